import { compact as c, dht } from '../packages.js';
import { hex, address, text, counting } from './fixed.js';
import { handshake as noise } from './noise.js';

const MODES = ['from_client', 'from_server', 'from_relay', 'from_second_relay', 'reply'];
const peerAddress = address('203.0.113.9', 50001);
const relayAddress = address('127.0.0.1', 40001);

/** The values of PEER_HANDSHAKE and PEER_HOLEPUNCH, in every mode and with each address. */
export function make() {
  const { message1 } = noise();
  const handshakes = MODES.flatMap((name, mode) =>
    [
      [null, null],
      [peerAddress, null],
      [null, relayAddress],
      [peerAddress, relayAddress],
    ].map(([peer, relay]) => ({
      mode,
      name,
      noise: hex(message1),
      peer_address: text(peer),
      relay_address: text(relay),
      bytes: hex(c.encode(dht.messages.handshake, { mode, noise: message1, peerAddress: peer, relayAddress: relay })),
    })),
  );
  const holepunches = MODES.flatMap((name, mode) =>
    [null, peerAddress].map((peer) => ({
      mode,
      name,
      id: mode ? 300 : 3,
      payload: hex(counting(60, 2)),
      peer_address: text(peer),
      bytes: hex(c.encode(dht.messages.holepunch, { mode, id: mode ? 300 : 3, payload: counting(60, 2), peerAddress: peer })),
    })),
  );
  return { handshakes, holepunches };
}
