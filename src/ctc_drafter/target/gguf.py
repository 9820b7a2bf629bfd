"""Reads GGUF files as targets: converts each once, to a folder of safetensors in the cache folder."""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ctc_drafter.files import CACHE, cache_folder, made_once
from ctc_drafter.target.checks import load_causal_lm, refuse_kind
from ctc_drafter.types import EXTRAS, UserError, first_line

# A conversion is a folder that any tool of transformers opens: weights in float32, as transformers dequantises them,
# tokenizer, chat template and end tokens. Its name has the file's hash, so that another file is another folder, and it
# gets its name last, so that what has the name is whole. Afterwards neither the file nor the gguf package is needed.

LOG = logging.getLogger(__name__)
FOLDER = "targets"  # of the cache folder
LAYOUT = 1  # counts up when conversions of old must not be used any more
NEEDS = ("gguf", "accelerate")  # packages that transformers imports for a GGUF file
BYTES = 4  # of a weight in float32, which every kind of block fits
UNREAD = ("rope.scaling.type", "rope.scaling.factor")  # settings that transformers leaves out
Advance = Callable[[float], None]  # gets the share that is done, 0 to 1


def converted(file: Path, sha256: str | None = None) -> Path:
    """The folder of a GGUF file's conversion, which is made now if it is not there yet.

    sha256: what the file's hash must be. Raises `UserError` for files that are missing, another, damaged or of no kind
    that can be a target, and for a cache folder without space or permission.
    """
    found = file_hash(file)
    if sha256 not in (None, found):
        raise UserError(f"{file} is another file than expected: its sha256 is {found[:12]}…, not {sha256[:12]}…")
    folder = conversion(file.stem, found)
    if not is_whole(folder):
        convert(file, folder)
    return folder


def conversion(stem: str, sha256: str) -> Path:
    """Where the conversion of a file of this name and hash lies, or would."""
    return cache_folder() / FOLDER / f"{stem}-{sha256[:16]}-v{LAYOUT}"


def is_whole(folder: Path) -> bool:
    """Whether there is a conversion. One that somebody has deleted files from is none."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def file_hash(file: Path) -> str:
    """The sha256 of a file that begins as a GGUF file does."""
    try:
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise UserError(f"{file} is not a GGUF file; give one, a folder of a model, or a Hugging Face id")
            opened.seek(0)
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give a GGUF file") from error


def convert(file: Path, folder: Path) -> None:
    """Converts a file into a folder that is not there, or not whole.

    One process converts, and others wait for it. One that was killed leaves nothing but a temporary folder, which the
    next one removes.
    """
    for package in NEEDS:
        try:
            import_module(package)
        except ImportError as error:
            raise UserError(f"{EXTRAS['gguf'][0]} needs {package}; pip install 'ctc-drafter[gguf]'") from error
    with ExitStack() as turn:
        with place_errors(folder.parent):
            turn.enter_context(made_once(folder, f"converting {file}"))
        if not is_whole(folder):
            write_conversion(file, folder)


def write_conversion(file: Path, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    with place_errors(folder.parent):
        shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
        shutil.rmtree(folder, ignore_errors=True)  # files are missing there
    try:
        with progress(f"converting {file.name}", folder) as advance:
            model, tokenizer = read(file, folder.parent, advance)
            with place_errors(folder.parent):
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
                for each in temporary.iterdir():
                    with each.open("rb+") as written:
                        os.fsync(written.fileno())
                temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read(file: Path, place: Path, advance: Advance) -> tuple[PreTrainedModel, Any]:
    """Model in float32 and tokenizer of a file, ready to be saved in `place`. Raises `UserError` for unusable ones."""
    source = {"pretrained_model_name_or_path": str(file.resolve().parent), "gguf_file": file.name}
    with reading_errors(file), read_once(file, advance):
        import gguf

        # transformers' own reader, which looks first, finds the end of a damaged file; the one of gguf may not.
        config = AutoConfig.from_pretrained(**source)
        refuse_kind(config)
        reader = gguf.GGUFReader(file)
        refuse_parts(file, reader)
        refuse_full(place, BYTES * sum(int(tensor.n_elements) for tensor in reader.tensors))
        tokenizer = AutoTokenizer.from_pretrained(**source)
        options = {"gguf_file": file.name, "config": config, "dtype": torch.float32} | dequantised()
        loaded = load_causal_lm(source["pretrained_model_name_or_path"], **options)
        warn_unread(file, reader)
        return plain(loaded, end_tokens(reader, config, tokenizer), tokenizer), tokenizer


def dequantised() -> dict[str, Any]:
    """The option that keeps transformers from leaving weights in blocks; older versions never do."""
    kind = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": kind(dequantize=True)} if kind else {}


def plain(loaded: PreTrainedModel, ends: list[int], tokenizer: Any) -> PreTrainedModel:
    """The same weights in a model that says nothing of GGUF: `save_pretrained` refuses quantised ones."""
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    config = type(loaded.config)(**settings)
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return fresh


def end_tokens(reader: Any, config: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: of the text, and of a turn where the file names another one for it."""
    listed = config.get_text_config(decoder=True).eos_token_id
    turn = reader.get_field("tokenizer.ggml.eot_token_id")
    ends = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    ends += [int(turn.parts[turn.data[0]][0])] if turn is not None else []
    return sorted({int(end) for end in ends if end is not None})


