"""Prompts for distillation: conversations from files or the hub, encoded."""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import Messages, encode_messages
from ctc_drafter.chat import encode_text as encode_whole
from ctc_drafter.provenance import digest
from ctc_drafter.rows import EXPECTED, BadRow, Row, read_corpus
from ctc_drafter.types import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """Token ids that end where the target's answer begins. `id` is a hash of them.

    source: a hash of the corpus's row that it was made of, as others may be; empty if that is not known.
    """

    id: str
    ids: list[int]
    source: str = ""


@dataclass(frozen=True)
class Opening:
    """A conversation that waits for an answer, of which `begun` may already stand there; plain text has no messages.

    source: a hash of the row that it is of.
    """

    messages: Messages
    begun: str = ""
    source: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and what became of every row: reason -> rows, `used` among them. odd: why turns of rows were left out:
    reason -> turns."""

    prompts: list[Prompt]
    counts: dict[str, int]
    odd: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        left_out = ", ".join(f"{n} {reason}" for reason, n in self.counts.items() if reason != "used")
        turns = ", ".join(f"{n} {reason}" for reason, n in self.odd.items())
        found = f"{len(self.prompts)} prompts" + (f"; rows left out: {left_out}" if left_out else "")
        return found + (f"; turns left out: {turns}" if turns else "")


def read_prompts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pattern: str = "*",
    limit: int | None = None,
    per_file: int | None = None,
    max_prompt_tokens: int | None = None,
    cuts: int = 0,
    seed: int = 0,
) -> PromptSet:
    """Prompts of a file, a folder of files or a data set of the hub (`read_corpus`), in an order that `seed`
    fixes.

    Rows are in any format of `rows.py`; of `{"turns": ...}` the first one is taken. Of a conversation one user turn is
    drawn; what was said before is its history.
    With `cuts` set, that many more prompts end at random places inside its answer, or inside a plain text, for
    the target to carry on: few prompts then give much and varied text.
    `per_file` caps the prompts of each file, `limit` all of them; `pattern` filters file names.
    Bad rows, text without a conversation, longer prompts and repeated ones are left out, counted and logged.
    Raises `UserError` if nothing is left, and for a chat template that opens no answer.
    """
    check_template(tokenizer)
    counts: Counter[str] = Counter()
    odd: Counter[str] = Counter()
    openings: list[Opening] = []
    for name, rows in read_corpus(source, pattern):
        openings += _openings(rows, name, seed, per_file, cuts, counts, odd)
    random.Random(f"{seed}:order").shuffle(openings)

    prompts: dict[str, Prompt] = {}
    longest = 1 + max(map(len, tokenizer.get_vocab()), default=0)
    for index, opening in enumerate(openings):
        if limit is not None and len(prompts) >= limit:
            counts["over the limit"] += len(openings) - index
            break
        length = len(opening.begun) + sum(len(message["content"]) for message in opening.messages)
        if max_prompt_tokens is not None and length > max_prompt_tokens * longest:
            counts[f"longer than {max_prompt_tokens} tokens"] += 1  # tokenising it could take all memory
            continue
        ids = encode_opening(tokenizer, opening)
        prompt = Prompt(digest(json.dumps(ids)), ids, opening.source)
        if not ids:
            counts["bad (refused by template or tokenizer)"] += 1
        elif max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            counts[f"longer than {max_prompt_tokens} tokens"] += 1
        elif prompt.id in prompts:
            counts["repeated"] += 1
        else:
            prompts[prompt.id] = prompt
            counts["used"] += 1
    found = PromptSet(list(prompts.values()), dict(counts), dict(odd))
    if not prompts:
        raise UserError(f"{source} has no usable rows ({found}); {EXPECTED}")
    amiss = odd or any("bad" in reason for reason in counts)
    logger.log(logging.WARNING if amiss else logging.INFO, "%s: %s", source, found)
    return found


def _openings(
    rows: Iterable[Row],
    name: str,
    seed: int,
    cap: int | None,
    cuts: int,
    counts: Counter[str],
    odd: Counter[str],
) -> list[Opening]:
    """Each usable row up to one of its user turns, and cuts through what follows, all drawn per row."""
    found: list[Opening] = []
    for number, row in enumerate(rows):
        if isinstance(row, BadRow):
            counts[f"bad ({row})"] += 1
            continue
        rng = random.Random(f"{seed}:{name}:{number}")
        if isinstance(row, str):
            if not cuts:
                counts["plain text"] += 1
            found += _cut(Opening([], source=digest(json.dumps(row))), row, cuts, rng)
            continue
        odd.update(row.odd)
        asked = [i + 1 for i, message in enumerate(row.messages) if message["role"] == "user"]
        talk = row.messages[: asked[0]] if row.questions else row.messages
        end = rng.choice(asked[:1] if row.questions else asked)
        found.append(Opening(row.up_to(end), source=digest(json.dumps(talk))))
        if end < len(talk) and talk[end]["role"] == "assistant":
            found += _cut(found[-1], talk[end]["content"], cuts, rng)
    random.Random(f"{seed}:{name}").shuffle(found)
    if cap is not None and len(found) > cap:
        counts["over the cap of a file"] += len(found) - cap
        found = found[:cap]
    return found


def _cut(opening: Opening, text: str, cuts: int, rng: random.Random) -> list[Opening]:
    """The opening with the text's beginning, up to a space, at up to `cuts` places."""
    places = [match.start() for match in re.finditer(r"(?<=\S)\s", text)]
    return [replace(opening, begun=text[:place]) for place in rng.sample(places, min(cuts, len(places)))]


def encode_opening(tokenizer: PreTrainedTokenizerBase, opening: Opening) -> list[int]:
    """Ids that end where the target goes on; empty if template or tokenizer refuse the conversation."""
    if not opening.messages:  # a begin token where completions of the text have one
        try:
            return encode_whole(tokenizer, opening.begun)
        except (TypeError, ValueError):  # as in `encode_text`
            return []
    ids = encode_messages(tokenizer, opening.messages)
    if not ids or not opening.begun:
        return ids
    begun = encode_text(tokenizer, opening.begun)
    return ids + begun if begun else []


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that goes on; empty for one that is no Unicode, such as half an emoji."""
    try:
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    except (TypeError, ValueError):  # tokenizers' word for lone surrogates
        return []


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UserError` for a chat template that puts something before an answer, but not at the end of a prompt.

    The answer would then be written in the user's turn.
    """
    if not tokenizer.chat_template:
        return
    asked = [{"role": "user", "content": "Why?"}]
    try:
        with_opening, without = (
            tokenizer.apply_chat_template(asked, add_generation_prompt=opening, tokenize=False)
            for opening in (True, False)
        )
        answered = str(
            tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "@answer"}], tokenize=False)
        )
    except (TemplateError, TypeError, ValueError):
        return  # rows that it refuses are counted
    missing = answered.partition("@answer")[0].removeprefix(str(without)).strip()
    if with_opening == without and missing and answered.startswith(str(without)):
        raise UserError(
            f"the chat template has no generation prompt ({missing!r} must stand at the end of a prompt); "
            "give one that has: --chat-template FILE"
        )
