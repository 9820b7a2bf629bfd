"""Pickles in models, drafters and checkpoints: none of them runs, whatever its form, and loading says so in a line."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import torch
from test_trainer import short_run

from ctc_drafter import AutoDrafter, Target, UserError
from ctc_drafter.load import load_target
from ctc_drafter.train.checkpoints import seal
from tiny_models import save_pair, tiny_llama


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.place), "w")


def bare(evil: Evil) -> bytes:
    return pickle.dumps({"x": evil})


def archive(evil: Evil) -> bytes:
    out = BytesIO()
    torch.save({"x": evil}, out)
    return out.getvalue()


def old(evil: Evil) -> bytes:
    out = BytesIO()
    torch.save({"x": evil}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def script(evil: Evil) -> bytes:
    """An archive with its pickle under another name, as TorchScript has it."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(evil))
        file.writestr("archive/constants.pkl", pickle.dumps((evil,)))
        file.writestr("archive/version", "3\n")
    return out.getvalue()


pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*TorchScript archive")
FORMS = [bare, archive, old, script]


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_do_run_where_nothing_holds_them(form: Callable[[Evil], bytes], tmp_path: Path) -> None:
    """Or the tests below would prove nothing."""
    content = form(Evil(tmp_path / "ran"))
    if form is script:
        with zipfile.ZipFile(BytesIO(content)) as file:
            content = file.read("archive/data.pkl")
    load = torch.load if form in (archive, old) else lambda file, weights_only: pickle.load(file)
    value = load(BytesIO(content), weights_only=False)
    (value["x"] if isinstance(value, dict) else value).close()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", FORMS)
def test_of_a_target(form: Callable[[Evil], bytes], tmp_path: Path) -> None:
    target, _ = save_pair(tmp_path)
    (target / "model.safetensors").unlink()
    (target / "pytorch_model.bin").write_bytes(form(Evil(tmp_path / "ran")))
    with pytest.raises(UserError) as caught:
        load_target(str(target), "float32", "cpu")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["ours", "medusa"])
def test_of_a_drafter(kind: str, form: Callable[[Evil], bytes], tmp_path: Path) -> None:
    _, ours = save_pair(tmp_path)
    (tmp_path / "medusa").mkdir()
    (tmp_path / "medusa" / "config.json").write_text('{"medusa_num_heads": 2, "medusa_num_layers": 1}')
    place = ours if kind == "ours" else tmp_path / "medusa"
    name, other = ("model.safetensors", "pytorch_model.bin") if kind == "ours" else (
        "medusa_lm_head.safetensors", "medusa_lm_head.pt"
    )  # fmt: skip
    (place / name).unlink(missing_ok=True)
    (place / other).write_bytes(form(Evil(tmp_path / "ran")))
    with pytest.raises(UserError) as caught:
        AutoDrafter.from_pretrained(str(place), Target.wrap(tiny_llama()))
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_of_a_checkpoint(file: str, tmp_path: Path) -> None:
    """Sealed again, so that nothing but the loading itself can refuse it."""
    out = tmp_path / "run"
    short_run(out)
    for each in out.glob("checkpoints/checkpoint-9"):
        shutil.rmtree(each)
    (out / "model.safetensors").unlink(missing_ok=True)
    checkpoint = out / "checkpoints" / "checkpoint-6"
    assert (checkpoint / file).is_file() or file == "training_args.bin"
    (checkpoint / file).write_bytes(archive(Evil(tmp_path / "ran")))
    seal(checkpoint)
    try:
        short_run(out)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017  # a file that nothing reads costs nothing
    assert not (tmp_path / "ran").exists()
