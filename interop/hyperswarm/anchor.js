#!/usr/bin/env node
// Measures the Node packages on this machine, for comparison: the same measures as benches/anchor.rs, in the same order.
//
// Network, server and client are separate processes. Options: nodes (5), fast (a tenth of everything), and bootstrap
// with key, to measure with a running server. Prints one line of JSON: names and results.

import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { options, startNode, parsed, pattern, unhex, hex } from './peer.js';
import { b4a, RPC, versions } from './packages.js';

const scale = options.fast ? 10 : 1;
const now = () => Number(process.hrtime.bigint()) / 1e6;
const soon = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

/** Another script, called by lines of JSON. */
async function script(name, more) {
  const path = fileURLToPath(new URL(name, import.meta.url));
  const child = spawn(process.execPath, [path, JSON.stringify(more)], { stdio: ['pipe', 'pipe', 'inherit'] });
  const lines = createInterface({ input: child.stdout });
  const waiting = [];
  let heard;
  const ready = new Promise((done) => (heard = done));
  lines.on('line', (line) => {
    const said = JSON.parse(line);
    if (said.ready) heard(said.ready);
    else waiting.shift()(said.ok);
  });
  const call = (action, more = {}) => {
    child.stdin.write(`${JSON.stringify({ id: 0, do: action, ...more })}\n`);
    return new Promise((done) => waiting.push(done));
  };
  return { ready: await ready, call, end: () => child.stdin.end() };
}

function summary(latencies, elapsed, bytes = 0) {
  latencies.sort((a, b) => a - b);
  const at = (part) => latencies[Math.min(latencies.length - 1, Math.floor(latencies.length * part))];
  const measured = { count: latencies.length, p50_ms: at(0.5), p99_ms: at(0.99) };
  if (elapsed) measured.per_second = (latencies.length / elapsed) * 1000;
  if (bytes) measured.megabytes_per_second = bytes / elapsed / 1000;
  return measured;
}

async function measured(times, parallel, act) {
  const latencies = [];
  let left = times;
  let bytes = 0;
  const start = now();
  const work = async () => {
    while (left-- > 0) {
      const asked = now();
      const received = await act();
      bytes += received;
      latencies.push(now() - asked);
    }
  };
  await Promise.all(Array.from({ length: parallel }, work));
  return summary(latencies, now() - start, bytes);
}

const network = options.bootstrap ? null : await script('testnet.js', { nodes: options.nodes ?? 5 });
const bootstrap = options.bootstrap ?? network.ready.bootstrap;
const server = options.key ? null : await script('rpc-server.js', { bootstrap });
const key = unhex(options.key ?? server.ready.key);

const node = startNode({ ephemeral: true, bootstrap: bootstrap.map(parsed) });
await node.fullyBootstrapped();
const rpc = new RPC({ dht: node });
const results = {};

const connects = [];
for (let left = 50 / scale; left > 0; left -= 1) {
  const start = now();
  const client = rpc.connect(key);
  await client.request('echo', b4a.alloc(100));
  connects.push(now() - start);
  client.destroy();
  await soon(20);
}
results.connect_and_echo = summary(connects);

const client = rpc.connect(key);
const payload = pattern(100);
await measured(2000 / scale, 1, () => client.request('echo', payload).then(() => 0));
results.echo_sequential = await measured(20000 / scale, 1, () => client.request('echo', payload).then(() => 0));
results.echo_64_in_flight = await measured(60000 / scale, 64, () => client.request('echo', payload).then(() => 0));
for (const parallel of [1, 16]) {
  const blob = () => client.request('blob64k', payload).then((answer) => answer.byteLength);
  results[`blob64k_${parallel}_in_flight`] = await measured(3000 / scale, parallel, blob);
}

if (server) {
  const found = [];
  for (let index = 0; index < 20 / scale; index += 1) {
    const topic = b4a.alloc(32, index + 1);
    const start = now();
    const announced = server.call('announce', { topic: hex(topic) });
    for (let seen = false; !seen; ) {
      for await (const { peers } of node.lookup(topic)) {
        seen = peers.length > 0;
        if (seen) break;
      }
    }
    found.push(now() - start);
    await announced;
  }
  results.announce_to_lookup = summary(found);
}

console.log(JSON.stringify({ versions: { node: process.version, ...versions }, results }));
server?.end();
network?.end();
process.exit(0);
