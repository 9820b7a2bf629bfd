"""Training: it learns, and a killed run that goes on gives the same losses as an unbroken one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl

from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.provenance import check_writer, config_hash, weights_hash
from ctc_drafter.train import trainer as trainer_module
from ctc_drafter.train.checkpoints import DueCheckpoints, Stopped, latest_checkpoint
from ctc_drafter.train.data import DistilledDataset, DistilledRow, collate
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.train.trainer import DrafterTrainer, Trained, train_drafter
from ctc_drafter.types import UserError
from train_helpers import pair, settings, written_rows

# 7 rows in batches of 2, two batches a step: an epoch has 2 steps, its last batch one row.
SHORT = {"steps": 9, "accumulate": 2, "log_every": 2, "save_every": 3, "eval_every": 4, "eval_nodes": (4, 8)}


def short_run(out: Path, resume: bool = True, **overrides: Any) -> Trained:
    target, drafter = pair()
    rows = written_rows(target, 9)
    dataset, held_out = DistilledDataset(rows.rows[:7]), DistilledDataset(rows.rows[7:])
    return train_drafter(target, drafter, dataset, held_out, out, settings(**{**SHORT, **overrides}), resume=resume)


def figures(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The log without what depends on the clock."""
    clock = ("runtime", "per_second", "preparation_time", "seconds")
    return [{k: v for k, v in entry.items() if not any(part in k for part in clock)} for entry in history]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    out = tmp_path_factory.mktemp("unbroken")
    return out, short_run(out)


def same_run(out: Path, done: Trained, unbroken: tuple[Path, Trained]) -> None:
    assert done.steps == unbroken[1].steps == 9
    assert figures(done.history) == figures(unbroken[1].history)
    tensors, expected = load_file(out / "model.safetensors"), load_file(unbroken[0] / "model.safetensors")
    assert all(torch.equal(tensors[name], expected[name]) for name in expected.keys() | tensors.keys())


def test_log_and_saved_drafter(unbroken: tuple[Path, Trained]) -> None:
    out, done = unbroken
    losses = [entry["step"] for entry in done.history if "loss" in entry]
    assert losses == [2, 3, 4, 6, 8, 9]
    evaluations = [entry for entry in done.history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 8, 9]
    assert {"eval_beta_chain", "eval_beta_4", "eval_beta_8"} <= evaluations[0].keys()
    assert [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()] == done.history
    drafter = CTCDrafter.from_pretrained(out)
    assert drafter.state_dict().keys() == load_file(out / "model.safetensors").keys()


