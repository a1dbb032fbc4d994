import { b4a, compact as c, require, ProtomuxRPC } from '../packages.js';
import { hex, counting, server } from './fixed.js';
import { Kept } from './protomux.js';

const { getEncoding } = require('hyperswarm-capability/spec/hyperschema');
const capability = getEncoding('@rpc/handshake');
const soon = () => new Promise((done) => setTimeout(done, 5));

function encoded(encoding, value) {
  return hex(c.encode(encoding, value));
}

/** Every error that the bitfield can tell: error, code, cause, context. */
function errors() {
  const cases = [];
  for (const code of [null, 'UNKNOWN_METHOD', 'REQUEST_ERROR', 'DECODE_ERROR', 'ENCODE_ERROR', 'E_OWN']) {
    for (const cause of [null, { message: 'the cause' }, { message: 'the cause', code: 'E_CAUSE' }]) {
      for (const context of cause ? [null, 'the context'] : [null]) {
        cases.push({ message: 'went wrong', code, cause: cause && { message: cause.message, code: cause.code ?? null, context } });
      }
    }
  }
  return cases;
}

export async function make() {
  const stream = new Kept();
  const rpc = new ProtomuxRPC(stream, { id: server.publicKey });
  const [open] = stream.take();
  const { _request: request, _response: response } = rpc;
  const values = [b4a.alloc(0), counting(1), counting(300)];

  const withCapability = new Kept();
  new ProtomuxRPC(withCapability, { id: server.publicKey, handshakeEncoding: capability, handshake: { capability: counting(32, 4) } });

  // What a server answers by itself, over a channel that the peer has opened.
  rpc.respond('fails', () => {
    throw Object.assign(new Error('the cause'), { code: 'E_CAUSE', context: 'the context' });
  });
  rpc.respond('echo', (value) => value);
  stream.receive(open);
  await soon();
  const answered = {};
  const requests = { echo: [1, 'echo', '03000102'], empty: [2, 'echo', '00'], fails: [3, 'fails', '00'], unknown: [4, 'nobody', '00'], undecodable: [5, 'echo', '05'], event: [0, 'echo', '00'] };
  for (const [name, [id, method, value]] of Object.entries(requests)) {
    const frame = b4a.concat([b4a.from([1, 0]), c.encode(request.encoding, { id, method, value: b4a.from(value, 'hex') })]);
    stream.receive(hex(frame));
    await soon();
    answered[name] = { request: hex(frame), answers: stream.take() };
  }
  // Two requests in one batch are answered by one batch.
  const items = [
    [6, 'echo'],
    [7, 'echo'],
  ].map(([id, method]) => b4a.concat([b4a.from([0]), c.encode(request.encoding, { id, method, value: b4a.from('0109', 'hex') })]));
  const batch = b4a.concat([b4a.from([0, 0, 1]), ...items.map((item) => c.encode(c.buffer, item))]);
  stream.receive(hex(batch));
  await soon();
  answered.batch = { request: hex(batch), answers: stream.take() };

  return {
    protocol: 'protomux-rpc',
    server_public_key: hex(server.publicKey),
    open,
    open_with_capability: { capability: hex(counting(32, 4)), frame: withCapability.take()[0] },
    handshakes: [null, counting(32, 4)].map((key) => ({ capability: hex(key), bytes: encoded(capability, { capability: key }) })),
    values: [null, ...values].map((value) => ({ value: hex(value), bytes: encoded(c.optionalBuffer, value) })),
    requests: [
      [1, 'echo'],
      [0, 'event'],
      [300, 'größer'],
      [Number.MAX_SAFE_INTEGER, ''],
    ].flatMap(([id, method]) =>
      values.map((value) => ({ id, method, value: hex(value), bytes: encoded(request.encoding, { id, method, value }) })),
    ),
    responses: [1, 300].flatMap((id) =>
      values.map((value) => ({ id, value: hex(value), bytes: encoded(response.encoding, { id, error: null, value }) })),
    ),
    errors: errors().map(({ message, code, cause }) => {
      const error = Object.assign(new Error(code ? `${code}: ${message}` : message), code ? { code } : {});
      if (cause) {
        error.cause = Object.assign(new Error(cause.message), cause.code ? { code: cause.code } : {}, cause.context ? { context: cause.context } : {});
      }
      return { id: 9, message, code, cause, bytes: encoded(response.encoding, { id: 9, error, value: null }) };
    }),
    answered,
  };
}
