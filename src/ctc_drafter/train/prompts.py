"""Prompts for distillation: conversations from files or the hub, encoded."""

from __future__ import annotations

import gzip
import json
import logging
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import Messages, encode_messages
from ctc_drafter.provenance import digest
from ctc_drafter.types import UserError, first_line

# Prompts for the target to answer, read from files of conversations and encoded.

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
    """Prompts, and what became of every row: reason -> rows, `used` among them."""

    prompts: list[Prompt]
    counts: dict[str, int]

    def __str__(self) -> str:
        left_out = ", ".join(f"{n} {reason}" for reason, n in self.counts.items() if reason != "used")
        return f"{len(self.prompts)} prompts" + (f"; rows left out: {left_out}" if left_out else "")


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

    Rows are `{"messages": ...}`, `{"prompt": ...}`, `{"turns": ...}` (the first one), ShareGPT's
    `{"conversations": ...}` and a few more. Of a conversation one user turn is drawn; what was said before is its
    history.
    With `cuts` set, that many more prompts end at random places inside its answer, or inside a plain text, for
    the target to carry on: few prompts then give much and varied text.
    `per_file` caps the prompts of each file, `limit` all of them; `pattern` filters file names.
    Bad rows, text without a conversation, longer prompts and repeated ones are left out, counted and logged.
    Raises `UserError` if nothing is left, and for a chat template that opens no answer.
    """
    check_template(tokenizer)
    counts: Counter[str] = Counter()
    openings: list[Opening] = []
    for name, rows in read_corpus(source, pattern):
        openings += _openings(rows, name, seed, per_file, cuts, counts)
    random.Random(f"{seed}:order").shuffle(openings)

    prompts: dict[str, Prompt] = {}
    for index, opening in enumerate(openings):
        if limit is not None and len(prompts) >= limit:
            counts["over the limit"] += len(openings) - index
            break
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
    found = PromptSet(list(prompts.values()), dict(counts))
    if not prompts:
        raise UserError(f"{source} has no usable rows ({found}); {EXPECTED}")
    logger.log(logging.WARNING if any("bad" in reason for reason in counts) else logging.INFO, "%s: %s", source, found)
    return found


def _openings(
    rows: Iterable[Row], name: str, seed: int, cap: int | None, cuts: int, counts: Counter[str]
) -> list[Opening]:
    """Each usable row up to one of its user turns, and cuts through what follows, all drawn per row."""
    found: list[Opening] = []
    for number, row in enumerate(rows):
        if isinstance(row, BadRow):
            counts[f"bad ({row})"] += 1
            continue
        rng, source = random.Random(f"{seed}:{name}:{number}"), digest(json.dumps(row))
        if isinstance(row, str):
            if not cuts:
                counts["plain text"] += 1
            found += _cut(Opening([], source=source), row, cuts, rng)
            continue
        end = rng.choice([i + 1 for i, message in enumerate(row) if message["role"] == "user"])
        found.append(Opening(row[:end], source=source))
        if end < len(row) and row[end]["role"] == "assistant":
            found += _cut(found[-1], row[end]["content"], cuts, rng)
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
    if not opening.messages:
        return encode_text(tokenizer, (tokenizer.bos_token or "") + opening.begun)
    ids = encode_messages(tokenizer, opening.messages)
    if not ids or not opening.begun:
        return ids
    begun = encode_text(tokenizer, opening.begun)
    return ids + begun if begun else []


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text as it stands; empty for one that is no Unicode, such as half an emoji."""
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


# Rows of a prompt corpus: files or a data set of the hub, one conversation per row in one of the usual formats.

EXPECTED = (
    'expected .jsonl or .jsonl.gz files with rows like {"messages": [{"role": "user", "content": "..."}]}, '
    '{"prompt": "..."}, {"turns": ["..."]} or {"conversations": [{"from": "human", "value": "..."}]}, '
    "one .json file with a list of such rows, one .txt file with a prompt a line, or hub:owner/name"
)
LINES = (".jsonl", ".jsonl.gz")
NAMED = (".json", ".txt")  # read when named; in folders they are often something else
HUB = "hub:"
HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
)

# ShareGPT's names, and those found in the wild, for the chat roles.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


class BadRow(ValueError):
    """A row that is no conversation; the message says why."""


# A conversation, plain text, or why it is neither.
Row = Messages | str | BadRow


def read_corpus(source: str | Path, pattern: str = "*") -> Iterator[tuple[str, Iterable[Row]]]:
    """The parts of a corpus by name, each with its rows, in a fixed order.

    source: a file, a folder (its files whose names fit `pattern`), or `hub:owner/name`, see `hub_rows`. Raises
    `UserError` if there is nothing to read.
    """
    if str(source).startswith(HUB):
        yield str(source), hub_rows(str(source))
        return
    path = Path(source)
    for file in corpus_files(path, pattern):
        yield file.relative_to(path).as_posix() if path.is_dir() else file.name, file_rows(file)


