import { compact as c, dht } from '../packages.js';
import { hex, address, text, counting, hash, client, server, clientSeed, serverSeed } from './fixed.js';

const m = dht.messages;
const { Persistent } = dht;
const relays = [address('127.0.0.1', 40001), address('198.51.100.4', 65535), address('203.0.113.9', 50001)];

function peer(pair, count) {
  return { publicKey: pair.publicKey, relayAddresses: relays.slice(0, count) };
}

function describedPeer(one) {
  return { public_key: hex(one.publicKey), relay_addresses: one.relayAddresses.map(text), bytes: hex(c.encode(m.peer, one)) };
}

function announcement({ kind, target, count, refresh = null, bump = 0 }) {
  const token = counting(32, 0x11);
  const nodeId = dht.peer.id('127.0.0.1', 49737);
  const value = { peer: peer(client, count), refresh, signature: null, bump };
  const sign = kind === 'announce' ? Persistent.signAnnounce : Persistent.signUnannounce;
  value.signature = sign(target, token, nodeId, value, client);
  return {
    kind,
    seed: hex(clientSeed),
    target: hex(target),
    token: hex(token),
    node_id: hex(nodeId),
    peer: describedPeer(value.peer),
    refresh: hex(refresh),
    bump,
    signature: hex(value.signature),
    value: hex(c.encode(m.announce, value)),
  };
}

function mutable(seq, value) {
  const signature = Persistent.signMutable(seq, value, client);
  return {
    seed: hex(clientSeed),
    public_key: hex(client.publicKey),
    target: hex(hash(client.publicKey)),
    seq,
    value: hex(value),
    signature: hex(signature),
    put: hex(c.encode(m.mutablePutRequest, { publicKey: client.publicKey, seq, value, signature })),
    reply: hex(c.encode(m.mutableGetResponse, { seq, value, signature })),
    get: hex(c.encode(c.uint, seq)),
  };
}

export function make() {
  const topic = counting(32, 0x77);
  const self = hash(client.publicKey);
  const peers = [peer(client, 0), peer(server, 3)];
  return {
    commands: dht.constants.COMMANDS,
    errors: dht.constants.ERROR,
    firewalls: dht.constants.FIREWALL,
    seeds: { client: hex(clientSeed), server: hex(serverSeed) },
    peers: [0, 1, 3].map((count) => describedPeer(peer(server, count))),
    announcements: [
      announcement({ kind: 'announce', target: self, count: 0 }),
      announcement({ kind: 'announce', target: topic, count: 3 }),
      announcement({ kind: 'announce', target: topic, count: 1, refresh: hash(counting(32, 3)) }),
      announcement({ kind: 'announce', target: topic, count: 1, bump: 1_700_000_000_000 }),
      announcement({ kind: 'announce', target: topic, count: 1, refresh: hash(counting(32, 3)), bump: 300 }),
      announcement({ kind: 'unannounce', target: self, count: 0 }),
      announcement({ kind: 'unannounce', target: topic, count: 0 }),
    ],
    refresh_only: { refresh: hex(counting(32, 3)), value: hex(c.encode(m.announce, { refresh: counting(32, 3) })) },
    lookups: [[], peers.slice(0, 1), peers].flatMap((some) =>
      [0, 1_700_000_000_000].map((bump) => ({
        peers: some.map(describedPeer),
        bump,
        value: hex(c.encode(m.lookupRawReply, { peers: some.map((one) => c.encode(m.peer, one)), bump })),
      })),
    ),
    // Nodes of earlier versions send no bump.
    lookup_without_bump: hex(c.encode(c.array(m.peer), peers)),
    find_peer: { peer: describedPeer(peers[1]), value: hex(c.encode(m.peer, peers[1])) },
    mutables: [mutable(0, counting(1)), mutable(1, counting(300)), mutable(70_000, counting(1000))],
    immutables: [counting(1), counting(1000)].map((value) => ({ target: hex(hash(value)), value: hex(value) })),
  };
}
