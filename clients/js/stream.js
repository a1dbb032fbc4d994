// `tether/stream/1`: one request, then messages back, limited by credit. docs/wire/tether-stream-1.md specifies every byte.
const crypto = require('crypto')
const c = require('compact-encoding')

const PROTOCOL = 'tether/stream/1'
const VERSION = 1
const OPEN = 1
const PART = 2
const ACCEPT = 3
const DATA = 4
const CREDIT = 5
const CANCEL = 6
const END = 7
const ERROR = 8

const FRAME_PAYLOAD_MAX = 64 * 1024
const MESSAGE_BYTES_MAX = 16 * 1024 * 1024
const WINDOW = 256 * 1024

/** An error from the other side. `code` identifies it; `retryAfterMs`, if present, says when to try again. */
class TetherError extends Error {
  constructor ({ code, message, param, retryAfterMs }) {
    super(message)
    this.name = 'TetherError'
    this.code = code
    if (param !== undefined) this.param = param
    if (retryAfterMs !== undefined) this.retryAfterMs = retryAfterMs
  }
}

const failure = (code, message) => new TetherError({ code, message })

function openFrame (method, body, deadlineMs) {
  const name = Buffer.from(method)
  const head = Buffer.alloc(19 + name.byteLength)
  head[0] = OPEN
  head[1] = VERSION
  head.writeUInt32LE(WINDOW, 2)
  head.writeBigUInt64LE(BigInt(deadlineMs), 6)
  head[14] = name.byteLength
  name.copy(head, 15)
  head.writeUInt32LE(body.byteLength, 15 + name.byteLength)
  return Buffer.concat([head, body.subarray(0, FRAME_PAYLOAD_MAX)])
}

function creditFrame (bytes) {
  const frame = Buffer.alloc(5)
  frame[0] = CREDIT
  frame.writeUInt32LE(bytes, 1)
  return frame
}

/**
 * Calls a streamed method and yields its messages as buffers. Leaving the loop early cancels the call.
 *
 * `mux` is a Protomux, and `body` is a buffer. `deadlineMs` limits the whole call, and 0 means no limit; `acceptMs` limits the
 * wait for the first response.
 */
async function * stream (mux, method, body, { deadlineMs = 0, acceptMs = 10_000 } = {}) {
  if (body.byteLength > MESSAGE_BYTES_MAX) throw failure('request_too_large', 'the request has more than 16 MiB')

  const frames = []
  let wake = null
  let closed = false
  const notify = () => {
    if (wake !== null) wake()
    wake = null
  }
  const channel = mux.createChannel({
    protocol: PROTOCOL,
    // Any number that no other stream of this connection uses.
    id: crypto.randomBytes(16),
    onclose () {
      closed = true
      notify()
    }
  })
  if (channel === null) throw failure('unavailable', 'the connection is closed')
  const frame = channel.addMessage({
    encoding: c.raw,
    onmessage (bytes) {
      // The decoded value is a view of the connection's buffer.
      frames.push(Buffer.from(bytes))
      notify()
    }
  })
  const next = async (withinMs) => {
    const timer = withinMs > 0 ? setTimeout(notify, withinMs) : null
    if (frames.length === 0 && !closed) {
      await new Promise((resolve) => {
        wake = resolve
      })
    }
    clearTimeout(timer)
    if (frames.length > 0) return frames.shift()
    if (closed) throw failure('unavailable', 'the connection closed before the answer was complete')
    throw failure('deadline_exceeded', 'the answer took too long')
  }

  channel.open()
  let ended = false
  try {
    frame.send(openFrame(method, body, deadlineMs))
    for (let at = FRAME_PAYLOAD_MAX; at < body.byteLength; at += FRAME_PAYLOAD_MAX) {
      frame.send(Buffer.concat([Buffer.from([PART]), body.subarray(at, at + FRAME_PAYLOAD_MAX)]))
    }
    const started = Date.now()
    const left = () => (deadlineMs > 0 ? Math.max(1, started + deadlineMs - Date.now()) : 0)
    let accepted = false
    let ungranted = 0
    let parts = []
    let size = 0
    while (true) {
      const bytes = await next(accepted ? left() : acceptMs)
      if (bytes[0] === ERROR || bytes[0] === END) ended = true
      if (bytes[0] === ERROR) throw new TetherError(JSON.parse(bytes.subarray(1).toString()))
      if (bytes[0] === ACCEPT && !accepted) {
        accepted = true
        continue
      }
      if (!accepted) throw failure('internal_error', 'the other side does not speak tether/stream/1')
      if (bytes[0] === END) return
      if (bytes[0] !== DATA || bytes.byteLength < 2) throw failure('internal_error', 'the other side broke the protocol')

      const payload = bytes.subarray(2)
      size += payload.byteLength
      if (size > MESSAGE_BYTES_MAX) throw failure('internal_error', 'a message has more than 16 MiB')
      ungranted += payload.byteLength
      if (ungranted >= WINDOW / 2) {
        frame.send(creditFrame(ungranted))
        ungranted = 0
      }
      parts.push(payload)
      if ((bytes[1] & 1) === 1) continue
      const message = parts.length === 1 ? payload : Buffer.concat(parts)
      parts = []
      size = 0
      yield message
    }
  } finally {
    if (!ended && !closed) frame.send(Buffer.from([CANCEL]))
    channel.close()
  }
}

module.exports = { stream, TetherError, PROTOCOL }
