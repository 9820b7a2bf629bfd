"""GGUF files as targets: what is converted, when, and what is refused."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctc_drafter import Target, UserError
from ctc_drafter.cli import main
from ctc_drafter.load import load_config, load_target
from ctc_drafter.target.gguf import conversion, converted, file_hash
from ctc_drafter.target.names import resolve
from tiny_gguf import tiny_model, write_gguf
from tiny_models import tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CTC_DRAFTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    write_gguf(tiny_model("llama"), tmp_path / "llama.gguf")
    return tmp_path / "llama.gguf"


def in_cache(cache: Path) -> list[str]:
    """Conversions and what is left of some, without locks."""
    return sorted(path.name for path in (cache / "targets").iterdir() if path.suffix != ".lock")


@pytest.mark.sparing
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False)])
def test_answers_are_those_of_the_model_that_was_written(kind, tied, tmp_path, capfd):
    model = write_gguf(tiny_model(kind, tied), tmp_path / "some.gguf")
    chat = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "the cat"}], add_generation_prompt=True, return_dict=False, return_tensors="pt"
    )
    expected = model.generate(chat, max_new_tokens=24, do_sample=False, pad_token_id=1)[0, chat.shape[1] :]
    options = ["--target", str(tmp_path / "some.gguf"), "--prompt", "the cat", "--max-new-tokens", "24"]
    assert main(["generate", *options, "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["outputs"][0]["tokens"] == expected.tolist()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_conversion_is_a_folder_for_transformers(kind, tmp_path):
    model = write_gguf(tiny_model(kind, tied=True), tmp_path / "some.gguf", tokenizer__ggml__eot_token_id=3)
    folder = converted(tmp_path / "some.gguf")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(5, 40).unsqueeze(0)
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert stock.config.tie_word_embeddings
    assert not hasattr(stock.config, "quantization_config")
    assert str(tmp_path / "some") not in (folder / "config.json").read_text()
    assert stock.generation_config.eos_token_id == [1, 3]
    assert stock.generation_config.bos_token_id == 0
    tokenizer, expected = AutoTokenizer.from_pretrained(folder), tiny_tokenizer()
    for text in ("the cat  sat, 2024!", "naïve 🐈", "<|user|>hat<|end|>"):
        assert tokenizer(text).input_ids == expected(text).input_ids
    assert tokenizer.chat_template == expected.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|bos|>", "<|end|>")
    assert load_config(str(tmp_path / "some.gguf"))[2] == (1, 3)


def test_any_dtype(llama):
    target, _ = load_target(str(llama), "bfloat16", "cpu")
    assert target.dtype == torch.bfloat16
    assert Target.load(str(llama)).dtype == torch.float32


def test_the_second_use_converts_nothing(llama, monkeypatch, cache):
    folder = converted(llama)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr("ctc_drafter.target.gguf.write_conversion", lambda *_: pytest.fail("converted again"))
    monkeypatch.setitem(sys.modules, "gguf", None)  # nor is the package needed any more
    assert converted(llama) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    moved = llama.rename(llama.with_name("elsewhere")).rename(llama)
    assert converted(moved) == folder


def test_another_file_of_that_name_is_another_conversion(llama):
    first = converted(llama)
    write_gguf(tiny_model("llama", seed=1), llama)
    second = converted(llama)
    assert first != second
    weights = [AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in (first, second)]
    assert not torch.equal(*weights)


def test_a_conversion_that_lost_files_is_made_again(llama):
    folder = converted(llama)
    (folder / "model.safetensors").unlink()
    assert converted(llama) == folder
    assert (folder / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("x")])
def test_what_ends_a_conversion_leaves_nothing(error, llama, monkeypatch, cache):
    def ended(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", lambda _model, folder: ended(folder))
        with pytest.raises(BaseException, match=r"x|^$"):
            converted(llama)
    assert in_cache(cache) == []
    assert converted(llama).is_dir()


def test_what_a_killed_conversion_left_is_not_taken(llama, cache):
    """Its temporary folder is complete but for its name, and its lock is still there."""
    folder = conversion(llama.stem, file_hash(llama))
    left = folder.with_name(f".{folder.name}.tmp")
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    (left / "model.safetensors").write_bytes(b"half")
    folder.with_name(f".{folder.name}.lock").touch()
    assert converted(llama) == folder
    assert (folder / "model.safetensors").stat().st_size > 4
    assert in_cache(cache) == [folder.name]


KILLED = """
import os, sys, transformers
from pathlib import Path
from ctc_drafter.target.gguf import converted
whole = transformers.PreTrainedModel.save_pretrained
def save(model, folder):
    whole(model, folder)
    os.kill(os.getpid(), 9)
transformers.PreTrainedModel.save_pretrained = save
converted(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_conversion_is_done_again(llama, cache):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(llama)], env=environment, check=False)
    assert run.returncode == -signal.SIGKILL
    assert [name[0] for name in in_cache(cache)] == ["."]
    folder = converted(llama)
    assert in_cache(cache) == [folder.name]
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 280


def test_two_at_once_convert_once(llama, monkeypatch, cache):
    from ctc_drafter.target import gguf as ours

    begun, go, calls = threading.Event(), threading.Event(), []
    write = ours.write_conversion

    def slowly(*args):
        calls.append(args)
        begun.set()
        assert go.wait(60)
        write(*args)

    monkeypatch.setattr(ours, "write_conversion", slowly)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(converted(llama))) for _ in range(2)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive()
    go.set()
    for thread in threads:
        thread.join(60)
    assert found == [conversion(llama.stem, file_hash(llama))] * 2
    assert len(calls) == 1


