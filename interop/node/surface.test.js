// Request parameters other than the text. No test depends on the content of the answer.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { MODEL, chat, client, gather, messages } from './network.js';

const weather = {
  type: 'function',
  function: {
    name: 'weather',
    parameters: {
      type: 'object',
      properties: { city: { type: 'string', enum: ['Tokyo', 'Kyoto'] } },
      required: ['city'],
      additionalProperties: false,
    },
  },
};

/** Returns why the model does not support function calls, if it does not. */
async function callsNone() {
  try {
    await chat({ tools: [weather], max_tokens: 1 });
    return false;
  } catch (error) {
    assert.deepEqual([error.code, error.param], ['unsupported_parameter', 'tools']);
    return error.message;
  }
}
const skip = await callsNone();

test('several answers are told apart', async () => {
  const completion = await chat({ n: 3, temperature: 1, max_tokens: 8 });
  assert.deepEqual(completion.choices.map((choice) => choice.index), [0, 1, 2]);
  assert.ok(completion.choices.every((choice) => choice.message.content && choice.finish_reason));
});

test('several streamed answers end once each', async () => {
  const chunks = await gather(await chat({ n: 3, temperature: 1, max_tokens: 8, stream: true }));
  const ends = chunks.flatMap((chunk) => chunk.choices).filter((choice) => choice.finish_reason);
  assert.deepEqual(ends.map((choice) => choice.index).sort(), [0, 1, 2]);
});

test('log-probabilities are told', async () => {
  const { logprobs } = (await chat({ logprobs: true, top_logprobs: 2, max_tokens: 3 })).choices[0];
  assert.equal(logprobs.content.length, 3);
  assert.ok(logprobs.content.every((token) => token.logprob <= 0 && token.top_logprobs.length === 2));
});

test('a function that must be called is called', { skip }, async () => {
  const { choices } = await chat({ tools: [weather], tool_choice: 'required' });
  assert.equal(choices[0].finish_reason, 'tool_calls');
  const [call] = choices[0].message.tool_calls;
  assert.equal(call.function.name, 'weather');
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ['city']);
});

test('the SDK gathers a streamed call', { skip }, async () => {
  const tool_choice = { type: 'function', function: { name: 'weather' } };
  const completion = await client.chat.completions
    .stream({ model: MODEL, messages, tools: [weather], tool_choice })
    .finalChatCompletion();
  const [call] = completion.choices[0].message.tool_calls;
  assert.ok(call.id);
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ['city']);
});

test('an answer keeps to a schema', async () => {
  // Without the last part, a weak model may generate further properties until its context is full.
  const properties = { answer: { enum: ['yes', 'no'] } };
  const schema = { type: 'object', properties, required: ['answer'], additionalProperties: false };
  const response_format = { type: 'json_schema', json_schema: { name: 'verdict', strict: true, schema } };
  const { choices } = await chat({ response_format });
  assert.match(JSON.parse(choices[0].message.content).answer, /^(yes|no)$/);
});

test('texts become vectors of length one', async () => {
  // By default, the SDK requests Base64 and decodes it.
  const input = ['a cat', 'a dog'];
  const packed = await client.embeddings.create({ model: MODEL, input });
  assert.deepEqual(packed.data.map((item) => item.index), [0, 1]);
  const squares = packed.data[0].embedding.reduce((sum, number) => sum + number ** 2, 0);
  assert.ok(Math.abs(squares - 1) < 1e-3, `${squares}`);
  const plain = await client.embeddings.create({ model: MODEL, input, encoding_format: 'float' });
  assert.equal(plain.data[1].embedding.length, packed.data[1].embedding.length);
});
