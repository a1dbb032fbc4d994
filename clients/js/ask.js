#!/usr/bin/env node
// Sends a prompt to a gateway and prints the answer as it arrives:
//
//   node ask.js --gateway KEY --bootstrap HOST:PORT[,...] [--model NAME] PROMPT
//
// The API token is in the variable TETHER_API_KEY, so that no list of processes shows it.
const { parseArgs } = require('util')
const { TetherClient } = require('.')

async function main () {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      gateway: { type: 'string' },
      bootstrap: { type: 'string' },
      model: { type: 'string', default: 'tether-tiny' }
    }
  })
  const token = process.env.TETHER_API_KEY
  if (!values.gateway || !values.bootstrap || positionals.length !== 1) {
    throw new Error('usage: node ask.js --gateway KEY --bootstrap HOST:PORT[,...] [--model NAME] PROMPT')
  }
  if (!token) throw new Error('put an API token into the variable TETHER_API_KEY')

  const client = new TetherClient({ gateway: values.gateway, bootstrap: values.bootstrap.split(','), token })
  try {
    const messages = [{ role: 'user', content: positionals[0] }]
    for await (const chunk of client.chat({ model: values.model, messages })) process.stdout.write(chunk.payload.text || '')
    process.stdout.write('\n')
  } finally {
    await client.close()
  }
}

main().catch((error) => {
  process.stderr.write(`ask: ${error.message}\n`)
  process.exitCode = 1
})
