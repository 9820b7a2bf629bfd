"""Distillation: the target's own answers, once each, whatever interrupts it."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.target.model import Target
from ctc_drafter.train import distill as distill_module
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.distill import Distilled, Sampling, distill
from ctc_drafter.train.prompts import Prompt
from ctc_drafter.types import UserError
from tiny_models import tiny_llama, tiny_tokenizer

PROMPTS = [Prompt(f"row{i}", [5 + i + j for j in range(1 + i % 4)]) for i in range(14)]
EOS = (17, 60, 101)


def run(out: Path, prompts: list[Prompt] = PROMPTS, seed: int = 0, **options) -> Distilled:
    sizes = {"max_new_tokens": 8, "batch_size": 2, "shard_size": 4, "eos": EOS, "progress": False}
    return distill(Target.wrap(tiny_llama(seed)), tiny_tokenizer(), prompts, out, **{**sizes, **options})


def contents(out: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("unbroken")
    run(out)
    return contents(out)


def test_answers_are_the_targets_own(unbroken: dict[str, str]) -> None:
    shards = [name for name in unbroken if name.startswith("shard")]
    rows = [json.loads(line) for name in shards for line in unbroken[name].splitlines()]
    assert [len(unbroken[name].splitlines()) for name in shards] == [4, 4, 4, 2]
    assert [row["id"] for row in rows] == [prompt.id for prompt in PROMPTS]
    target = Target.wrap(tiny_llama())
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row["prompt_ids"] == prompt.ids
        assert [row["answer_ids"]] == plain_generate(target, [prompt.ids], max_new_tokens=8, eos=EOS).tokens


def test_summary_and_repeat(tmp_path: Path, unbroken: dict[str, str]) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert (first.rows, first.found, second.rows, second.found) == (14, 0, 0, 14)
    assert first.tokens == sum(len(row.ids) for row in DistilledDataset.load([tmp_path]).rows) - sum(
        len(prompt.ids) for prompt in PROMPTS
    )
    assert contents(tmp_path) == unbroken


def test_progress_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "14/14" in shown
    assert "tokens/s" in shown


def stopping(monkeypatch: pytest.MonkeyPatch, answers: int, error: BaseException) -> None:
    """The error instead of the next answer after so many."""
    real = distill_module.plain_generate_many

    def stopped(*args, **kwargs):
        for count, found in enumerate(real(*args, **kwargs)):
            if count == answers:
                raise error
            yield found

    monkeypatch.setattr(distill_module, "plain_generate_many", stopped)


@pytest.mark.sparing(2)
@pytest.mark.parametrize("answers", [0, 1, 3, 6, 13])
def test_interrupted_and_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, str], answers: int
) -> None:
    """Every answer that had ended is kept, in a shard or in the journal."""
    stopping(monkeypatch, answers, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.undo()
    done = run(tmp_path)
    assert (done.found, done.rows) == (answers, 14 - answers)
    assert contents(tmp_path) == unbroken


def test_a_torn_line_of_the_journal_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, str]
) -> None:
    stopping(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.undo()
    journal = tmp_path / "journal.jsonl"
    text = journal.read_text()
    assert len(text.splitlines()) == 3
    journal.write_text(text[:-9])
    stopping(monkeypatch, 0, KeyboardInterrupt())  # what is written next does not stick to half a line
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.undo()
    assert journal.read_text() == "".join(text.splitlines(keepends=True)[:2])
    assert run(tmp_path).found == 2
    assert contents(tmp_path) == unbroken


def test_answers_are_on_disk_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, synced, real = [0.0], [], os.fsync
    monkeypatch.setattr(distill_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(now[0]) or real(descriptor))
    manifest = json.loads(json.dumps({"prompts": 14, "prompts_hash": "x"}))
    with distill_module.Shards(tmp_path, PROMPTS, 14, manifest, False) as shards:
        synced.clear()
        for place in range(10):
            now[0] += 25
            shards.add(place, [1, 2], False)
            assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == place + 1
    assert synced == [75, 150, 225]


@pytest.mark.slow  # a second interpreter; in this one, the tests above and below
def test_sigkill_while_a_shard_is_written(tmp_path: Path, unbroken: dict[str, str]) -> None:
    script = (
        "import os, signal, sys, pathlib, test_distill as t\n"
        "from ctc_drafter.train import distill as shards\n"
        "lines = [0]\n"
        "def line(prompt, answer):\n"
        "    lines[0] += 1\n"
        "    if lines[0] == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(prompt, answer)\n"
        "real, shards._line = shards._line, line\n"
        "t.run(pathlib.Path(sys.argv[1]))\n"
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
    there = sorted(file.name for file in tmp_path.iterdir())
    assert len([name for name in there if name.startswith("shard-")]) in (1, 2)  # one of four rows, one of two
    assert len([name for name in there if name.startswith(".shard-")]) == 1
    assert {"manifest.json", "journal.jsonl"} < set(there)
    assert run(tmp_path).found >= 8
    assert contents(tmp_path) == unbroken


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, str]) -> None:
    syncs = [0]

    def fsync(descriptor: int) -> None:
        syncs[0] += 1
        if syncs[0] == 4:  # manifest, two shards, then the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: No space left.*same command again"):
        run(tmp_path)
    assert len(list(tmp_path.glob("shard-*"))) == 2
    monkeypatch.undo()
    assert run(tmp_path).found >= 12  # the answers of the shard that could not be written are in the journal
    assert contents(tmp_path) == unbroken


@pytest.mark.parametrize("stops", [None, 2, 4])
def test_more_prompts_behind_the_same_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, str], stops: int | None
) -> None:
    """`--limit` may grow: what is there is kept, and the folder ends as one of a single run does."""
    assert run(tmp_path, PROMPTS[:6]).rows == 6
    if stops is not None:
        stopping(monkeypatch, stops, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, PROMPTS[:11])
        monkeypatch.undo()
    done = run(tmp_path)
    assert done.found == 6 + (stops or 0)
    assert contents(tmp_path) == unbroken


def test_killed_while_a_short_shard_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, str]
) -> None:
    for fails in (1, 2):
        out, real, writes = tmp_path / str(fails), distill_module.write_atomic, [0]
        run(out, PROMPTS[:6])

        def killed(path, lines, writes=writes, real=real, fails=fails):
            writes[0] += 1
            if writes[0] == fails:
                raise KeyboardInterrupt
            real(path, lines)

        monkeypatch.setattr(distill_module, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            run(out)
        monkeypatch.undo()
        assert run(out).found == 6
        assert contents(out) == unbroken


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_new_tokens": 9}, "max_new_tokens was 8, is now 9"),
        ({"shard_size": 3}, "shard_size was 4, is now 3"),
        ({"prompts": PROMPTS[:-1]}, "prompts was 14, is now 13"),
        ({"prompts": PROMPTS[::-1]}, "prompts_hash"),
        ({"prompts": [*PROMPTS[::-1], Prompt("more", [1])]}, "prompts was 14, is now 15"),
        ({"name": "other"}, "target was"),
    ],
)
def test_folder_of_another_run(tmp_path: Path, unbroken: dict[str, str], change: dict, named: str) -> None:
    for name, text in unbroken.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"holds another run: {named}.*use another output folder"):
        run(tmp_path, **change)
    assert contents(tmp_path) == unbroken


def test_too_little_memory_names_a_batch_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, str]
) -> None:
    stopping(monkeypatch, 6, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="too little memory for 2 answers at a time; give --batch-size 1: finished ans"):
        run(tmp_path)
    monkeypatch.undo()
    assert run(tmp_path, batch_size=1).found == 6
    shards = {name: text for name, text in unbroken.items() if name.startswith("shard")}
    assert {name: text for name, text in contents(tmp_path).items() if name.startswith("shard")} == shards

    stopping(monkeypatch, 0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        run(tmp_path / "other")


def test_a_folder_of_folders_is_trained_on_as_one(tmp_path: Path) -> None:
    run(tmp_path / "all" / "a", PROMPTS[:8])
    run(tmp_path / "all" / "b", PROMPTS[8:], max_new_tokens=6)
    run(tmp_path / "all", PROMPTS[:3], seed=0)
    whole = DistilledDataset.load([tmp_path / "all"])
    apart = DistilledDataset.load([tmp_path / "all" / name for name in ("a", "b")])
    assert len(whole) == 17
    assert len(apart) == 14
    run(tmp_path / "all" / "other", seed=1)
    with pytest.raises(UserError, match="come from different targets"):
        DistilledDataset.load([tmp_path / "all"])


def test_folders_of_one_target_trained_on(tmp_path: Path) -> None:
    """What was written before the target changed is not mixed with what it writes now."""
    run(tmp_path / "a")
    run(tmp_path / "b", seed=1)
    with pytest.raises(UserError, match="come from different targets: weights was"):
        DistilledDataset.load([tmp_path / "a", tmp_path / "b"])
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    del manifest["weights"]
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    for order in (["a", "b"], ["b", "a"]):  # a server's text does not say; the other's does
        assert DistilledDataset.load([tmp_path / name for name in order]).manifest["weights"]


def test_folder_with_strangers_shards(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        run(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        run(tmp_path)


def test_prompts_without_room_are_left_out(tmp_path: Path) -> None:
    long = Prompt("long", [1] * 505)
    assert run(tmp_path, [long, PROMPTS[0]]).too_long == 1
    with pytest.raises(UserError, match="no prompt leaves 8"):
        run(tmp_path / "b", [long])


def test_dataset_knows_the_answers(tmp_path: Path) -> None:
    run(tmp_path)
    dataset = DistilledDataset.load([tmp_path])
    row = json.loads((tmp_path / "shard-00000.jsonl").read_text().splitlines()[1])
    assert dataset[1]["input_ids"].tolist() == row["prompt_ids"] + row["answer_ids"]
    assert dataset[1]["answer_start"] == len(row["prompt_ids"])
    cut = DistilledDataset.load([tmp_path], max_length=3)
    assert max(len(row.ids) for row in cut.rows) == 3
    assert len(cut) == sum(len(prompt.ids) < 3 for prompt in PROMPTS)


def test_split_follows_the_id(tmp_path: Path) -> None:
    run(tmp_path)
    dataset = DistilledDataset.load([tmp_path])
    train, held_out = dataset.split(0.3)
    keys = [{row.key for row in part.rows} for part in (train, held_out)]
    assert keys[0] | keys[1] == {row.key for row in dataset.rows}
    assert len(keys[0]) + len(keys[1]) == 14
    assert 0 < len(held_out) < 10
    run(tmp_path / "b", PROMPTS[::-1])
    assert {row.key for row in DistilledDataset.load([tmp_path / "b"]).split(0.3)[1].rows} == keys[1]


def test_a_file_of_prompts_is_no_folder_of_answers(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text('{"prompt": "the cat"}\n')
    with pytest.raises(UserError, match=r"my\.jsonl is a file.*ctc-drafter distill --prompts .*my\.jsonl") as raised:
        DistilledDataset.load([tmp_path / "my.jsonl"])
    assert "\n" not in str(raised.value)


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no shards; run distill"):
        DistilledDataset.load([tmp_path / "empty"])
    run(tmp_path / "a")
    run(tmp_path / "b", name="other", max_new_tokens=5)
    assert len(DistilledDataset.load([tmp_path / "a", tmp_path / "b"])) == 28
    other = json.loads((tmp_path / "b" / "manifest.json").read_text()) | {"tokenizer": "x"}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="different targets: tokenizer was"):
        DistilledDataset.load([tmp_path / "a", tmp_path / "b"])
    shard = tmp_path / "a" / "shard-00001.jsonl"
    shard.write_text(shard.read_text()[:-20])
    with pytest.raises(UserError, match=r"shard-00001\.jsonl line 4 is damaged; delete this shard"):
        DistilledDataset.load([tmp_path / "a"])


def test_drawn_answers_depend_on_seed_and_prompt_alone(tmp_path: Path) -> None:
    drawn = Sampling(temperature=0.9, top_p=0.95, seed=1)
    first = run(tmp_path / "a", sampling=drawn, batch_size=2)
    assert run(tmp_path / "b", PROMPTS[:4], sampling=drawn, batch_size=3).rows == 4
    shards = [contents(tmp_path / name)["shard-00000.jsonl"] for name in "ab"]
    assert shards[0] == shards[1]
    run(tmp_path / "c", sampling=Sampling(temperature=0.9, top_p=0.95, seed=2))
    assert contents(tmp_path / "c")["shard-00000.jsonl"] != shards[0]
    assert 0 < first.cut < first.rows
    with pytest.raises(UserError, match="seed was 1, is now 0"):
        run(tmp_path / "a", sampling=Sampling(temperature=0.9, top_p=0.95))
    with pytest.raises(UserError, match="give --temperature"):
        Sampling(top_p=0.5)