@pytest.mark.timeout(300)  # a second interpreter, on a machine that may be busy
@pytest.mark.slow  # a second interpreter; in this one: test_cut_off_while_a_checkpoint_is_written
def test_sigkill_and_resume(tmp_path: Path, unbroken: tuple[Path, Trained]) -> None:
    script = (
        "import os, signal, sys, pathlib, torch, test_trainer as t\n"
        "torch.set_num_threads(1)\n"
        "calls = [0]\n"
        "def loss(*args):\n"
        "    calls[0] += 1\n"
        "    if calls[0] == 11: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args)\n"
        "real, t.DrafterTrainer.anchor_losses = t.DrafterTrainer.anchor_losses, loss\n"
        "t.short_run(pathlib.Path(sys.argv[1]))\n"
    )
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
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": path})
    assert killed.returncode == -signal.SIGKILL
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert not (tmp_path / "model.safetensors").exists()
    same_run(tmp_path, short_run(tmp_path), unbroken)


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    tmp_path: Path, unbroken: tuple[Path, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = torch.save, []

    def full(value: Any, place: Any, *args: Any, **options: Any) -> None:
        if "checkpoint-6" in str(place):
            failed.append(place)
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        real(value, place, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="cannot write to"):
            short_run(tmp_path)
    assert len(failed) == 1
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-3"
    same_run(tmp_path, short_run(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_told_to_stop_it_leaves_a_checkpoint(
    number: signal.Signals, tmp_path: Path, unbroken: tuple[Path, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = DrafterTrainer.anchor_losses, []

    def loss(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:  # in the fifth step, behind the checkpoint of the third
            os.kill(os.getpid(), number)
        return real(*args)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(DrafterTrainer, "anchor_losses", loss)
        with pytest.raises(Stopped) as caught:
            short_run(tmp_path, eval_every=100)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-5"
    assert not (tmp_path / "model.safetensors").exists()
    assert short_run(tmp_path, eval_every=100).steps == 9
    tensors, expected = load_file(tmp_path / "model.safetensors"), load_file(unbroken[0] / "model.safetensors")
    assert all(torch.equal(tensors[name], expected[name]) for name in expected.keys() | tensors.keys())


def test_checkpoints_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many seconds since the last one, whatever the number of steps."""
    now = [0.0]
    monkeypatch.setattr("ctc_drafter.train.checkpoints.time.monotonic", lambda: now[0])
    due, saved = DueCheckpoints(300.0), []
    for step in range(1, 12):
        now[0] += 70.0
        control = TrainerControl(should_save=step == 3)
        due.on_step_end(None, None, control)
        if control.should_save:
            saved.append(step)
            due.on_save(None, None, control)
        assert not control.should_training_stop
    assert saved == [3, 8]
    due.asked = signal.SIGTERM
    control = due.on_step_end(None, None, TrainerControl())
    assert control.should_training_stop
    assert control.should_save


def test_the_trainer_asks_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "DueCheckpoints", lambda: DueCheckpoints(0.0))
    short_run(tmp_path, steps=2, save_every=100, eval_every=100)
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_cut_off_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: tuple[Path, Trained], at: int
) -> None:
    seals, seal = [0], trainer_module.seal

    def failing(checkpoint: Path) -> None:
        seals[0] += 1
        if seals[0] == at:
            (checkpoint / "optimizer.pt").write_bytes(b"half")
            raise KeyboardInterrupt
        seal(checkpoint)

    monkeypatch.setattr(trainer_module, "seal", failing)
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path)
    monkeypatch.undo()
    same_run(tmp_path, short_run(tmp_path), unbroken)


@pytest.mark.slow
def test_a_finished_run_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = short_run(tmp_path, steps=3)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr(DrafterTrainer, "train", lambda *_, **__: pytest.fail("trained on"))
    again = short_run(tmp_path, steps=3)
    assert again == first
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "kept"),
    [("model.safetensors", -10), ("optimizer.pt", 0), ("trainer_state.json", None), ("files.json", -10)],
)
def test_damaged_checkpoint(tmp_path: Path, unbroken: tuple[Path, Trained], file: str, kept: int | None) -> None:
    shutil.copytree(unbroken[0], tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / "checkpoints" / "checkpoint-9" / file
    content = damaged.read_bytes()
    damaged.unlink()
    if kept is not None:
        damaged.write_bytes(content[:kept])
    with pytest.raises(UserError, match=r"checkpoint-9 is damaged.*delete this folder to go on"):
        short_run(tmp_path)
    shutil.rmtree(damaged.parent)
    same_run(tmp_path, short_run(tmp_path), unbroken)


def test_folder_of_another_run(unbroken: tuple[Path, Trained]) -> None:
    out = unbroken[0]
    with pytest.raises(UserError, match=r"learning_rate was 0\.003, is now 0\.1; use another output folder"):
        short_run(out, learning_rate=0.1)
    with pytest.raises(UserError, match="holds checkpoints; resume them"):
        short_run(out, resume=False)
    target, drafter = pair()
    with pytest.raises(UserError, match="count was 7, is now 2"):
        train_drafter(target, drafter, written_rows(target, 2), None, out, settings(**SHORT))


def test_data_of_another_target(tmp_path: Path) -> None:
    target, drafter = pair()
    rows = written_rows(target, 2).rows
    other = DistilledDataset(rows, {"config": "x", "target": "some-model"})
    with pytest.raises(
        UserError, match="another target \\(some-model\\): the configuration is not the same; distill again"
    ):
        train_drafter(target, drafter, other, None, tmp_path, settings(steps=1))
    own = DistilledDataset(rows, {"config": config_hash(target.model.config)})
    assert train_drafter(target, drafter, own, None, tmp_path, settings(steps=1)).steps == 1
    own.manifest["weights"] = weights_hash(target.model)
    assert train_drafter(target, drafter, own, None, tmp_path, settings(steps=1)).steps == 1
    with torch.no_grad():
        next(target.model.parameters()).mul_(1.5)
    with pytest.raises(UserError, match="the weights are not the same"):
        train_drafter(target, drafter, own, None, tmp_path, settings(steps=1))
    strange = DistilledRow(torch.tensor([1, 2, 97], dtype=torch.int32), 1, 0)
    with pytest.raises(UserError, match="hold token 97, the target's vocabulary ends at 96"):
        train_drafter(target, drafter, DistilledDataset([strange]), None, tmp_path, settings(steps=1))
    with pytest.raises(UserError, match="hold token 97"):
        train_drafter(target, drafter, DistilledDataset(rows), DistilledDataset([strange]), tmp_path, settings(steps=1))
    with pytest.raises(UserError, match="hold token 97"):
        DistilledDataset([strange]).answer_counts(97)
    with pytest.raises(UserError, match="no training rows"):
        train_drafter(target, drafter, DistilledDataset([]), None, tmp_path, settings(steps=1))


@pytest.mark.slow
def test_a_run_that_came_to_nothing_may_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the message about memory advises; what has a checkpoint is still one run."""

    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CTCDrafter, "forward", short)
    with pytest.raises(torch.OutOfMemoryError):
        short_run(tmp_path, batch_size=4, accumulate=1)
    monkeypatch.undo()
    assert short_run(tmp_path, batch_size=2).steps == 9
    with pytest.raises(UserError, match="batch_size was 2, is now 4"):
        short_run(tmp_path, batch_size=4)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="batch_size was 2, is now 4"):
        short_run(tmp_path, batch_size=4)


def test_a_run_goes_on_with_the_same_target_only(tmp_path: Path) -> None:
    """Text of a server does not name its weights."""
    target, drafter = pair()
    rows = written_rows(target, 4)
    train_drafter(target, drafter, rows, None, tmp_path, settings(steps=1))
    with torch.no_grad():
        next(target.model.parameters()).mul_(1.5)
    with pytest.raises(UserError, match="weights was"):
        train_drafter(target, drafter, rows, None, tmp_path, settings(steps=1))


def test_weights_in_float16_are_compared_with_their_like(caplog: pytest.LogCaptureFixture) -> None:
    target, _ = pair()
    written = {"weights": weights_hash(target.model.half()), "dtype": "float16"}
    target.model.float()
    check_writer(written, target.model)
    with pytest.raises(UserError, match="the weights are not the same"):
        check_writer({"weights": "x", "dtype": "bfloat16"}, target.model)
    target.model.config._commit_hash = "b"
    check_writer({"revision": "a"}, target.model)
    assert "written by revision a of the target, this is b" in caplog.text


def test_the_target_is_left_alone(unbroken: tuple[Path, Trained], tmp_path: Path) -> None:
    target, drafter = pair()
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    rows = written_rows(target, 4)
    train_drafter(target, drafter, rows, None, tmp_path, settings(steps=2, batch_size=4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in target.model.parameters())
    saved = load_file(tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == drafter.state_dict().keys()
    trainer = DrafterTrainer(target, drafter, rows, None, tmp_path, settings(steps=2))
    optimised = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert optimised == {id(p) for p in drafter.parameters()}


def test_accumulated_batches_give_the_loss_of_the_whole(tmp_path: Path) -> None:
    target, drafter = pair()
    rows = written_rows(target, 4, answer=7)  # the last rows have fewer tokens than anchors
    trainer = DrafterTrainer(target, drafter, rows, None, tmp_path, settings(steps=2))
    drafter.train()
    items = [rows[i] for i in range(4)]
    parts, count = trainer.get_batch_samples(iter([collate(items[:3]), collate(items[3:])]), 2, torch.device("cpu"))
    shares = [trainer.compute_loss(drafter, part, num_items_in_batch=count) for part in parts]
    whole = trainer.compute_loss(drafter, collate(items))
    assert count == 7 + 6 + 5 + 4
    torch.testing.assert_close(sum(shares), whole)


@pytest.mark.sparing
@pytest.mark.parametrize("loss", ["prefix", "ctc"])
def test_learns_a_text(tmp_path: Path, loss: str) -> None:
    target, drafter = pair()
    rows = written_rows(target, 4, answer=30)
    options = {"steps": 60, "batch_size": 4, "log_every": 10, "eval_every": 30, "loss": loss, "save_every": 100}
    done = train_drafter(target, drafter, rows, rows, tmp_path, settings(**options))
    losses = [entry["loss"] for entry in done.history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    first, last = (entry for entry in done.history if "eval_beta_16" in entry)
    assert last["eval_beta_16"] > first["eval_beta_16"]
    assert last["eval_beta_chain"] > 1.5
    assert last["eval_beta_64"] >= last["eval_beta_16"] > 2


@pytest.mark.slow
def test_bf16_is_close_to_float32(tmp_path: Path) -> None:
    losses = []
    for bf16 in (False, True):
        target, drafter = pair()
        out = tmp_path / str(bf16)
        done = train_drafter(
            target, drafter, written_rows(target, 4), None, out, settings(steps=5, log_every=1, bf16=bf16)
        )
        losses.append([entry["loss"] for entry in done.history if "loss" in entry])
        assert {p.dtype for p in drafter.parameters()} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_settings_that_do_not_exist() -> None:
    with pytest.raises(UserError, match="unknown setting learning_rat; known are loss,"):
        TrainSettings.parse({"learning_rat": 1})
    assert TrainSettings.parse({"report_to": "tensorboard"}).report_to == ("tensorboard",)
    assert TrainSettings.parse({"eval_nodes": "16", "report_to": ""}).eval_nodes == (16,)
    assert TrainSettings.parse({"eval_nodes": ["4", "16"]}).eval_nodes == (4, 16)
    with pytest.raises(UserError, match=r"setting anchors: .*greater than or equal to 1"):
        TrainSettings.parse({"anchors": 0})
