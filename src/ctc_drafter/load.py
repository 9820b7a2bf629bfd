"""Loads what a command works with: target, tokenizer and drafter, by name or the shipped ones."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.layout import columns_first
from ctc_drafter.quickstart import DRAFTER_DIR, TARGET_DIR
from ctc_drafter.target import Target, first_line
from ctc_drafter.text import fingerprint
from ctc_drafter.types import UserError


def pair(target: str | None, drafter: str | None) -> tuple[str | None, str | None]:
    """Both names, or neither for the shipped model: a drafter serves one target only."""
    if (target is None) != (drafter is None):
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
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine offers no CUDA device; use --device cpu")
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    target = Target.load(name, dtype, chosen)
    try:
        return target, AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises bare Exception for a corrupt file
        raise UserError(f"no tokenizer could be loaded from {name}: {first_line(error)}") from error


def load_drafter(name: str | None, target: Target, tokenizer: PreTrainedTokenizerBase) -> CTCDrafter:
    """A drafter that was made for this target; the shipped one without a name."""
    drafter = CTCDrafter.from_pretrained(name or shipped(DRAFTER_DIR))
    drafter.check_target(target.model.config, fingerprint(tokenizer))
    drafter = drafter.to(device=target.device, dtype=target.dtype).eval()
    columns_first(drafter)
    return drafter


def keep_quiet() -> None:
    """Leaves the terminal to our own lines."""
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ctc_drafter").setLevel(logging.INFO)


def fresh_drafter(target: Target, tokenizer: PreTrainedTokenizerBase, seed: int, **sizes: int | None) -> CTCDrafter:
    """An untrained drafter for this target; sizes that are None are the config's. It starts with the target's norm."""
    width = target.embed(torch.zeros(1, dtype=torch.long, device=target.device)).shape[-1]
    if width != target.hidden_size:
        raise UserError(
            f"the target's embeddings have {width} numbers and its blocks {target.hidden_size}; "
            "a CTC drafter needs a target where both are the same"
        )
    torch.manual_seed(seed)
    fillers = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    chosen = {name: size for name, size in sizes.items() if size is not None}
    drafter = CTCDrafter.for_target(
        target.model.config,
        mask_token_id=next(token for token in fillers if token is not None),
        target_fingerprint=fingerprint(tokenizer),
        **chosen,
    )
    scale = target.norm_scale
    if scale is not None:
        drafter.norm.weight.data.copy_(scale)
    return drafter.to(target.device)
