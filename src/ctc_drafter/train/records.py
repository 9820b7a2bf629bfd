"""Rows of a prompt corpus: .jsonl or .jsonl.gz files, one conversation per line in one of the usual formats."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctc_drafter.types import UserError

EXPECTED = (
    'expected .jsonl or .jsonl.gz files with rows like {"messages": [{"role": "user", "content": "..."}]}, '
    '{"prompt": "..."}, {"turns": ["..."]} or {"conversations": [{"from": "human", "value": "..."}]}'
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

Messages = list[dict[str, str]]


class BadRow(ValueError):
    """A row that is no conversation; the message says why."""


def corpus_files(path: Path, pattern: str = "*") -> list[Path]:
    """The usable files of a folder, subfolders included, or the file itself, in a fixed order.

    `pattern` filters file names, e.g. `*.train.*`. Raises `UserError` if there are none.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; {EXPECTED}")
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    usable = [f for f in found if f.is_file() and f.name.endswith((".jsonl", ".jsonl.gz")) and f.match(pattern)]
    if not usable:
        raise UserError(f"{path} has no usable files; {EXPECTED}")
    return usable


def read_lines(file: Path) -> Iterator[bytes | None]:
    """Lines that are not empty; None last if the file breaks off (a damaged archive, an unreadable file)."""
    try:
        with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as lines:
            for line in lines:
                if line.strip():
                    yield line
    except (OSError, EOFError, zlib.error):
        yield None


def parse_row(line: bytes) -> Messages | str:
    """The conversation of a line, or its plain text. Raises `BadRow`."""
    try:
        row = json.loads(line)
    except ValueError as error:  # bad UTF-8 too
        raise BadRow("not JSON") from error
    if not isinstance(row, dict):
        raise BadRow("not an object")
    if "messages" in row:
        return _messages(row["messages"], "role", "content")
    if "conversations" in row:
        return _messages(row["conversations"], "from", "value")
    if "turns" in row:
        turns = row["turns"]
        return [_user(turns[0] if isinstance(turns, list) and turns else None)]
    if "prompt" in row:
        return [_user(row["prompt"])]
    if isinstance(row.get("text"), str):
        return row["text"]
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
