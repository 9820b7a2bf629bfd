"""Distillation and training killed twenty times at random moments end as unbroken runs do."""

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import test_distill
import test_trainer
import torch
from safetensors.torch import load_file

from ctc_drafter.train.prompts import Prompt

KILLS = 20
STEPS = 200
PROMPTS = [Prompt(f"{n:03d}", [3 + n % 50, 7, 9]) for n in range(120)]
# Forked from a process that has imported everything, so that a kill falls into the work and not into the imports before
# it, and 40 runs do not import 40 times.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_kill"])


def distill_slowly(out: Path, begun: Event, working: Event) -> None:
    """Slow, so that a kill can fall anywhere in the work, and the work is not done before the last one."""
    real = test_distill.distill_module.plain_generate_many

    def slow(*args: Any, **options: Any) -> Iterator[Any]:
        for found in real(*args, **options):
            working.set()
            time.sleep(0.2)
            yield found

    test_distill.distill_module.plain_generate_many = slow
    begun.set()
    test_distill.run(out, PROMPTS)


def train_slowly(out: Path, begun: Event, working: Event) -> None:
    torch.set_num_threads(1)
    real = test_trainer.DrafterTrainer.anchor_losses

    def slow(*args: Any) -> Any:
        working.set()
        time.sleep(0.1)
        return real(*args)

    test_trainer.DrafterTrainer.anchor_losses = slow
    begun.set()
    test_trainer.short_run(out, steps=STEPS)


def kill_again_and_again(work: Callable[[Path, Event, Event], None], out: Path, longest: float) -> None:
    """Starts the work and kills it at a random moment, again and again: behind its start, behind its first result."""
    rng = random.Random(0)
    for number in range(KILLS):
        events = [FORKS.Event() for _ in range(2)]
        process = FORKS.Process(target=work, args=(out, *events))
        process.start()
        try:
            assert events[number % 2].wait(600)
            process.join(rng.uniform(0, longest))
            assert process.is_alive(), f"it ended with {process.exitcode} before it could be killed"
        finally:
            process.kill()
            process.join()
            process.close()


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("work", "longest"), [("distill", 1.5), ("train", 2.5)])
def test_killed_twenty_times(tmp_path: Path, work: str, longest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 hands it to forks, not to their server

    def run(out: Path) -> Any:
        return test_distill.run(out, PROMPTS) if work == "distill" else test_trainer.short_run(out, steps=STEPS)

    unbroken = run(tmp_path / "unbroken")
    kill_again_and_again(distill_slowly if work == "distill" else train_slowly, tmp_path / "killed", longest)
    kept = "shard-*" if work == "distill" else "checkpoints/checkpoint-*"
    assert list((tmp_path / "killed").glob(kept)), "it never came to anything"
    done = run(tmp_path / "killed")
    if work == "distill":
        assert test_distill.contents(tmp_path / "killed") == test_distill.contents(tmp_path / "unbroken")
        return
    assert test_trainer.figures(done.history) == test_trainer.figures(unbroken.history)
    tensors, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "unbroken"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
