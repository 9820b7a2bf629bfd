"""`ctc-drafter generate`: answers prompts, streamed or in batches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ctc_drafter.chat import AnswerText, encode_conversation, eos_ids
from ctc_drafter.decode.batch import AUTO, DecodingConfig, Method, Nodes
from ctc_drafter.decode.budget import Budget
from ctc_drafter.decode.generate import Generation, generate, plain_generate
from ctc_drafter.decode.prefill import check_prompts
from ctc_drafter.decode.profile import budget_for, settled
from ctc_drafter.decode.sampling import ARGMAX, Greedy, ModelSampling, Sampled, Sampler, row_seeds, warpers
from ctc_drafter.decode.sequence import OnTokens
from ctc_drafter.decode.stats import Stats
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.evaluate.tasks import Prompt
from ctc_drafter.files import write_json
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerSettings:
    """`raw` leaves the chat template out. Temperature 0 is greedy; settings of sampling that are None are the model's,
    see `filled`. `stop` holds texts that end an answer. With `nodes` "auto" trees are as large as pays on this machine;
    with a number and `budget` so, too, up to that number.

    Raises `UserError` for contradictions.
    """

    max_new_tokens: int
    batch_size: int
    nodes: Nodes
    raw: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    budget: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature and (self.top_k or self.top_p not in (None, 1)):
            raise UserError("top-k and top-p are for sampling; give --temperature above 0 as well")
        if not all(self.stop):
            raise UserError("an empty text cannot end an answer; give some text to --stop")
        self.warpers()

    def warpers(self) -> LogitsProcessorList:
        top_p = 1.0 if self.top_p is None else self.top_p
        chosen = warpers(self.temperature, self.top_k or 0, top_p, self.min_p) if self.temperature else ()
        return LogitsProcessorList([*self.penalty(), *chosen])

    def penalty(self) -> LogitsProcessorList:
        if self.repetition_penalty == 1:
            return LogitsProcessorList()
        return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(self.repetition_penalty)])

    def filled(self, own: ModelSampling) -> AnswerSettings:
        """With the model's settings of sampling for those that were not given; a line in the log where it samples."""
        changes: dict[str, Any] = {"repetition_penalty": own.repetition_penalty}
        if self.temperature is None:
            changes["temperature"] = own.temperature
            if own.temperature:
                LOG.info("sampling as the model's generation config says; --temperature 0 decodes greedily")
        if changes.get("temperature", self.temperature):
            changes |= {"top_k": own.top_k} if self.top_k is None else {}
            changes |= {"top_p": own.top_p} if self.top_p is None else {}
            changes |= {"min_p": own.min_p}
        return replace(self, **changes)


@dataclass(frozen=True)
class Answerer:
    """Target, tokenizer and settings; without a drafter it decodes plainly."""

    target: Target
    drafter: Drafter | None
    tokenizer: PreTrainedTokenizerBase
    settings: AnswerSettings

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt. Raises `UserError` for a prompt that cannot be answered, before any is."""
        several = next((prompt for prompt in prompts if len(prompt.turns) > 1 + len(prompt.answers)), None)
        if several:
            raise UserError(f"prompt {several.id} has {len(several.turns)} turns; generate answers one, eval all")
        raw = self.settings.raw
        encoded = [encode_conversation(self.tokenizer, p.turns, p.answers, raw, p.system) for p in prompts]
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
        """For all batches, the last and smallest, too."""
        nodes, rows = self.settings.nodes, self.settings.batch_size
        if self.drafter is None:
            return None
        if nodes == AUTO:
            return settled(Method(self.target, self.drafter, DecodingConfig(nodes)), rows).config.budget
        return budget_for(self.target, self.drafter, nodes, rows) if self.settings.budget else None

    def sampler(self, numbers: Sequence[int]) -> Sampler:
        if not self.settings.temperature:
            return Greedy(penalty) if (penalty := self.settings.penalty()) else ARGMAX
        return Sampled(row_seeds(self.settings.seed, numbers), self.settings.warpers())

    def shown(self) -> AnswerText:
        """Text of an answer, which ends before a stop string, as the server's does."""
        return AnswerText(self.tokenizer, self.settings.stop)

    def text(self, tokens: Sequence[int]) -> str:
        shown = self.shown()
        return "".join(shown.push(token) for token in tokens if not shown.stopped) + shown.close()

    def criteria(self) -> StoppingCriteriaList:
        stop = list(self.settings.stop)
        return StoppingCriteriaList([StopStringCriteria(self.tokenizer, stop)] if stop else [])


def answer(
    answerer: Answerer, prompts: Sequence[Prompt], meta: dict[str, Any], json_out: Path | None, out: TextIO
) -> None:
    """Writes the answers to `out`, a line of figures to stderr, and all of it to `json_out` after every batch."""
    encoded = answerer.encode(prompts)
    if not answerer.settings.raw and not answerer.tokenizer.chat_template:
        print("note: the target has no chat template, and goes on with the text as it stands", file=sys.stderr)
    outputs: list[dict[str, Any]] = []
    stats = Stats()
    size = answerer.settings.batch_size
    for start in range(0, len(prompts), size):
        batch = encoded[start : start + size]
        generation = stream(answerer, batch, out) if len(prompts) == 1 else answerer.run(batch, start)
        stats += generation.stats
        for prompt, tokens in zip(prompts[start : start + size], generation.tokens, strict=True):
            text = answerer.text(tokens)
            outputs.append({"id": prompt.id, "prompt": prompt.turns[-1], "text": text, "tokens": tokens})
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
    print(figures_line(stats), file=sys.stderr)


ENOUGH = 50  # tokens behind which the first calls' cost matters little


def figures_line(stats: Stats) -> str:
    """Tokens, tokens per step, and the speed of answers that are long enough to tell it."""
    line = f"{stats.tokens} tokens, {stats.tokens_per_step:.2f} tokens per step"
    return line if stats.tokens < ENOUGH else f"{line}, {stats.tokens / max(stats.seconds, 1e-9):.0f} tokens/s"


def stream(answerer: Answerer, prompts: list[list[int]], out: TextIO, start: int = 0) -> Generation:
    """Writes the answer to the one prompt as it comes; `start` as for `Answerer.run`."""
    shown = answerer.shown()

    def show(_row: int, tokens: list[int]) -> None:
        print("".join(shown.push(token) for token in tokens if not shown.stopped), end="", file=out, flush=True)

    generation = answerer.run(prompts, start, show)
    print(shown.close(), file=out, flush=True)
    return generation
