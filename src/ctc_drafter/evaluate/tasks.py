"""Benchmark tasks: prompts from files or downloads."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from ctc_drafter.files import cache_folder, whole_or_nothing
from ctc_drafter.rows import BadRow, Talk, parse_row, raw_rows
from ctc_drafter.types import UserError, first_line

# Tasks: named lists of prompts, read from one file each, in this project's or the published formats.

logger = logging.getLogger(__name__)
ID_FIELDS = ("id", "question_id", "task_id", "prompt_id")
PROMPT_FILES = (".jsonl", ".jsonl.gz", ".json")  # of rows; any other file is text with a prompt a line


@dataclass(frozen=True)
class Prompt:
    """One conversation to answer: `turns` are the user's texts; the target writes the answers between them.

    system: text of a system message before them. answers: those that the row gives, between all turns or none;
    `generate` takes them for what was said, a measurement has the target write its own.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    system: str = ""
    answers: tuple[str, ...] = ()


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
    """`FOLDER/<name>.jsonl` for each name; `x.jsonl` is a file of its own.

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
    if name.endswith(PROMPT_FILES):
        return Task(Path(name).name.partition(".")[0], read_prompts(Path(name)))
    if folder is None:
        return Task(name, read_prompts(download(name), name))
    if name not in task_files(folder):
        raise UserError(f"no task {name}; {folder} has {', '.join(task_files(folder)) or 'no .jsonl file'}")
    return Task(name, read_prompts(folder / f"{name}.jsonl"))


def task_files(folder: Path | None) -> list[str]:
    """Names of the tasks in a folder."""
    return sorted(path.stem for path in folder.glob("*.jsonl")) if folder else list(SOURCES)


def read_prompts(path: Path, task: str | None = None) -> tuple[Prompt, ...]:
    """Prompts of a file of rows (.jsonl, .jsonl.gz, .json) in any format of `rows.py`, or of a text file with one
    prompt a line. task: its name, the file's without one.

    Of a conversation all of the user's turns are asked. Turns that cannot be read are left out, and said in the log.
    Raises `UserError` that names the file and the line.
    """
    if not path.is_file():
        raise UserError(f"cannot read {path}: no such file; give an existing file")
    task = task or path.name.partition(".")[0]
    rows = raw_rows(path) if path.name.endswith(PROMPT_FILES) else enumerate(text_lines(path), 1)
    prompts, odd = [], Counter[str]()
    for number, value in rows:
        try:
            prompt, left_out = row_prompt(value, task, number)
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}") from error
        if prompt is not None:
            prompts.append(prompt)
            odd.update(left_out)
    if not prompts:
        raise UserError(f"{path} holds no prompt; put one on each line")
    if odd:
        logger.warning("%s: turns left out: %s", path, ", ".join(f"{n} {reason}" for reason, n in odd.items()))
    return tuple(prompts)


def text_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give an existing file") from error


def row_prompt(value: Any, task: str, number: int) -> tuple[Prompt | None, tuple[str, ...]]:
    """The prompt of a row, or of a line of text, and why turns of it were left out; None for an empty line.

    Raises `ValueError` for a row that has none.
    """
    if isinstance(value, str):
        return (Prompt(f"{task}/{number}", task, (value.strip(),)) if value.strip() else None), ()
    talk = parse_row(value)
    if isinstance(talk, BadRow):
        raise ValueError(f"{talk}; write one object a line") if str(talk).startswith("not ") else talk
    if isinstance(talk, str):
        raise ValueError("no question, only a text to go on with; give it as a prompt")
    if talk.questions and talk.odd:
        raise ValueError(talk.odd[0])
    given_id = next((value[field] for field in ID_FIELDS if value.get(field) is not None), f"{task}/{number}")
    category = str(value.get("category") or task)
    return Prompt(str(given_id), category, *turns_of(talk)), talk.odd


def turns_of(talk: Talk) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """The user's texts, the system's, and the answers between the first, if all of them are there."""
    last = max(i for i, message in enumerate(talk.messages) if message["role"] == "user")
    messages = talk.up_to(last + 1)
    texts = {
        role: [each["content"] for each in messages if each["role"] == role] for role in ("system", "user", "assistant")
    }
    spoken = [each["role"] for each in messages if each["role"] != "system"]
    in_turn = spoken == [("user", "assistant")[i % 2] for i in range(len(spoken))]
    return tuple(texts["user"]), "\n\n".join(texts["system"]), tuple(texts["assistant"]) if in_turn else ()


# Published benchmarks by name, downloaded when no folder of task files is given.

GITHUB = "https://raw.githubusercontent.com"
DOWNLOADS = "tasks"  # folder in the cache folder
SECONDS, MOST_BYTES = 30.0, 1 << 24


@dataclass(frozen=True)
class Source:
    """Where a benchmark's authors publish its file, at one commit, and the SHA-256 of it."""

    url: str
    sha256: str


SOURCES = {
    # Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (2023)
    "mt_bench": Source(
        f"{GITHUB}/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
        "/fastchat/llm_judge/data/mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    # Cobbe et al., "Training Verifiers to Solve Math Word Problems" (2021)
    "gsm8k": Source(
        f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
    # Chen et al., "Evaluating Large Language Models Trained on Code" (2021)
    "humaneval": Source(
        f"{GITHUB}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    ),
    # Xia et al., "Unlocking Efficiency in Large Language Model Inference" (2024)
    "spec_bench": Source(
        f"{GITHUB}/hemingkx/Spec-Bench/fd2c1cd7d2201ef71db4c5f4e455008f017967bf/data/spec_bench/question.jsonl",
        "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04",
    ),
}


def download(name: str) -> Path:
    """The file of a benchmark as its authors publish it, from the cache folder if it is there.

    Raises `UserError` if the benchmark is unknown or out of reach, and for a file of another checksum.
    """
    if name not in SOURCES:
        raise UserError(
            f"task {name} has no file; give --tasks-path the folder that holds {name}.jsonl, "
            f"or one of {', '.join(SOURCES)}"
        )
    source = SOURCES[name]
    path = cache_folder() / DOWNLOADS / (name + "".join(Path(source.url).suffixes))
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256:
        return path
    logger.info("downloading %s from %s", name, source.url)
    try:
        with urlopen(source.url, timeout=SECONDS) as answer:
            content = answer.read(MOST_BYTES)
        found = hashlib.sha256(content).hexdigest()
        if found != source.sha256:
            raise OSError(f"its SHA-256 is {found} instead of {source.sha256}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_nothing(path) as temporary:
            temporary.write_bytes(content)
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(
            f"{name} could not be downloaded from {source.url} ({first_line(error)}); "
            f"give --tasks-path a folder with {name}.jsonl"
        ) from error
    return path
