#!/usr/bin/env node
// An RPC client. Options: bootstrap, seed (of its key), firewalled (false).

import { options, serve, startNode, dhtCalls, keyPairOf, hex, unhex, parsed, pattern, written } from './peer.js';
import { b4a, RPC } from './packages.js';

const node = startNode({ ephemeral: true });
await node.fullyBootstrapped();
const keyPair = keyPairOf(options.seed);
const rpc = new RPC({ dht: node, keyPair });
const clients = new Map();
const soon = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

/** `relay` is the node that is asked first. If it is the server itself, the handshake goes directly to it. */
async function connect({ to, relay }) {
  const client = rpc.connect(unhex(to), { keyPair, relayAddresses: relay ? [parsed(relay)] : [] });
  if (!(await client.rpc.stream.opened)) throw new Error('the stream did not open');
  return client;
}

function named(name = 'main') {
  const client = clients.get(name);
  if (!client) throw new Error(`no connection ${name}`);
  return client;
}

async function closed(client) {
  client.destroy();
  if (!client.rpc.stream.destroyed) await new Promise((done) => client.rpc.stream.once('close', done));
}

/** Connects, sends one request and disconnects. Returns the error, if any. */
async function visit(call, index) {
  const client = await connect(call);
  try {
    const sent = b4a.from(`visit ${index}`);
    const answer = await client.request('echo', sent, { timeout: 20_000 });
    if (!b4a.equals(answer, sent)) throw new Error('another answer');
  } finally {
    await closed(client);
  }
}

serve(
  { key: hex(keyPair.publicKey), address: written({ host: '127.0.0.1', port: node.address().port }) },
  {
    ...dhtCalls(node, keyPair),
    async connect(call) {
      const client = await connect(call);
      clients.set(call.name ?? 'main', client);
      client.rpc.respond('answer', (value) => b4a.concat([b4a.from('answered '), value]));
      return { relayed: client.rpc.stream.rawStream.remotePort };
    },
    async request({ name, method, value, timeout }) {
      return hex(await named(name).request(method, unhex(value), timeout ? { timeout } : {}));
    },
    /** Sends `length` patterned bytes, and gets their hash. */
    async hash_pattern({ name, length }) {
      return hex(await named(name).request('hash', pattern(length)));
    },
    /** Requests `length` patterned bytes. */
    async fetch_pattern({ name, length }) {
      const answer = await named(name).request('large', b4a.from(String(length)));
      return { length: answer.byteLength, same: b4a.equals(answer, pattern(length)) };
    },
    /** Sends several requests in one Protomux batch. */
    async batch({ name, count }) {
      const client = named(name);
      client.rpc.cork();
      const asked = Array.from({ length: count }, (_, index) => client.request('echo', b4a.from(`item ${index}`)));
      client.rpc.uncork();
      const answers = await Promise.all(asked);
      return answers.every((answer, index) => b4a.toString(answer) === `item ${index}`);
    },
    async concurrent({ name, count, method, value }) {
      const client = named(name);
      const answers = await Promise.all(Array.from({ length: count }, () => client.request(method, unhex(value))));
      return answers.length;
    },
    async event({ name, value }) {
      named(name).event('event', unhex(value));
    },
    async many({ times, parallel = 1, ...call }) {
      const failures = [];
      let index = 0;
      const work = async () => {
        while (index < times) {
          const own = (index += 1);
          await visit(call, own).catch((error) => failures.push(`${own}: ${error.message}`));
        }
      };
      await Promise.all(Array.from({ length: parallel }, work));
      return failures;
    },
    async idle({ milliseconds }) {
      await soon(milliseconds);
    },
    async stats({ name }) {
      const raw = named(name).rpc.stream.rawStream;
      return { mtu: raw.mtu, rtt: raw.rtt, cwnd: raw.cwnd, retransmits: raw.retransmits, rto: raw.rtoCount, remote: raw.remotePort };
    },
    async is_open({ name }) {
      return !named(name).closed;
    },
    async disconnect({ name }) {
      await closed(named(name));
      clients.delete(name ?? 'main');
    },
  },
);
