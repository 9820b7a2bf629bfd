"""Rows of prompt files: conversations and questions in the formats of data sets, from files or the hub."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctc_drafter.files import bounded_lines
from ctc_drafter.types import UserError, first_line

EXPECTED = (
    'expected .jsonl or .jsonl.gz files with rows like {"messages": [{"role": "user", "content": "..."}]}, '
    '{"prompt": "..."}, {"turns": ["..."]} or {"conversations": [{"from": "human", "value": "..."}]}, '
    "one .json file with a list of such rows, one .txt file with a prompt a line, or hub:owner/name"
)
TOO_LONG = b""  # stands for a line of a file
LINES = (".jsonl", ".jsonl.gz")
NAMED = (".json", ".txt")  # read when named; in folders they are often something else
HUB = "hub:"
HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
)

# ShareGPT's names, and those found in the wild, for the chat roles.
ROLES = {
    "system": "system",
    "developer": "system",
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


@dataclass(frozen=True)
class Talk:
    """Messages of a row: `{"role": "system", "user" or "assistant", "content": text}`, at least one of them a user's.

    odd: why turns were left out, one reason each. unanswered: indices of the user turns whose answer was left out.
    questions: the row has the user's turns alone, to which the answers are still to be written.
    """

    messages: list[dict[str, str]]
    odd: tuple[str, ...] = ()
    unanswered: frozenset[int] = frozenset()
    questions: bool = False

    def up_to(self, end: int) -> list[dict[str, str]]:
        """The first `end` messages, without earlier questions that have no answer any more."""
        return [each for i, each in enumerate(self.messages[:end]) if i not in self.unanswered or i == end - 1]


# A conversation, plain text, or why it is neither.
Row = Talk | str | BadRow


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
    for _, value in raw_rows(file):
        yield parse_row(value)


def raw_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """What the rows of a .jsonl, .jsonl.gz, .json or .txt file hold, `BadRow` where that cannot be read, each with the
    number of its line, or of its place in a list, from 1. Raises `UserError` for a .json file that is not JSON."""
    if file.suffix == ".json":
        try:
            rows = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not JSON; {EXPECTED}") from error
        yield from enumerate(rows if isinstance(rows, list) else [rows], 1)
        return
    for number, line in read_lines(file):
        if line is None:
            yield number, BadRow("the rest of a damaged file")
        elif line == TOO_LONG:
            yield number, BadRow("a line of more than 16 MB")
        elif file.suffix == ".txt":
            yield number, {"prompt": line.decode("utf-8", "surrogateescape").strip()}
        else:
            yield number, parse_line(line)


def hub_rows(source: str) -> Iterator[Row]:
    """Rows of a data set of the hub: `hub:owner/name`, then `/config`, `:split` (train) and `@revision` if need be.

    Raises `UserError` for names of another form and for data sets that cannot be loaded.
    """
    found = HUB_NAME.fullmatch(source.removeprefix(HUB))
    if found is None:
        raise UserError(
            f"{source} names no data set; write hub:owner/name, hub:owner/name/config or hub:owner/name:split"
        )
    if Path(found["name"]).exists():  # which `load_dataset` would read instead
        raise UserError(f"a folder of that name is here: give --prompts {found['name']} to read it, or go elsewhere")
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            found["name"], found["config"], split=found["split"] or "train", revision=found["revision"]
        )
    except Exception as error:  # every reader and the network have errors of their own
        reason = first_line(error)
        raise UserError(f"{source} could not be loaded: {reason}") from error
    yield from map(parse_row, rows)


def read_lines(file: Path) -> Iterator[tuple[int, bytes | None]]:
    """Lines that are not empty, with their numbers, `TOO_LONG` for those longer than any row; None last if the file
    breaks off (a damaged archive, an unreadable file)."""
    number = 0
    try:
        for number, line in enumerate(bounded_lines(file), 1):
            if line is None:
                yield number, TOO_LONG
            elif line.strip():
                yield number, line
    except (OSError, EOFError, zlib.error):
        yield number + 1, None


def parse_line(line: bytes) -> Any:
    """The value of a line of JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # bad UTF-8, brackets without end
        return BadRow("not JSON")


# What a row holds. Its format is told by the keys and values that are there, not by where the row comes from.

LISTS = ("messages", "conversations", "conversation", "turns", "prompt")  # of messages; the last two of questions too
QUESTIONS = ("prompt", "instruction", "question", "query", "problem")
CONTEXTS = ("input", "context", "passage", "document", "article")  # that a question is about
SYSTEMS = ("system_prompt", "system")
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value", "text")
NOTHING = "no " + ", ".join(dict.fromkeys((*LISTS, *QUESTIONS))) + " or text"


def parse_row(row: Any) -> Row:
    """The conversation that a row holds, or its plain text."""
    if isinstance(row, BadRow):
        return row
    try:
        return _parse(row)
    except BadRow as error:
        return error


