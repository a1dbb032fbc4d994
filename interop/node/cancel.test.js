// A client that leaves its stream stops the engine.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { MODEL, apiKey, chat, counter, eventually, gather, messages, url } from './network.js';

const GENERATED = 'tether_generation_tokens_total';
const CANCELLED = 'tether_engine_cancelled_total';
const RUNNING = 'tether_worker_requests_running';
const long = { max_tokens: 400, ignore_eos: true };

test('a long answer that is read to its end is long', async () => {
  // Without this test, the next one could pass because there was nothing to cancel.
  const chunks = await gather(await chat({ ...long, stream: true, stream_options: { include_usage: true } }));
  assert.equal(chunks.at(-1).usage.completion_tokens, 400);
});

test('a stream that is left stops the engine', async () => {
  await eventually('the engines rest', async () => (await counter(RUNNING)) === 0);
  const [generated, cancelled] = [await counter(GENERATED), await counter(CANCELLED)];

  let chunks = 0;
  for await (const chunk of await chat({ ...long, stream: true })) {
    assert.ok(chunk.choices);
    chunks += 1;
    break;
  }
  assert.equal(chunks, 1);

  await eventually('the engine is told', async () => (await counter(CANCELLED)) === cancelled + 1);
  await eventually('the engine rests', async () => (await counter(RUNNING)) === 0);
  const after = await counter(GENERATED);
  // One decode step, and those until the cancel arrives. On a slow machine there are more, but never the rest of the answer.
  assert.ok(after > generated && after - generated < 200, `${after - generated} tokens`);

  // All tokens that are generated from here on belong to this answer.
  const own = (await chat()).usage.completion_tokens;
  await eventually('the answer is counted', async () => (await counter(GENERATED)) >= after + own);
  assert.equal(await counter(GENERATED), after + own);
});

test('many streams that are left leave no engine busy', async () => {
  // A cancel that a race occasionally loses occupies a slot for ever.
  const cancelled = await counter(CANCELLED);
  for (let left = 0; left < 30; left++) {
    const stream = await chat({ ...long, stream: true });
    await stream[Symbol.asyncIterator]().next();
    stream.controller.abort();
  }
  await eventually('the engines are told', async () => (await counter(CANCELLED)) === cancelled + 30);
  await eventually('the engines rest', async () => (await counter(RUNNING)) === 0);
});

test('an answer that is waited for no longer stops the engine', async () => {
  const begun = performance.now();
  await chat({ ...long, max_tokens: 450 });
  const halfway = (performance.now() - begun) / 2;

  const cancelled = await counter(CANCELLED);
  // On a busy machine, the answer may have ended by then, or not begun, but hardly every time.
  for (let asked = 0; asked < 5; asked++) {
    // Not by the SDK, which would ask again: its job goes on for a moment.
    const asking = fetch(`${url}/v1/chat/completions`, {
      method: 'POST',
      headers: { authorization: `Bearer ${apiKey}`, 'content-type': 'application/json' },
      body: JSON.stringify({ model: MODEL, messages, ...long, stream: false, max_tokens: 450 }),
      signal: AbortSignal.timeout(Math.ceil(halfway)),
    });
    await asking.catch((error) => assert.equal(error.name, 'TimeoutError'));
  }
  await eventually('the engine is told', async () => (await counter(CANCELLED)) > cancelled);
});
