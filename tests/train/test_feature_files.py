"""Features from files are those of the target, and a run learns the same from them."""

from pathlib import Path

import pytest
import torch

from ctc_drafter.drafters.registry import trained_method
from ctc_drafter.target.model import Target
from ctc_drafter.train import feature_cache
from ctc_drafter.train.data import EMPTY_ROW, collate
from ctc_drafter.train.feature_cache import FeatureFiles, WithFeatures, consecutive
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.types import UserError
from helpers import tiny_target
from train_helpers import pair, settings, written_rows

LAYERS = (0, 2)
ROW = 2**15  # bytes, about that of one row


def files(folder: Path, target: Target | None = None, count: int = 7, **options) -> FeatureFiles:
    target = target or tiny_target()
    return FeatureFiles(folder, target, written_rows(target, count), LAYERS, **{"last": True, **options})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rows_have_the_targets_states(tmp_path: Path) -> None:
    found = files(tmp_path, shard_bytes=3 * ROW)
    found.open_folder(limit=None)
    found.fill(batch_size=2, progress=False)
    assert 1 < len(found.shards) < 7
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) == pytest.approx(found.bytes, rel=0.05)
    rows = WithFeatures(found)
    for index in range(len(rows)):
        row = rows[index]
        for state, expected in zip(
            (row["features"], row["last"]), found.target.hidden_states(row["input_ids"][None], LAYERS), strict=True
        ):
            torch.testing.assert_close(state, expected[0], rtol=1e-4, atol=1e-5)
    batch = collate([rows[0], rows[EMPTY_ROW]])
    assert batch["features"].shape == (2, len(rows[0]["input_ids"]), 128)


@pytest.mark.parametrize("method", ["ctc", pytest.param("dspark", marks=pytest.mark.slow)])
def test_losses_equal_those_of_online_features(method: str, tmp_path: Path) -> None:
    losses = []
    for features in ("online", "cached"):
        target, drafter = pair()
        if method != "ctc":
            torch.manual_seed(0)
            drafter = trained_method(method).drafter.for_target(target.config, draft_length=4)
        rows = written_rows(target, 9)
        chosen = settings(steps=4, log_every=1, features=features, **trained_method(method).training)
        done = train_drafter(target, drafter, rows, None, tmp_path / features, chosen)
        losses.append([entry["loss"] for entry in done.history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert names(tmp_path / "cached" / "features") == ["features-00000.safetensors", "manifest.json"]
    assert not (tmp_path / "online" / "features").exists()


def test_limits_come_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    found = files(tmp_path / "f")
    size = found.bytes / 1e9
    with (
        caplog.at_level("INFO"),
        pytest.raises(UserError, match=r"the limit is .*--features-limit .*--features online"),
    ):
        found.open_folder(limit=size * 0.9)
    assert f"{size:.3g} GB in" in caplog.text
    assert not (tmp_path / "f").exists()
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": found.bytes - 1}))
    with pytest.raises(UserError, match=r"has room for .* make room there"):
        found.open_folder(limit=size * 1.1)
    monkeypatch.undo()
    found.open_folder(limit=size * 1.1)


def test_a_full_disk_keeps_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = files(tmp_path, shard_bytes=ROW)
    found.open_folder(None)
    save = feature_cache.save_file

    def failing(states: dict[str, torch.Tensor], path: Path) -> None:
        if "00002" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(states, path)

    monkeypatch.setattr(feature_cache, "save_file", failing)
    with pytest.raises(UserError, match=r"No space left on device; finished parts are kept"):
        found.fill(2, progress=False)
    whole = ["features-00000.safetensors", "features-00001.safetensors", "manifest.json"]
    assert names(tmp_path) == whole
    (tmp_path / ".features-00002.safetensors.tmp").write_bytes(b"killed")
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in whole}
    monkeypatch.undo()
    again = files(tmp_path, shard_bytes=ROW)
    again.open_folder(None)
    for number in (1, 0):  # two processes
        again.fill(2, (number, 2), progress=False)
    assert not again.missing
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in whole} == before
    assert names(tmp_path) == sorted(
        [*(path.name for path in map(again.path, range(len(again.shards)))), "manifest.json"]
    )


def test_files_of_others_and_damaged_ones(tmp_path: Path) -> None:
    found = files(tmp_path)
    found.open_folder(None)
    found.fill(2, progress=False)
    with pytest.raises(UserError, match="holds another run: weights was"):
        files(tmp_path, tiny_target(1)).open_folder(None)
    with pytest.raises(UserError, match="holds another run: count was 7, is now 6"):
        files(tmp_path, count=6).open_folder(None)
    found.path(0).write_bytes(found.path(0).read_bytes()[:-100])
    with pytest.raises(UserError, match=r"features-00000\.safetensors is damaged; delete it"):
        files(tmp_path).read(0)


def test_consecutive_parts() -> None:
    assert consecutive([3, 3, 9, 1, 2], 6) == [range(2), range(2, 3), range(3, 5)]
    assert consecutive([], 6) == []


def test_a_sharded_target_computes_online(tmp_path: Path) -> None:
    target, drafter = pair()
    rows = written_rows(target, 2)
    with pytest.raises(UserError, match="leave out --features cached"):
        train_drafter(target, drafter, rows, None, tmp_path, settings(steps=1, features="cached"), shard_target=True)
