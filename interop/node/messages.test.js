// The Messages API, by Anthropic's SDK.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import Anthropic from '@anthropic-ai/sdk';

import { MODEL as OURS, QUESTION, apiKey, eventually, counter, gather, url } from './network.js';

const MODEL = process.env.TETHER_MESSAGES_MODEL ?? OURS;
const messages = [{ role: 'user', content: QUESTION }];
const asked = { model: MODEL, max_tokens: 64, temperature: 0, messages };
const weather = {
  name: 'weather',
  input_schema: {
    type: 'object',
    properties: { city: { type: 'string', enum: ['Tokyo', 'Kyoto'] } },
    required: ['city'],
    additionalProperties: false,
  },
};

function connect(options = {}) {
  return new Anthropic({ baseURL: url, apiKey, ...options });
}
const client = connect();

/** Returns why the model does not support tools, if it does not. */
async function callsNone() {
  try {
    await client.messages.create({ ...asked, max_tokens: 1, tools: [weather] });
    return false;
  } catch (error) {
    assert.ok(error instanceof Anthropic.BadRequestError && error.message.includes('tools'));
    return error.message;
  }
}
const skip = await callsNone();

const textOf = ({ content }) => content.map((block) => block.text ?? '').join('');

test('a question is answered', async () => {
  const message = await client.messages.create(asked);
  assert.deepEqual([message.type, message.role, message.model], ['message', 'assistant', MODEL]);
  assert.ok(textOf(message) && message._request_id);
  assert.ok(message.usage.output_tokens > 0);
});

test('a streamed answer is the same', async () => {
  const whole = await client.messages.create(asked);
  const stream = client.messages.stream(asked);
  let pieces = '';
  stream.on('text', (text) => (pieces += text));
  const streamed = await stream.finalMessage();
  assert.equal(pieces, textOf(whole));
  assert.equal(textOf(streamed), textOf(whole));
  assert.equal(streamed.stop_reason, whole.stop_reason);
});

test('events come in their order', async () => {
  const types = (await gather(await client.messages.create({ ...asked, stream: true }))).map((event) => event.type);
  assert.deepEqual(types.slice(0, 2), ['message_start', 'content_block_start']);
  assert.deepEqual(types.slice(-3), ['content_block_stop', 'message_delta', 'message_stop']);
});

test('a stop sequence ends the answer and is named', async () => {
  const answer = textOf(await client.messages.create(asked));
  const stop = answer.slice(4, 9);
  const message = await client.messages.create({ ...asked, stop_sequences: [stop] });
  assert.deepEqual([message.stop_reason, message.stop_sequence], ['stop_sequence', stop]);
});

test('tokens are counted', async () => {
  const { input_tokens } = await client.messages.countTokens({ model: MODEL, messages });
  assert.ok(input_tokens > 0);
});

test('an answer that was begun is continued', async () => {
  const begun = { role: 'assistant', content: 'The capital of Japan' };
  const message = await client.messages.create({ ...asked, messages: [...messages, begun] });
  assert.ok(!textOf(message).startsWith(begun.content));
});

test('the SDK gathers a streamed call', { skip }, async () => {
  const stream = client.messages.stream({ ...asked, tools: [weather], tool_choice: { type: 'any' } });
  const message = await stream.finalMessage();
  assert.equal(message.stop_reason, 'tool_use');
  const [call] = message.content.filter((block) => block.type === 'tool_use');
  assert.deepEqual([call.name, Object.keys(call.input)], ['weather', ['city']]);
});

test('the models are listed and described', async () => {
  const models = await gather(client.models.list());
  assert.ok(models.some((model) => model.id === MODEL));
  assert.equal((await client.models.retrieve(MODEL)).type, 'model');
});

test('each refusal is the exception of its kind', async () => {
  const refuses = (ask, kind) => assert.rejects(ask, (error) => error instanceof kind && error.error.type === 'error');
  await refuses(connect({ apiKey: 'sk-ant-something' }).messages.create(asked), Anthropic.AuthenticationError);
  await refuses(client.messages.create({ ...asked, model: 'claude-nothing' }), Anthropic.NotFoundError);
  await refuses(client.messages.create({ ...asked, max_tokens: 0 }), Anthropic.BadRequestError);
  await refuses(client.messages.create({ ...asked, messages: [] }), Anthropic.BadRequestError);
});

test('a stream that is left stops the engine', async () => {
  const cancelled = await counter('tether_engine_cancelled_total');
  for (let left = 0; left < 5; left++) {
    const stream = await client.messages.create({ ...asked, max_tokens: 400, stream: true });
    await stream[Symbol.asyncIterator]().next();
    stream.controller.abort();
  }
  await eventually('the engines rest', async () => (await counter('tether_worker_requests_running')) === 0);
  assert.ok((await counter('tether_engine_cancelled_total')) > cancelled);
});
