import { createSocket } from 'node:dgram';
import { b4a, UDX } from '../packages.js';
import { hex, counting } from './fixed.js';

const HEADER = 20;
const BITS = { data: 1, end: 2, sack: 4, message: 8, destroy: 16, heartbeat: 32 };
const soon = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

function described(bytes) {
  const type = bytes[2];
  const offset = bytes[3];
  const sacks = [];
  const names = Object.keys(BITS).filter((name) => type & BITS[name]);
  const hasBlocks = (type & BITS.sack) !== 0;
  // Without an offset the blocks fill the rest.
  const end = hasBlocks && offset ? HEADER + offset : bytes.length;
  for (let at = HEADER; hasBlocks && at + 8 <= end; at += 8) {
    sacks.push([bytes.readUInt32LE(at), bytes.readUInt32LE(at + 4)]);
  }
  return {
    type,
    names,
    data_offset: offset,
    stream_id: bytes.readUInt32LE(4),
    window: bytes.readUInt32LE(8),
    seq: bytes.readUInt32LE(12),
    ack: bytes.readUInt32LE(16),
    sacks,
    payload: hex(hasBlocks && !offset ? b4a.alloc(0) : bytes.subarray(HEADER + offset)),
    bytes: hex(bytes),
  };
}

/** Two streams that talk through sockets which keep every packet; `passes` says whether one goes on. */
async function between(act, passes = () => true) {
  const packets = [];
  const udx = { left: new UDX(), right: new UDX() };
  const sockets = { left: udx.left.createSocket(), right: udx.right.createSocket() };
  for (const socket of Object.values(sockets)) socket.bind(0, '127.0.0.1');
  const streams = { left: udx.left.createStream(0x11111111), right: udx.right.createStream(0x22222222) };
  const proxies = { left: createSocket('udp4'), right: createSocket('udp4') };
  for (const [side, proxy] of Object.entries(proxies)) {
    await new Promise((done) => proxy.bind(0, '127.0.0.1', done));
    const other = side === 'left' ? 'right' : 'left';
    proxy.on('message', (bytes) => {
      const one = { from: side, ...described(bytes) };
      packets.push(one);
      if (passes(one)) proxies[other].send(bytes, sockets[other].address().port, '127.0.0.1');
    });
  }
  for (const [side, stream] of Object.entries(streams)) {
    const other = side === 'left' ? 'right' : 'left';
    stream.connect(sockets[side], streams[other].id, proxies[side].address().port, '127.0.0.1');
    stream.on('data', () => {});
    stream.on('error', () => {});
  }
  await act(streams);
  await soon(60);
  for (const stream of Object.values(streams)) stream.destroy();
  await soon(20);
  for (const socket of Object.values(sockets)) await socket.close();
  for (const proxy of Object.values(proxies)) proxy.close();
  return packets;
}

/** Each packet once, by sender: what travels twice, and what overtakes what, is for the timers to say. */
function distinct(packets) {
  const seen = new Map(packets.map((packet) => [packet.from + packet.bytes, packet]));
  return ['left', 'right'].flatMap((side) => [...seen.values()].filter((packet) => packet.from === side));
}

export async function make() {
  const echo = await between(async ({ left, right }) => {
    left.write(b4a.from('hello'));
    await soon(60);
    right.write(counting(3000));
    await soon(60);
    left.trySend(b4a.from('a message'));
    await soon(60);
    left.end();
    await soon(60);
    right.end();
  });
  let dropped = false;
  const loss = await between(
    async ({ left }) => {
      left.write(counting(6000));
      await soon(100);
    },
    (packet) => dropped || packet.from !== 'left' || packet.seq !== 1 || !(dropped = true),
  );
  const destroyed = await between(async ({ left }) => {
    left.write(b4a.from('x'));
    await soon(60);
    left.destroy();
    await soon(30);
  });
  // A probe of the path's size is data behind padding; a heartbeat asks for an acknowledgement.
  const probe = await between(async ({ left, right }) => {
    left.write(b4a.from('x'));
    await soon(60);
    for (const length of [1100, 1101]) {
      left.write(counting(length));
      await soon(60);
    }
    right.setKeepalive(20);
    await soon(60);
  });
  return { header_length: HEADER, bits: BITS, echo: distinct(echo), loss: distinct(loss), destroyed: distinct(destroyed), probe: distinct(probe) };
}
