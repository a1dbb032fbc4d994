import { b4a, compact as c, dht } from '../packages.js';
import { hex, counting, client, server, clientSeed, serverSeed, address } from './fixed.js';

export const clientPayload = {
  error: 0,
  firewall: 2,
  holepunch: null,
  addresses4: [address('192.168.1.20', 49738)],
  addresses6: [],
  udx: { reusableSocket: true, id: 0x12345678, seq: 0 },
  secretStream: {},
  relayThrough: null,
  relayAddresses: null,
};
export const serverPayload = {
  error: 0,
  firewall: 1,
  holepunch: null,
  addresses4: [address('127.0.0.1', 49737)],
  addresses6: null,
  udx: { reusableSocket: false, id: 0x9abcdef0, seq: 0 },
  secretStream: {},
  relayThrough: null,
  relayAddresses: [address('127.0.0.1', 40001), address('127.0.0.1', 40002)],
};

/** A whole handshake with fixed keys; `wrap` is the initiator's or responder's state. */
export function handshake(first = clientPayload, second = serverPayload) {
  const ephemeral = [counting(32, 0x80), counting(32, 0xc0)];
  const initiator = new dht.NoiseWrap(client, server.publicKey);
  const responder = new dht.NoiseWrap(server, null);
  initiator.handshake.e = dht.curve.generateKeyPair(ephemeral[0]);
  responder.handshake.e = dht.curve.generateKeyPair(ephemeral[1]);
  const message1 = initiator.send(first);
  // The packages wipe the ephemeral keys where they lie, so each side gets a copy.
  responder.recv(b4a.from(message1));
  const message2 = responder.send(second);
  initiator.recv(b4a.from(message2));
  return { ephemeral, message1, message2, initiator: initiator.final(), responder: responder.final() };
}

function described(first, second) {
  const done = handshake(first, second);
  const side = (final) => ({
    tx: hex(final.tx),
    rx: hex(final.rx),
    hash: hex(final.hash),
    holepunch_secret: hex(final.holepunchSecret),
    remote_public_key: hex(final.remotePublicKey),
  });
  return {
    pattern: 'IK',
    prologue: hex(dht.constants.NS.PEER_HANDSHAKE),
    initiator_seed: hex(clientSeed),
    responder_seed: hex(serverSeed),
    initiator_ephemeral_seed: hex(done.ephemeral[0]),
    responder_ephemeral_seed: hex(done.ephemeral[1]),
    initiator_public_key: hex(client.publicKey),
    responder_public_key: hex(server.publicKey),
    payload1: hex(c.encode(dht.messages.noisePayload, first)),
    payload2: hex(c.encode(dht.messages.noisePayload, second)),
    message1: hex(done.message1),
    message2: hex(done.message2),
    initiator: side(done.initiator),
    responder: side(done.responder),
  };
}

export function make() {
  const bare = { error: 0, firewall: 0 };
  return { handshakes: [described(clientPayload, serverPayload), described(bare, { error: 1, firewall: 0 })] };
}
