import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from ctc_drafter.chat import decode
from ctc_drafter.cli.bench import below_heading
from ctc_drafter.decode.generate import Generation
from ctc_drafter.decode.stats import Stats
from ctc_drafter.evaluate import methods, runner
from ctc_drafter.evaluate.methods import Contender
from ctc_drafter.evaluate.results import results_table
from ctc_drafter.evaluate.runner import evaluate
from ctc_drafter.evaluate.tasks import Prompt, Task
from ctc_drafter.files import write_json
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from tiny_models import tiny_drafter, tiny_llama, tiny_tokenizer

ROW_KEYS = {
    *("method", "nodes", "task", "prompts", "skipped", "tokens", "steps", "beta", "tokens_per_s", "gamma"),
    *("identical", "compared", "accept_histogram", "stages_ms", "seconds"),
}
META_KEYS = {
    *("command", "commit", "versions", "hardware", "dtype", "seed", "target", "drafter", "threads", "nodes", "floor"),
    *("batch_size", "max_new_tokens", "limit", "date", "device", "note", "complete", "compiled", "exact", "engine"),
}


def task(name: str, *conversations: tuple[str, ...]) -> Task:
    return Task(name, tuple(Prompt(f"{name}/{i}", "c", turns) for i, turns in enumerate(conversations)))


TASKS = [
    task("two", ("the cat", "and the hat"), ("a mat", "sat on"), ("hat", "cat")),
    task("one", ("how many cats?",), ("the",), ("mat and cat and hat and mat",), ("b",), ("c",)),
]


def measured(tasks: list[Task], **options: Any) -> dict[str, Any]:
    model = tiny_llama()
    settings = {"max_new_tokens": 12, "nodes": 4, "meta": {"command": "c", "target": "t", "drafter": "d"}} | options
    return evaluate(Target.wrap(model), tiny_drafter(model), tiny_tokenizer(), tasks, **settings)


@pytest.mark.sparing
@pytest.mark.parametrize("batch_size", [1, 3])
def test_results_have_the_agreed_form(batch_size: int) -> None:
    result = measured(TASKS, batch_size=batch_size, limit=4)
    assert json.loads(json.dumps(result)) == result
    assert result["meta"].keys() == META_KEYS
    assert result["meta"]["complete"] is True
    assert [(row["task"], row["method"]) for row in result["rows"]] == [
        *(("two", "plain"), ("two", "ctc"), ("one", "plain"), ("one", "ctc"))
    ]
    for row, base in zip(result["rows"], [result["rows"][i] for i in (0, 0, 2, 2)], strict=True):
        assert row.keys() == ROW_KEYS
        assert row["prompts"] == row["compared"] == row["identical"] == {"two": 3, "one": 4}[row["task"]]
        assert row["tokens"] == base["tokens"] > row["prompts"]
        assert row["gamma"] == pytest.approx(row["tokens_per_s"] / base["tokens_per_s"])
        assert sum(row["accept_histogram"]) == row["steps"] > 0
        assert set(row["stages_ms"]) >= {"verify"} | ({"compact"} if row["method"] != "plain" else set())
    assert all(row["beta"] == 1.0 for row in result["rows"] if row["method"] == "plain")


class Recorder:
    """Stands in for a decoding function: every answer is `tokens`, every call is kept."""

    def __init__(self, name: str, calls: list[tuple[str, list[list[int]]]], tokens: list[int]):
        self.name, self.calls, self.tokens = name, calls, tokens

    def __call__(self, prompts: list[list[int]], timed: bool, _: object) -> Generation:
        if not timed:
            self.calls.append((self.name, prompts))
        stats = Stats(len(prompts) * len(self.tokens), len(prompts), len(prompts), [len(prompts)])
        return Generation([self.tokens] * len(prompts), stats, [[0]] * len(prompts))


def recorded(monkeypatch: pytest.MonkeyPatch, plain: list[int], ctc: list[int]) -> list[tuple[str, list[list[int]]]]:
    calls: list[tuple[str, list[list[int]]]] = []
    both = [Contender(name, None, Recorder(name, calls, t)) for name, t in (("plain", plain), ("ctc", ctc))]
    monkeypatch.setattr(runner, "contenders_of", lambda *_args, **_options: both)
    return calls


def test_methods_take_turns_on_equal_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch, [100, 101], [102])
    measured(TASKS)
    warm_up, rest = calls[:2], calls[2:]
    assert [name for name, _ in warm_up] == ["plain", "ctc"]
    assert [name for name, _ in rest[:8]] == ["plain", "ctc", "plain", "ctc", "ctc", "plain", "ctc", "plain"]
    assert all(first[1] == second[1] for first, second in zip(rest[::2], rest[1::2], strict=True))


