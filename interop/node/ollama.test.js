// Ollama's own client for Node.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Ollama } from 'ollama';
import { ANSWER, MODEL, QUESTION, apiKey, messages, url } from './network.js';

const client = new Ollama({ host: url, headers: { Authorization: `Bearer ${apiKey}` } });
const options = { temperature: 0 };

test('a conversation is answered, whole and streamed', async () => {
  const whole = await client.chat({ model: MODEL, messages, options });
  assert.equal(whole.message.content, ANSWER);
  assert.equal(whole.done_reason, 'stop');
  let text = '';
  for await (const part of await client.chat({ model: MODEL, messages, options, stream: true })) {
    text += part.message.content;
  }
  assert.equal(text, ANSWER);
});

test('a text is answered', async () => {
  const { response } = await client.generate({ model: MODEL, prompt: QUESTION, options });
  assert.equal(response, ANSWER);
});

test('a stream that is aborted ends', async () => {
  const stream = await client.chat({
    model: MODEL,
    messages,
    stream: true,
    options: { ...options, num_predict: 400, stop: [] },
  });
  let parts = 0;
  await assert.rejects(async () => {
    for await (const _ of stream) {
      parts += 1;
      stream.abort();
    }
  }, /abort/i);
  assert.ok(parts > 0);
});

test('vectors, lists and errors', async () => {
  const { embeddings } = await client.embed({ model: MODEL, input: ['one', 'two'] });
  assert.equal(embeddings.length, 2);
  const { models } = await client.list();
  assert.ok(models.some(({ name }) => name === `${MODEL}:latest`));
  const shown = await client.show({ model: MODEL });
  assert.ok(shown.capabilities.includes('completion'));
  await assert.rejects(client.chat({ model: 'absent', messages }), /absent/);
});
