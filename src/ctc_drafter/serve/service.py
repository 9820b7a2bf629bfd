"""From API requests to completions: prompts, samplers, limits."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ParamSpec, TypeVar

import jinja2
import torch
from starlette.concurrency import run_in_threadpool
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from ctc_drafter.chat import AnswerText, apply_template, encode_text, eos_ids, is_unicode, special_texts
from ctc_drafter.decode.prefill import check_prompts
from ctc_drafter.decode.processors import CountPenalty
from ctc_drafter.decode.sampling import ARGMAX, Greedy, Sampled, Sampler, warpers
from ctc_drafter.serve.engine import Engine
from ctc_drafter.serve.messages import Message, Tool
from ctc_drafter.serve.middleware import APIError
from ctc_drafter.serve.protocol import MOST_CHOICES, ResponseFormat, Sampling
from ctc_drafter.serve.requests import Completion
from ctc_drafter.serve.structured import OBJECT, Grammar, Vocabulary
from ctc_drafter.serve.tool_choice import call_grammar
from ctc_drafter.serve.tools import ToolFormat, check_tools, format_of, source_of
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError

# What templates raise about conversations that they were not written for.
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
P = ParamSpec("P")
R = TypeVar("R")
TOKENISED_AT_ONCE = 2  # prompts


@dataclass(frozen=True)
class Limits:
    """max_new_tokens: longest answer; requests for longer ones are cut there. max_prompt: tokens, None for what
    the context holds. max_body: bytes. timeout: seconds of an answer, its wait included. grace: seconds that running
    answers have left at shutdown. lenient: whether unknown fields of requests are left out, not refused."""

    max_new_tokens: int = 2048
    max_prompt: int | None = None
    max_body: int = 1 << 20
    timeout: float = 300.0
    grace: float = 10.0
    lenient: bool = False

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
    tokenising: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(TOKENISED_AT_ONCE))

    async def encoded(self, encode: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """What `encode` returns for these arguments, on another thread, `TOKENISED_AT_ONCE` of them at a time: a
        prompt of a megabyte takes a hundred and fifty while it becomes tokens."""
        async with self.tokenising:
            return await run_in_threadpool(encode, *args, **options)

    @cached_property
    def longest_token(self) -> int:
        """Characters that a token stands for at most, with a space that some tokenizers drop."""
        return 1 + max(map(len, self.tokenizer.get_vocab()), default=0)

    @property
    def most_prompt(self) -> int:
        """Tokens that a prompt may have."""
        return min(self.limits.max_prompt or self.target.context, self.target.context - 1)

    def check_length(self, texts: Iterable[str]) -> None:
        """Raises `APIError` for texts that no tokenizer could make few enough tokens of, before any tries."""
        length, most = sum(map(len, texts)), self.most_prompt * self.longest_token
        if length > most:
            message = f"the prompt has {length} characters, and may have {self.most_prompt} tokens; shorten it"
            raise APIError(400, message, code="context_length_exceeded")

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            raise APIError(404, f"there is no model {model}; use {self.name}", param="model", code="model_not_found")

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        options: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], ToolFormat | None]:
        """Token ids of a conversation that ends where the answer begins, and how its tool calls are read, where it has
        tools. options: variables of the chat template. Raises `APIError`."""
        turns = [message.turn() for message in messages]
        given = [tool.model_dump(exclude_unset=True) for tool in tools]
        text = json.dumps([turns, given, dict(options or {})], ensure_ascii=False)
        check_text([text])
        self.check_length([text])
        source = source_of(self.tokenizer, tools)
        check_tools(source, messages, tools)
        try:
            ids = apply_template(self.tokenizer, turns, given, options)
        except REFUSALS as error:
            raise APIError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        ids = self.check_prompt(ids)
        return ids, format_of(self.tokenizer, source, tools, ids) if tools else None

    def encode_text(self, text: str, place: int = 0) -> list[int]:
        check_text([text])
        self.check_length([text])
        return self.check_prompt(encode_text(self.tokenizer, text), place)

    def check_prompt(self, ids: list[int], place: int = 0) -> list[int]:
        """The same ids. Raises `APIError` for a prompt that is too long, empty or unknown to the target.

        place: its number among the prompts of a request.
        """
        if len(ids) > self.most_prompt:
            message = f"the prompt has {len(ids)} tokens and may have {self.most_prompt}; shorten it"
            raise APIError(400, message, code="context_length_exceeded")
        check_prompts(self.target, [ids], place)
        return ids

    def check_choices(self, count: int) -> None:
        """Raises `APIError` for more answers than go together."""
        most = min(MOST_CHOICES, self.engine.most)
        if count > most:
            raise APIError(400, f"{count} answers are asked for; at most {most} go together", param="n")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        eos = eos_ids(self.target.model, self.tokenizer)
        return Vocabulary.of(self.tokenizer, self.target.vocab_size, eos)

    def grammar(self, form: ResponseFormat | None) -> Grammar | None:
        """What an answer of this format may be; None for any text. Raises `UserError`. Large schemas take a second."""
        if form is None:
            return None
        return self.vocabulary.grammar(form.json_schema.definition if form.json_schema else OBJECT)

    def call_grammar(self, tools: Sequence[Tool], several: bool) -> Grammar:
        """An answer that is a call of one of the tools, or of `several`. Raises `UserError`."""
        special = list(special_texts(self.tokenizer).values())
        text = call_grammar(source_of(self.tokenizer, tools), tools, several, special)
        return self.vocabulary.lark(text, "tools: their parameters")

    def check_tokens(self, request: Sampling) -> None:
        """Raises `APIError` for settings that name tokens the target does not have."""
        named = {"stop_token_ids": request.stop_token_ids or (), "logit_bias": map(int, request.logit_bias or ())}
        for param, tokens in named.items():
            for token in tokens:
                if not 0 <= token < self.target.vocab_size:
                    most = self.target.vocab_size - 1
                    raise APIError(400, f"{param}: there is no token {token}; the last one is {most}", param=param)

    def completions(
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
        form: ToolFormat | None = None,
        grammar: Grammar | None = None,
    ) -> list[Completion]:
        """n choices for each prompt, in order. form: of tool calls, whose marks stay in the text. grammar: what answers
        may be."""
        self.check_choices(len(prompts) * n)
        self.check_tokens(request)
        asked = with_defaults(request, self.target.model.generation_config)
        own = () if request.ignore_eos else eos_ids(self.target.model, self.tokenizer)
        eos = frozenset((*own, *(request.stop_token_ids or ())))
        seed = secrets.randbits(63) if request.seed is None else request.seed

        def sampler(ids: list[int]) -> Sampler:
            first = [grammar.processor(len(ids))] if grammar else []
            return sampler_of(asked, seed, len(ids), eos, self.target.device, first)

        shared = [sampler(ids) for ids in prompts]
        kept = form.shown(special_texts(self.tokenizer)) if form else frozenset()
        deadline = time.monotonic() + self.limits.timeout
        return [
            Completion(
                choice,
                ids,
                min(limit or self.limits.max_new_tokens, self.limits.max_new_tokens, self.target.context - len(ids)),
                eos,
                sampler=sampler(ids) if grammar else shared[place],
                method=method or next(iter(self.engine.batches)),
                shown=AnswerText(self.tokenizer, stop, kept),
                top=top,
                trace=trace,
                deadline=deadline,
            )
            for place, ids in enumerate(prompts)
            for choice in range(n)
        ]


# Sampling settings that a model's generation config may hold, of which requests say what they want otherwise.
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def with_defaults(request: Sampling, config: GenerationConfig | None) -> Sampling:
    """The request with the model's own defaults for what it does not say."""
    found = {name: getattr(config, name, None) for name in DEFAULTS if getattr(request, name) is None}
    return request.model_copy(update={name: value for name, value in found.items() if value is not None})


