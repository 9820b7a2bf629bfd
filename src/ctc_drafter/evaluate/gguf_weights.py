"""GGUF weights for other engines: a target's own file, as it is or re-encoded (f32, bf16, q8_0, q4_0, ...)."""

from __future__ import annotations

import functools
import math
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ctc_drafter.files import cache_folder, whole_or_nothing
from ctc_drafter.target.gguf import (
    Advance,
    file_hash,
    place_errors,
    progress,
    reading_errors,
    refuse_full,
    refuse_parts,
)
from ctc_drafter.types import UserError

# llama.cpp's llama-quantize re-encodes as well, but is no part of its Python packages; gguf-py, its library of files,
# is. The numbers are the file's, which are the target's: the target was read from it.

FOLDER = "gguf"  # of the cache folder
LAYOUT = 1  # counts up when files of old must not be used any more
ENCODED = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")  # types that gguf-py writes
FOUR_BITS = "q4"  # the file as it is if its weights have four bits, else `q4_0`
TYPES = (*ENCODED, FOUR_BITS)
RENEWED = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
EMBEDDING = "token_embd.weight"
OUTER = (EMBEDDING, "output.weight")  # eight bits where the layers have four: llama-quantize spares them as well


@dataclass(frozen=True)
class Weights:
    """A GGUF file. kind: the type of most of its weights, as in `q4_1`; vocabulary: rows of its embedding."""

    file: Path
    kind: str
    vocabulary: int


def weights(file: Path, kind: str | None) -> Weights:
    """A file's weights in one of `TYPES`, re-encoded once if they are in another; None: as they are.

    Raises `UserError` for what is no whole GGUF file, for weights that gguf-py cannot read or whose rows do not fit the
    type's blocks, and for a cache folder without space or permission.
    """
    own = described(file)
    if kind == FOUR_BITS:
        kind = own.kind if own.kind.startswith(FOUR_BITS) else "q4_0"
    if kind is None or kind == own.kind:
        return own
    return Weights(encoded(file, kind), kind, own.vocabulary)


@functools.cache
def described(file: Path) -> Weights:
    """What a file says of its weights. It takes seconds: gguf-py reads every token of the vocabulary on the way."""
    reader = opened(file)
    with reading_errors(file):
        count: Counter[str] = Counter()
        for tensor in reader.tensors:
            count[tensor.tensor_type.name.lower()] += int(tensor.n_elements)
        rows = {tensor.name: int(tensor.shape[-1]) for tensor in reader.tensors}
        return Weights(file, count.most_common(1)[0][0], rows[EMBEDDING])


def opened(file: Path) -> Any:
    """gguf-py's reader. Raises `UserError` for what is no GGUF file, or one of several."""
    file_hash(file)  # which says so in a line if it is none
    with reading_errors(file):
        import gguf

        reader = gguf.GGUFReader(file)
        refuse_parts(file, reader)
    return reader


def encoded(file: Path, kind: str) -> Path:
    """The file's weights in another type, in the cache folder. One process writes them, others wait for it."""
    place = cache_folder() / FOLDER / f"{file.stem}-{file_hash(file)[:16]}-{kind}-v{LAYOUT}.gguf"
    if place.is_file():
        return place
    with place_errors(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f".{place.name}.lock")):
            if not place.is_file():
                reader = opened(file)
                with progress(f"writing {file.name} as {kind}", place.parent) as advance:
                    write(file, reader, place, kind, advance)
    return place


def write(file: Path, reader: Any, place: Path, kind: str, advance: Advance) -> None:
    """A copy of the file whose matrices are of another type.

    Vectors stay, and so do float32 matrices among others that are not: whoever wrote the file left them so.
    """
    import gguf
    from gguf.quants import dequantize, quantize

    wanted, full = gguf.GGMLQuantizationType[kind.upper()], gguf.GGMLQuantizationType.F32
    outer = gguf.GGMLQuantizationType.Q8_0 if kind.startswith(FOUR_BITS) else wanted
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) > 1]
    packed = [tensor for tensor in matrices if tensor.tensor_type != full]
    kinds = {tensor.name: outer if tensor.name in OUTER else wanted for tensor in packed or matrices}
    shapes = {tensor.name: byte_shape(file, tensor, kinds[tensor.name]) for tensor in matrices if tensor.name in kinds}
    refuse_full(place.parent, sum(map(math.prod, shapes.values())))
    with whole_or_nothing(place) as temporary:
        architecture = reader.get_field("general.architecture").contents()
        with closing(gguf.GGUFWriter(temporary, architecture)) as writer:
            for field in reader.fields.values():
                if field.name not in RENEWED and not field.name.startswith("GGUF."):
                    inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
            writer.add_file_type(gguf.LlamaFileType["ALL_F32" if wanted == full else f"MOSTLY_{wanted.name}"])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for tensor in reader.tensors:
                if shape := shapes.get(tensor.name):
                    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), kinds[tensor.name])
                else:
                    data = tensor.data
                    writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, tensor in enumerate(reader.tensors):
                advance(done / len(reader.tensors))
                data = tensor.data
                if tensor.name in shapes:
                    data = quantize(dequantize(data, tensor.tensor_type), kinds[tensor.name])
                writer.write_tensor_data(data)


def byte_shape(file: Path, tensor: Any, wanted: Any) -> tuple[int, ...]:
    """Shape of a matrix in bytes, in the type that is wanted. Raises `UserError` where that cannot be."""
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    rows = [int(size) for size in tensor.shape[::-1]]
    try:
        dequantize(tensor.data[..., :1, :], tensor.tensor_type)
        return tuple(quant_shape_to_byte_shape(rows, wanted))
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"{file}: {tensor.name} ({tensor.tensor_type.name}) cannot be written as {wanted.name}: {error}; "
            "name another type, or none for the file as it is"
        ) from error
