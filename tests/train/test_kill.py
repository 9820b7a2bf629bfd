"""Distillation and training killed twenty times at random moments end as unbroken runs do."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import test_distill
import test_trainer
import torch
from safetensors.torch import load_file

from ctc_drafter.train.prompts import Prompt

HERE = Path(__file__).parent
KILLS = 20
STEPS = 200
PROMPTS = [Prompt(f"{n:03d}", [3 + n % 50, 7, 9]) for n in range(120)]
# Slowed down, so that a kill can fall anywhere in the work and not only in the imports before it, and so that the work
# is not done before the last one.
DISTILL = (
    "import pathlib, sys, time, test_distill as t, test_kill\n"
    "real = t.distill_module.plain_generate\n"
    "def slow(*args, **options):\n"
    "    time.sleep(0.4)\n"
    "    return real(*args, **options)\n"
    "t.distill_module.plain_generate = slow\n"
    "print('begun', flush=True)\n"
    "t.run(pathlib.Path(sys.argv[1]), test_kill.PROMPTS)\n"
)
TRAIN = (
    "import pathlib, sys, time, torch, test_trainer as t, test_kill\n"
    "torch.set_num_threads(1)\n"
    "real = t.DrafterTrainer.anchor_losses\n"
    "def slow(*args):\n"
    "    time.sleep(0.2)\n"
    "    return real(*args)\n"
    "t.DrafterTrainer.anchor_losses = slow\n"
    "print('begun', flush=True)\n"
    "t.short_run(pathlib.Path(sys.argv[1]), steps=test_kill.STEPS)\n"
)


def kill_again_and_again(script: str, out: Path, longest: float) -> None:
    """Starts the script and kills it at a random moment of its work, again and again."""
    path = os.pathsep.join(
        [
            str(HERE),
            str(HERE.parent / "support"),
            str(HERE.parents[1]),
            str(HERE.parents[1] / "src"),
            os.environ.get("PYTHONPATH", ""),
        ]
    )
    rng = random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(out)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(rng.uniform(0, longest))
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("work", "longest"), [("distill", 3.0), ("train", 5.0)])
def test_killed_twenty_times(tmp_path: Path, work: str, longest: float) -> None:
    def run(out: Path) -> Any:
        return test_distill.run(out, PROMPTS) if work == "distill" else test_trainer.short_run(out, steps=STEPS)

    unbroken = run(tmp_path / "unbroken")
    kill_again_and_again(DISTILL if work == "distill" else TRAIN, tmp_path / "killed", longest)
    kept = "shard-*" if work == "distill" else "checkpoints/checkpoint-*"
    assert list((tmp_path / "killed").glob(kept)), "it never came to anything"
    done = run(tmp_path / "killed")
    if work == "distill":
        assert test_distill.contents(tmp_path / "killed") == test_distill.contents(tmp_path / "unbroken")
        return
    assert test_trainer.figures(done.history) == test_trainer.figures(unbroken.history)
    tensors, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "unbroken"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
