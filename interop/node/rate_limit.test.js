// The rate limit is reached, reported, and obeyed.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import OpenAI from 'openai';

import { MODEL, connect, variable } from './network.js';

const apiKey = variable('TETHER_LIMITED_KEY');
const oneToken = { model: MODEL, messages: [{ role: 'user', content: 'Hello' }], max_tokens: 1 };
// The limit that `interop/run` sets for this tenant.
const PER_MINUTE = 60;

/** Sends requests until the limit is reached, and returns the refusal. */
async function untilRefused() {
  const impatient = connect({ apiKey, maxRetries: 0 });
  // A token bucket that never empties would allow all of these.
  for (let asked = 0; asked < 20; asked++) {
    try {
      await impatient.chat.completions.create(oneToken);
    } catch (error) {
      assert.ok(error instanceof OpenAI.RateLimitError, String(error));
      return error;
    }
  }
  return assert.fail('the limit was never hit');
}

test('one request too many is refused', async () => {
  const error = await untilRefused();
  assert.equal(error.status, 429);
  assert.equal(error.code, 'rate_limit_exceeded');
  assert.equal(error.type, 'rate_limit_error');
  assert.equal(error.headers.get('retry-after'), '1');
  const wait = Number(error.headers.get('retry-after-ms'));
  assert.ok(wait > 0 && wait <= 60_000 / PER_MINUTE, `${wait} ms`);
  assert.equal(error.headers.get('x-ratelimit-limit-requests'), String(PER_MINUTE));
  assert.equal(error.headers.get('x-ratelimit-remaining-requests'), '0');
});

test('an SDK that waits as told is answered', async () => {
  await untilRefused();
  const statuses = [];
  const watching = connect({
    apiKey,
    fetch: async (...request) => {
      const answer = await fetch(...request);
      statuses.push(answer.status);
      return answer;
    },
  });
  const completion = await watching.chat.completions.create(oneToken);
  assert.equal(completion.choices[0].finish_reason, 'length');
  // The request was refused, and the returned wait was long enough.
  assert.deepEqual(statuses, [429, 200]);
});

test('one tenant does not slow another', async () => {
  await untilRefused();
  await connect({ maxRetries: 0 }).chat.completions.create(oneToken);
});
