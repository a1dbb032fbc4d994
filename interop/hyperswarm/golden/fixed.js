// Values that never change from run to run.

import { b4a, dht, sodium } from '../packages.js';

export const hex = (bytes) => (bytes === null || bytes === undefined ? null : b4a.toString(bytes, 'hex'));

/** Bytes that count up from `start`. */
export function counting(length, start = 0) {
  return b4a.from(Uint8Array.from({ length }, (_, index) => (start + index) & 0xff));
}

export const address = (host, port) => ({ host, port });
export const text = (address) => (address ? `${address.host}:${address.port}` : null);

export const clientSeed = counting(32, 0x10);
export const serverSeed = counting(32, 0x40);
export const client = dht.crypto.createKeyPair(clientSeed);
export const server = dht.crypto.createKeyPair(serverSeed);

export function hash(bytes) {
  return dht.crypto.unslabbedHash(bytes);
}

/** Runs `act` while the packages' random bytes count up from 0x70, and secret streams start with that header. */
export function withFixedChance(act) {
  const { randombytes_buf: random, crypto_secretstream_xchacha20poly1305_init_push: push } = sodium;
  sodium.randombytes_buf = (out) => out.set(counting(out.byteLength, 0x70));
  sodium.crypto_secretstream_xchacha20poly1305_init_push = (state, header, key) => {
    header.set(counting(header.byteLength, 0xa0));
    // A pushing state differs from a pulling one only in who made the header.
    sodium.crypto_secretstream_xchacha20poly1305_init_pull(state, header, key);
  };
  try {
    return act();
  } finally {
    sodium.randombytes_buf = random;
    sodium.crypto_secretstream_xchacha20poly1305_init_push = push;
  }
}
