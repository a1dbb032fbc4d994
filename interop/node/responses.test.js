// The Responses API. No test depends on the content of the answer.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import OpenAI from 'openai';

import { MODEL, QUESTION, client, eventually, gather } from './network.js';

const respond = (options = {}) => client.responses.create({ model: MODEL, input: QUESTION, temperature: 0, ...options });

test('a question is answered', async () => {
  const response = await respond();
  assert.equal(response.status, 'completed');
  assert.ok(response.output_text);
});

test('a stream is gathered by the SDK', async () => {
  const stream = client.responses.stream({ model: MODEL, input: QUESTION, temperature: 0 });
  const events = await gather(stream);
  assert.deepEqual(events.map((event) => event.sequence_number), events.map((_, index) => index));
  assert.equal((await stream.finalResponse()).output_text, (await respond()).output_text);
});

test('a stored response is read, continued and deleted', async () => {
  const first = await respond();
  assert.equal((await client.responses.retrieve(first.id)).output_text, first.output_text);
  const second = await respond({ input: 'And of France?', previous_response_id: first.id });
  const items = await gather(client.responses.inputItems.list(second.id, { order: 'asc' }));
  assert.deepEqual(items.map((item) => item.role), ['user', 'assistant', 'user']);
  await client.responses.delete(first.id);
  await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
});

test('a background response is generated without its client, and its stream is read again', async () => {
  const response = await respond({ background: true });
  let ended;
  await eventually('it ends', async () => {
    ended = await client.responses.retrieve(response.id);
    return !['queued', 'in_progress'].includes(ended.status);
  });
  assert.equal(ended.status, 'completed');
  const events = await gather(await client.responses.retrieve(response.id, { stream: true, starting_after: 1 }));
  assert.equal(events[0].sequence_number, 2);
  assert.deepEqual(events.at(-1).response.output, ended.output);
});
