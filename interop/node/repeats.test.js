// Connections that break in the middle of an answer: one answer, and it is whole.

import assert from 'node:assert/strict';
import net from 'node:net';
import { after, before, test } from 'node:test';

import { MODEL, connect, url } from './network.js';

const CUTS = Number(process.env.CUTS ?? 12);
const gateway = new URL(url);

/** Passes bytes to the gateway, and resets the connections of the next answers after so many bytes. */
const cuts = [];
const cutter = net.createServer((client) => {
  const server = net.connect(Number(gateway.port), gateway.hostname);
  let left = Infinity;
  const end = () => {
    client.resetAndDestroy();
    server.resetAndDestroy();
  };
  client.on('error', end).on('close', end).pipe(server);
  server.on('error', end).on('close', end).on('data', (data) => {
    // A connection may be kept from an earlier answer.
    left = left === Infinity ? (cuts.shift() ?? Infinity) : left;
    const part = data.subarray(0, Math.min(left, data.length));
    left -= part.length;
    client.write(part, () => left <= 0 && end());
  });
});

before(() => new Promise((resolve) => cutter.listen(0, '127.0.0.1', resolve)));
after(() => cutter.close());

for (const keyed of [true, false]) {
  test(`a cut connection loses nothing, ${keyed ? 'with a key' : 'by the SDK alone'}`, async () => {
    const direct = connect();
    for (let cut = 0; cut < CUTS; cut++) {
      const body = {
        model: MODEL,
        max_tokens: 60,
        temperature: 1,
        messages: [{ role: 'user', content: `Tell me story ${cut}.` }],
      };
      const { data, response } = await direct.chat.completions.create(body).withResponse();
      const head = [...response.headers].flat().join(': \r\n').length;
      // The SDK tries again if the head is cut, and leaves it to its user if the body is.
      const bytes = keyed ? head + JSON.stringify(data).length : Math.floor(head / 2);
      cuts.push(1 + Math.floor(Math.random() * (bytes - 1)));
      const headers = keyed ? { 'Idempotency-Key': `node ${cut} ${Math.random()}` } : {};
      const client = connect({ baseURL: `http://127.0.0.1:${cutter.address().port}/v1`, maxRetries: 5 });
      const ask = () => client.chat.completions.create(body, { headers });
      const answer = await ask().catch((error) => {
        assert.ok(keyed && error instanceof TypeError, String(error));
        return ask();
      });
      assert.equal(cuts.length, 0, 'the connection was cut');
      assert.ok(answer.choices[0].message.content.length > 0);
      if (!keyed) continue;
      // Sampled anew, it would be another text.
      const again = await client.chat.completions.create(body, { headers }).withResponse();
      assert.deepEqual(again.data, answer);
      assert.equal(again.response.headers.get('idempotency-replayed'), 'true');
    }
  });
}
