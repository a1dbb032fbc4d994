import { b4a, compact as c, dht } from '../packages.js';
import { hex, address, text, counting, withFixedChance } from './fixed.js';

const none = { connected: false, punching: false, addresses: null, remoteAddress: null, token: null, remoteToken: null };
const payloads = [
  { error: 0, firewall: 0, round: 0, ...none },
  { error: 0, firewall: 2, round: 1, ...none, connected: true },
  { error: 0, firewall: 2, round: 1, ...none, punching: true, addresses: [address('203.0.113.9', 50001), address('203.0.113.9', 50002)] },
  { error: 0, firewall: 2, round: 0, ...none, addresses: [], remoteAddress: address('198.51.100.4', 50000) },
  { error: 3, firewall: 3, round: 7, ...none, token: counting(32, 5) },
  { error: 0, firewall: 1, round: 252, ...none, remoteToken: counting(32, 6) },
  {
    error: 1,
    firewall: 2,
    round: 2,
    connected: true,
    punching: true,
    addresses: [address('203.0.113.9', 50001)],
    remoteAddress: address('198.51.100.4', 50000),
    token: counting(32, 5),
    remoteToken: counting(32, 6),
  },
];

export function make() {
  const secret = counting(32, 0x33);
  return {
    secret: hex(secret),
    nonce: hex(counting(24, 0x70)),
    cases: payloads.map((payload) => ({
      error: payload.error,
      firewall: payload.firewall,
      round: payload.round,
      connected: payload.connected,
      punching: payload.punching,
      addresses: payload.addresses && payload.addresses.map(text),
      remote_address: text(payload.remoteAddress),
      token: hex(payload.token),
      remote_token: hex(payload.remoteToken),
      bytes: hex(c.encode(dht.messages.holepunchPayload, payload)),
      sealed: withFixedChance(() => hex(new dht.SecurePayload(secret).encrypt(payload))),
    })),
    token: withFixedChance(() => {
      const sealer = new dht.SecurePayload(secret);
      return { host: '203.0.113.9', local_secret: hex(counting(32, 0x70)), token: hex(sealer.token(address('203.0.113.9', 1))) };
    }),
    punch_datagram: hex(b4a.alloc(1)),
  };
}