def _parse(row: Any) -> Row:
    if not isinstance(row, Mapping):
        raise BadRow("not an object")
    row = {key: value for key, value in row.items() if value is not None}
    key = next((key for key in LISTS if key in row and not (key == "prompt" and isinstance(row[key], str))), None)
    if key is not None:
        if not isinstance(row[key], list):
            raise BadRow(f"{key} is no list")
        return _talk(key, row[key], _system(row))
    key = next((key for key in QUESTIONS if key in row), None)
    if key is not None:
        return Talk([*_system(row), *_history(row), {"role": "user", "content": _question(row, key)}])
    if isinstance(row.get("text"), str):
        return str(row["text"])
    raise BadRow(NOTHING)


def _question(row: Mapping[str, Any], key: str) -> str:
    """A question with all that belongs to it: the text that it is about, and the answers to choose from."""
    parts = [_text(row, key)]
    if not parts[0].strip():
        raise BadRow(f"empty {key}")
    parts += [text for about in CONTEXTS if about in row and (text := _text(row, about)).strip()]
    if choices := row.get("choices"):
        parts.append(_choices(choices))
    return "\n\n".join(parts)


def _choices(choices: Any) -> str:
    """A line each: MMLU's list, or ARC's lists of texts and labels."""
    texts, labels = (choices.get("text"), choices.get("label")) if isinstance(choices, Mapping) else (choices, None)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) > 26:
        raise BadRow("choices is no list of texts")
    names = labels if isinstance(labels, list) and len(labels) == len(texts) else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return "\n".join(f"{name}. {text}" for name, text in zip(names, texts, strict=False))


def _system(row: Mapping[str, Any]) -> list[dict[str, str]]:
    texts = [text for key in SYSTEMS if key in row and (text := _text(row, key)).strip()]
    return [{"role": "system", "content": text} for text in texts[:1]]


def _history(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Questions and answers before the row's own, as pairs (LLaMA-Factory)."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadRow("history is no list of pairs")
    texts = [text for pair in pairs for text in pair]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadRow("history has a pair without text")
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise BadRow(f"{key} is no text")
    return str(row[key])


def _talk(key: str, turns: list[Any], system: list[dict[str, str]]) -> Talk:
    """The turns that can be used. An odd one costs itself, and a user's also its answer; the row is lost if no user's
    turn is left."""
    questions = key in ("turns", "prompt") and not any(isinstance(turn, Mapping) for turn in turns)
    kept: list[dict[str, str]] = []
    odd: list[str] = []
    unanswered = set()
    gap = orphaned = False  # a turn was left out behind the last one kept; the next answer is to a question left out
    for turn in turns:
        try:
            message = _user_turn(key, turn) if questions else _message(key, turn)
        except BadRow as error:
            odd.append(str(error))
            gap = True
            orphaned = orphaned or (isinstance(turn, Mapping) and _role(turn) == "user")
            continue
        if message["role"] == "assistant" and orphaned:
            continue
        if message["role"] == "user":
            if gap and kept and kept[-1]["role"] == "user":
                unanswered.add(len(kept) - 1)
            orphaned = False
        kept.append(message)
        gap = False
    if not any(message["role"] == "user" for message in kept):
        raise BadRow(odd[0] if odd else f"{key} has no user turn" if turns else f"{key} is empty")
    shift = 0 if any(message["role"] == "system" for message in kept) else len(system)
    found = frozenset(place + shift for place in unanswered)
    return Talk([*system[:shift], *kept], tuple(odd), found, questions)


def _user_turn(key: str, turn: Any) -> dict[str, str]:
    if not isinstance(turn, str):
        raise BadRow(f"a turn of {key} is no text")
    if not turn.strip():
        raise BadRow(f"an empty turn of {key}")
    return {"role": "user", "content": turn}


def _role(turn: Mapping[str, Any]) -> str | None:
    """The chat role of a turn; None for others, such as tools'."""
    role = next((turn[key] for key in ROLE_KEYS if key in turn), None)
    return ROLES.get(role.lower()) if isinstance(role, str) else None


def _message(key: str, turn: Any) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise BadRow(f"a turn of {key} is no object")
    named = next((name for name in ROLE_KEYS if name in turn), None)
    if named is None:
        raise BadRow(f"a turn of {key} has no {' or '.join(ROLE_KEYS)}")
    role = _role(turn)
    if role is None:
        raise BadRow(f"a turn of {key} whose {named} is none of {', '.join(ROLES)}")
    place = next((name for name in TEXT_KEYS if turn.get(name) is not None), None)
    if place is None:
        raise BadRow(f"a turn of {key} has no {', '.join(TEXT_KEYS[:-1])} or {TEXT_KEYS[-1]}")
    content = turn[place]
    if isinstance(content, list):  # parts
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise BadRow(f"a turn of {key} whose {place} has parts without text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow(f"a turn of {key} whose {place} is no text")
    if not content.strip():
        raise BadRow(f"a turn of {key} whose {place} is empty")
    return {"role": role, "content": content}