def describe_corpus(source: str | Path) -> dict[str, str]:
    """`name` of a corpus, a folder's or file's last part alone, and `licence` if it is on the hub and says one."""
    named = hub_name(str(source))
    if not named:
        return {"name": Path(source).resolve().name}
    from huggingface_hub import HfApi

    try:
        card = HfApi().dataset_info(named, timeout=10).card_data
        licence = card.get("license") if card else None
    except Exception:  # a corpus that was loaded from a cache needs no network, whose errors are of many kinds
        licence = None
    return {"name": str(source), **({"licence": str(licence)} if licence else {})}


def hub_name(source: str) -> str:
    """owner/name of `hub:owner/name:split` and the like; empty for others."""
    found = HUB_NAME.fullmatch(source.removeprefix(HUB)) if source.startswith(HUB) else None
    return found["name"] if found else ""


def corpus_files(path: Path, pattern: str = "*") -> list[Path]:
    """The usable files of a folder, subfolders included, or the file itself, in a fixed order.

    `pattern` filters file names, e.g. `*.train.*`. Raises `UserError` if there are none.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; {EXPECTED}")
    found, endings = (sorted(path.rglob("*")), LINES) if path.is_dir() else ([path], LINES + NAMED)
    usable = [f for f in found if f.is_file() and f.name.endswith(endings) and f.match(pattern)]
    if not usable:
        raise UserError(f"{path} has no usable files; {EXPECTED}")
    return usable


def file_rows(file: Path) -> Iterator[Row]:
    """Rows of a .jsonl, .jsonl.gz, .json or .txt file."""
    if file.suffix == ".json":
        try:
            rows = json.loads(file.read_bytes())
        except ValueError as error:
            raise UserError(f"{file} is not JSON; {EXPECTED}") from error
        yield from map(parse_row, rows if isinstance(rows, list) else [rows])
        return
    for line in read_lines(file):
        if line is None:
            yield BadRow("the rest of a damaged file")
        elif file.suffix == ".txt":
            yield parse_row({"prompt": line.decode("utf-8", "surrogateescape").strip()})
        else:
            yield parse_line(line)


def hub_rows(source: str) -> Iterator[Row]:
    """Rows of a data set of the hub: `hub:owner/name`, then `/config`, `:split` (train) and `@revision` if need be.

    Raises `UserError` for names of another form and for data sets that cannot be loaded.
    """
    found = HUB_NAME.fullmatch(source.removeprefix(HUB))
    if found is None:
        raise UserError(
            f"{source} names no data set; write hub:owner/name, hub:owner/name/config or hub:owner/name:split"
        )
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            found["name"], found["config"], split=found["split"] or "train", revision=found["revision"]
        )
    except Exception as error:  # every reader and the network have errors of their own
        reason = first_line(error)
        raise UserError(f"{source} could not be loaded: {reason}") from error
    # Columns that a row lacks are there as None.
    yield from (parse_row({key: value for key, value in row.items() if value is not None}) for row in rows)


def read_lines(file: Path) -> Iterator[bytes | None]:
    """Lines that are not empty; None last if the file breaks off (a damaged archive, an unreadable file)."""
    try:
        with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as lines:
            for line in lines:
                if line.strip():
                    yield line
    except (OSError, EOFError, zlib.error):
        yield None


def parse_line(line: bytes) -> Row:
    """The row of a line of JSON."""
    try:
        return parse_row(json.loads(line))
    except (ValueError, RecursionError):  # bad UTF-8, brackets without end
        return BadRow("not JSON")


def parse_row(row: Any) -> Row:
    """The conversation that a row holds, or its plain text."""
    try:
        return _parse(row)
    except BadRow as error:
        return error


def _parse(row: Any) -> Row:
    if not isinstance(row, dict):
        raise BadRow("not an object")
    if "messages" in row:
        return _messages(row["messages"], "role", "content")
    if "conversations" in row:
        return _messages(row["conversations"], "from", "value")
    if "turns" in row:
        turns = row["turns"]
        return [_user(turns[0] if isinstance(turns, list) and turns else None)]
    for key in ("prompt", "instruction", "question"):
        if key in row:
            return [_user(row[key])]
    if isinstance(row.get("text"), str):
        return str(row["text"])
    raise BadRow("no messages, conversations, turns or prompt")


def _user(text: Any) -> dict[str, str]:
    if not isinstance(text, str) or not text.strip():
        raise BadRow("empty prompt")
    return {"role": "user", "content": text}


def _messages(turns: Any, role_key: str, text_key: str) -> Messages:
    if not isinstance(turns, list):
        raise BadRow("messages are no list")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRow("a message is no object")
        role, text = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise BadRow("unknown role")
        if not isinstance(text, str) or not text.strip():
            raise BadRow("empty message")
        messages.append({"role": ROLES[role.lower()], "content": text})
    if not any(message["role"] == "user" for message in messages):
        raise BadRow("no user turn")
    return messages
