"""Chat templates and text streaming: conversations to token ids, emitted tokens to printable text, stop strings"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctc_drafter.types import UserError, first_line, listed_ids

REPLACEMENT = "\ufffd"
MOST_HELD = 3  # tokens of an unfinished character: UTF-8 takes four bytes at most


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[str],
    answers: Sequence[str] = (),
    raw: bool = False,
    system: str = "",
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of the prompt that asks for the answer to the last turn.

    `answers[k]` follows `turns[k]`; there is one turn more than answers. system: text of a system message before them.
    The chat template is applied, with its generation prompt, if the tokenizer has one and `raw` is false; else the
    texts stand below each other. options: the template's own variables.
    Raises `UserError` for an empty turn, for text that is not Unicode, and where the template refuses the turns.
    """
    if not turns or any(not turn.strip() for turn in turns):
        raise UserError("the prompt is empty; give some text to continue")
    if not all(map(is_unicode, (system, *turns))):
        raise UserError("the prompt is not valid Unicode text; give it as UTF-8")
    texts = [text for pair in zip(turns, answers, strict=False) for text in pair] + [turns[-1]]
    if raw:
        return encode_text(tokenizer, "\n".join([*([system] if system else []), *texts]))
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    try:
        return apply_template(tokenizer, messages, options=options)
    except TemplateError as error:
        raise UserError(f"the chat template refuses the conversation: {first_line(error)}") from error


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a conversation that ends where its answer begins; without a chat template, of its texts, one a line.

    tools: that the template tells the model of, as JSON schemas. options: the template's own variables.

    Raises `jinja2.TemplateError` where the template refuses it, or fails.
    """
    if not tokenizer.chat_template:
        return encode_text(tokenizer, "\n".join(message["content"] for message in messages))
    chosen: dict[str, Any] = {"tools": [*map(dict, tools)] or None, **(options or {})}
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **chosen))
    except TemplateError:
        raise
    except Exception as error:  # a template is a program: it divides by zero, nests without end, ...
        raise TemplateError(f"{type(error).__name__}: {first_line(error)}") from error


def check_template_ends(tokenizer: PreTrainedTokenizerBase, seconds: float = 20.0) -> None:
    """Raises `UserError` for a chat template that is still at work on a short question after so many seconds.

    Loops within loops take years, and nothing can end a thread from outside: it goes on until the process ends.
    """
    if not tokenizer.chat_template:
        return

    def render() -> None:
        with contextlib.suppress(Exception):  # said where the template is used
            tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)

    thread = threading.Thread(target=render, name="chat template", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise UserError(f"the chat template does not end within {seconds:g} s; give another one: --chat-template FILE")


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text as the tokenizer makes them, but for a second begin token: a text that a chat template has made
    begins with one already."""
    ids = list(tokenizer(text).input_ids)
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return ids[1:] if begins and ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def is_unicode(text: str) -> bool:
    """Whether it can be encoded: half an emoji, a lone surrogate, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the generation config's, with the tokenizer's own; empty if neither has one."""
    ids = set(listed_ids(getattr(model.generation_config, "eos_token_id", None)))
    return tuple(sorted(ids | ({tokenizer.eos_token_id} - {None})))


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


class AnswerText:
    """Takes an answer token by token. What may become a stop string is held back until it did, or cannot.

    Of several stop strings the one that is complete first counts, of those that end together the longest; the
    answer ends before it. This depends on the text alone, not on where tokens begin. Special tokens count as their own
    text, as transformers' `StopStringCriteria` has it, though they are not shown, unless they are among those `kept`.
    `length` counts the characters that the tokens made, `shown` those that were handed out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), kept: frozenset[int] = frozenset()
    ):
        self.stream, self.stop, self.kept = TextStream(tokenizer), stop, kept
        self.special = special_texts(tokenizer) if stop or kept else {}
        self.held: list[tuple[str, bool]] = []  # characters, and whether they are shown
        self.length = self.shown = 0
        self.stopped = False

    def follow(self, tokens: Sequence[int]) -> None:
        """Goes on behind these tokens, whose text is not shown again; an unfinished character of theirs is."""
        if tokens:
            self.stream.push(tokens)

    def push(self, token: int) -> str:
        """The text that may be shown after this token; `stopped` says whether a stop string is complete."""
        return self._show(self.stream.push([token]), self.special.get(token, ""), token in self.kept)

    def close(self) -> str:
        """The text held back, once no token follows."""
        last = self._show(self.stream.close())
        return last if self.stopped else last + self._release(len(self.held))

    def _show(self, new: str, special: str = "", seen: bool = False) -> str:
        self.length += len(new) + seen * len(special)
        self.held += [(character, True) for character in new] + [(character, seen) for character in special]
        text = "".join(character for character, _ in self.held)
        ends = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        cut = min(ends)[1] if ends else len(text) - max((overlap(text, stop) for stop in self.stop), default=0)
        out = self._release(cut)
        if self.stopped:
            self.held = []
        return out

    def _release(self, count: int) -> str:
        out = "".join(character for character, seen in self.held[:count] if seen)
        self.held = self.held[count:]
        self.shown += len(out)
        return out


def overlap(text: str, stop: str) -> int:
    """The longest end of the text that is a beginning of the stop string, but not all of it."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def special_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Text of each token that decoding leaves out, by its id."""
    return {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Ids of a conversation that waits for its answer; empty if template or tokenizer refuse it."""
    try:
        return apply_template(tokenizer, messages)
    except (TemplateError, TypeError, ValueError):
        return []


Messages = Sequence[Mapping[str, Any]]