# What is refused, and what is said.


def refuse_parts(file: Path, reader: Any) -> None:
    """Raises `UserError` for one file of several, which llama.cpp writes of large models."""
    count = reader.get_field("split.count")
    if count is not None and int(count.parts[count.data[0]][0]) > 1:
        raise UserError(f"{file} is a part of a model in several files; join them first: llama-gguf-split --merge")


def refuse_full(place: Path, size: int) -> None:
    """Raises `UserError` where `size` bytes do not fit."""
    free = shutil.disk_usage(place).free
    if free < size:
        raise UserError(f"{no_space(place)}: the conversion takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def no_space(place: Path) -> str:
    return f"no space left in {place}; make room, or set {CACHE} to another folder"


def warn_unread(file: Path, reader: Any) -> None:
    """Says which settings of positions transformers leaves out: texts beyond the first context then differ."""
    names = [name for name in reader.fields if name.endswith(UNREAD)]
    names += [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_freqs")]
    if names:
        LOG.warning("%s: not read, since transformers does not know it in GGUF: %s", file.name, ", ".join(names))


@contextmanager
def reading_errors(file: Path) -> Iterator[None]:
    """Turns whatever a damaged or unknown file raises into one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # readers fail wherever a file stops making sense
        raise UserError(
            f"{file} cannot be a target: {first_line(error)}; give a whole GGUF file of a model that transformers reads"
        ) from error


@contextmanager
def place_errors(place: Path) -> Iterator[None]:
    """Turns a full or unwritable cache folder into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in reason:
            raise UserError(no_space(place)) from error
        raise UserError(f"cannot write to {place}: {reason}; set {CACHE} to another folder") from error


# Progress.


@contextmanager
def progress(what: str, folder: Path) -> Iterator[Advance]:
    """A bar on stderr; where that is no terminal, one line."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        LOG.info("%s once, into %s", what, folder)
        yield lambda _share: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


# What transformers does with a file in one thread at a time: the parts that are replaced are the process's.
READING = threading.Lock()


@contextmanager
def read_once(file: Path, advance: Advance) -> Iterator[None]:
    """Lets transformers read a file with one look at its header instead of six, which take most of the time, and report
    to `advance` instead of drawing bars, which no option of its turns off."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as theirs

    path, shown = file.resolve(), transformers_logging.is_progress_bar_enabled()

    def steps(tensors: Iterable[Any], **_options: Any) -> Iterator[Any]:
        listed = list(tensors)
        for done, tensor in enumerate(listed):
            advance(done / len(listed))
            yield tensor

    with READING:
        places = [(gguf, "GGUFReader"), (gguf, "get_tensor_name_map"), (theirs, "tqdm")]
        kept = [getattr(module, name, None) for module, name in places]
        new_reader, once = gguf.GGUFReader, functools.cache(gguf.GGUFReader)

        def reader(place: Any, *mode: Any) -> Any:
            return new_reader(place, *mode) if mode or Path(place).resolve() != path else once(path)

        replaced = (reader, functools.cache(gguf.get_tensor_name_map), steps)
        try:
            for (module, name), new in zip(places, replaced, strict=True):
                setattr(module, name, new)
            transformers_logging.disable_progress_bar()
            yield
        finally:
            for (module, name), old in zip(places, kept, strict=True):
                setattr(module, name, old)
            if shown:
                transformers_logging.enable_progress_bar()
