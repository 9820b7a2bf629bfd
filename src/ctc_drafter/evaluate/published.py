"""Published benchmarks by name, downloaded by `datasets` when no folder of task files is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ctc_drafter.types import UserError

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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name} could not be downloaded ({reason}); give --tasks-path a folder with its file"
        ) from error
    return list(found)