def test_the_targets_own_answer_is_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch, [100, 101], [102])
    measured(TASKS[:1])
    tokenizer = tiny_tokenizer()
    second = tokenizer.decode(calls[4][1][0])
    assert f"<|assistant|>{decode(tokenizer, [100, 101])}<|end|><|user|>and the hat<|end|>" in second


def test_every_turn_counts_for_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(monkeypatch, [100], [100, 100])
    plain, ctc = measured(TASKS[:1])["rows"]
    assert (plain["identical"], plain["compared"], plain["tokens"]) == (3, 3, 6)
    assert (ctc["identical"], ctc["compared"], ctc["tokens"]) == (0, 3, 12)


@pytest.mark.slow
def test_one_different_last_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = methods.generate
    count = 0

    def wrong_once(*args: Any, **options: Any) -> Generation:
        nonlocal count
        found, count = original(*args, **options), count + 1
        if count == 2:  # the first after the warm-up
            found.tokens[0][-1] ^= 1
        return found

    monkeypatch.setattr(methods, "generate", wrong_once)
    ctc = measured(TASKS[1:])["rows"][1]
    assert (ctc["identical"], ctc["compared"]) == (4, 5)


def test_prompts_beyond_the_context_are_counted() -> None:
    model = tiny_llama(context=64)
    tasks = [task("long", ("x y z " * 30, "b"), ("a", "b"), ("a", "x y z " * 30))]
    result = evaluate(Target.wrap(model), tiny_drafter(model), tiny_tokenizer(), tasks, max_new_tokens=12, batch_size=2)
    assert [(row["prompts"], row["skipped"], row["compared"]) for row in result["rows"]] == [(1, 2, 1)] * 2
    assert all(row["tokens"] <= 24 for row in result["rows"])


def test_nothing_fits() -> None:
    model = tiny_llama(context=16)
    tasks = [task("long", ("x y z " * 30,))]
    result = evaluate(Target.wrap(model), tiny_drafter(model), tiny_tokenizer(), tasks, max_new_tokens=12)
    assert [(row["skipped"], row["tokens_per_s"], row["gamma"], row["beta"]) for row in result["rows"]] == [
        (1, None, None, None)
    ] * 2
    assert results_table(result).row_count == 2


def test_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    path, saved = tmp_path / "out.json", 0

    def save(result: dict[str, Any]) -> None:
        nonlocal saved
        write_json(path, result)
        saved += 1
        if saved == 2:
            raise KeyboardInterrupt

    result = measured(TASKS, save=save)
    on_disk = json.loads(path.read_text())
    assert on_disk == result
    assert on_disk["meta"]["complete"] is False
    assert [(row["task"], row["prompts"]) for row in on_disk["rows"]] == [("two", 2)] * 2


def test_table_shows_every_row() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    row = {
        "method": "ctc",
        "task": "some_long_name",
        "prompts": 40,
        "skipped": 1,
        "tokens": 900,
        "tokens_per_s": 251.26,
    }
    row |= {"gamma": 1.914, "beta": 3.456, "identical": 39, "compared": 40}
    console.print(results_table({"rows": [row]}))
    text = console.export_text()
    assert all(part in text for part in ("some_long_name", "251.3", "1.91", "3.46", "39 of 40"))


def test_a_table_of_copies_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    row = {"task": "mt_bench", "skipped": 0, "tokens": 12345, "tokens_per_s": 1251.26, "nodes": 64}
    row |= {"gamma": 1.914, "beta": 3.456, "identical": 39, "compared": 40}
    methods = ("ctc-no-copies, copies", "prompt_lookup")
    part = {"rows": [row | {"method": name} for name in methods]}
    console.print(results_table(below_heading(part)))
    text = console.export_text()
    assert "…" not in text
    assert "ctc-no-copies " in text
    assert [each["method"] for each in part["rows"]] == list(methods), "the result is as it was"


def test_write_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})

    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["out.json"]


def test_meta_names_dtype_and_settings() -> None:
    model = tiny_llama().to(torch.bfloat16)
    drafter = tiny_drafter(model).to(torch.bfloat16)
    meta = evaluate(Target.wrap(model), drafter, tiny_tokenizer(), TASKS[1:], limit=1, max_new_tokens=3, seed=5)["meta"]
    assert (meta["dtype"], meta["seed"], meta["limit"], meta["max_new_tokens"]) == ("bfloat16", 5, 1, 3)


def test_commit_is_none_outside_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    from ctc_drafter import provenance

    def no_git(*_args: object, **_options: object) -> SimpleNamespace:
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", no_git)
    assert provenance.environment()["commit"] is None
