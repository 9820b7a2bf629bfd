"""A folder is claimed by the run that made it, or not at all: also where only one side says something."""

import json
import logging
from pathlib import Path

import pytest

from ctc_drafter.provenance import claim
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.types import UserError
from train_helpers import pair, settings, written_rows

RUN = {"config": "c", "settings": {"steps": (1, 2), "seed": 0}, "versions": {"torch": "1"}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (RUN, ""),
        (RUN | {"versions": {"torch": "2", "more": "1"}}, ""),
        (RUN | {"settings": {"steps": [1, 2], "seed": 0, "free": 3}}, ""),
        (RUN | {"settings": {"steps": [1, 2], "seed": 0, "added": 5}}, ""),
        (RUN | {"settings": {"steps": [1, 2], "seed": 0, "added": 6}}, "added was 5, is now 6"),
        (RUN | {"settings": {"steps": [1, 2], "seed": 1}}, "seed was 0, is now 1"),
        (RUN | {"settings": {"steps": [1, 2]}}, "seed was 0, is now not said"),
        (RUN | {"settings": {"steps": [1, 2], "seed": 0, "server": "x"}}, "server was not said, is now x"),
        (RUN | {"init": "x"}, "init was not said, is now x"),
        ({key: RUN[key] for key in ("settings", "versions")}, "config was c, is now not said"),
    ],
)
def test_keys_of_one_side_alone(tmp_path: Path, changed: dict, said: str) -> None:
    older = {"settings": {"added": 5}, "other": 1}
    claim(tmp_path / "m.json", RUN, older)
    written = (tmp_path / "m.json").read_text()
    if said:
        with pytest.raises(UserError, match=f"holds another run: {said}; use another output folder"):
            claim(tmp_path / "m.json", changed, older, {"free"})
    else:
        claim(tmp_path / "m.json", changed, older, {"free"})
    assert (tmp_path / "m.json").read_text() == written


def test_what_nobody_can_know_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    claim(tmp_path / "m.json", RUN)
    with caplog.at_level(logging.WARNING):
        claim(tmp_path / "m.json", RUN | {"weights": "w"}, {"weights": None})
    assert "does not say its weights, which is taken for the same" in caplog.text
    claim(tmp_path / "n.json", RUN | {"weights": "w"})
    with pytest.raises(UserError, match="weights was w, is now v"):
        claim(tmp_path / "n.json", RUN | {"weights": "v"}, {"weights": None})


def test_a_training_folder_of_an_older_version_goes_on(tmp_path: Path) -> None:
    target, drafter = pair()
    rows = written_rows(target, 2)
    train_drafter(target, drafter, rows, None, tmp_path, settings(steps=1))
    run = json.loads((tmp_path / "train.json").read_text())
    run["settings"]["anchor_chunk"] = 128  # no setting that is learnt from any more
    del run["settings"]["adam_beta2"]
    (tmp_path / "train.json").write_text(json.dumps(run))
    assert train_drafter(target, drafter, rows, None, tmp_path, settings(steps=1)).steps == 1
    beta = TrainSettings.parse({}).adam_beta2 - 0.1
    with pytest.raises(UserError, match=r"adam_beta2 was 0\.95, is now"):
        train_drafter(target, drafter, rows, None, tmp_path, settings(steps=1, adam_beta2=beta))
