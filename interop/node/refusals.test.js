// What clients get for requests that are refused.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import OpenAI from 'openai';

import { MODEL, apiKey, chat, client, connect, messages, url, variable } from './network.js';

/** Returns the error of a rejected promise, which must be of this class. */
async function refusal(kind, promise) {
  let caught;
  await assert.rejects(promise, (error) => {
    caught = error;
    return true;
  });
  assert.ok(caught instanceof kind, `${kind.name} was expected: ${caught}`);
  return caught;
}

const mistyped = apiKey.slice(0, -1) + (apiKey.endsWith('a') ? 'b' : 'a');
for (const [what, key] of Object.entries({
  'of another kind': 'sk-something',
  mistyped,
  'of another network': variable('TETHER_FOREIGN_KEY'),
})) {
  test(`a key that is ${what} is refused`, async () => {
    const error = await refusal(
      OpenAI.AuthenticationError,
      connect({ apiKey: key }).chat.completions.create({ model: MODEL, messages }),
    );
    assert.equal(error.status, 401);
    assert.equal(error.code, 'invalid_api_key');
    assert.equal(error.headers.get('www-authenticate'), 'Bearer');
    assert.ok(!error.message.includes(key), 'a key does not come back into logs');
  });
}

test('an unknown model is not found', async () => {
  for (const ask of [
    () => client.models.retrieve('gpt-nothing'),
    () => chat({ model: 'gpt-nothing' }),
    () => chat({ model: 'gpt-nothing', stream: true }),
    () => client.completions.create({ model: 'gpt-nothing', prompt: 'x' }),
  ]) {
    const error = await refusal(OpenAI.NotFoundError, ask());
    assert.equal(error.code, 'model_not_found');
    assert.equal(error.param, 'model');
  }
});

for (const stream of [false, true]) {
  test(`too long a prompt is refused, stream: ${stream}`, async () => {
    const long = [{ role: 'user', content: 'What is the capital of Japan? '.repeat(200) }];
    const error = await refusal(OpenAI.BadRequestError, chat({ messages: long, stream }));
    assert.equal(error.code, 'context_length_exceeded');
    assert.equal(error.type, 'invalid_request_error');
  });
}

test('an oversized body is refused', async () => {
  const large = [{ role: 'user', content: 'x'.repeat(9 << 20) }];
  const error = await refusal(OpenAI.APIError, chat({ messages: large }));
  assert.equal(error.status, 413, String(error));
  assert.equal(error.code, 'request_too_large');
});

test('bad JSON is refused', async () => {
  // The SDK cannot send any.
  const answer = await fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { Authorization: `Bearer ${apiKey}`, 'Content-Type': 'application/json' },
    body: '{"model":"tether-tiny","messages":[',
  });
  assert.equal(answer.status, 400);
  const { error } = await answer.json();
  assert.equal(error.code, 'invalid_json');
  assert.equal(error.type, 'invalid_request_error');
});

for (const [param, value] of Object.entries({
  modalities: ['text', 'audio'],
  audio: { format: 'wav', voice: 'alloy' },
})) {
  test(`what is not done here is refused and named: ${param}`, async () => {
    const error = await refusal(OpenAI.BadRequestError, chat({ [param]: value }));
    assert.equal(error.code, 'unsupported_parameter');
    assert.equal(error.param, param);
  });
}

test('what newer clients always send is passed over', async () => {
  const answer = await chat({ verbosity: 'low', max_tokens: 1 });
  assert.equal(answer.object, 'chat.completion');
});

for (const [param, value] of Object.entries({ temperature: 9, max_tokens: 0, messages: [], stop: 5 })) {
  test(`a value out of range is refused and named: ${param}`, async () => {
    const error = await refusal(OpenAI.BadRequestError, chat({ [param]: value }));
    assert.equal(error.code, 'invalid_value');
    assert.equal(error.param, param);
  });
}
