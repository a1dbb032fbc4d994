import { b4a, dht } from '../packages.js';
import { hex, address, text, counting } from './fixed.js';

const local = address('127.0.0.1', 49737);
const remote = address('203.0.113.9', 50001);
const nodes = [address('127.0.0.1', 40001), address('198.51.100.4', 65535)];

/** The package's own input and output over a socket that only keeps what is sent. */
function io({ persistent, closest = [] }) {
  const sent = [];
  const socket = { trySend: (bytes) => sent.push(b4a.from(bytes)) };
  const requests = [];
  const made = new dht.IO(
    { id: dht.peer.id(local.host, local.port), closest: () => closest },
    { watchNetworkInterfaces: () => ({ destroy() {} }) },
    { firewalled: false, onrequest: (request) => requests.push(request) },
  );
  made.serverSocket = socket;
  made.clientSocket = { trySend: socket.trySend };
  made.ephemeral = !persistent;
  made._secrets = [counting(32, 0x60), counting(32, 0x55)];
  made._tid = 0x1234;
  return { made, sent, requests };
}

function request({ id = false, token = null, internal = false, command, target = null, value = null, to = remote }) {
  const { made, sent } = io({ persistent: id });
  made.createRequest(to, token, internal, command, target, value, null).send(true);
  for (const one of made.inflight) clearTimeout(one._timeout);
  return {
    tid: 0x1234,
    to: text(to),
    id: id ? hex(dht.peer.id(local.host, local.port)) : null,
    token: hex(token),
    internal,
    command,
    target: hex(target),
    value: hex(value),
    bytes: hex(sent[0]),
  };
}

/** How a node answers: the request comes in by `onmessage`, and the package builds the response. */
function response({ id = false, token = false, closest = [], error = 0, value = null }) {
  const asker = io({ persistent: false });
  asker.made.createRequest(local, null, false, 3, counting(32, 7), null, null).send(true);
  for (const one of asker.made.inflight) clearTimeout(one._timeout);
  const node = io({ persistent: id, closest });
  node.made.onmessage(node.made.serverSocket, asker.sent[0], remote);
  const [incoming] = node.requests;
  incoming.sendReply(error, value, token, closest.length > 0);
  return {
    tid: 0x1234,
    to: text(remote),
    id: id ? hex(dht.peer.id(local.host, local.port)) : null,
    token: token ? hex(node.made.token(remote, 1)) : null,
    closer_nodes: closest.length ? closest.map(text) : null,
    error,
    value: hex(value),
    bytes: hex(node.sent[0]),
  };
}

/** A request with a token that the node never gave: error 2, a fresh token, and the closest nodes. */
function refusedToken() {
  const asker = io({ persistent: false });
  asker.made.createRequest(local, counting(32, 1), false, 4, counting(32, 7), counting(3), null).send(true);
  for (const one of asker.made.inflight) clearTimeout(one._timeout);
  const node = io({ persistent: true, closest: nodes });
  node.made.onmessage(node.made.serverSocket, asker.sent[0], remote);
  return { request: hex(asker.sent[0]), from: text(remote), secret: hex(counting(32, 0x55)), response: hex(node.sent[0]) };
}

/** Every combination of `options`, each left out or taken. */
function combinations(options) {
  return Object.entries(options).reduce(
    (all, [name, value]) => all.flatMap((one) => [one, { ...one, [name]: value }]),
    [{}],
  );
}

export function make() {
  const port = b4a.from([0x49, 0xc2]);
  const delay = b4a.from([0xe8, 0x03, 0, 0]);
  const six = b4a.from('7f00000149c2', 'hex');
  return {
    version: 3,
    node: { address: text(local), id: hex(dht.peer.id(local.host, local.port)) },
    secrets: { previous: hex(counting(32, 0x60)), current: hex(counting(32, 0x55)) },
    requests: combinations({ id: true, token: counting(32, 1), internal: true, target: counting(32, 7), value: counting(5) }).map(
      (options) => request({ command: options.internal ? 2 : 3, ...options }),
    ),
    commands: {
      ping: request({ internal: true, command: 0 }),
      ping_nat: request({ internal: true, command: 1, value: port }),
      find_node: request({ internal: true, command: 2, target: counting(32, 7) }),
      down_hint: request({ internal: true, command: 3, value: six }),
      delayed_ping: request({ internal: true, command: 4, value: delay }),
      largest: request({ command: 300, value: b4a.alloc(0) }),
    },
    responses: combinations({ id: true, token: true, closest: nodes, error: 2, value: counting(5) }).map(response),
    refused_token: refusedToken(),
  };
}
