#!/usr/bin/env node
// An RPC server. Options: bootstrap, seed (of its key), firewalled (false).

import { options, serve, startNode, dhtCalls, keyPairOf, hex, written, pattern } from './peer.js';
import { b4a, RPC, dht as inner } from './packages.js';

const node = startNode({ ephemeral: true });
await node.fullyBootstrapped();
const keyPair = keyPairOf(options.seed);
const rpc = new RPC({ dht: node });
const blob = pattern(65536);
const events = [];
let server = null;
let opened = 0;

const soon = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const length = (bytes) => b4a.toString(bytes ?? b4a.alloc(0));

async function listen() {
  server = rpc.createServer();
  server.on('connection', () => (opened += 1));
  server.respond('echo', (value) => value);
  server.respond('blob64k', () => blob);
  server.respond('hash', (value) => inner.crypto.hash(value ?? b4a.alloc(0)));
  server.respond('large', (value) => pattern(Number(length(value))));
  server.respond('delay', async (value) => {
    await soon(Number(length(value)));
    return value;
  });
  server.respond('fail', (value) => {
    const error = new Error(`refused ${length(value)}`);
    throw Object.assign(error, { code: 'E_REFUSED', context: 'the context' });
  });
  server.respond('fail_without_code', () => {
    throw new Error('plain');
  });
  server.respond('event', (value) => {
    events.push(hex(value));
  });
  await server.listen(keyPair);
}

await listen();

const { port } = node.address();
serve(
  { key: hex(keyPair.publicKey), address: written({ host: '127.0.0.1', port }) },
  {
    ...dhtCalls(node, keyPair),
    async events() {
      return events.splice(0);
    },
    async connections() {
      return { open: server.connections.size, opened };
    },
    /** Sends a request to each connected client. A server may send requests too. */
    async ask({ method, value }) {
      const answers = [];
      for (const connection of server.connections) {
        answers.push(hex(await connection.request(method, b4a.from(value, 'hex'))));
      }
      return answers;
    },
    async listen_again() {
      await server.close();
      await listen();
    },
    async drop_connections() {
      for (const connection of server.connections) connection.stream.destroy();
    },
  },
);
