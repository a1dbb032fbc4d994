"""LiteLLM: streams the answer to each argument as a question, and prints each answer as a line."""

import os
import sys

import litellm

for question in sys.argv[1:]:
    messages = [{"role": "user", "content": question}]
    chunks = list(litellm.completion(model=f"openai/{os.environ['MODEL']}", messages=messages, stream=True, stream_options={"include_usage": True}, num_retries=0, timeout=30))
    usage = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    print("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), usage[-1].completion_tokens)
