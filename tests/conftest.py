"""Quiet, single-threaded tests: two cores are shared, and small tensors gain nothing from threads."""

import gc
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

CACHE = "CTC_DRAFTER_CACHE"
# The first example may wait for a compiler, and machines of continuous integration are uneven.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """What is imported stays: without this each `gc.collect` of a training walks over all of it, for half a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of each family that is marked `sparing(n)` the first n cases, 1 unless told, stay fast; the others are slow."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sparing")
        if mark is not None:
            family = item.nodeid.partition("[")[0]
            seen[family] += 1
            if seen[family] > (mark.args[0] if mark.args else 1):
                item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    """What commands and servers in processes of their own measure stays out of the user's cache."""
    if CACHE not in os.environ:
        os.environ[CACHE] = tempfile.mkdtemp(prefix="ctc-drafter-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(CACHE), ignore_errors=True))


@pytest.fixture(autouse=True)
def trees_of_fixed_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nodes="auto"` measures nothing, which takes time, and trees have the size they have where nothing can be
    measured; `@pytest.mark.measured` lets a test measure into a cache of its own, as if it were the first."""
    if request.node.get_closest_marker("measured") is None:
        monkeypatch.setattr("ctc_drafter.decode.profile.automatic", lambda *_: None)
    else:
        monkeypatch.setenv(CACHE, str(request.getfixturevalue("tmp_path") / "cache"))
        monkeypatch.setattr("ctc_drafter.decode.profile.BUDGETS", {})


# What may be skipped in continuous integration (CI=1), since it runs elsewhere: `make test-quant`, `pytest -m gpu`.
SKIPPED_IN_CI = ("tests/target/test_quantised.py", "tests/test_gpu.py")

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def refuse_skips(report: Report) -> Report:
    """In continuous integration nothing is skipped unseen: a test that lacks its browser would never run again."""
    unseen = report.skipped and not hasattr(report, "wasxfail") and not report.nodeid.startswith(SKIPPED_IN_CI)
    if os.environ.get("CI") and unseen:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=1 does not allow: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return refuse_skips((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return refuse_skips((yield))


@pytest.fixture
def quick_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line says that a loading takes long, as on a busy machine, where all lines of a log are compared."""
    monkeypatch.setattr("ctc_drafter.load.said_if_slow", lambda *_: nullcontext())


@pytest.fixture
def tiny_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a quick bench of a tiny target, in place of the shipped one, with trainings of 2 steps."""
    from ctc_drafter import load
    from ctc_drafter.cli import main
    from ctc_drafter.evaluate import variants
    from recipes.quickstart.sample import write_sample
    from tiny_models import save_pair

    target, drafter = save_pair(tmp_path)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat {i} " * 3}) + "\n" for i in range(4)))
    options = ["--target", str(target), "--prompts", str(prompts), "--max-new-tokens", "30"]
    assert main(["distill", *options, "--out", str(tmp_path / "answers")]) == 0
    write_sample([tmp_path / "answers"], tmp_path / "sample")
    monkeypatch.setattr("ctc_drafter.target.names.TARGET_DIR", target)
    monkeypatch.setitem(load.DRAFTERS, "tiny", drafter)
    monkeypatch.setattr(variants, "SAMPLE_DIR", tmp_path / "sample")
    tasks = tmp_path / "cats.jsonl"
    tasks.write_text('{"prompt": "the cat"}\n')
    return ["--tasks", str(tasks), "--max-new-tokens", "6", "--watched", "0", "--steps", "2"]


@pytest.fixture
def quiet_tracing() -> Iterator[None]:
    """pytest keeps every record that a logger lets through, and tracing makes very many."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    trace = logging.getLogger("torch.__trace")
    disabled, trace.disabled = trace.disabled, True
    yield
    trace.disabled = disabled
    logger.setLevel(before)
