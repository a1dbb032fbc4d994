// Files and batches. No test depends on the content of an answer.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import OpenAI, { toFile } from 'openai';

import { MODEL, client, eventually } from './network.js';

const line = (number) => ({
  custom_id: `line-${number}`,
  method: 'POST',
  url: '/v1/chat/completions',
  body: { model: MODEL, messages: [{ role: 'user', content: `What is ${number}?` }], max_tokens: 8 },
});

const upload = async (lines) => {
  const text = lines.map((each) => `${JSON.stringify(each)}\n`).join('');
  return client.files.create({ file: await toFile(Buffer.from(text), 'requests.jsonl'), purpose: 'batch' });
};

test('a batch answers each of its lines', async () => {
  const file = await upload([1, 2, 3].map(line));
  const begun = await client.batches.create({
    input_file_id: file.id, endpoint: '/v1/chat/completions', completion_window: '24h',
  });
  let batch;
  await eventually('it ends', async () => {
    batch = await client.batches.retrieve(begun.id);
    return ['completed', 'failed', 'expired', 'cancelled'].includes(batch.status);
  });
  assert.equal(batch.status, 'completed');
  const text = await (await client.files.content(batch.output_file_id)).text();
  const answers = text.trim().split('\n').map((each) => JSON.parse(each));
  assert.deepEqual(answers.map((answer) => answer.custom_id), ['line-1', 'line-2', 'line-3']);
  assert.ok(answers.every((answer) => answer.response.status_code === 200));
});

test('a file is read and deleted', async () => {
  const file = await upload([line(1)]);
  assert.deepEqual(JSON.parse(await (await client.files.content(file.id)).text()), line(1));
  assert.equal((await client.files.delete(file.id)).deleted, true);
  await assert.rejects(client.files.retrieve(file.id), OpenAI.NotFoundError);
});
