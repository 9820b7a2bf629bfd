"""Two processes on the CPU learn what one learns, and one goes on where two were stopped."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ctc_drafter.target.features import decoder_blocks
from ctc_drafter.train import trainer as trainer_module
from ctc_drafter.train.checkpoints import share_of
from ctc_drafter.train.data import EMPTY_ROW, DistilledDataset, LengthSampler
from ctc_drafter.train.feature_cache import FeatureFiles
from ctc_drafter.train.objective import draw_anchors
from ctc_drafter.train.trainer import LogBeforeSave, Trained, train_drafter
from ctc_drafter.types import UserError
from train_helpers import pair, settings, written_rows

# 9 rows in batches of 2, two a step: an epoch ends with a step of one row, where one process has none.
RUN = {"steps": 7, "accumulate": 2, "log_every": 1, "save_every": 3, "eval_every": 3, "eval_nodes": (4, 8)}


def run(out: Path, shard_target: bool = False, stop_at: int | None = None, features: str = "online") -> Trained:
    target, drafter = pair()
    trainer_module.FeatureFiles = partial(FeatureFiles, shard_bytes=3000)  # several files for each process
    if stop_at:

        class Killed(LogBeforeSave):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == stop_at:
                    os._exit(0)

        trainer_module.LogBeforeSave = Killed
    rows = written_rows(target, 14).rows
    parts = DistilledDataset(rows[:9]), DistilledDataset(rows[9:])
    done = train_drafter(target, drafter, *parts, out, settings(**RUN, features=features), shard_target=shard_target)
    # No process holds more than its share between two blocks' turns.
    whole = [p for block in decoder_blocks(target.model) for p in block.parameters() if not isinstance(p, DTensor)]
    assert not (shard_target and whole)
    return done


def launch(out: Path, arguments: str = "") -> None:
    """The same with two processes, as torchrun starts them."""
    script = (
        "import pathlib, sys, torch, test_processes as t\n"
        "torch.set_num_threads(1)\n"
        f"t.run(pathlib.Path(sys.argv[1]){arguments})\n"
        "torch.distributed.destroy_process_group()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    path = os.pathsep.join(
        [
            str(here),
            str(here.parent / "support"),
            str(here.parents[1]),
            str(here.parents[1] / "src"),
            os.environ.get("PYTHONPATH", ""),
        ]
    )
    common = {"PYTHONPATH": path, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(out)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # one that waits for the other would wait on
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)


def learnt(done: Trained) -> list[dict[str, float]]:
    kept = ("loss", "eval_loss", "eval_beta_chain", "eval_beta_8", "eval_top_1", "tokens", "step")
    return [{name: entry[name] for name in kept if name in entry} for entry in done.history]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    out = tmp_path_factory.mktemp("alone")
    return out, run(out)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["", ", shard_target=True", ", features='cached'"], ids=["whole", "sharded", "cached"])
def test_two_processes_learn_what_one_learns(tmp_path: Path, alone: tuple[Path, Trained], way: str) -> None:
    launch(tmp_path, way)
    if "cached" in way:
        assert len(list((tmp_path / "features").glob("*.safetensors"))) > 3
    done = run(tmp_path)  # finished: what the two wrote is read
    assert len(done.history) == len(alone[1].history)
    for found, expected in zip(learnt(done), learnt(alone[1]), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    tensors, expected = load_file(tmp_path / "model.safetensors"), load_file(alone[0] / "model.safetensors")
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(tmp_path: Path, alone: tuple[Path, Trained]) -> None:
    launch(tmp_path, ", stop_at=4")
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-3"]
    for found, expected in zip(learnt(run(tmp_path)), learnt(alone[1]), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_forward_passes_are_shared_evenly() -> None:
    assert share_of(8, 4) == 2
    with pytest.raises(UserError, match=r"3 processes cannot share the 4 .*accumulate=6, or a multiple"):
        share_of(4, 3)


def test_every_process_gets_as_many_batches() -> None:
    lengths = [i * 37 % 101 for i in range(103)]
    alone, shared = LengthSampler(lengths, 4, seed=0), LengthSampler(lengths, 4, seed=0, processes=8)
    assert list(shared) == list(alone) + [EMPTY_ROW] * 25
    assert len(shared) == len(list(shared)) == 128


def test_rows_that_teach_nothing_have_no_anchors() -> None:
    nothing = DistilledDataset([])[EMPTY_ROW]
    start, length = torch.tensor([nothing["answer_start"]]), torch.tensor([len(nothing["input_ids"])])
    positions, used = draw_anchors(length, start, torch.tensor([0]), 5, seed="0:0")
    assert (positions.shape, used.tolist()) == ((1, 1), [[False]])
