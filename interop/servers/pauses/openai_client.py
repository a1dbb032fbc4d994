"""The official SDK: streams the answer to each argument as a question, and prints each answer as a line."""

import os
import sys

import openai

client = openai.OpenAI(max_retries=0, timeout=30)
for question in sys.argv[1:]:
    messages = [{"role": "user", "content": question}]
    stream = client.chat.completions.create(model=os.environ["MODEL"], messages=messages, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    print("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks[-1].usage.completion_tokens)
