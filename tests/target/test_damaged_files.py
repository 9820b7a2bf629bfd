"""Damaged safetensors of targets and drafters: refused in one line that names the folder, never read half."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ctc_drafter.drafters.registry import open_drafter
from ctc_drafter.load import load_target
from ctc_drafter.types import UserError
from tiny_models import save_pair

FILE = "model.safetensors"


def parts(content: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_header(change: Callable[[dict, str], object]) -> Callable[[bytes], bytes]:
    """A change of the header's entry of one tensor, or of the header."""

    def damage(content: bytes) -> bytes:
        header, data = parts(content)
        name = next(name for name in header if name != "__metadata__")
        changed = change(header, name)
        return joined(header if changed is None else changed, data)

    return damage


def entry(**values: object) -> Callable[[bytes], bytes]:
    return with_header(lambda header, name: header[name].update(values))


def swapped(header: dict, name: str) -> None:
    """Two tensors that share their bytes."""
    other = next(each for each in header if each not in ("__metadata__", name))
    header[other]["data_offsets"] = header[name]["data_offsets"]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "seven bytes": lambda content: content[:7],
    "header alone": lambda content: content[: 8 + struct.unpack("<Q", content[:8])[0]],
    "cut in the header": lambda content: content[:300],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "nothing but zeros": lambda content: bytes(len(content)),
    "header size of 2^63": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "header size of 2^64 - 1": lambda content: struct.pack("<Q", 2**64 - 1) + content[8:],
    "header size of 0": lambda content: struct.pack("<Q", 0) + content[8:],
    "header size one more": lambda content: struct.pack("<Q", struct.unpack("<Q", content[:8])[0] + 1) + content[8:],
    "header is no JSON": lambda content: joined(b"{" * 200, parts(content)[1]),
    "header is a list": with_header(lambda header, name: [header]),
    "header nests without end": lambda content: joined(b'{"a":' * 50_000, parts(content)[1]),
    "header is not UTF-8": lambda content: joined(b'{"\xff\xfe": 1}', parts(content)[1]),
    "unknown type": entry(dtype="F7"),
    "another type": entry(dtype="F64"),
    "another shape": entry(shape=[3, 5]),
    "huge shape": entry(shape=[2**40, 2**40]),
    "negative shape": entry(shape=[-1, 64]),
    "offsets behind the end": entry(data_offsets=[2**40, 2**40 + 4]),
    "offsets the wrong way": entry(data_offsets=[8, 4]),
    "negative offsets": entry(data_offsets=[-4, 0]),
    "shared bytes": with_header(swapped),
    "a tensor less": with_header(lambda header, name: header.pop(name) and None),
    "a pickle": lambda content: b"\x80\x04\x95" + content[3:],
    "a zip file": lambda content: b"PK\x03\x04" + content[4:],
    "HTML": lambda content: b"<!DOCTYPE html><html>404</html>",
    "a pointer of Git LFS": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


OPEN = {"target": lambda folder: load_target(folder, "float32", "cpu"), "drafter": open_drafter}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    return folder


@pytest.mark.parametrize("which", OPEN)
@pytest.mark.parametrize("name", DAMAGES)
def test_it_is_one_line(whole: Path, name: str, which: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole / which, tmp_path / which))
    (folder / FILE).write_bytes(DAMAGES[name]((folder / FILE).read_bytes()))
    with pytest.raises(UserError) as raised:
        OPEN[which](str(folder))
    message = str(raised.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize("which", OPEN)
def test_whole_files_load(whole: Path, which: str) -> None:
    OPEN[which](str(whole / which))
