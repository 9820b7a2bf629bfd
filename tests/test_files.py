"""Files are written whole, by one of several writers, and nothing that is no file is replaced."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from ctc_drafter.files import read_json, remove_leftovers, whole_or_nothing, write_json
from ctc_drafter.types import UserError


def test_a_device_stays_one_and_a_full_one_is_said(tmp_path: Path) -> None:
    """As root, replacing /dev/full makes a file of it."""
    before = Path("/dev/null").stat()
    write_json(Path("/dev/null"), {"a": 1})
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert Path("/dev/null").stat().st_ino == before.st_ino
    with pytest.raises(UserError, match="No space left"):
        write_json(Path("/dev/full"), {"a": 1})
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    assert not list(Path("/dev").glob(".*.tmp"))


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join(5)
    assert json.loads(found[0]) == {"a": 1}
    assert pipe.is_fifo()


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, place = tmp_path / "out.json", tmp_path / "there" / "real.json"
    place.write_text("{}")
    link.symlink_to(place)
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(place.read_text()) == {"a": 1}
    assert [each.name for each in (tmp_path / "there").iterdir()] == ["real.json"]


def test_a_link_to_nowhere_is_one_line(tmp_path: Path) -> None:
    link = tmp_path / "out.json"
    link.symlink_to(tmp_path / "none" / "real.json")
    with pytest.raises(UserError, match="cannot write"):
        write_json(link, {"a": 1})


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """The second was killed while it wrote, and the first put what it had written into place."""
    path = tmp_path / "shard"
    with whole_or_nothing(path) as first:
        first.write_text("whole")
        child = os.fork()
        if child == 0:
            with whole_or_nothing(path) as second:
                second.write_bytes(b"\0" * 1000)
                os._exit(9)  # killed
        os.waitpid(child, 0)
    assert path.read_text() == "whole"
    remove_leftovers(tmp_path, "shard")
    assert [each.name for each in tmp_path.iterdir()] == ["shard"], "what a dead process left is removed"


def test_leftovers_of_a_running_process_stay(tmp_path: Path) -> None:
    with whole_or_nothing(tmp_path / "shard-1") as temporary:
        temporary.write_text("on its way")
        (tmp_path / ".shard-2.tmp").write_text("an older version's")
        remove_leftovers(tmp_path, "shard-*")
        assert temporary.exists()
        assert not (tmp_path / ".shard-2.tmp").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, "\xff", "{", ""])
def test_results_that_are_no_json_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="is not JSON"):
        read_json(tmp_path / "r.json")