def test_a_folder_with_one_file(llama, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    llama.rename(folder / "llama.gguf")
    assert resolve(str(folder)) == str(converted(folder / "llama.gguf"))
    (folder / "second.gguf").touch()
    with pytest.raises(UserError, match="holds 2 GGUF files; give one of them"):
        resolve(str(folder))


# Bad files and places: each is one line.


def cut(file: Path, share: float) -> Path:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    return file


def written(folder: Path, **fields) -> Path:
    write_gguf(tiny_model("llama"), folder / "bad.gguf", **fields)
    return folder / "bad.gguf"


def holding(folder: Path, data: bytes) -> Path:
    (folder / "bad.gguf").write_bytes(data)
    return folder / "bad.gguf"


# Version 3, no tensors, one key "a": an array of 2^60 numbers.
BOMB = b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 1 << 60)
BAD = {
    "unknown": (lambda folder: written(folder, architecture="clip"), "architecture clip is not supported"),
    "of another family": (lambda folder: written(folder, architecture="bloom"), "is incomplete"),
    "cut in the weights": (lambda folder: cut(written(folder), 0.7), "bad.gguf cannot be a target"),
    "cut in the header": (lambda folder: cut(written(folder), 0.02), "bad.gguf cannot be a target"),
    "part": (lambda folder: written(folder, split__count=3), "llama-gguf-split --merge"),
    "other sizes": (lambda folder: written(folder, llama__feed_forward_length=64), "does not fit its config.json"),
    "text": (lambda folder: holding(folder, b"GGML is another"), "bad.gguf is not a GGUF file"),
    "empty": (lambda folder: holding(folder, b""), "bad.gguf is not a GGUF file"),
    "magic alone": (lambda folder: holding(folder, b"GGUF"), "bad.gguf cannot be a target"),
    "bomb": (lambda folder: holding(folder, BOMB), "bad.gguf cannot be a target"),
    "nothing": (lambda folder: folder / "bad.gguf", "bad.gguf: No such file"),
}


@pytest.mark.sparing(3)
@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line(case, tmp_path, capfd, cache):
    make, part = BAD[case]
    assert part in refused(make(tmp_path), capfd)
    assert not (cache / "targets").exists() or in_cache(cache) == []


def test_a_missing_weight_is_named(tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_tensor",
        lambda self, name, *a, **o: None if "1.ffn_up" in name else add(self, name, *a, **o),
    )
    write_gguf(tiny_model("llama"), tmp_path / "lacking.gguf")
    with pytest.raises(UserError, match=r"incomplete: model.layers.1.mlp.up_proj.weight is missing"):
        converted(tmp_path / "lacking.gguf")


def test_scaled_positions_that_nobody_reads_are_named(tmp_path, caplog):
    write_gguf(tiny_model("llama"), tmp_path / "long.gguf", llama__rope__scaling__factor=4)
    converted(tmp_path / "long.gguf")
    assert "llama.rope.scaling.factor" in caplog.text


def refused(file: Path, capfd) -> str:
    """The one line that a command says of a file."""
    assert main(["generate", "--target", str(file), "--drafter", "prompt_lookup", "--prompt", "a"]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("converting ")]
    assert (out, len(lines), lines[0].partition(":")[0]) == ("", 1, "error")
    return lines[0]


@contextmanager
def no_larger_files(size: int):
    """As a full disk, the file system refuses what goes beyond `size` bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_is_said_beforehand(llama, cache, monkeypatch, capfd):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    line = refused(llama, capfd)
    assert f"no space left in {cache / 'targets'}" in line
    assert "CTC_DRAFTER_CACHE" in line
    assert in_cache(cache) == []


@pytest.mark.slow
def test_a_disk_that_fills_up(llama, cache, capfd):
    with no_larger_files(100_000):
        line = refused(llama, capfd)
    assert f"cannot write to {cache / 'targets'}" in line
    assert "CTC_DRAFTER_CACHE" in line
    assert in_cache(cache) == []
    assert converted(llama).is_dir()


def test_a_cache_folder_that_cannot_be_written(llama, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CTC_DRAFTER_CACHE", str(tmp_path / "file"))
    line = refused(llama, capfd)
    assert f"cannot write to {tmp_path / 'file'}" in line
    assert "CTC_DRAFTER_CACHE" in line


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_one_line(package, llama, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, package, None)
    assert refused(llama, capfd) == f"error: reading a GGUF file needs {package}; pip install 'ctc-drafter[gguf]'"


def test_a_bar_where_there_is_a_terminal(llama, monkeypatch, capfd):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich draws as in a terminal then
    monkeypatch.setenv("FORCE_COLOR", "1")
    converted(llama)
    out, err = capfd.readouterr()
    assert out == ""
    assert "converting llama.gguf" in err
    assert "100%" in err or "%" in err


@pytest.mark.usefixtures("quick_loading")
def test_one_line_where_there_is_none(llama, capfd, caplog):
    load_target(str(llama), "float32", "cpu")
    assert caplog.messages == [f"converting llama.gguf once, into {conversion('llama', file_hash(llama))}"]
    assert capfd.readouterr() == ("", "")


def test_transformers_is_as_before(llama, tmp_path, monkeypatch):
    from transformers import modeling_gguf_pytorch_utils as theirs

    before = (gguf.GGUFReader, gguf.get_tensor_name_map, theirs.tqdm)
    opened = []
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", _noted(gguf.GGUFReader._build_fields, opened))
    converted(llama)
    assert len(opened) == 1, "reading the header takes longest"
    with pytest.raises(UserError):
        converted(holding(tmp_path, BOMB))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map, theirs.tqdm) == before


def _noted(work, calls: list):
    def run(*args):
        calls.append(args)
        return work(*args)

    return run
