// The network under test, as `interop/run` started it.

import OpenAI from 'openai';

export const MODEL = 'tether-tiny';
export const QUESTION = 'What is the capital of Japan?';
export const ANSWER = 'The capital of Japan is Tokyo.';
export const messages = [{ role: 'user', content: QUESTION }];

export function variable(name) {
  const value = process.env[name];
  if (!value) {
    throw new Error(`${name} is missing: start the tests by interop/run`);
  }
  return value;
}

export const url = variable('TETHER_URL');
export const apiKey = variable('TETHER_API_KEY');

/** Makes an SDK client. Only its address and key are set, unless a test sets more. */
export function connect(options = {}) {
  return new OpenAI({ baseURL: `${url}/v1`, apiKey, ...options });
}

export const client = connect();

/** Asks one question, greedily unless a test sets otherwise. */
export function chat(options = {}, more = {}) {
  return client.chat.completions.create({ model: MODEL, messages, temperature: 0, ...options }, more);
}

export async function gather(stream) {
  const chunks = [];
  for await (const chunk of stream) {
    chunks.push(chunk);
  }
  return chunks;
}

export const textOf = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('');

/** Returns the sum of a metric over its labels. A metric that never changed is absent, and counts as 0. */
export async function counter(name) {
  const text = await (await fetch(`${url}/metrics`)).text();
  return text
    .split('\n')
    .filter((line) => line.startsWith(`${name}{`) || line.startsWith(`${name} `))
    .reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(' ') + 1)), 0);
}

/** Waits until the condition is true. */
export async function eventually(what, condition, seconds = 20) {
  const deadline = performance.now() + seconds * 1000;
  while (!(await condition())) {
    if (performance.now() >= deadline) {
      throw new Error(`not within ${seconds} s: ${what}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
