"""The text of an answer that may be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import TextStream


class AnswerText:
    """Takes an answer token by token. What may become a stop string is held back until it did, or cannot.

    Of several stop strings the one that is complete first counts, of those that end together the longest; the
    answer ends before it. This depends on the text alone, not on where tokens begin.
    `length` counts the characters that the tokens made, `shown` those that were handed out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.stream, self.stop = TextStream(tokenizer), stop
        self.held = ""
        self.length = self.shown = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """What may be shown after this token; `stopped` says whether a stop string is complete."""
        return self._show(self.stream.push([token]))

    def close(self) -> str:
        """What was held back, once no token follows."""
        last = self._show(self.stream.close())
        if self.stopped:
            return last
        rest, self.held = self.held, ""
        self.shown += len(rest)
        return last + rest

    def _show(self, new: str) -> str:
        self.length += len(new)
        text = self.held + new
        ends = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        cut = min(ends)[1] if ends else len(text) - max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = "" if self.stopped else text[cut:]
        self.shown += cut
        return text[:cut]


def overlap(text: str, stop: str) -> int:
    """The longest end of the text that is a beginning of the stop string, but not all of it."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
