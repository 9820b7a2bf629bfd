"""GGUF weights in another type: numbers against gguf-py's own, metadata kept, written once and whole."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from ctc_drafter.evaluate import gguf_weights
from ctc_drafter.evaluate.gguf_weights import OUTER, weights
from ctc_drafter.files import CACHE
from ctc_drafter.types import UserError
from tiny_gguf import tiny_model, write_gguf

KINDS = gguf.GGMLQuantizationType


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Matrices in q8_0, norms in float32."""
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def numbers(file: Path) -> dict[str, tuple[KINDS, np.ndarray]]:
    return {
        tensor.name: (tensor.tensor_type, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(file).tensors
    }


def metadata(file: Path) -> dict[str, object]:
    fields = gguf.GGUFReader(file).fields.values()
    return {field.name: field.contents() for field in fields if not field.name.startswith("GGUF.")}


def test_without_a_type_the_file_is_as_it_is(file: Path, cache: Path) -> None:
    for kind in (None, "q8_0"):
        found = weights(file, kind)
        assert (found.file, found.kind, found.vocabulary) == (file, "q8_0", 280)
    assert not cache.exists()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q4_0", "q4_1"])
def test_numbers_are_those_of_the_file_in_another_type(file: Path, kind: str) -> None:
    found = weights(file, kind)
    assert (found.kind, found.vocabulary) == (kind, 280)
    old, new = numbers(file), numbers(found.file)
    assert list(new) == list(old)  # in the order of the file
    matrices = [name for name, (type_, _) in old.items() if type_ == KINDS.Q8_0]
    assert {*OUTER} < {*matrices} < {*old}
    for name, (type_, values) in new.items():
        wanted = KINDS[kind.upper()]
        if name in OUTER and kind.startswith("q4"):
            wanted = KINDS.Q8_0
        if name not in matrices:
            wanted = KINDS.F32
        assert type_ == wanted, name
        step = gguf.quants.quantize(old[name][1], wanted)
        assert np.array_equal(values, gguf.quants.dequantize(step, wanted)), name
        if wanted in (KINDS.F32, KINDS.Q8_0):
            assert np.array_equal(values, old[name][1]), name


def test_metadata_is_kept(file: Path) -> None:
    old, new = metadata(file), metadata(weights(file, "bf16").file)
    renewed = {"general.file_type": gguf.LlamaFileType.MOSTLY_BF16.value}
    assert new == old | renewed | {"general.quantization_version": gguf.GGML_QUANT_VERSION}


def test_float32_matrices_among_others_stay(tmp_path: Path) -> None:
    """A router or a convolution that somebody left in float32; where everything is float32, everything changes."""
    model = tiny_model("llama")
    write_gguf(model, tmp_path / "full.gguf", quantised=False)
    assert weights(tmp_path / "full.gguf", None).kind == "f32"
    found = numbers(weights(tmp_path / "full.gguf", "bf16").file)
    assert found["blk.0.attn_q.weight"][0] == KINDS.BF16
    mixed = weights(tmp_path / "full.gguf", "q8_0").file
    reader = gguf.GGUFReader(mixed)
    writer = gguf.GGUFWriter(tmp_path / "mixed.gguf", "llama")
    for tensor in reader.tensors:
        left = tensor.name == "blk.1.attn_k.weight"
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type) if left else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=KINDS.F32 if left else tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = numbers(weights(tmp_path / "mixed.gguf", "f16").file)
    assert found["blk.1.attn_k.weight"][0] == KINDS.F32
    assert found["blk.0.attn_k.weight"][0] == KINDS.F16


def test_four_bits_are_the_files_own_or_q4_0(file: Path) -> None:
    assert weights(file, "q4").kind == "q4_0"
    own = weights(file, "q4_1").file
    assert weights(own, "q4") == weights(own, None)
    assert weights(own, "q4").kind == "q4_1"


def test_it_is_written_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights(file, "f16")
    written = first.file.stat().st_mtime_ns
    monkeypatch.setattr(gguf_weights, "write", None)  # another call would fail
    assert weights(file, "f16") == first
    assert first.file.stat().st_mtime_ns == written


def test_what_is_cut_off_leaves_nothing(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gguf.quants, "quantize", fail)
        with pytest.raises(KeyboardInterrupt):
            weights(file, "q4_0")
    assert [each.suffix for each in (cache / "gguf").iterdir()] in ([], [".lock"])
    assert weights(file, "q4_0").file.is_file()


def test_what_cannot_be_is_one_line(tmp_path: Path, file: Path) -> None:
    (tmp_path / "text.gguf").write_text("GGML?", encoding="utf-8")
    (tmp_path / "short.gguf").write_bytes(file.read_bytes()[:3000])
    for name, line in (("text", "is not a GGUF file"), ("short", "cannot be a target"), ("none", "cannot read")):
        with pytest.raises(UserError, match=line):
            weights(tmp_path / f"{name}.gguf", None)
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 20), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"token_embd.weight .* cannot be written as Q8_0: .* name another type"):
        weights(tmp_path / "odd.gguf", "q8_0")
