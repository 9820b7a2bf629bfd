"""Training removes what a killed run of its own left, and nothing else; hostile checkpoints are one line."""

import json
import os
from pathlib import Path

import pytest

from ctc_drafter.train.checkpoints import SEAL, latest_checkpoint, remove_unsealed, seal, trainer_state
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.trainer import RUN_FILE, train_drafter
from ctc_drafter.types import UserError
from train_helpers import pair, settings, written_rows


def train(out: Path) -> None:
    target, drafter = pair()
    dataset = DistilledDataset(written_rows(target, 3).rows)
    train_drafter(target, drafter, dataset, None, out, settings(steps=1, save_every=1))


def checkpoint(folder: Path, step: object, sealed: bool = True) -> Path:
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"weights")
    (place / "trainer_state.json").write_text('{"global_step": 1, "max_steps": 1, "log_history": []}')
    if sealed:
        seal(place)
    return place


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


@pytest.mark.parametrize("run_file", [None, '{"mine": 1}', "{", "[]"])
def test_another_tools_checkpoints_stay(run_file: str | None, tmp_path: Path) -> None:
    for step in (500, 1000, "best"):
        checkpoint(tmp_path / "checkpoints", step, sealed=False)
    if run_file:
        (tmp_path / RUN_FILE).write_text(run_file)
    before = files_of(tmp_path)
    with pytest.raises(UserError) as raised:
        train(tmp_path)
    assert "--out" in str(raised.value) or "another output folder" in str(raised.value)
    assert files_of(tmp_path) == before


def test_a_run_file_of_something_else_stays(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text('{"mine": 1}')
    with pytest.raises(UserError, match="another"):
        train(tmp_path)
    assert (tmp_path / RUN_FILE).read_text() == '{"mine": 1}'


def test_what_a_killed_run_of_its_own_left_goes(tmp_path: Path) -> None:
    train(tmp_path)
    torn = checkpoint(tmp_path / "checkpoints", 7, sealed=False)
    other = checkpoint(tmp_path / "checkpoints", "best", sealed=False)
    train(tmp_path)
    assert not torn.exists()
    assert other.exists(), "no checkpoint of a step"


@pytest.mark.parametrize("make", [lambda p: p.write_text("a"), lambda p: p.symlink_to("/tmp"), os.mkfifo])
def test_what_is_called_a_checkpoint_and_is_no_folder_is_named(make, tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-77")
    with pytest.raises(UserError, match="checkpoint-77 is no folder"):
        latest_checkpoint(tmp_path)
    with pytest.raises(UserError, match="checkpoint-77 is no folder"):
        remove_unsealed(tmp_path)
    assert os.path.lexists(tmp_path / "checkpoint-77")


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "sealed",
    [
        {"/dev/zero": "0"},
        {"../../../../../../../../dev/zero": "0"},
        {"zero": "0"},
        {"pipe": "0"},
        {},
        [],
        {"model.safetensors": None},
        {"model.safetensors": "0"},
        7,
    ],
)
def test_a_seal_that_names_other_things_is_damaged(sealed: object, tmp_path: Path) -> None:
    place = checkpoint(tmp_path, 3)
    (place / "zero").symlink_to("/dev/zero")
    os.mkfifo(place / "pipe")
    (place / SEAL).write_text(json.dumps(sealed))
    with pytest.raises(UserError, match="is damaged"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"global_step": "x"}', "{}", '{"global_step": 1, "max_steps": 2}'])
def test_a_state_that_is_none_is_damaged(text: str, tmp_path: Path) -> None:
    place = checkpoint(tmp_path, 3, sealed=False)
    (place / "trainer_state.json").write_text(text)
    seal(place)
    with pytest.raises(UserError, match="is damaged"):
        trainer_state(place)


def test_a_whole_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, sealed=False)
    assert latest_checkpoint(tmp_path) == newest
    remove_unsealed(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
