// `clients/js` with a network of processes, by public key and without HTTP.

import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { createRequire } from 'node:module';
import net from 'node:net';
import { after, before, test } from 'node:test';
import { setTimeout as soon } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import { Network, eventually } from './network.js';

const require = createRequire(new URL('../../clients/js/index.js', import.meta.url));
const { TetherClient, TetherError } = require('.');
const DHT = require('hyperdht');
const RPC = require('@hyperswarm/rpc');

const MODEL = 'tether-tiny';
const messages = [{ role: 'user', content: 'What is the capital of Japan?' }];
const question = { modelId: MODEL, input: { messages, temperature: 0 } };
const long = { modelId: MODEL, input: { prompt: 'Once', maxTokens: 400, ignoreEos: true } };

let network;
let client;

before(async () => {
  network = await Network.start();
  client = connect();
});

after(async () => {
  await client?.close();
  if (network) assert.deepEqual(await network.stop(), [], 'every process ends well when it is asked to');
});

function connect(options = {}) {
  const { gateway, token, bootstrap } = network;
  return new TetherClient({ gateway, token, bootstrap: [bootstrap], ...options });
}

async function gather(chunks) {
  const all = [];
  for await (const chunk of chunks) all.push(chunk);
  return all;
}

const textOf = (chunks) => chunks.map((chunk) => chunk.payload.text ?? '').join('');

/** Runs code in a process that cannot open TCP connections. */
async function withoutTcp(work) {
  const { connect: original } = net.Socket.prototype;
  net.Socket.prototype.connect = () => {
    throw new Error('a TCP connection');
  };
  try {
    return await work();
  } finally {
    net.Socket.prototype.connect = original;
  }
}

const until = (what, so) => eventually(what, so, 10_000);
const rests = async () => {
  const workers = await network.workers();
  return workers.length === 1 && workers.every(({ report, reserved }) => report.capacity.running + reserved === 0);
};

test('an answer is streamed by public key, token by token, and nothing goes by HTTP', async () => {
  const chunks = await withoutTcp(() => gather(client.submit(question)));
  assert.match(textOf(chunks), /Tokyo/);
  assert.ok(chunks.length >= 2, `${chunks.length} chunks`);
  assert.deepEqual(chunks.map((chunk) => chunk.seq), chunks.map((_, index) => index));
  assert.deepEqual(chunks.map((chunk) => chunk.done), chunks.map((_, index) => index === chunks.length - 1));
  assert.equal(new Set(chunks.map((chunk) => chunk.correlationId)).size, 1);
  const { usage, finishReason } = chunks.at(-1).payload;
  assert.equal(finishReason, 'stop');
  assert.ok(usage.completionTokens >= 5 && usage.promptTokens > 5);
});

test('the first token comes before the last is made', async () => {
  const times = [];
  let usage;
  for await (const { payload } of client.submit(long)) {
    times.push(performance.now());
    usage = payload.usage;
  }
  assert.equal(usage.completionTokens, 400);
  assert.ok(times.length > 50, `${times.length} chunks`);
  const spread = times.at(-1) - times[0];
  assert.ok(spread > 20, `${spread} ms between the first and the last of 400 tokens`);
});

test('a chat in the words of OpenAI is answered like a submission in our own', async () => {
  const chunks = await gather(client.chat({ model: MODEL, messages, temperature: 0 }));
  assert.equal(textOf(chunks), textOf(await gather(client.submit(question))));
});

test('a whole answer and the list of models are plain requests', async () => {
  const answer = await withoutTcp(() => client.ask(question));
  assert.match(answer.text, /Tokyo/);
  assert.equal(answer.modelId, MODEL);
  assert.ok(answer.usage.completionTokens >= 5);
  const models = await client.models();
  assert.ok(models.data.some((model) => model.id === MODEL));
});

test('the calls of a client share one connection and do not wait for each other', async () => {
  const answers = await Promise.all(Array.from({ length: 8 }, () => client.ask(question)));
  assert.ok(answers.every((answer) => answer.text.includes('Tokyo')));
  // A short answer overtakes a long one of the same connection.
  const slow = client.submit(long);
  await slow.next();
  const ends = [];
  await Promise.all([
    gather(slow).then(() => ends.push('long')),
    client.models().then(() => ends.push('short')),
  ]);
  assert.deepEqual(ends, ['short', 'long']);
});

test('a request of many frames arrives whole', async () => {
  // Too long for the model. The worker that read all of it returns the error.
  const prompt = 'word '.repeat(60_000);
  await assert.rejects(gather(client.submit({ modelId: MODEL, input: { prompt } })), (error) => {
    assert.ok(error instanceof TetherError);
    assert.equal(error.code, 'context_length_exceeded', error.message);
    return true;
  });
  await client.models();
});

