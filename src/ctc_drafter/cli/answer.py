"""`ctc-drafter generate`: answers prompts, streamed or in batches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from ctc_drafter.chat import TextStream, decode, encode_conversation, eos_ids
from ctc_drafter.decode.budget import Budget
from ctc_drafter.decode.generate import Generation, generate, plain_generate
from ctc_drafter.decode.prefill import check_prompts
from ctc_drafter.decode.profile import budget_for
from ctc_drafter.decode.sampling import ARGMAX, Sampled, Sampler, row_seeds, warpers
from ctc_drafter.decode.sequence import OnTokens
from ctc_drafter.decode.stats import Stats
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.evaluate.tasks import Prompt
from ctc_drafter.files import write_json
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError


@dataclass(frozen=True)
class AnswerSettings:
    """`raw` leaves the chat template out. Temperature 0 is greedy; `stop` holds texts that end an answer. With `budget`
    trees are as large as pays on this machine, up to `nodes`.

    Raises `UserError` for contradictions.
    """

    max_new_tokens: int
    batch_size: int
    nodes: int
    raw: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    budget: bool = False

    def __post_init__(self) -> None:
        if not self.temperature and (self.top_k or self.top_p != 1):
            raise UserError("top-k and top-p are for sampling; give --temperature above 0 as well")
        if not all(self.stop):
            raise UserError("an empty text cannot end an answer; give some text to --stop")
        self.warpers()

    def warpers(self) -> LogitsProcessorList:
        return warpers(self.temperature, self.top_k, self.top_p) if self.temperature else LogitsProcessorList()


@dataclass(frozen=True)
class Answerer:
    """Target, tokenizer and settings; without a drafter it decodes plainly."""

    target: Target
    drafter: Drafter | None
    tokenizer: PreTrainedTokenizerBase
    settings: AnswerSettings

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt. Raises `UserError` for a prompt that cannot be answered, before any is."""
        several = next((prompt for prompt in prompts if len(prompt.turns) > 1), None)
        if several:
            raise UserError(f"prompt {several.id} has {len(several.turns)} turns; generate answers one, eval all")
        encoded = [encode_conversation(self.tokenizer, prompt.turns, raw=self.settings.raw) for prompt in prompts]
        check_prompts(self.target, encoded)
        longest, context = max(map(len, encoded)), self.target.context
        if longest >= context:
            raise UserError(f"a prompt has {longest} tokens, but the target's context is {context}; shorten it")
        return encoded

    def run(self, prompts: list[list[int]], start: int = 0, on_tokens: OnTokens | None = None) -> Generation:
        """Continues prompts; `start` is the index of the first one, from which seeds are derived."""
        options: dict[str, Any] = {
            "max_new_tokens": self.settings.max_new_tokens,
            "eos": eos_ids(self.target.model, self.tokenizer),
            "sampler": self.sampler(range(start, start + len(prompts))),
            "criteria": self.criteria(),
            "on_tokens": on_tokens,
        }
        if self.drafter is None:
            return plain_generate(self.target, prompts, **options)
        return generate(self.target, self.drafter, prompts, nodes=self.settings.nodes, budget=self.budget, **options)

    @cached_property
    def budget(self) -> Budget | None:
        if self.drafter is None or not self.settings.budget:
            return None
        return budget_for(self.target, self.drafter, self.settings.nodes, self.settings.batch_size)

    def sampler(self, numbers: Sequence[int]) -> Sampler:
        if not self.settings.temperature:
            return ARGMAX
        return Sampled(row_seeds(self.settings.seed, numbers), self.settings.warpers())

    def criteria(self) -> StoppingCriteriaList:
        stop = list(self.settings.stop)
        return StoppingCriteriaList([StopStringCriteria(self.tokenizer, stop)] if stop else [])


def answer(
    answerer: Answerer, prompts: Sequence[Prompt], meta: dict[str, Any], json_out: Path | None, out: TextIO
) -> None:
    """Writes the answers to `out`, a line of figures to stderr, and all of it to `json_out` after every batch."""
    encoded = answerer.encode(prompts)
    outputs: list[dict[str, Any]] = []
    stats = Stats()
    size = answerer.settings.batch_size
    for start in range(0, len(prompts), size):
        batch = encoded[start : start + size]
        generation = _stream(answerer, batch, out) if len(prompts) == 1 else answerer.run(batch, start)
        stats += generation.stats
        for prompt, tokens in zip(prompts[start : start + size], generation.tokens, strict=True):
            text = decode(answerer.tokenizer, tokens)
            outputs.append({"id": prompt.id, "prompt": prompt.turns[0], "text": text, "tokens": tokens})
            if len(prompts) > 1:
                print(f"[{prompt.id}]\n{text}\n", file=out, flush=True)
        if json_out:
            settings, figures = asdict(answerer.settings), asdict(stats) | {"beta": stats.beta}
            write_json(json_out, {"meta": meta | settings, "outputs": outputs, "stats": figures})
    context = answerer.target.context
    beyond = [o["id"] for o, ids in zip(outputs, encoded, strict=True) if len(ids) + len(o["tokens"]) > context]
    if beyond:
        note = f"note: {len(beyond)} answers, the first {beyond[0]}, go beyond the target's context of {context} tokens"
        print(note, file=sys.stderr)
    speed = stats.tokens / max(stats.seconds, 1e-9)
    print(f"{stats.tokens} tokens, {speed:.0f} tokens/s, β {stats.beta:.2f}", file=sys.stderr)


def _stream(answerer: Answerer, prompts: list[list[int]], out: TextIO) -> Generation:
    stream = TextStream(answerer.tokenizer)

    def show(_row: int, tokens: list[int]) -> None:
        print(stream.push(tokens), end="", file=out, flush=True)

    generation = answerer.run(prompts, on_tokens=show)
    print(stream.close(), file=out, flush=True)
    return generation
