// The AI SDK by its providers, of which OpenAI's uses the Responses API by default. The network's engines are mocks,
// which call a function that a question writes out.

import assert from 'node:assert/strict';
import { describe, test } from 'node:test';

import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';

const MODEL = 'tether-tiny';
const { TETHER_URL: url, TETHER_API_KEY: apiKey } = process.env;
if (!url) {
  throw new Error('TETHER_URL is missing: start the tests by interop/run');
}

const baseURL = `${url}/v1`;
const openai = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({
  name: 'tether',
  baseURL,
  apiKey,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const MODELS = {
  'Responses, the default': openai(MODEL),
  'Chat Completions': openai.chat(MODEL),
  Messages: createAnthropic({ baseURL, apiKey })(MODEL),
  'OpenAI-compatible': compatible(MODEL),
};

/** Returns the options of a question that needs the function `add`, and the calls of this function. */
function adding(model) {
  const calls = [];
  const add = tool({
    description: 'Adds two numbers.',
    inputSchema: z.object({ a: z.number(), b: z.number() }),
    execute: ({ a, b }) => {
      calls.push([a, b]);
      return a + b;
    },
  });
  const prompt = 'What is add(2, 3)?';
  const options = { model, tools: { add }, stopWhen: stepCountIs(3), maxRetries: 0, maxOutputTokens: 256, prompt };
  return { options, calls };
}

for (const [name, model] of Object.entries(MODELS)) {
  describe(name, () => {
    test('a function is called and its result is read', async () => {
      const { options, calls } = adding(model);
      const result = await generateText(options);
      assert.deepEqual(calls, [[2, 3]]);
      assert.deepEqual(result.steps.map((step) => step.finishReason), ['tool-calls', 'stop']);
      assert.ok(result.text && result.totalUsage.outputTokens > 0);
      assert.deepEqual(result.warnings ?? [], []);
    });

    test('a stream ends with the same answer', async () => {
      const { options, calls } = adding(model);
      const errors = [];
      const result = streamText({ ...options, onError: ({ error }) => errors.push(error) });
      let text = '';
      for await (const part of result.textStream) {
        text += part;
      }
      assert.deepEqual(errors, []);
      assert.deepEqual(calls, [[2, 3]]);
      assert.equal(text, (await generateText(options)).text);
      assert.ok((await result.totalUsage).outputTokens > 0);
    });

    test('an answer follows a schema', async () => {
      const output = Output.object({ schema: z.object({ holds: z.boolean() }) });
      const result = await generateText({ model, output, prompt: 'Is it so?', maxRetries: 0 });
      assert.deepEqual(result.output, { holds: false });
    });

    test('a conversation goes on', async () => {
      const { options } = adding(model);
      const { prompt, ...rest } = options;
      const asked = [{ role: 'user', content: prompt }];
      const { response } = await generateText({ ...rest, messages: asked });
      const messages = [...asked, ...response.messages, { role: 'user', content: 'Thanks.' }];
      assert.ok((await generateText({ ...rest, messages })).text);
    });

    test('a client that leaves gets no error but its own', async () => {
      const abort = new AbortController();
      const { textStream } = streamText({
        model,
        prompt: 'hi',
        maxRetries: 0,
        abortSignal: abort.signal,
        onError: ({ error }) => assert.fail(error),
      });
      for await (const _ of textStream) {
        abort.abort();
      }
      assert.ok(abort.signal.aborted);
    });
  });
}

test('vectors are answered', async () => {
  for (const model of [openai.embedding(MODEL), compatible.embeddingModel(MODEL)]) {
    const { embeddings, usage } = await embedMany({ model, values: ['a', 'b', 'a'], maxRetries: 0 });
    assert.equal(embeddings.length, 3);
    assert.deepEqual(embeddings[0], embeddings[2]);
    assert.ok(usage.tokens > 0);
  }
});
