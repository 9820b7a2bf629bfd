"""Answer many prompts with a batch that stays full: python examples/many_prompts.py [MODEL [DRAFTER]].

A row that ends makes room for the next prompt. Every answer is sampled by a seed of its own, and is the same whatever
else is in the batch.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from ctc_drafter import AutoDrafter, DecodingConfig, Sampled, Target, generate_many, warpers
from ctc_drafter.quickstart import DRAFTER_DIR, TARGET_DIR

name, drafter, *_ = [*sys.argv[1:], "prompt_lookup"] if sys.argv[1:] else [str(TARGET_DIR), str(DRAFTER_DIR)]
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
target = Target.wrap(model)


def prompts():
    """Token ids, made when there is room for them: this may be a stream that never ends."""
    for number in range(6):
        chat = [{"role": "user", "content": f"Tom has {number + 2} boxes of 5 pens. How many pens has he?"}]
        yield tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


sampler = Sampled(seeds=7, processors=warpers(temperature=0.7, top_p=0.9))
config = DecodingConfig(nodes=16, sampler=sampler)
draft = AutoDrafter.from_pretrained(drafter, model)
for number, tokens in generate_many(target, draft, prompts(), in_flight=4, max_new_tokens=48, config=config):
    print(f"{number}: {tokenizer.decode(tokens, skip_special_tokens=True).strip()!r}")
