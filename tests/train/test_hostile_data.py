"""Prompts and answers from files that were made to hurt: one line or a row left out, little memory, no traceback."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from ctc_drafter import files
from ctc_drafter.evaluate.tasks import read_prompts as read_task_prompts
from ctc_drafter.rows import BadRow, file_rows, hub_rows
from ctc_drafter.train import prompts
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.prompts import read_prompts
from ctc_drafter.types import UserError
from tiny_models import tiny_tokenizer

pytestmark = pytest.mark.slow

ROW = {"id": "a", "prompt_ids": [5, 6], "answer_ids": [7, 8]}


def shard(folder: Path, *lines: bytes) -> Path:
    (folder / "shard-00000.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    "row",
    [
        ROW | {"answer_ids": ["a", "b"]},
        ROW | {"answer_ids": "text"},
        ROW | {"prompt_ids": "ab", "answer_ids": "cd"},
        ROW | {"answer_ids": [2**31]},
        ROW | {"answer_ids": [10**40]},
        ROW | {"answer_ids": [-1]},
        ROW | {"prompt_ids": [-1, 5]},
        ROW | {"answer_ids": [1.5]},
        ROW | {"answer_ids": [True]},
        ROW | {"answer_ids": [None]},
        ROW | {"answer_ids": [[7]]},
        ROW | {"id": 7},
        ROW | {"id": None},
        ROW | {"source": 7},
        [1],
        None,
        "text",
    ],
)
def test_rows_that_are_none_are_named_by_file_and_line(row: object, tmp_path: Path) -> None:
    shard(tmp_path, json.dumps(ROW).encode(), json.dumps(row).encode())
    with pytest.raises(UserError, match=r"shard-00000\.jsonl line 2 is damaged"):
        DistilledDataset.load([tmp_path])


@pytest.mark.parametrize("line", [b"\xff\xfe{}", b"[" * 100_000, b'{"id": "a"', b"{}", b"9" * 5000])
def test_lines_that_are_no_json_are_named(line: bytes, tmp_path: Path) -> None:
    shard(tmp_path, json.dumps(ROW).encode(), line)
    with pytest.raises(UserError, match="line 2 is damaged"):
        DistilledDataset.load([tmp_path])


def test_good_rows_are_read(tmp_path: Path) -> None:
    shard(tmp_path, json.dumps(ROW).encode(), json.dumps(ROW | {"id": "b", "source": "s"}).encode())
    assert [row.ids.tolist() for row in DistilledDataset.load([tmp_path]).rows] == [[5, 6, 7, 8]] * 2
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "shard-00000.jsonl.gz").write_bytes(gzip.compress((tmp_path / "shard-00000.jsonl").read_bytes()))
    assert len(DistilledDataset.load([packed])) == 2


def peak(work) -> float:
    """Megabytes that Python took meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("letter", [b" ", b"a", b"\n"])
def test_archives_that_inflate_a_thousandfold_take_little_memory(
    letter: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few megabytes of archive held many gigabytes; here 32 kB of it hold 32 MB."""
    monkeypatch.setattr(files, "LONGEST_ROW", 1 << 20)
    size = 1 << 20 if letter == b"\n" else 32 << 20
    (tmp_path / "shard-00000.jsonl.gz").write_bytes(gzip.compress(letter * size))

    def load() -> None:
        with pytest.raises(UserError, match=r"is damaged|no answers"):
            DistilledDataset.load([tmp_path])

    assert peak(load) < 8
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(letter * size + b'\n{"prompt": "the cat"}\n'))
    found = []
    assert peak(lambda: found.extend(file_rows(tmp_path / "p.jsonl.gz"))) < 8
    good = [row for row in found if not isinstance(row, BadRow)]
    assert len(good) == 1, "rows behind it are read"
    assert "the cat" in str(good[0])


def test_long_prompts_are_left_out_before_they_are_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen = tiny_tokenizer(), []
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("the cat", "a" * 1_000_000))
    )
    real = prompts.encode_messages
    monkeypatch.setattr(prompts, "encode_messages", lambda t, m: seen.append(len(m[0]["content"])) or real(t, m))
    found = read_prompts(tmp_path / "p.jsonl", tokenizer, max_prompt_tokens=50)
    assert found.counts == {"used": 1, "longer than 50 tokens": 1}
    assert seen == [7]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' + "[" * 100_000, "9" * 5000, '{"prompt": "\\ud800"}'])
def test_task_files_that_nest_without_end_are_one_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(line)
    try:
        read_task_prompts(tmp_path / "t.jsonl")
    except UserError as error:
        message = str(error)
    else:
        message = "t.jsonl line 1: "
        assert "ud800" in line, "refused when it is encoded"
    assert "t.jsonl line 1" in message


def test_a_json_file_that_nests_without_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not JSON"):
        list(file_rows(tmp_path / "p.json"))


def test_a_folder_does_not_stand_for_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.jsonl").write_text('{"prompt": "private"}\n')
    with pytest.raises(UserError, match="a folder of that name is here"):
        list(hub_rows("hub:owner/name"))
