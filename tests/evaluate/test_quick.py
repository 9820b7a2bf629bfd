"""Small drafters of every method: a sample of text, trainings that are alike and go on, a comparison."""

import gzip
import json
from pathlib import Path

import pytest

from ctc_drafter.cli import main
from ctc_drafter.drafters.registry import TRAINED
from ctc_drafter.evaluate import variants
from ctc_drafter.evaluate.variants import Recipe, TrainedAlike, recipes, sample_rows, selected
from ctc_drafter.files import cache_folder
from ctc_drafter.load import load_target
from ctc_drafter.provenance import config_hash
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.types import UserError
from recipes.quickstart.sample import write_sample


def distilled(folder: Path, prefix: str, rows: int, length: int, config: str = "c") -> Path:
    folder.mkdir()
    manifest = {"target": "t", "config": config, "tokenizer": "k", "template": "m"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines = [{"id": f"{prefix}{i}", "prompt_ids": [9, i % 90], "answer_ids": [5] * (length - 2)} for i in range(rows)]
    (folder / "shard-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_sample_takes_rows_evenly(tmp_path: Path) -> None:
    folders = [distilled(tmp_path / "a", "a", 100, 10), distilled(tmp_path / "b", "b", 20, 50)]
    out = tmp_path / "sample"
    assert write_sample(folders, out, 400) == pytest.approx(400, abs=60)
    rows = DistilledDataset.load([out])
    assert rows.manifest == DistilledDataset.load(folders).manifest
    short = [int(row.ids[1]) for row in rows.rows if len(row.ids) == 10]
    assert short == [(4 + 5 * i) % 90 for i in range(20)]  # every fifth
    assert sum(len(row.ids) == 50 for row in rows.rows) == 4
    assert all(row.answer_start == 2 for row in rows.rows)
    first = (out / "shard-00000.jsonl.gz").read_bytes()
    write_sample(folders, out, 400)
    assert (out / "shard-00000.jsonl.gz").read_bytes() == first
    assert write_sample(folders[:1], out, 10**6) == 1000


def test_samples_that_cannot_be(tmp_path: Path) -> None:
    one, other = distilled(tmp_path / "a", "a", 3, 9), distilled(tmp_path / "b", "b", 3, 9, config="d")
    with pytest.raises(UserError, match="different targets"):
        write_sample([one, other], tmp_path / "out")
    (one / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        write_sample([one], tmp_path / "out")
    packed = one / "shard-00001.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{}" * 99)[:20])
    with pytest.raises(UserError, match="is damaged"):
        DistilledDataset.load([one])


def test_the_shipped_sample_is_the_shipped_targets() -> None:
    rows = sample_rows()
    target, _ = load_target("tiny", "float32", "cpu")
    assert rows.manifest
    assert rows.manifest["config"] == config_hash(target.model.config)
    assert 300_000 <= sum(len(row.ids) for row in rows.rows) <= 500_000
    size = sum(file.stat().st_size for file in variants.SAMPLE_DIR.iterdir())
    assert size < 1_500_000


@pytest.mark.slow
def test_command(tiny_quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    out, work = tmp_path / "out.json", tmp_path / "work"
    options = ["bench", "--quick", *tiny_quick, "--json", str(out), "--work", str(work)]
    options += ["--only", "ctc", "--only", "medusa", "--copies", "own"]
    assert main(options) == 0
    result = json.loads(out.read_text())
    assert [(row["method"], row["nodes"]) for row in result["rows"]] == [
        ("plain", None), *((name, size) for name in ("ctc", "medusa", "prompt_lookup") for size in ("chain", 16))
    ]  # fmt: skip
    assert all(row["identical"] == row["compared"] == 1 for row in result["rows"])
    facts = result["meta"]["drafters"]
    assert facts["ctc"]["draft_length"] == facts["medusa"]["draft_length"] == 5
    assert facts["ctc"]["training"]["steps"] == facts["medusa"]["training"]["steps"] == 2
    assert facts["ctc"]["training"]["tokens"] == facts["medusa"]["training"]["tokens"] > 0

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("ctc_drafter.train.trainer.DrafterTrainer.train", never)
    assert main(options) == 0
    again = json.loads(out.read_text())
    assert [row["beta"] for row in again["rows"]] == [row["beta"] for row in result["rows"]]
    assert main([*options, "--steps", "3"]) == 2
    assert "steps was 2, is now 3" in capfd.readouterr().err


def test_every_method_has_a_recipe() -> None:
    assert {recipe.method for recipe in recipes().values()} <= TRAINED.keys()
    assert {"ctc", "ctc-paper", "medusa", "hydra", "hydra++", "dflash", "dspark"} <= recipes().keys()
    assert selected(recipes(), ["ctc"]) == {"ctc": Recipe("ctc")}
    with pytest.raises(UserError, match="--only cct is not known"):
        selected(recipes(), ["cct"])


def test_drafters_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CTC_DRAFTER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert variants.work_folder(TrainedAlike()) == tmp_path / "ctc-drafter" / "160-steps"
    assert variants.work_folder(TrainedAlike(work=tmp_path / "w")) == tmp_path / "w"


def test_the_own_folder_comes_before_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CTC_DRAFTER_CACHE", str(tmp_path / "own"))
    assert variants.work_folder(TrainedAlike()) == tmp_path / "own" / "160-steps"
    monkeypatch.setenv("CTC_DRAFTER_CACHE", "")
    assert cache_folder() == tmp_path / "cache" / "ctc-drafter"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ctc-drafter"
