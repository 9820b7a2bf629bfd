"""Distillation and training killed twenty times at random moments end as unbroken runs do."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import test_distill
import test_trainer

HERE = Path(__file__).parent
KILLS = 20
# Slowed down, so that a kill can fall anywhere in the work and not only in the imports before it.
DISTILL = (
    "import pathlib, sys, time, test_distill as t\n"
    "real = t.distill_module.plain_generate\n"
    "def slow(*args, **options):\n"
    "    time.sleep(0.3)\n"
    "    return real(*args, **options)\n"
    "t.distill_module.plain_generate = slow\n"
    "print('begun', flush=True)\n"
    "t.run(pathlib.Path(sys.argv[1]))\n"
)
TRAIN = (
    "import pathlib, sys, time, torch, test_trainer as t\n"
    "torch.set_num_threads(1)\n"
    "real = t.trainer_module.draft_loss\n"
    "def slow(*args):\n"
    "    time.sleep(0.05)\n"
    "    return real(*args)\n"
    "t.trainer_module.draft_loss = slow\n"
    "print('begun', flush=True)\n"
    "t.short_run(pathlib.Path(sys.argv[1]), steps=60)\n"
)


def kill_again_and_again(script: str, out: Path, longest: float) -> int:
    """Starts the script and kills it, `KILLS` times at most; returns how often it was killed."""
    path = os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    rng = random.Random(0)
    for kills in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(out)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        end = time.monotonic() + rng.uniform(0, longest)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        if process.wait() == 0:  # done before it could be killed
            return kills
    return KILLS


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("work", "longest"), [("distill", 2.0), ("train", 4.0)])
def test_killed_twenty_times(tmp_path: Path, work: str, longest: float) -> None:
    run: Callable = test_distill.run if work == "distill" else lambda out: test_trainer.short_run(out, steps=60)
    unbroken = run(tmp_path / "unbroken")
    kills = kill_again_and_again(DISTILL if work == "distill" else TRAIN, tmp_path / "killed", longest)
    assert kills >= 3, "it was never in danger"
    done = run(tmp_path / "killed")
    if work == "distill":
        assert test_distill.contents(tmp_path / "killed") == test_distill.contents(tmp_path / "unbroken")
        return
    assert test_trainer.figures(done.history) == test_trainer.figures(unbroken.history)
    tensors, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "unbroken"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