def sampler_of(
    request: Sampling,
    seed: int,
    prompt: int,
    eos: frozenset[int],
    device: torch.device,
    first: Sequence[LogitsProcessor] = (),
) -> Sampler:
    """For prompts of so many tokens; greedy at temperature 0. Answers with a seed are those of `ctc-drafter generate
    --seed`. Processors, behind those that come `first`, are transformers' and in the order of its `generate`."""
    processors = LogitsProcessorList(first)
    if request.logit_bias:
        biases = [[[int(token)], float(bias)] for token, bias in request.logit_bias.items()]
        processors.append(SequenceBiasLogitsProcessor(biases))
    if request.repetition_penalty not in (None, 1):
        processors.append(RepetitionPenaltyLogitsProcessor(float(request.repetition_penalty)))
    if request.presence_penalty or request.frequency_penalty:
        processors.append(CountPenalty(prompt, request.presence_penalty or 0.0, request.frequency_penalty or 0.0))
    if request.min_tokens and eos:
        processors.append(MinNewTokensLengthLogitsProcessor(prompt, request.min_tokens, sorted(eos), str(device)))
    temperature = 1.0 if request.temperature is None else request.temperature
    if temperature == 0:
        return Greedy(processors) if processors else ARGMAX
    top_p = 1.0 if request.top_p is None else request.top_p
    processors += warpers(temperature, max(request.top_k or 0, 0), top_p, request.min_p or 0.0)
    return Sampled(seed, processors)


def check_text(texts: Iterable[str]) -> None:
    for text in texts:
        if not is_unicode(text):
            raise APIError(400, "the text is not valid Unicode; a surrogate stands alone")
