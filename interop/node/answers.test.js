// What clients get for valid requests.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { ANSWER, MODEL, chat, client, gather, messages, textOf } from './network.js';

test('the models are listed', async () => {
  const models = await gather(client.models.list());
  assert.deepEqual(models.map((model) => model.id), [MODEL, `${MODEL}:pirate`]);
  assert.equal(models[0].object, 'model');
  assert.equal(models[0].owned_by, 'tether');
  assert.ok(models[0].created > 0);
});

test('a model is described', async () => {
  const model = await client.models.retrieve(MODEL);
  assert.equal(model.id, MODEL);
  // Our additions to OpenAI's fields.
  assert.equal(model.state, 'ready');
  assert.equal(model.context_length, 512);
});

test('a question is answered', async () => {
  const completion = await chat();
  assert.equal(completion.object, 'chat.completion');
  assert.match(completion.id, /^chatcmpl-/);
  assert.equal(completion.model, MODEL);
  assert.equal(completion.choices.length, 1);
  const [choice] = completion.choices;
  assert.equal(choice.message.role, 'assistant');
  assert.equal(choice.message.content, ANSWER);
  assert.equal(choice.finish_reason, 'stop');
  assert.ok(completion._request_id);
});

test('usage is told', async () => {
  const { usage } = await chat();
  assert.ok(usage.prompt_tokens > 0);
  assert.ok(usage.completion_tokens > 0);
  assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
});

test('the fingerprint is of the model', async () => {
  const { digest } = await client.models.retrieve(MODEL);
  assert.equal((await chat()).system_fingerprint, `fp_${digest.slice(0, 12)}`);
});

test('a streamed answer is the same', async () => {
  const chunks = await gather(await chat({ stream: true }));
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
  assert.equal(chunks[0].object, 'chat.completion.chunk');
  assert.equal(chunks[0].choices[0].delta.role, 'assistant');
  assert.equal(textOf(chunks), ANSWER);
  const reasons = chunks.map((chunk) => chunk.choices[0].finish_reason);
  assert.deepEqual(reasons, [...Array(chunks.length - 1).fill(null), 'stop']);
  assert.ok(chunks.every((chunk) => chunk.usage == null), 'usage was not asked for');
});

test('a long answer comes in many pieces', async () => {
  // The number of tokens in a piece depends on how fast it is read.
  const story = [{ role: 'user', content: 'Tell me a story' }];
  assert.ok((await gather(await chat({ messages: story, stream: true }))).length > 5);
});

test('a streamed answer ends with its usage where asked', async () => {
  const chunks = await gather(await chat({ stream: true, stream_options: { include_usage: true } }));
  const last = chunks.pop();
  assert.deepEqual(last.choices, []);
  assert.deepEqual(last.usage, (await chat()).usage);
  assert.ok(chunks.every((chunk) => chunk.usage == null));
});

test('the SDK gathers a stream', async () => {
  const completion = await client.chat.completions
    .stream({ model: MODEL, messages, temperature: 0 })
    .finalChatCompletion();
  assert.equal(completion.choices[0].message.content, ANSWER);
  assert.equal(completion.choices[0].finish_reason, 'stop');
});

test('a conversation goes on', async () => {
  const completion = await chat({
    messages: [
      { role: 'system', content: 'You are a helpful assistant.' },
      { role: 'user', content: 'Hello' },
      { role: 'assistant', content: 'Hello! How can I help you?' },
      { role: 'user', content: [{ type: 'text', text: 'What is the capital ' }, { type: 'text', text: 'of Japan?' }] },
    ],
  });
  assert.match(completion.choices[0].message.content, /Tokyo/);
});

test('a text is continued', async () => {
  const completion = await client.completions.create({ model: MODEL, prompt: 'The capital of Japan', temperature: 0 });
  assert.equal(completion.object, 'text_completion');
  assert.equal(completion.choices[0].text, ' is Tokyo.');
  assert.equal(completion.choices[0].finish_reason, 'stop');
  assert.equal(completion.usage.total_tokens, completion.usage.prompt_tokens + completion.usage.completion_tokens);
  assert.match(completion.system_fingerprint, /^fp_/);
});

test('a text is continued piece by piece', async () => {
  const stream = await client.completions.create({
    model: MODEL,
    prompt: 'The capital of Japan',
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  });
  const chunks = await gather(stream);
  const last = chunks.pop();
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(''), ' is Tokyo.');
  assert.equal(chunks.at(-1).choices[0].finish_reason, 'stop');
  assert.deepEqual(last.choices, []);
  assert.ok(last.usage.total_tokens > 0);
});

for (const limit of ['max_tokens', 'max_completion_tokens']) {
  test(`a limit of tokens ends an answer: ${limit}`, async () => {
    const completion = await chat({ [limit]: 3 });
    assert.equal(completion.choices[0].finish_reason, 'length');
    assert.equal(completion.usage.completion_tokens, 3);
    const text = completion.choices[0].message.content;
    assert.ok(text && text !== ANSWER && ANSWER.startsWith(text), text);
    const chunks = await gather(await chat({ [limit]: 3, stream: true }));
    assert.equal(chunks.at(-1).choices[0].finish_reason, 'length');
  });
}

for (const [stop, expected] of [
  [' Tokyo', 'The capital of Japan is'],
  [['nowhere', 'kyo'], 'The capital of Japan is To'],
]) {
  test(`a stop text ends an answer and is left out: ${stop}`, async () => {
    const whole = await chat({ stop });
    assert.equal(whole.choices[0].message.content, expected);
    assert.equal(whole.choices[0].finish_reason, 'stop');
    // If a stop sequence begins in one piece and ends in another, no part of it may be returned.
    assert.equal(textOf(await gather(await chat({ stop, stream: true }))), expected);
  });
}

test('a seed repeats an answer', async () => {
  const told = async (seed) => {
    const story = [{ role: 'user', content: 'Tell me a story' }];
    const completion = await chat({ messages: story, temperature: 1, seed, max_tokens: 24 });
    return completion.choices[0].message.content;
  };
  const repeats = [await told(7), await told(7), await told(7), await told(7)];
  assert.equal(new Set(repeats).size, 1);
  const others = [await told(0), await told(1), await told(2), await told(3), await told(4)];
  assert.ok(new Set(others).size > 1, 'the seed or the temperature changes nothing');
});

test('many questions at once are each answered', async () => {
  const completions = await Promise.all(Array.from({ length: 16 }, () => chat()));
  assert.deepEqual(new Set(completions.map((completion) => completion.choices[0].message.content)), new Set([ANSWER]));
  assert.equal(new Set(completions.map((completion) => completion.id)).size, 16);
});
