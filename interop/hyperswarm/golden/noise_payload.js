import { b4a, compact as c, dht } from '../packages.js';
import { hex, address, text, counting } from './fixed.js';

const part = {
  holepunch: { id: 3, relays: [{ relayAddress: address('127.0.0.1', 40001), peerAddress: address('198.51.100.4', 50000) }] },
  addresses4: [address('203.0.113.9', 49737), address('192.168.0.4', 65535)],
  addresses6: [address('2001:db8::1', 49737)],
  udx: { reusableSocket: true, id: 0x12345678, seq: 300 },
  secretStream: {},
  relayThrough: { publicKey: counting(32, 1), token: counting(32, 2) },
  relayAddresses: [address('127.0.0.1', 40001), address('127.0.0.1', 40002)],
};
const none = { holepunch: null, addresses4: [], addresses6: [], udx: null, secretStream: null, relayThrough: null, relayAddresses: null };

function described(payload) {
  return {
    version: 1,
    error: payload.error,
    firewall: payload.firewall,
    holepunch: payload.holepunch && {
      id: payload.holepunch.id,
      relays: payload.holepunch.relays.map((one) => ({ relay: text(one.relayAddress), peer: text(one.peerAddress) })),
    },
    addresses4: payload.addresses4.map(text),
    addresses6: payload.addresses6.map((one) => `[${one.host}]:${one.port}`),
    udx: payload.udx && { reusable_socket: payload.udx.reusableSocket, id: payload.udx.id, seq: payload.udx.seq },
    secret_stream: payload.secretStream && { version: 1 },
    relay_through: payload.relayThrough && { public_key: hex(payload.relayThrough.publicKey), token: hex(payload.relayThrough.token) },
    relay_addresses: payload.relayAddresses && payload.relayAddresses.map(text),
    bytes: hex(c.encode(dht.messages.noisePayload, payload)),
  };
}

/** Each flag alone, all of them, none, and each number at its largest. */
export function make() {
  const cases = Object.keys(part).map((name) => ({ error: 0, firewall: 0, ...none, [name]: part[name] }));
  cases.push({ error: 0, firewall: 1, ...none }, { error: 3, firewall: 3, ...none }, { error: 0, firewall: 2, ...part });
  cases.push({ error: 0, firewall: 0, ...none, relayAddresses: [] });
  cases.push({ error: 0, firewall: 0, ...none, udx: { reusableSocket: false, id: 0xffffffff, seq: 0xffffffff } });
  // What is of another version is told as such and not read any further.
  const laterVersion = dht.messages.noisePayload.decode({ start: 0, end: 3, buffer: b4a.from('02ffff', 'hex') });
  return { cases: cases.map(described), later_version: { bytes: '02ffff', version: laterVersion.version } };
}
