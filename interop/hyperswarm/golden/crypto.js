import { b4a, dht, namespace, sodium, NoiseSecretStream, HyperswarmCapability } from '../packages.js';
import { hex, address, text, counting, hash, clientSeed, serverSeed, client, server } from './fixed.js';

export function make() {
  const keyed = (input, key) => {
    const out = b4a.alloc(32);
    sodium.crypto_generichash(out, input, key);
    return out;
  };
  const names = { 'hyperswarm/dht': 11, 'hyperswarm/secret-stream': 3, 'hyperswarm-capability': 2 };
  const namespaces = Object.entries(names).flatMap(([name, count]) =>
    namespace(name, count).map((value, id) => ({ name, id, value: hex(value) })),
  );
  const handshakeHash = counting(64, 3);
  return {
    key_pairs: [clientSeed, serverSeed].map((seed) => {
      const pair = dht.crypto.createKeyPair(seed);
      return { seed: hex(seed), public_key: hex(pair.publicKey), target: hex(hash(pair.publicKey)) };
    }),
    hashes: [b4a.alloc(0), b4a.from('tether'), counting(300)].map((input) => ({ input: hex(input), hash: hex(hash(input)) })),
    keyed_hashes: [32, 64].map((length) => {
      const key = counting(length, 9);
      const input = counting(40, 1);
      return { key: hex(key), input: hex(input), hash: hex(keyed(input, key)) };
    }),
    namespaces,
    dh: [
      { seed: hex(clientSeed), public_key: hex(server.publicKey), shared: hex(dht.curve.dh(server.publicKey, client)) },
      { seed: hex(serverSeed), public_key: hex(client.publicKey), shared: hex(dht.curve.dh(client.publicKey, server)) },
    ],
    node_ids: [address('127.0.0.1', 49737), address('203.0.113.7', 65535)].map((one) => ({
      address: text(one),
      id: hex(dht.peer.id(one.host, one.port)),
    })),
    tokens: ['127.0.0.1', '203.0.113.7'].map((host) => {
      const secret = counting(32, 0x55);
      return { host, secret: hex(secret), token: hex(keyed(b4a.from(host), secret)) };
    }),
    stream_ids: {
      handshake_hash: hex(handshakeHash),
      initiator: hex(NoiseSecretStream.id(handshakeHash, true)),
      responder: hex(NoiseSecretStream.id(handshakeHash, false)),
    },
    holepunch_secret: {
      handshake_hash: hex(handshakeHash),
      secret: hex(keyed(dht.constants.NS.PEER_HOLEPUNCH, handshakeHash)),
    },
    capabilities: [true, false].map((initiator) => {
      const key = counting(32, 0x21);
      const made = new HyperswarmCapability().generate({ isInitiator: initiator, handshakeHash }, key);
      return { initiator, key: hex(key), handshake_hash: hex(handshakeHash), capability: hex(made) };
    }),
  };
}
