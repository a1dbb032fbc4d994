#!/usr/bin/env node
// Writes the bytes that the Node packages send, for comparison in the Rust tests.
//
//   node golden.js           writes crates/hyperswarm/tests/golden/*.json
//   node golden.js --check   fails if the files differ from what the packages produce
//
// Keys, nonces and times are fixed, so that every run writes the same bytes.

import { readdirSync, readFileSync, writeFileSync, mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { join } from 'node:path';

const folder = fileURLToPath(new URL('../../crates/hyperswarm/tests/golden', import.meta.url));
const names = [
  'compact_encoding',
  'crypto',
  'noise',
  'noise_payload',
  'secret_stream',
  'holepunch_payload',
  'dht_messages',
  'router_values',
  'records',
  'udx',
  'protomux',
  'rpc',
];

const check = process.argv.includes('--check');
const wrong = [];
mkdirSync(folder, { recursive: true });
for (const name of names) {
  const { make } = await import(`./golden/${name}.js`);
  const text = async () => `${JSON.stringify(await make(), null, 1)}\n`;
  const path = join(folder, `${name}.json`);
  if (!check) {
    writeFileSync(path, await text());
    continue;
  }
  // The packets of UDX are captured between real timers, so a busy machine gets more attempts.
  const tries = name === 'udx' ? 5 : 1;
  const written = readFileSync(path, 'utf8');
  let same = false;
  for (let left = tries; left > 0 && !same; left -= 1) {
    same = (await text()) === written;
  }
  if (!same) {
    wrong.push(name);
  }
}
for (const name of readdirSync(folder)) {
  if (!names.includes(name.replace(/\.json$/, ''))) {
    wrong.push(name);
  }
}
if (wrong.length) {
  console.error(`golden: not what the packages produce: ${wrong.join(', ')}`);
  process.exit(1);
}
console.log(`golden: ${names.length} files ${check ? 'are what the packages produce' : 'written'}`);
process.exit(0);
