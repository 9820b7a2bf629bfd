"""Talk to a server with OpenAI's client: python examples/chat_client.py [URL].

Start `ctc-drafter serve` in another terminal first, and wait for the line with its address (docs/serving.md).
Answers are exactly those of the model without a drafter. Any client of OpenAI's API works the same way.
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if sys.argv[1:] else "http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id
talk = [{"role": "user", "content": "What is a good name for a cat?"}]

answer = client.chat.completions.create(model=model, messages=talk, max_tokens=32, temperature=0)
print(answer.choices[0].message.content)

talk += [answer.choices[0].message, {"role": "user", "content": "And for a dog?"}]
for event in client.chat.completions.create(model=model, messages=talk, max_tokens=32, seed=1, stream=True):
    print((event.choices and event.choices[0].delta.content) or "", end="", flush=True)
print()
