// A turn of the AI SDK, `node turn.js URL KEY API`: asks a question that needs a function, and prints the answer.
// Nothing is tried again.

import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';

const [url, apiKey, api] = process.argv.slice(2);
const MODEL = 'tether-tiny';
const baseURL = `${url}/v1`;
const model = {
  responses: () => createOpenAI({ baseURL, apiKey })(MODEL),
  chat: () => createOpenAI({ baseURL, apiKey }).chat(MODEL),
  messages: () => createAnthropic({ baseURL, apiKey })(MODEL),
  compatible: () => createOpenAICompatible({ name: 'tether', baseURL, apiKey })(MODEL),
}[api]();
const add = tool({
  description: 'Adds two numbers.',
  inputSchema: z.object({ a: z.number(), b: z.number() }),
  execute: ({ a, b }) => a + b,
});

const result = streamText({
  model,
  tools: { add },
  stopWhen: stepCountIs(3),
  prompt: 'What is add(2, 3)?',
  maxRetries: 0,
  maxOutputTokens: 4096,
  onError: ({ error }) => {
    console.error(error);
    process.exitCode = 1;
  },
});
await result.consumeStream();
const [called] = await result.steps;
if (called.toolResults[0]?.output !== 5) {
  console.error('the function was not called', called.content);
  process.exitCode = 1;
}
console.log(await result.text);
