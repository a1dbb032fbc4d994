import { EventEmitter } from 'node:events';
import { b4a, compact as c, Protomux } from '../packages.js';
import { hex, counting, server } from './fixed.js';

/** A stream that only keeps what is written to it. */
export class Kept extends EventEmitter {
  userData = null;
  destroyed = false;
  frames = [];
  write(bytes) {
    this.frames.push(hex(bytes));
    return true;
  }
  end() {}
  pause() {}
  resume() {}
  destroy(error) {
    this.destroyed = true;
    this.error = error;
  }
  receive(bytes) {
    this.emit('data', b4a.from(bytes, 'hex'));
  }
  take() {
    return this.frames.splice(0);
  }
}

const soon = () => new Promise((done) => setTimeout(done, 5));

export async function make() {
  const stream = new Kept();
  const mux = new Protomux(stream);
  const cases = {};
  const protocol = 'tether/test';
  const id = server.publicKey;

  const first = mux.createChannel({ protocol, id, messages: [{ encoding: c.raw }, { encoding: c.raw }] });
  first.open();
  [cases.open] = stream.take();
  const second = mux.createChannel({ protocol: 'no id', messages: [{ encoding: c.raw }] });
  second.open();
  [cases.open_without_id] = stream.take();
  const third = mux.createChannel({ protocol, id: counting(2), handshake: c.raw, messages: [{ encoding: c.raw }] });
  third.open(counting(4));
  [cases.open_with_handshake] = stream.take();

  first.messages[0].send(b4a.from('pipelined'));
  [cases.message_before_open] = stream.take();
  first.messages[1].send(counting(300));
  [cases.message] = stream.take();

  mux.cork();
  first.messages[0].send(counting(3));
  mux.uncork();
  [cases.batch_of_one] = stream.take();
  mux.cork();
  first.messages[0].send(counting(3));
  first.messages[1].send(counting(300));
  second.messages[0].send(counting(2, 0x50));
  first.messages[0].send(b4a.alloc(0));
  mux.uncork();
  [cases.batch] = stream.take();
  mux.cork();
  first.messages[0].send(counting(1));
  second.close();
  const fourth = mux.createChannel({ protocol: 'in a batch', messages: [{ encoding: c.raw }] });
  fourth.open();
  fourth.messages[0].send(counting(1, 9));
  mux.uncork();
  [cases.batch_with_control] = stream.take();
  mux.cork();
  mux.uncork();
  cases.empty_batch = stream.take();

  first.close();
  [cases.close] = stream.take();

  // An open for which nobody here waits is rejected.
  const alone = new Kept();
  new Protomux(alone);
  alone.receive(cases.open);
  await soon();
  [cases.reject] = alone.take();

  // Ids: the remote may take the next one or a freed one, and nothing else.
  const strict = new Kept();
  const strictMux = new Protomux(strict);
  strictMux.createChannel({ protocol: 'skip' });
  const skipping = '000102' + '04736b6970' + '00';
  strict.receive(skipping);
  await soon();

  // Messages for ids that were never opened are dropped without an answer; a control frame of an unknown type too.
  const lenient = new Kept();
  new Protomux(lenient);
  const dropped = ['', '0500', '000900', '000305', '000300'];
  for (const bytes of dropped) lenient.receive(bytes);
  await soon();
  // A reject of what was never opened, or a cut frame, ends the stream.
  const ending = ['000205', '00', '0001', '00010104'].map((bytes) => {
    const stream = new Kept();
    new Protomux(stream);
    stream.receive(bytes);
    return { bytes, destroyed: stream.destroyed };
  });
  return {
    protocol,
    id: hex(id),
    cases,
    skipped_id: { bytes: skipping, destroyed: strict.destroyed },
    dropped: { frames: dropped, destroyed: lenient.destroyed, answers: lenient.take() },
    ending,
  };
}
