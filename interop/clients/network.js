// A network of processes of the program under test: bootstrap node, registry, orchestrator, gateway and worker.

import { execFile, spawn } from 'node:child_process';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as soon } from 'node:timers/promises';
import { promisify } from 'node:util';

const LOOPBACK = '127.0.0.1:0';
const PATIENCE_MS = 30_000;

function variable(name) {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is missing: start the tests by interop/run`);
  return value;
}

export const program = variable('TETHER_BIN');

/** Waits until `look` returns a value, and returns this value. */
export async function eventually(what, look, within = PATIENCE_MS) {
  const deadline = performance.now() + within;
  for (;;) {
    const found = await look();
    if (found) return found;
    if (performance.now() >= deadline) throw new Error(`not within ${within / 1000} s: ${what}`);
    await soon(10);
  }
}

/** One process of the network. */
class Node {
  constructor(folder, environment, args) {
    this.output = '';
    // It ends with this process, however that ends.
    const options = { cwd: folder, env: environment, stdio: ['ignore', 'pipe', 'pipe'] };
    this.child = spawn(program, [...args, '--with-parent'], options);
    const take = (piece) => {
      this.output += piece;
    };
    this.child.stdout.setEncoding('utf8').on('data', take);
    this.child.stderr.setEncoding('utf8').on('data', take);
    this.ended = new Promise((done) => this.child.once('exit', (code, signal) => done(signal ?? code)));
    this.ended.then((how) => {
      this.end = how;
    });
  }

  /** Waits for a line that matches the pattern, and returns the match. */
  said(pattern) {
    return eventually(`${pattern} in\n${this.output}`, () => {
      const found = this.output.match(pattern);
      if (!found && this.end !== undefined) throw new Error(`it ended (${this.end})\n${this.output}`);
      return found;
    });
  }

  /** Stops it, and returns how it ended. */
  async stop(signal = 'SIGTERM') {
    this.child.kill(signal);
    const impatient = setTimeout(() => this.child.kill('SIGKILL'), 10_000);
    const how = await this.ended;
    clearTimeout(impatient);
    return how;
  }
}

export class Network {
  nodes = new Map();

  static async start() {
    const network = new Network();
    network.folder = await mkdtemp(join(tmpdir(), 'tether-clients-'));
    try {
      await network.#begin();
    } catch (error) {
      await network.stop();
      throw error;
    }
    return network;
  }

  async #begin() {
    const bootstrap = this.node('bootstrap', ['bootstrap', '--listen', LOOPBACK]);
    this.bootstrap = (await bootstrap.said(/bootstrap node on UDP ([\d.:]+)/))[1];
    const registry = this.node('registry', ['registry', '--listen', LOOPBACK, '--bootstrap', this.bootstrap]);
    await registry.said(/^next: /m);
    this.token = (await readFile(join(this.folder, 'registry', 'api-key'), 'utf8')).trim();
    await this.#join('orchestrator');
    const gateway = await this.#join('gateway', '--bind', LOOPBACK);
    await this.#join('worker');
    await this.gatewayIsUp(gateway);
    await eventually('a worker that is ready', async () => (await this.workers()).length === 1);
  }

  /** Reads the gateway's key and its HTTP address from its output. */
  async gatewayIsUp(gateway) {
    this.gateway = (await gateway.said(/^gateway ([0-9a-f]{64}) on UDP/m))[1];
    this.url = (await gateway.said(/^OpenAI address (\S+)\/v1/m))[1];
  }

  /** Starts a node with its own folder. */
  node(name, args) {
    const environment = { PATH: process.env.PATH, HOME: this.folder };
    const node = new Node(this.folder, environment, [...args, '--data-dir', join(this.folder, name)]);
    this.nodes.set(name, node);
    return node;
  }

  async #join(role, ...more) {
    const invite = ['invite', '--role', role, '--data-dir', join(this.folder, 'registry')];
    const { stdout } = await promisify(execFile)(program, invite, { env: { HOME: this.folder } });
    return this.node(role, ['join', stdout.trim().split(' ').at(-1), '--listen', LOOPBACK, ...more]);
  }

  /** Restarts the stopped gateway. */
  async restartGateway() {
    const gateway = this.node('gateway', ['gateway', '--listen', LOOPBACK, '--bind', LOOPBACK]);
    await this.gatewayIsUp(gateway);
  }

  /** Returns the latest reports of the workers that have a model in memory. This needs an admin key. */
  async workers() {
    const headers = { authorization: `Bearer ${this.token}` };
    const answer = await fetch(`${this.url}/admin/v1/nodes`, { headers }).catch(() => null);
    if (!answer?.ok) return [];
    const { workers } = await answer.json();
    return workers.filter(({ report }) => report.modelCache.some(({ state }) => state === 'ready'));
  }

  /** Stops all processes, and returns those that did not end successfully. */
  async stop() {
    const nodes = [...this.nodes].reverse();
    const ends = await Promise.all(nodes.map(async ([name, node]) => [name, node.end ?? (await node.stop())]));
    await rm(this.folder, { recursive: true, force: true });
    return ends.filter(([, how]) => how !== 0);
  }
}
