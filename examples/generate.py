"""Speed up `generate` of a chat model: python examples/generate.py [MODEL [DRAFTER]].

Without a drafter the tokens that follow a repeated passage are copied from the text (prompt lookup), which needs no
training. Without a model the small pair that ships with the package is used: a toy, look at the figures and not at the
text.
"""

import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from ctc_drafter import Speculator
from ctc_drafter.quickstart import DRAFTER_DIR, TARGET_DIR

name, drafter, *_ = [*sys.argv[1:], None, None] if sys.argv[1:] else [str(TARGET_DIR), str(DRAFTER_DIR)]
# In bfloat16, which is faster, a near-tie between two tokens may fall the other way, as with any change of batch size.
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(name)
fast = Speculator(model, drafter)

chat = [{"role": "user", "content": "What are some good ways to relax after a long day at work?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
options = {"do_sample": False, "max_new_tokens": 64}
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
for generate in (model.generate, fast.generate):
    generate(**inputs, **options)  # the first call of each prepares what the others use

start = time.perf_counter()
plain = model.generate(**inputs, **options)
middle = time.perf_counter()
output = fast.generate(**inputs, **options, streamer=streamer)
seconds = time.perf_counter() - middle
print(f"same text: {bool((plain == output).all())}; {fast.stats.tokens_per_step:.2f} tokens per step; ", end="")
print(f"{(middle - start) / seconds:.2f} times as fast as generate")
