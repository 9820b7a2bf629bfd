"""transformers' own `generate` as methods under test.

`hf` with its usual cache, `hf-compiled` with its static cache and compiled forward, `hf-lookup` with
`prompt_lookup_num_tokens`, `hf-assisted=DIR` with a smaller model of the same tokenizer as its assistant. A compiled
forward is kept on the model by transformers; the others leave it alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from ctc_drafter.decode.generate import Generation
from ctc_drafter.decode.stats import Stats
from ctc_drafter.evaluate.methods import Calibration, Contender, Decoding
from ctc_drafter.target.checks import load_causal_lm
from ctc_drafter.types import UserError

HF, HF_COMPILED, HF_LOOKUP, HF_ASSISTED = "hf", "hf-compiled", "hf-lookup", "hf-assisted"
NAMES = (HF, HF_COMPILED, HF_LOOKUP, HF_ASSISTED)
ROW_BY_ROW = (HF_LOOKUP, HF_ASSISTED)
LOOKUP_TOKENS = 10  # what transformers' documentation uses
LOOKUP_MATCH = 2  # the longest match that transformers looks for unless it is told otherwise


class Bursts(BaseStreamer):
    """Sizes of what one row's `generate` hands out at a time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.sizes.append(value.numel())

    def end(self) -> None:
        """Nothing is held back."""


def stock_contender(decoding: Decoding, text: str) -> Contender:
    """One of `NAMES`, as `also.parse_also` returns it, greedy, until the same ends as `decoding`'s."""
    name, _, place = text.partition("=")
    config, model = generation_config(decoding, name), decoding.target.model
    assistant = load_assistant(place, decoding) if place else None

    def run(prompts: list[list[int]], _timed: bool, _: Calibration | None) -> Generation:
        begin = time.perf_counter()
        # Assisted generation and streamers take a row at a time.
        groups = [[prompt] for prompt in prompts] if name in ROW_BY_ROW else [prompts]
        rows = [row for group in groups for row in generated(model, group, config, assistant)]
        stats = Stats(seconds=time.perf_counter() - begin)
        for tokens, accepted in rows:
            stats.tokens += len(tokens) - sum(each + 1 for each in accepted)
            for count in accepted:
                stats.count(count, count + 1)
        return Generation([tokens for tokens, _ in rows], stats, [accepted for _, accepted in rows])

    return Contender(name, None, run)


def generation_config(decoding: Decoding, name: str) -> GenerationConfig:
    ends = sorted(decoding.eos)
    options: dict[str, Any] = {"pad_token_id": ends[0] if ends else 0, "eos_token_id": ends or None}
    if name == HF_LOOKUP:
        options["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
    if name == HF_COMPILED:
        options |= {"cache_implementation": "static", "compile_config": compile_config()}
    return GenerationConfig(max_new_tokens=decoding.max_new_tokens, do_sample=False, **options)


def load_assistant(place: str, decoding: Decoding) -> PreTrainedModel:
    """The assistant, in the target's dtype and on its device. Raises `UserError` for one that cannot be it."""
    target = decoding.target
    try:
        assistant = load_causal_lm(place, dtype=target.dtype)
    except UserError as error:
        raise UserError(f"no assistant could be loaded: {error}") from error
    if assistant.config.get_text_config().vocab_size != target.model.config.get_text_config().vocab_size:
        raise UserError(f"the assistant {place} has another vocabulary than the target; give one of its tokenizer")
    return assistant.to(target.device).eval()


def compile_config() -> CompileConfig:
    config = CompileConfig()
    config._compile_all_devices = True  # transformers has no public way to ask for it on a CPU
    return config


def generated(
    model: PreTrainedModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    assistant: PreTrainedModel | None = None,
) -> list[tuple[list[int], list[int]]]:
    """New tokens of each row up to its end, and accepted tokens of each step after the first token."""
    width = max(map(len, prompts))
    filler = config.pad_token_id or 0
    padded = [[filler] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    device = model.device
    bursts = Bursts() if len(prompts) == 1 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that do not suit each other in its view
        ids = model.generate(
            torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
            streamer=bursts,
            assistant_model=assistant,
        )
    rows = [cut(row, config.eos_token_id or ()) for row in ids[:, width:].tolist()]
    return [(row, accepted(len(row), bursts)) for row in rows]


def cut(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens of a row without padding."""
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: last + 1]


def accepted(tokens: int, bursts: Bursts | None) -> list[int]:
    """Accepted drafts of each step, the prefill's token left out: 0 each where tokens come one by one."""
    if bursts is None:
        return [0] * (tokens - 1)
    first, *rest = bursts.sizes[1:]  # the first of all is the prompt
    return [size - 1 for size in ([first - 1] if first > 1 else []) + rest]
