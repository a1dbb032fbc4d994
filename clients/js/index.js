// Calls a Tether gateway by its public key, without an address and without HTTP.
//
//   const client = new TetherClient({ gateway, token, bootstrap: ['192.0.2.1:49737'] })
//   for await (const chunk of client.submit({ modelId: 'tether-tiny', input: 'Hello' })) process.stdout.write(chunk.payload.text)
//   await client.close()
const DHT = require('hyperdht')
const Protomux = require('protomux')
const ProtomuxRPC = require('protomux-rpc')
const c = require('compact-encoding')
const { stream, TetherError } = require('./stream')

const SUBMIT = 'infer.submit'
const MODELS = 'infer.models'

/** Errors of the connection itself, with the codes of the protocol. */
const CODES = {
  CHANNEL_CLOSED: 'unavailable',
  CHANNEL_DESTROYED: 'unavailable',
  TIMEOUT_EXCEEDED: 'deadline_exceeded',
  UNKNOWN_METHOD: 'unknown_method'
}

/** Timeout for opening a connection, in milliseconds. */
const CONNECT_MS = 10_000

class TetherClient {
  /**
   * `gateway` is the gateway's public key as 64 hex digits or a buffer, and `token` is an API token. `bootstrap` lists nodes
   * of the network as `host:port`. An existing HyperDHT node can be given as `dht`; the caller then closes it.
   */
  constructor ({ gateway, token, bootstrap, dht = null, keyPair = DHT.keyPair() }) {
    this.gateway = typeof gateway === 'string' ? Buffer.from(gateway, 'hex') : Buffer.from(gateway)
    if (this.gateway.byteLength !== 32) throw new TypeError("the gateway's public key has 64 hex digits")
    if (dht === null && !(bootstrap && bootstrap.length > 0)) throw new TypeError('name a bootstrap node, such as 192.0.2.1:49737')
    this.token = token
    this.ownsDht = dht === null
    this.dht = dht || new DHT({ bootstrap: bootstrap.map(address), ephemeral: true })
    this.keyPair = keyPair
    this.connection = null
  }

  /** Yields the `Infer.Chunk`s of a job. `request` is an `Infer.Submission`: `{ modelId, input, ... }`. */
  async * submit (request, options = {}) {
    yield * this.#chunks({ token: this.token, request }, options)
  }

  /** Yields the `Infer.Chunk`s of a chat. `body` is that of OpenAI's chat completions: `{ model, messages, ... }`. */
  async * chat (chat, options = {}) {
    yield * this.#chunks({ token: this.token, chat }, options)
  }

  /** Returns the whole answer to an `Infer.Submission` as one value. */
  async ask (request, options = {}) {
    return this.call(SUBMIT, { token: this.token, request }, options)
  }

  /** Lists the models that the token may use. */
  async models (options = {}) {
    return this.call(MODELS, { token: this.token }, options)
  }

  /** Calls a unary method with JSON values, as any `@hyperswarm/rpc` client can. */
  async call (method, value, { timeoutMs = 120_000 } = {}) {
    const { rpc } = await this.#connect()
    try {
      return await rpc.request(method, value, { timeout: timeoutMs })
    } catch (error) {
      // The reason is in the cause. The code of the outer error only says that there is one.
      const cause = error.cause
      if (cause && cause.code) throw new TetherError({ code: cause.code, message: cause.message })
      if (CODES[error.code]) throw new TetherError({ code: CODES[error.code], message: error.message })
      throw error
    }
  }

  /** Closes the connection, and the DHT node if the client created it. */
  async close () {
    const connection = this.connection
    this.connection = null
    if (connection !== null) (await connection.catch(() => null))?.socket.destroy()
    if (this.ownsDht) await this.dht.destroy()
  }

  async * #chunks (submission, options) {
    const { mux } = await this.#connect()
    const body = Buffer.from(JSON.stringify(submission))
    for await (const message of stream(mux, SUBMIT, body, options)) yield JSON.parse(message.toString())
  }

  /** Returns the connection, which all calls share. A broken one is replaced. */
  #connect () {
    if (this.connection === null) {
      const opening = this.#open()
      this.connection = opening
      const forget = () => {
        if (this.connection === opening) this.connection = null
      }
      opening.then(({ socket }) => socket.once('close', forget), forget)
    }
    return this.connection
  }

  async #open () {
    const socket = this.dht.connect(this.gateway, { keyPair: this.keyPair })
    // Callers that wait for the connection get its errors. Later, each call does.
    socket.on('error', () => {})
    const timer = setTimeout(() => socket.destroy(new Error('the gateway does not answer')), CONNECT_MS)
    try {
      const opened = await socket.opened
      if (!opened) throw new TetherError({ code: 'unavailable', message: 'the gateway does not answer' })
    } finally {
      clearTimeout(timer)
    }
    const mux = Protomux.from(socket)
    const rpc = new ProtomuxRPC(mux, { id: this.gateway, valueEncoding: c.json })
    return { socket, mux, rpc }
  }
}

function address (text) {
  const at = text.lastIndexOf(':')
  return { host: text.slice(0, at), port: Number(text.slice(at + 1)) }
}

module.exports = { TetherClient, TetherError }
