"""Benchmark tasks: prompts from files or downloads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctc_drafter.types import UserError, first_line

# Tasks: named lists of prompts, read from one JSONL file each, in this project's or the published formats.

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

    def some(self, limit: int | None) -> Task:
        """The task with `limit` of its prompts, evenly from all of the file: files are sorted by category."""
        count = len(self.prompts)
        if limit is None or limit >= count:
            return self
        return Task(self.name, tuple(self.prompts[place * count // limit] for place in range(limit)))


def read_tasks(folder: Path | None, names: Sequence[str]) -> list[Task]:
    """`FOLDER/<name>.jsonl` for each name, in this project's or the published format; `x.jsonl` is a file of its own.

    Without a folder, published benchmarks are downloaded, see `download`. Raises `UserError` when one is missing,
    or nothing is named.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give --tasks-path the folder that holds the <task>.jsonl files")
    if not names:
        raise UserError(f"no task was named; {folder or 'the command line'} has {', '.join(task_files(folder))}")
    tasks = [read_task(folder, name) for name in names]
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:  # what is measured goes by task and prompt
            raise UserError(f"{count} tasks are called {name}; name each of them once, and files by names of their own")
    return tasks


def read_task(folder: Path | None, name: str) -> Task:
    if name.endswith(".jsonl"):
        return Task(Path(name).stem, read_prompts(Path(name)))
    if folder is None:
        rows = enumerate(download(name), 1)
        return Task(name, tuple(row_prompt(row, name, number) for number, row in rows))
    if name not in task_files(folder):
        raise UserError(f"no task {name}; {folder} has {', '.join(task_files(folder)) or 'no .jsonl file'}")
    return Task(name, read_prompts(folder / f"{name}.jsonl"))


def task_files(folder: Path | None) -> list[str]:
    """Names of the tasks in a folder."""
    return sorted(path.stem for path in folder.glob("*.jsonl")) if folder else list(SOURCES)


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
    return row_prompt(row, task, number)


def row_prompt(row: Mapping[str, Any], task: str, number: int) -> Prompt:
    """A prompt from a row of a published format. Raises `ValueError` if it holds no text."""
    given_id = next((row[field] for field in ID_FIELDS if row.get(field) is not None), f"{task}/{number}")
    return Prompt(id=str(given_id), category=str(row.get("category") or task), turns=_turns(row))


def _turns(row: Mapping[str, Any]) -> tuple[str, ...]:
    text = next((row[field] for field in TEXT_FIELDS if row.get(field) is not None), None)
    turns = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, list) else ()
    if not turns or any(not isinstance(turn, str) or not turn.strip() for turn in turns):
        raise ValueError(f"no text; give one of the fields {', '.join(TEXT_FIELDS)}")
    return turns


# Published benchmarks by name, downloaded by `datasets` when no folder of task files is given.

GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Source:
    """Arguments of `datasets.load_dataset`."""

    path: str
    name: str | None = None
    split: str = "train"
    files: dict[str, str] = field(default_factory=dict)


SOURCES = {
    # Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (2023)
    "mt_bench": Source(
        "json",
        files={
            "train": f"{GITHUB}/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
            "/fastchat/llm_judge/data/mt_bench/question.jsonl"
        },
    ),
    # Cobbe et al., "Training Verifiers to Solve Math Word Problems" (2021)
    "gsm8k": Source("openai/gsm8k", "main", "test"),
    # Chen et al., "Evaluating Large Language Models Trained on Code" (2021)
    "humaneval": Source("openai/openai_humaneval", split="test"),
    # Xia et al., "Unlocking Efficiency in Large Language Model Inference" (2024)
    "spec_bench": Source("json", files={"train": f"{GITHUB}/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"}),
}


def download(name: str) -> list[Mapping[str, Any]]:
    """The rows of a benchmark as its authors publish them. Raises `UserError` if it is unknown or out of reach."""
    if name not in SOURCES:
        raise UserError(
            f"task {name} has no file; give --tasks-path the folder that holds {name}.jsonl, "
            f"or one of {', '.join(SOURCES)}"
        )
    from datasets import load_dataset

    source = SOURCES[name]
    try:
        found = load_dataset(source.path, source.name, data_files=source.files or None, split=source.split)
    except Exception as error:  # whatever the network and its libraries raise
        reason = first_line(error)
        raise UserError(
            f"{name} could not be downloaded ({reason}); give --tasks-path a folder with its file"
        ) from error
    return list(found)
