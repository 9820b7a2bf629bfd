"""Chat templates and text streaming: conversations to token ids, emitted tokens to printable text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctc_drafter.types import UserError, first_line

REPLACEMENT = "\ufffd"
MOST_HELD = 3  # tokens of an unfinished character: UTF-8 takes four bytes at most


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], answers: Sequence[str] = (), raw: bool = False
) -> list[int]:
    """Token ids of the prompt that asks for the answer to the last turn.

    `answers[k]` follows `turns[k]`; there is one turn more than answers. The chat template is applied, with
    its generation prompt, if the tokenizer has one and `raw` is false; else the texts stand below each other.
    Raises `UserError` for an empty turn, for text that is not Unicode, and where the template refuses the turns.
    """
    if not turns or any(not turn.strip() for turn in turns):
        raise UserError("the prompt is empty; give some text to continue")
    if not all(map(is_unicode, turns)):
        raise UserError("the prompt is not valid Unicode text; give it as UTF-8")
    texts = [text for pair in zip(turns, answers, strict=False) for text in pair] + [turns[-1]]
    if raw:
        return list(tokenizer("\n".join(texts)).input_ids)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    try:
        return apply_template(tokenizer, messages)
    except TemplateError as error:
        raise UserError(f"the chat template refuses the conversation: {first_line(error)}") from error


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Ids of a conversation that ends where its answer begins; without a chat template, of its texts, one a line.

    Raises `jinja2.TemplateError` where the template refuses it.
    """
    if not tokenizer.chat_template:
        return list(tokenizer("\n".join(message["content"] for message in messages)).input_ids)
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def is_unicode(text: str) -> bool:
    """Whether it can be encoded: half an emoji, a lone surrogate, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the generation config's, with the tokenizer's own; empty if neither has one."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    ids = set(listed if isinstance(listed, list) else [listed]) | {tokenizer.eos_token_id}
    return tuple(sorted(i for i in ids if i is not None))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what ids mean to this tokenizer; a drafter keeps its target's."""
    words = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Text of tokens, special ones left out, spaces as they are."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class TextStream:
    """Turns one row's tokens into text as they come, and holds back a character until its bytes are complete.

    `window` holds the tokens released last (a leading space needs its left neighbour), `shown` of them, and then
    those held back.

    Not `tokenizers.decoders.DecodeStream`: with byte fallback it raises "Invalid prefix encountered" behind bytes that
    make no character, it holds such bytes back without bound, and what it holds at the end cannot be had.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.window: list[int] = []
        self.shown = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; empty while a character is unfinished."""
        self.window.extend(tokens)
        for held in range(MOST_HELD + 1):
            end = len(self.window) - held
            if end <= self.shown:
                return ""
            text = decode(self.tokenizer, self.window[:end])
            if not text.endswith(REPLACEMENT):
                break
        return self._release(text, end)

    def close(self) -> str:
        """The text held back so far, without a last character that never became complete."""
        return self._release(decode(self.tokenizer, self.window).rstrip(REPLACEMENT), len(self.window))

    def _release(self, text: str, end: int) -> str:
        new = text[len(decode(self.tokenizer, self.window[: self.shown])) :]
        if not new:  # special tokens are no neighbour of a leading space: those before them stay
            return ""
        self.window, self.shown = self.window[self.shown :], end - self.shown
        return new


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Ids of a conversation that waits for its answer; empty if template or tokenizer refuse it."""
    try:
        return apply_template(tokenizer, messages)
    except (TemplateError, TypeError, ValueError):
        return []


Messages = list[dict[str, str]]
