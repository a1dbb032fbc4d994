// The Node packages under test, with the internal parts that only the golden vectors need.

import { createRequire } from 'node:module';

export const require = createRequire(import.meta.url);

export const b4a = require('b4a');
export const compact = require('compact-encoding');
export const sodium = require('sodium-universal');
export const DHT = require('hyperdht');
export const RPC = require('@hyperswarm/rpc');
export const UDX = require('udx-native');
export const NoiseSecretStream = require('@hyperswarm/secret-stream');
export const Protomux = require('protomux');
export const ProtomuxRPC = require('protomux-rpc');
export const createTestnet = require('hyperdht/testnet');
export const { namespace } = require('hypercore-crypto');
export const HyperswarmCapability = require('hyperswarm-capability');

export const dht = {
  messages: require('hyperdht/lib/messages.js'),
  constants: require('hyperdht/lib/constants.js'),
  crypto: require('hyperdht/lib/crypto.js'),
  NoiseWrap: require('hyperdht/lib/noise-wrap.js'),
  Persistent: require('hyperdht/lib/persistent.js'),
  SecurePayload: require('hyperdht/lib/secure-payload.js'),
  IO: require('dht-rpc/lib/io.js'),
  peer: require('dht-rpc/lib/peer.js'),
  curve: require('noise-curve-ed'),
};

export const versions = Object.fromEntries(
  ['hyperdht', '@hyperswarm/rpc', 'udx-native'].map((name) => [name, require(`${name}/package.json`).version]),
);
