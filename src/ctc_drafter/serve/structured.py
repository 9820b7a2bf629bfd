"""Structured answers: JSON by a schema, through llguidance; its state follows the tokens of each row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from ctc_drafter.decode.processors import OfText
from ctc_drafter.types import UserError, missing_extra

if TYPE_CHECKING:  # it is imported where an answer is structured, and by nobody else
    from llguidance import LLMatcher, LLTokenizer

# One space, or a line with its indentation: without a bound a model may write spaces for ever.
SPACES = r" |\n {0,32}"
OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Vocabulary:
    """A target's tokens as llguidance wants them, which takes about a second to make. eos: what ends an answer."""

    tokens: LLTokenizer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos: Sequence[int]) -> Vocabulary:
        """Raises `UserError` for tokenizers and targets that llguidance cannot serve."""
        try:
            from llguidance.hf import from_tokenizer
        except ModuleNotFoundError as error:
            raise UserError(missing_extra(error) or str(error)) from error
        if not eos:
            raise UserError("the model has no end token, which structured answers need; leave out response_format")
        try:
            known: Any = tokenizer
            return cls(from_tokenizer(known, max(vocab_size, len(tokenizer)), list(eos)))
        except ValueError as error:
            raise UserError(f"the model's tokenizer cannot serve structured answers: {error}") from error

    def grammar(self, schema: Mapping[str, Any]) -> Grammar:
        """Raises `UserError` for what is no JSON schema, or has parts that llguidance lacks."""
        from llguidance import LLMatcher

        try:
            text = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": SPACES})
        except (ValueError, RecursionError) as error:  # nested too deeply, for one
            raise UserError(f"response_format: the schema cannot be followed: {error}") from error
        return self._begun(text, "response_format: the schema")

    def lark(self, grammar: str, what: str) -> Grammar:
        """Of a grammar in llguidance's Lark. what: whose it is, for the `UserError` where it cannot be followed."""
        from llguidance import LLMatcher

        try:
            return self._begun(LLMatcher.grammar_from_lark(grammar), what)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{what} cannot be followed: {error}") from error

    def _begun(self, text: str, what: str) -> Grammar:
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokens, text, log_level=0)
        matcher.compute_bitmask()  # some that nothing can satisfy are found out here
        if matcher.is_error() or matcher.is_stopped():
            reason = matcher.get_error().strip().partition("\n")[0] or "nothing satisfies it"
            raise UserError(f"{what} cannot be followed: {reason}")
        return Grammar(matcher)


@dataclass(frozen=True)
class Grammar:
    """What an answer may be; the matcher stands at its beginning, and is copied for each answer."""

    matcher: LLMatcher

    def processor(self, start: int) -> Structured:
        return Structured(start, self.matcher.deep_copy())


class Structured(OfText):
    """Leaves the tokens that the grammar allows behind the text from place `start` on.

    The matcher goes along with the text that it is asked about: back to where the two part, and on from there. So each
    node of a token tree gets the state of its own path, whatever was asked about before.
    """

    def __init__(self, start: int, matcher: LLMatcher):
        self.start, self.matcher = start, matcher
        self.taken: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = [self._allowed(row[self.start :], scores.shape[1]) for row in input_ids.tolist()]
        return scores.masked_fill(~torch.stack(rows).to(scores.device), float("-inf"))

    def _allowed(self, tokens: list[int], vocab_size: int) -> torch.Tensor:
        """bool `[V]`"""
        same = next((i for i, (a, b) in enumerate(zip(tokens, self.taken, strict=False)) if a != b), None)
        keep = min(len(tokens), len(self.taken)) if same is None else same
        if keep < len(self.taken):
            self.matcher.rollback(len(self.taken) - keep)
        self.matcher.consume_tokens(tokens[keep:])
        self.taken = tokens
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        if self.matcher.is_error():
            reason = self.matcher.get_error().strip().partition("\n")[0]
            raise UserError(f"the answer cannot go on by its schema: {reason}")
        allowed = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
        allowed = allowed.flatten()[:vocab_size].bool()
        return torch.nn.functional.pad(allowed, (0, vocab_size - len(allowed)))  # logits that belong to no token
