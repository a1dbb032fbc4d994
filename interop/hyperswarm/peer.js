// Shared parts of the Node peers: lines of JSON in and out, a DHT node, and its commands.
//
// The first argument is a JSON object of options. Each line on stdin is a call, `{"id": 1, "do": "echo", …}`; each line on
// stdout is `{"ready": …}`, once, or the response to a call, `{"id": 1, "ok": …}` or `{"id": 1, "error": {…}}`.
// A peer ends when its stdin closes.

import { createInterface } from 'node:readline';
import { b4a, DHT } from './packages.js';

export const options = JSON.parse(process.argv[2] ?? '{}');

export const hex = (bytes) => (bytes ? b4a.toString(bytes, 'hex') : null);
export const unhex = (text) => b4a.from(text ?? '', 'hex');
export const written = ({ host, port }) => `${host}:${port}`;
export function parsed(text) {
  const [host, port] = text.split(':');
  return { host, port: Number(port) };
}

/** Bytes that both sides can generate: a counter with steps that no power of two divides. */
export function pattern(length) {
  const bytes = b4a.alloc(length);
  for (let index = 0; index < length; index += 1) {
    bytes[index] = (index * 7 + (index >> 8)) & 0xff;
  }
  return bytes;
}

/** Starts a node. Unless the options say otherwise, it assumes that everybody can reach it. */
export function startNode(more = {}) {
  return new DHT({
    bootstrap: (options.bootstrap ?? []).map(parsed),
    host: '127.0.0.1',
    // Any free port, because several networks run concurrently.
    port: [0, 1],
    firewalled: options.firewalled ?? false,
    ...more,
  });
}

/** Handles calls until stdin closes. */
export function serve(ready, calls) {
  const say = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
  const lines = createInterface({ input: process.stdin });
  lines.on('line', async (line) => {
    const call = JSON.parse(line);
    try {
      const act = calls[call.do];
      if (!act) throw new Error(`no such call: ${call.do}`);
      say({ id: call.id, ok: (await act(call)) ?? null });
    } catch (error) {
      say({ id: call.id, error: described(error) });
    }
  });
  lines.on('close', () => process.exit(0));
  say({ ready });
}

function described(error) {
  const { message, code = null, context = null, cause } = error;
  return { message, code, context, cause: cause ? described(cause) : null };
}

/** The commands of every DHT node. */
export function dhtCalls(node, keyPair) {
  return {
    async announce({ topic }) {
      await node.announce(unhex(topic), keyPair).finished();
    },
    async unannounce({ topic }) {
      await node.unannounce(unhex(topic), keyPair);
    },
    async lookup({ topic }) {
      const keys = new Set();
      for await (const { peers } of node.lookup(unhex(topic))) {
        for (const peer of peers) keys.add(hex(peer.publicKey));
      }
      return [...keys].sort();
    },
    async find_peer({ key }) {
      const query = node.findPeer(unhex(key));
      let found = 0;
      for await (const reply of query) {
        if (reply.value !== undefined) found += 1;
      }
      return found;
    },
    async immutable_put({ value }) {
      return hex((await node.immutablePut(unhex(value))).hash);
    },
    async immutable_get({ hash }) {
      const found = await node.immutableGet(unhex(hash));
      return found && hex(found.value);
    },
    async mutable_put({ value, seq }) {
      await node.mutablePut(keyPair, unhex(value), { seq });
      return hex(keyPair.publicKey);
    },
    async mutable_get({ key, seq }) {
      const found = await node.mutableGet(unhex(key), { seq: seq ?? 0 });
      return found && { value: hex(found.value), seq: found.seq };
    },
    async table() {
      return { nodes: node.toArray().map(written), ephemeral: node.ephemeral, firewalled: node.firewalled };
    },
    async ping({ to }) {
      const { rtt } = await node.ping(parsed(to));
      return rtt;
    },
    async stop() {
      await node.destroy({ force: true });
    },
  };
}

export function keyPairOf(seed) {
  return seed ? DHT.keyPair(unhex(seed)) : DHT.keyPair();
}
