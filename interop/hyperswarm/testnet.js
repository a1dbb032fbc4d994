#!/usr/bin/env node
// Nodes of a DHT. Options: nodes (3), bootstrap (none: the first node is the bootstrap node of the others).

import { options, serve, startNode, written, dhtCalls, keyPairOf, parsed } from './peer.js';

const nodes = [];
const bootstrap = (options.bootstrap ?? []).map(parsed);

async function add() {
  const node = startNode({ ephemeral: false, bootstrap: [...bootstrap], anyPort: true });
  await node.fullyBootstrapped();
  if (bootstrap.length === 0) bootstrap.push({ host: '127.0.0.1', port: node.address().port });
  nodes.push(node);
  return { host: '127.0.0.1', port: node.address().port };
}

for (let left = options.nodes ?? 3; left > 0; left -= 1) {
  await add();
}

serve(
  { bootstrap: bootstrap.map(written), nodes: nodes.map((node) => written({ host: '127.0.0.1', port: node.address().port })) },
  {
    ...dhtCalls(nodes[nodes.length - 1], keyPairOf()),
    async add() {
      return written(await add());
    },
    /** Stops a node without notifying any other. */
    async kill({ index }) {
      await nodes[index].destroy({ force: true });
    },
  },
);
