"""LangChain: streams the answer to each argument as a question, and prints each answer as a line."""

import os
import sys

from langchain_openai import ChatOpenAI

model = ChatOpenAI(model=os.environ["MODEL"], max_retries=0, timeout=30, stream_usage=True)
for question in sys.argv[1:]:
    chunks = list(model.stream(question))
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    print("".join(chunk.content for chunk in chunks), usage[-1]["output_tokens"])
