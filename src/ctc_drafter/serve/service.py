"""From API requests to completions: prompts, samplers, limits."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import jinja2
from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import apply_template, eos_ids, is_unicode
from ctc_drafter.decode.prefill import check_prompts
from ctc_drafter.decode.sampling import ARGMAX, Sampled, Sampler, warpers
from ctc_drafter.serve.engine import Engine
from ctc_drafter.serve.middleware import APIError
from ctc_drafter.serve.protocol import MOST_CHOICES, Message, Sampling
from ctc_drafter.serve.requests import AnswerText, Completion
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError


@dataclass(frozen=True)
class Limits:
    """max_new_tokens: longest answer; requests for longer ones are cut there. max_prompt: tokens, None for what
    the context holds. max_body: bytes. timeout: seconds of an answer, its wait included. grace: seconds that running
    answers have left at shutdown."""

    max_new_tokens: int = 2048
    max_prompt: int | None = None
    max_body: int = 1 << 20
    timeout: float = 300.0
    grace: float = 10.0

    def __post_init__(self) -> None:
        for name in ("timeout", "grace"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}; give a number of seconds")
        for name in ("max_new_tokens", "max_body", "timeout"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; give more than 0")
        if self.max_prompt is not None and self.max_prompt < 1:
            raise UserError(f"max_prompt is {self.max_prompt}; give at least 1 token")
        if self.grace < 0:
            raise UserError(f"grace is {self.grace}; give at least 0 seconds")


@dataclass(frozen=True)
class Service:
    """An engine with the tokenizer of its target and the model's public name."""

    engine: Engine
    target: Target
    tokenizer: PreTrainedTokenizerBase
    name: str
    limits: Limits = field(default_factory=Limits)
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            raise APIError(404, f"there is no model {model}; use {self.name}", param="model", code="model_not_found")

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that ends where the answer begins. Raises `APIError`."""
        check_text(message.text for message in messages)
        roles = {"developer": "system"}
        turns = [{"role": roles.get(each.role, each.role), "content": each.text} for each in messages]
        try:
            ids = apply_template(self.tokenizer, turns)
        except jinja2.TemplateError as error:
            raise APIError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        return self.check_prompt(ids)

    def encode_text(self, text: str, place: int = 0) -> list[int]:
        check_text([text])
        return self.check_prompt(list(self.tokenizer(text).input_ids), place)

    def check_prompt(self, ids: list[int], place: int = 0) -> list[int]:
        """The same ids. Raises `APIError` for a prompt that is too long, empty or unknown to the target.

        place: its number among the prompts of a request.
        """
        most = min(self.limits.max_prompt or self.target.context, self.target.context - 1)
        if len(ids) > most:
            message = f"the prompt has {len(ids)} tokens and may have {most}; shorten it"
            raise APIError(400, message, code="context_length_exceeded")
        check_prompts(self.target, [ids], place)
        return ids

    def check_choices(self, count: int) -> None:
        """Raises `APIError` for more answers than go together."""
        most = min(MOST_CHOICES, self.engine.most)
        if count > most:
            raise APIError(400, f"{count} answers are asked for; at most {most} go together", param="n")

    def jobs(
        self,
        prompts: Sequence[list[int]],
        request: Sampling,
        limit: int | None,
        *,
        n: int = 1,
        stop: Sequence[str] = (),
        top: int | None = None,
        method: str | None = None,
        trace: bool = False,
    ) -> list[Completion]:
        """n choices for each prompt, in order."""
        self.check_choices(len(prompts) * n)
        eos = frozenset(eos_ids(self.target.model, self.tokenizer))
        sampler = sampler_of(request)
        deadline = time.monotonic() + self.limits.timeout
        return [
            Completion(
                choice,
                ids,
                min(limit or self.limits.max_new_tokens, self.limits.max_new_tokens, self.target.context - len(ids)),
                eos,
                sampler=sampler,
                method=method or next(iter(self.engine.batches)),
                shown=AnswerText(self.tokenizer, stop),
                top=top,
                trace=trace,
                deadline=deadline,
            )
            for ids in prompts
            for choice in range(n)
        ]


def sampler_of(request: Sampling) -> Sampler:
    """Greedy at temperature 0. Answers with a seed are those of `ctc-drafter generate --seed`."""
    temperature = 1.0 if request.temperature is None else request.temperature
    if temperature == 0:
        return ARGMAX
    seed = secrets.randbits(63) if request.seed is None else request.seed
    return Sampled(seed, warpers(temperature, request.top_k or 0, 1.0 if request.top_p is None else request.top_p))


def check_text(texts: Iterable[str]) -> None:
    for text in texts:
        if not is_unicode(text):
            raise APIError(400, "the text is not valid Unicode; a surrogate stands alone")
