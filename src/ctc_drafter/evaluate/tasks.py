"""Tasks: named lists of prompts, read from one JSONL file each, in this project's or the published formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctc_drafter.types import UserError

ID_FIELDS = ("id", "question_id", "task_id", "prompt_id")
TEXT_FIELDS = ("turns", "question", "prompt")


@dataclass(frozen=True)
class Prompt:
    """One conversation to answer: `turns` are the user's texts; the target writes the answers between them."""

    id: str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A benchmark's prompts under its name."""

    name: str
    prompts: tuple[Prompt, ...]


def read_tasks(folder: Path | None, names: Sequence[str]) -> list[Task]:
    """`FOLDER/<name>.jsonl` for each name; names that end in .jsonl are files of their own.

    Without a folder, published benchmarks are downloaded, see `published.py`. Raises `UserError` when one is missing,
    or nothing is named.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give --tasks-path the folder that holds the <task>.jsonl files")
    files = {name: Path(name) for name in names if name.endswith(".jsonl")}
    found = sorted(path.stem for path in folder.glob("*.jsonl")) if folder else []
    unknown = [name for name in names if name not in files and name not in found]
    if folder is None and unknown:
        raise UserError(f"task {unknown[0]} has no file; give --tasks-path the folder that holds {unknown[0]}.jsonl")
    if unknown or not names:
        named = f"no task {', '.join(unknown)}" if unknown else "no task was named"
        raise UserError(f"{named}; {folder or 'the command line'} has {', '.join(found) or 'no .jsonl file'}")
    places = {name: files.get(name) or Path(folder or "") / f"{name}.jsonl" for name in names}
    return [Task(place.stem, read_prompts(place)) for place in places.values()]


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Prompts of a JSONL file, or of a text file with one prompt a line.

    A row holds its text in `turns` (MT-bench, Spec-Bench, ours), `question` (GSM8K) or `prompt` (HumanEval and
    others; a string or a list of turns). Raises `UserError` that names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give an existing file") from error
    parse = _json_prompt if path.suffix in (".jsonl", ".json") else _line_prompt
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompts.append(parse(line, path.stem, number))
            except ValueError as error:
                raise UserError(f"{path} line {number}: {error}") from error
    if not prompts:
        raise UserError(f"{path} holds no prompt; put one on each line")
    return tuple(prompts)


def _line_prompt(line: str, task: str, number: int) -> Prompt:
    return Prompt(id=f"{task}/{number}", category=task, turns=(line.strip(),))


def _json_prompt(line: str, task: str, number: int) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}); write one object a line") from error
    if not isinstance(row, Mapping):
        raise ValueError("not a JSON object; write one object a line")
    given_id = next((row[field] for field in ID_FIELDS if field in row), f"{task}/{number}")
    return Prompt(id=str(given_id), category=str(row.get("category", task)), turns=_turns(row))


def _turns(row: Mapping[str, Any]) -> tuple[str, ...]:
    text = next((row[field] for field in TEXT_FIELDS if field in row), None)
    turns = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, list) else ()
    if not turns or any(not isinstance(turn, str) or not turn.strip() for turn in turns):
        raise ValueError(f"no text; give one of the fields {', '.join(TEXT_FIELDS)}")
    return turns
