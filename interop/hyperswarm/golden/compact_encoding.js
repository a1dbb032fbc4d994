import { compact as c } from '../packages.js';
import { hex, address, text, counting } from './fixed.js';

/** How each kind of value becomes bytes. `written` may differ from `value` where several values are written alike. */
export function make() {
  const cases = [];
  const add = (kind, encoding, value, shown = value) => cases.push({ kind, value: shown, bytes: hex(c.encode(encoding, value)) });
  for (const value of [0, 1, 0xfc, 0xfd, 0xfe, 0xff, 0x100, 0xffff, 0x10000, 0xffffffff, 0x100000000, Number.MAX_SAFE_INTEGER]) {
    add('uint', c.uint, value);
  }
  for (const value of [0, 0x1234, 0xffff]) add('uint16', c.uint16, value);
  for (const value of [0, 0x12345678, 0xffffffff]) add('uint32', c.uint32, value);
  for (const value of ['', 'echo', 'größer', '東京', '🦀']) add('string', c.string, value);
  for (const length of [0, 1, 252, 253, 300]) add('buffer', c.buffer, counting(length), hex(counting(length)));
  add('optional_buffer', c.optionalBuffer, null);
  add('optional_buffer', c.optionalBuffer, counting(3), hex(counting(3)));
  add('raw', c.raw, counting(5), hex(counting(5)));
  add('fixed32', c.fixed32, counting(32), hex(counting(32)));
  add('fixed64', c.fixed64, counting(64), hex(counting(64)));
  for (const value of [address('127.0.0.1', 49737), address('255.1.0.9', 65535)]) add('ipv4', c.ipv4Address, value, text(value));
  for (const [host, port] of [['::1', 49737], ['2001:db8::8a2e:370:7334', 1]]) {
    add('ipv6', c.ipv6Address, address(host, port), `[${host}]:${port}`);
  }
  for (const value of [[], [1, 300, 70000]]) add('array_of_uint', c.array(c.uint), value);
  const refused = ['', 'fd', 'fd01', 'fe010203', 'ff01020304050607'].map((bytes) => ({ kind: 'uint', bytes }));
  refused.push({ kind: 'buffer', bytes: '0501' }, { kind: 'ipv4', bytes: '7f000001' }, { kind: 'array_of_uint', bytes: '0201' });
  return { cases, refused };
}
