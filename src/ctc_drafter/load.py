"""Loads target, tokenizer and drafter by folder or Hugging Face id, or the shipped pair."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.registry import PROMPT_LOOKUP
from ctc_drafter.drafters.warm_start import AutoDrafter
from ctc_drafter.quickstart import DRAFTER_DIR, TARGET_DIR
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError, first_line


def pair(target: str | None, drafter: str | None) -> tuple[str | None, str | None]:
    """Checks that both names are given, or neither: a drafter serves one target only, `prompt_lookup` any."""
    if (target is None) != (drafter is None) and drafter != PROMPT_LOOKUP:
        raise UserError("give --target and --drafter together, or neither for the shipped model")
    return target, drafter


def shipped(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise UserError("this installation has no shipped model; give --target and --drafter")
    return str(folder)


def load_target(name: str | None, dtype: str, device: str) -> tuple[Target, PreTrainedTokenizerBase]:
    """The target and its tokenizer; the shipped ones without a name."""
    keep_quiet()
    name = name or shipped(TARGET_DIR)
    target = Target.load(name, dtype, chosen_device(device))
    try:
        return target, AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises bare Exception for a corrupt file
        raise UserError(f"no tokenizer could be loaded from {name}: {first_line(error)}") from error


def chosen_device(device: str) -> str:
    """cpu or cuda; `auto` takes CUDA if there is one. Raises `UserError` for a CUDA that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine offers no CUDA device; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_config(name: str | None) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, tuple[int, ...]]:
    """Configuration, tokenizer and end tokens of a target whose weights are not needed."""
    keep_quiet()
    name = name or shipped(TARGET_DIR)
    try:
        config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises bare Exception for a corrupt file
        raise UserError(f"no configuration and tokenizer could be loaded from {name}: {first_line(error)}") from error
    try:
        listed = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # not every target has one
        listed = config.get_text_config(decoder=True).eos_token_id
    ends = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id} - {None}
    return config, tokenizer, tuple(sorted(ends))


def read_template(tokenizer: PreTrainedTokenizerBase, file: Path | None) -> None:
    """Sets the tokenizer's chat template from a file, if one is given."""
    if file is None:
        return
    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the chat template {file}: {first_line(error)}") from error


def load_drafter(name: str | None, target: Target, tokenizer: PreTrainedTokenizerBase) -> Drafter:
    """A drafter that was made for this target, `prompt_lookup`, or the shipped one without a name."""
    return AutoDrafter.from_pretrained(name or shipped(DRAFTER_DIR), target, tokenizer)


def load_pair(
    target: str | None, drafter: str | None, dtype: str, device: str
) -> tuple[Target, PreTrainedTokenizerBase, Drafter]:
    """Target, tokenizer and drafter by their names, the shipped ones without; see `pair`."""
    names = pair(target, drafter)
    found, tokenizer = load_target(names[0], dtype, device)
    return found, tokenizer, load_drafter(names[1], found, tokenizer)


def compiled_for(target: Target, drafter: Drafter | None, nodes: int, rows: int) -> Target:
    """The target with graphs for steps of up to `nodes` nodes and `rows` rows, made now; see `compile_target`."""
    return compiled_for_all(target, [drafter] if drafter else [], nodes, rows)


def compiled_for_all(target: Target, drafters: Sequence[Drafter], nodes: int, rows: int) -> Target:
    """As `compiled_for`, for several drafters, which may ask for features of other layers; plain steps without any."""
    from ctc_drafter.target.compiled import compile_target

    layers = list(dict.fromkeys(tuple(drafter.feature_layers) for drafter in drafters)) or [()]
    made = compile_target(target, layers[0])
    for each in layers:
        made.prepare(nodes if drafters else 0, rows, each)
    return made


def keep_quiet() -> None:
    """Silences progress bars and warnings of libraries."""
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ctc_drafter").setLevel(logging.INFO)