test('what is refused is an error with its code', async () => {
  const wrong = connect({ token: `${network.token.slice(0, -1)}${network.token.endsWith('A') ? 'B' : 'A'}` });
  const code = (expected) => (error) => {
    assert.ok(error instanceof TetherError, String(error));
    assert.equal(error.code, expected, error.message);
    return true;
  };
  await assert.rejects(gather(wrong.submit(question)), code('invalid_api_key'));
  await assert.rejects(wrong.ask(question), code('invalid_api_key'));
  await assert.rejects(wrong.models(), code('invalid_api_key'));
  await wrong.close();
  await assert.rejects(gather(client.submit({ ...question, modelId: 'nothing' })), code('model_not_found'));
  await assert.rejects(client.ask({ ...question, modelId: 'nothing' }), code('model_not_found'));
  await assert.rejects(gather(client.submit({ modelId: MODEL })), (error) => error instanceof TetherError);
  await assert.rejects(client.call('infer.nothing', {}), code('unknown_method'));
});

test('leaving the loop frees the worker, every time', async () => {
  await until('the worker rests', rests);
  for (let left = 0; left < 12; left++) {
    for await (const chunk of client.submit(long)) {
      assert.equal(chunk.seq, 0);
      break;
    }
  }
  await until('the worker rests again', rests);
});

test('a deadline ends the wait for an answer', async () => {
  await assert.rejects(gather(client.submit(long, { deadlineMs: 30 })), (error) => {
    assert.equal(error.code, 'deadline_exceeded', error.message);
    return true;
  });
  await until('the worker rests', rests);
});

test('a bare client of @hyperswarm/rpc asks with JSON', async () => {
  const [host, port] = network.bootstrap.split(':');
  const dht = new DHT({ bootstrap: [{ host, port: Number(port) }], ephemeral: true });
  const rpc = new RPC({ dht });
  const gateway = Buffer.from(network.gateway, 'hex');
  const ask = async (method, value) => JSON.parse(await rpc.request(gateway, method, Buffer.from(JSON.stringify(value))));
  try {
    const { token } = network;
    assert.equal((await ask('infer.models', { token })).data[0].id, MODEL);
    assert.match((await ask('infer.submit', { token, request: question })).text, /Tokyo/);
    const chat = await ask('infer.submit', { token, chat: { model: MODEL, messages, temperature: 0 } });
    assert.match(chat.choices[0].message.content, /Tokyo/);
    await assert.rejects(ask('infer.models', { token: 'x' }), (error) => {
      assert.equal(error.cause?.code ?? error.code, 'invalid_api_key');
      return true;
    });
  } finally {
    await rpc.destroy();
    await dht.destroy();
  }
});

test('the command of the client prints an answer', async () => {
  const ask = fileURLToPath(new URL('../../clients/js/ask.js', import.meta.url));
  const args = [ask, '--gateway', network.gateway, '--bootstrap', network.bootstrap, messages[0].content];
  const run = (token) => promisify(execFile)(process.execPath, args, { env: { TETHER_API_KEY: token }, timeout: 15_000 });
  assert.match((await run(network.token)).stdout, /\w+/);
  await assert.rejects(run('x'), (error) => error.code === 1 && error.stderr.startsWith('ask: '));
});

test('a gateway that nobody knows is an error soon', async () => {
  const lost = connect({ gateway: 'ab'.repeat(32) });
  const begun = performance.now();
  await assert.rejects(lost.models(), TetherError);
  assert.ok(performance.now() - begun < 12_000);
  await lost.close();
});

for (const [signal, within] of [['SIGTERM', 2_000], ['SIGKILL', 30_000]]) {
  test(`a connection that is lost is an error, and the next call makes another (${signal})`, async () => {
    const answers = client.submit(long);
    await answers.next();
    const begun = performance.now();
    const stopping = network.nodes.get('gateway').stop(signal);
    // A gateway that is stopped finishes the answers that it has begun, within its drain time.
    const outcome = await gather(answers).then(() => null, (error) => error);
    if (signal === 'SIGKILL') {
      assert.ok(outcome instanceof TetherError, String(outcome));
      assert.equal(outcome.code, 'unavailable', outcome.message);
    }
    await stopping;
    const lost = performance.now() - begun;
    assert.ok(lost < within, `${lost} ms`);
    await network.restartGateway();
    const again = performance.now();
    assert.match((await retried(() => client.ask(question))).text, /Tokyo/);
    process.stdout.write(`# ${signal}: lost after ${lost.toFixed()} ms, back after ${(performance.now() - again).toFixed()} ms\n`);
  });
}

/** Retries while the gateway's error says that it has not found its network yet. */
async function retried(ask) {
  for (let tries = 0; ; tries++) {
    try {
      return await ask();
    } catch (error) {
      if (tries === 20 || error.code !== 'unavailable') throw error;
      await soon(250);
    }
  }
}
