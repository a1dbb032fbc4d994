import { Duplex } from 'node:stream';
import { b4a, NoiseSecretStream } from '../packages.js';
import { hex, counting, withFixedChance } from './fixed.js';
import { handshake } from './noise.js';

/** A raw stream that only keeps what is written to it. */
class Kept extends Duplex {
  frames = [];
  boxes = [];
  _read() {}
  _write(bytes, _, done) {
    done();
  }
  write(bytes) {
    this.frames.push(b4a.from(bytes));
    return true;
  }
  trySend(bytes) {
    this.boxes.push(b4a.from(bytes));
  }
  send() {}
}

const plain = [b4a.from('hello'), b4a.alloc(0), counting(300), counting(1), counting(70000)];

function side(initiator) {
  const raw = new Kept();
  const done = handshake();
  withFixedChance(() => {
    const stream = new NoiseSecretStream(initiator, raw, { handshake: initiator ? done.initiator : done.responder });
    for (const message of plain) stream._write(message, () => {});
    stream.trySend(b4a.from('unordered'));
    stream.trySend(b4a.alloc(0));
  });
  const [first, ...frames] = raw.frames;
  const long = frames.pop();
  return {
    initiator,
    header: hex(first.subarray(35)),
    first_frame: hex(first),
    frames: frames.map((frame, index) => ({ plain: hex(plain[index]), frame: hex(frame) })),
    // Only the ends of the long one, to keep the file small: 70,000 bytes that count up.
    long_frame: { plain_length: 70000, start: hex(long.subarray(0, 40)), end: hex(long.subarray(-40)), length: long.byteLength },
    unordered: raw.boxes.map((box, index) => ({ plain: hex(index ? b4a.alloc(0) : b4a.from('unordered')), box: hex(box) })),
  };
}

export function make() {
  const { initiator } = handshake();
  return {
    handshake_hash: hex(initiator.hash),
    initiator_tx: hex(initiator.tx),
    initiator_rx: hex(initiator.rx),
    send_counter: hex(counting(8, 0x70)),
    sides: [side(true), side(false)],
  };
}
