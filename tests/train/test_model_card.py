"""The card of a finished drafter says what its files say, and the hub gets the files that matter."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from ctc_drafter.cli import main
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.evaluate.figures import learning_curves
from ctc_drafter.rows import describe_corpus
from ctc_drafter.train import publish
from ctc_drafter.train.publish import OURS, TrainJob, train_for_target
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.types import UserError
from tiny_models import save_pair
from train_helpers import write_jsonl

HISTORY = [
    {"step": 10, "loss": 4.0},
    {"step": 20, "loss": 3.0, "eval_loss": 3.5},
    {"step": 20, "eval_beta_chain": 1.5, "eval_beta_8": 2.0},
    {"step": 40, "eval_beta_chain": 2.5, "eval_beta_8": 3.0},
]


class StubHub:
    """Takes note of what would be uploaded."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: list[str] = []

    def whoami(self) -> dict[str, str]:
        return {"name": "somebody"}

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.private[repository] = private
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
        assert repo_id in self.private
        there = [file.relative_to(folder_path).as_posix() for file in folder_path.rglob("*") if file.is_file()]
        self.files = sorted(filter_repo_objects(there, allow_patterns=allow_patterns))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target and its answers."""
    folder = tmp_path_factory.mktemp("made")
    target, _ = save_pair(folder)
    prompts = write_jsonl(folder / "cats.jsonl", [{"prompt": f"the cat {number} sat"} for number in range(6)])
    options = ["--target", str(target), "--prompts", str(prompts), "--max-new-tokens", "20"]
    assert main(["distill", *options, "--out", str(folder / "answers")]) == 0
    return folder


@pytest.mark.slow
def test_a_training_ends_with_card_picture_and_upload(answers: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    stub = StubHub()
    monkeypatch.setattr(publish, "HfApi", lambda: stub)
    monkeypatch.setattr(sys, "argv", ["ctc-drafter", "train", "--data", "my answers"])
    out = tmp_path / "drafter"
    options = ["--target", str(answers / "target"), "--data", str(answers / "answers"), "--out", str(out)]
    sizes = ["--steps", "2", "--held-out", "0.4", "--draft-length", "3", "--set", "progress=no", "--set", "log_every=1"]
    assert main(["train", *options, *sizes, "--push-to-hub", "some/drafter", "--private"]) == 0
    assert "https://hub/some/drafter" in capfd.readouterr().out
    assert stub.private == {"some/drafter": True}
    usual = ["README.md", "config.json", "custom_generate/generate.py", "model.safetensors", "train.json"]
    usual += ["train_log.jsonl"]
    assert stub.files == sorted([*usual, "training.png", "training.svg"])

    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "ctc-drafter"
    assert "base_model" not in head  # a folder is no repository
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    for key, shown in (("loss", "loss, nats an anchor"), ("eval_loss", "held-out loss"), ("eval_beta_16", "β, 16")):
        newest = [entry[key] for entry in log if key in entry][-1]
        assert f"| {shown} | {newest:.3f} |" in card
    assert "| cats.jsonl | unknown | 6 | target in float32 |" in card
    assert "    ctc-drafter train --data 'my answers'\n" in card
    block = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert block
    names: dict = {}
    exec(block[1].replace("some/drafter", str(out)).replace("max_new_tokens=128", "max_new_tokens=4"), names)
    assert names["output"].shape[0] == 1

    monkeypatch.setattr(sys, "argv", ["ctc-drafter", "again"])
    (out / "README.md").write_text(card.replace(OURS, ""))
    assert main(["train", *options, *sizes]) == 0
    assert "again" not in (out / "README.md").read_text()
    (out / "README.md").unlink()
    assert main(["train", *options, *sizes]) == 0
    assert "    ctc-drafter again\n" in (out / "README.md").read_text()


def test_a_whole_training_is_one_call_from_python(answers: Path, tmp_path: Path) -> None:
    """Nobody draws unless asked to, and the card then names no picture."""
    chosen = TrainSettings.parse({"steps": 1, "progress": False, "log_every": 1})
    given = {"target": str(answers / "target"), "sizes": {"draft_length": 3, "frames": None}, "held_out": 0.0}
    job = TrainJob([answers / "answers"], tmp_path, chosen, **given)
    done = train_for_target(job)
    assert done is not None
    assert (done.trained.steps, done.address) == (1, None)
    assert CTCDrafter.from_pretrained(tmp_path).config.draft_length == 3
    assert "training.png" not in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "training.png").exists()


def test_curves_are_the_logs_and_readable_without_colour() -> None:
    figure = learning_curves(HISTORY)
    assert figure
    drawn = {
        entry.get_label(): (list(entry.get_xdata()), list(entry.get_ydata()))
        for axis in figure.axes
        for entry in axis.lines
    }
    assert drawn == {
        "training": ([10, 20], [4.0, 3.0]),
        "held out": ([20], [3.5]),
        "chain": ([20, 40], [1.5, 2.5]),
        "8 nodes": ([20, 40], [2.0, 3.0]),
    }
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "linear"]
    for axis in figure.axes:
        assert len({(entry.get_marker(), entry.get_linestyle()) for entry in axis.lines}) == len(axis.lines)
    assert len(learning_curves(HISTORY[:1]).axes) == 1
    assert learning_curves([]) is None


def test_who_cannot_push_hears_so_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> None:
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(publish, "HfApi", lambda: SimpleNamespace(whoami=nobody))
    with pytest.raises(UserError, match=r"nobody is logged in to push to some/drafter; run hf auth login"):
        publish.check_hub("some/drafter")
    with pytest.raises(UserError, match="write owner/name"):
        publish.check_hub("drafter")


def test_a_hub_that_refuses_keeps_what_was_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise RuntimeError("403 Forbidden\nmore")  # the client's errors are of many kinds

    monkeypatch.setattr(publish, "HfApi", lambda: SimpleNamespace(create_repo=refusing))
    with pytest.raises(UserError, match=r"could not push to a/b: 403 Forbidden; .* the same command tries again$"):
        publish.push(tmp_path, "a/b")


def test_the_licence_of_a_corpus_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def info(name: str, timeout: float) -> SimpleNamespace:
        if name != "some/chats":
            raise OSError("offline")
        return SimpleNamespace(card_data={"license": "mit"})

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=info))
    assert describe_corpus("hub:some/chats:test") == {"name": "hub:some/chats:test", "licence": "mit"}
    assert describe_corpus("hub:other/chats") == {"name": "hub:other/chats"}
    assert describe_corpus(tmp_path / "prompts.jsonl") == {"name": "prompts.jsonl"}
