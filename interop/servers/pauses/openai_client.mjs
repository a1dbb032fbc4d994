// The official SDK for Node: streams the answer to each argument as a question, and prints each answer as a line.
import { createRequire } from 'node:module'

const OpenAI = createRequire(process.env.NODE_PACKAGES)('openai')

const client = new OpenAI({ maxRetries: 0, timeout: 30_000 })
for (const question of process.argv.slice(2)) {
  const messages = [{ role: 'user', content: question }]
  const stream = await client.chat.completions.create({ model: process.env.MODEL, messages, stream: true, stream_options: { include_usage: true } })
  const chunks = []
  for await (const chunk of stream) chunks.push(chunk)
  const text = chunks.map(chunk => chunk.choices[0]?.delta.content ?? '').join('')
  console.log(text, chunks.at(-1).usage.completion_tokens)
}
