"""Hashes and manifests of data folders; commit, versions and hardware of results."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import subprocess
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ctc_drafter.chat import fingerprint
from ctc_drafter.files import write_atomic
from ctc_drafter.types import UserError

# What made a folder: hashes and settings in a JSON file, so that another run cannot mix its own into it.

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
NOT_SAID = "not said"

WORDS = {
    "config": "the configuration is",
    "weights": "the weights are",
    "tokenizer": "the tokenizer is",
    "template": "the chat template is",
}
SAMPLED = 16  # numbers of a weight that its hash covers

# Keys of a model config that say how it was loaded or is used, not what it is.
VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
VOLATILE |= {"lookup_length"}


def digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:16]


def config_hash(config: PreTrainedConfig) -> str:
    """A hash of what a config says of the model, whatever it was loaded from and in whatever dtype."""
    kept = {key: value for key, value in config.to_dict().items() if key not in VOLATILE}
    return digest(json.dumps(kept, sort_keys=True, default=str))


def weights_hash(model: PreTrainedModel) -> str:
    """A hash of a few numbers of every floating-point weight, in bfloat16, so that the dtype of loading does not count;
    empty for quantised models. It tells a target from the same one trained on."""
    if getattr(model, "hf_quantizer", None) is not None:
        return ""
    return tensors_hash(model.named_parameters())


def tensors_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of names and a few numbers of each, in bfloat16."""
    found = hashlib.sha256()
    for name, weight in sorted(tensors, key=lambda pair: pair[0]):
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].to(torch.bfloat16).float()
        found.update(name.encode() + some.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    return digest(json.dumps(tokenizer.chat_template or "", sort_keys=True))


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest, None if there is none. Raises `UserError` for a damaged one."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is damaged; use another output folder, or delete this one")
    return manifest


def claim(
    path: Path, manifest: dict[str, Any], older: Mapping[str, Any] | None = None, ignored: Collection[str] = ()
) -> None:
    """Writes the manifest of a new folder, or checks that the folder belongs to the same run.

    Keys must be the same too. Folders of older versions lack some: `older` holds those, nested as in the manifest, with
    what these versions did; None if nobody can know, which is logged. `versions` and the `ignored` keys may differ.
    Raises `UserError` that names the difference.
    """
    found = read_manifest(path)
    if found is None:
        write_atomic(path, [json.dumps(manifest, indent=2)])
        return
    # Through JSON, so that tuples and the like compare as they were stored.
    wanted, known = json.loads(json.dumps([manifest, older or {}]))
    before, now = (_without(each, {"versions", *ignored}) for each in (_filled(found, known, wanted), wanted))
    for key in sorted(before.keys() | now.keys()):
        if key in wanted and key not in found and known.get(key, "") is None:
            logger.warning("%s does not say its %s, which is taken for the same", path, key)
        elif before.get(key, NOT_SAID) != now.get(key, NOT_SAID):
            raise UserError(
                f"{path.parent} holds another run: {different(key, before, now)}; "
                "use another output folder, or the options of that run to go on with it"
            )


def _filled(found: dict[str, Any], older: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Manifest with defaults for keys that older versions did not write."""
    filled = {key: value for key, value in older.items() if key in wanted and key not in found} | found
    for key in older.keys() & found.keys() & wanted.keys():
        if all(isinstance(each.get(key), dict) for each in (found, older, wanted)):
            filled[key] = _filled(found[key], older[key], wanted[key])
    return filled


def _without(manifest: dict[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    return {
        key: _without(value, ignored) if isinstance(value, dict) else value
        for key, value in manifest.items()
        if key not in ignored
    }


def check_writer(
    manifest: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raises `UserError` that says what differs if another target, tokenizer or template wrote the text.

    Text whose manifest does not say is taken as it is. Weights in float16 have a hash of their own: they are compared
    with their like only.
    """
    own = {"config": config_hash(model.config), "weights": weights_hash(model)}
    dtypes = {str(manifest.get("dtype")), str(model.dtype).removeprefix("torch.")}
    if "float16" in dtypes and len(dtypes) > 1:
        del own["weights"]
    revision = getattr(model.config, "_commit_hash", None)
    if not manifest.get("weights") and revision and manifest.get("revision") not in (None, "", revision):
        logger.warning(
            "the training rows were written by revision %s of the target, this is %s: if its weights changed in "
            "between, distill again",
            manifest["revision"],
            revision,
        )
    if tokenizer is not None:
        own |= {"tokenizer": fingerprint(tokenizer), "template": template_hash(tokenizer)}
    for key, value in own.items():
        if value and manifest.get(key) and manifest[key] != value:
            raise UserError(
                f"the training rows were written by another target ({manifest.get('target')}): "
                f"{WORDS[key]} not the same; distill again with this one"
            )


def different(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """Names the difference in `key`, its first differing part if it is an object."""
    old, new = before.get(key, NOT_SAID), now.get(key, NOT_SAID)
    if isinstance(old, dict) and isinstance(new, dict):
        inner = next(k for k in sorted(old.keys() | new.keys()) if old.get(k, NOT_SAID) != new.get(k, NOT_SAID))
        return different(inner, old, new)
    return f"{key} was {old}, is now {new}"


# What a measurement ran on: commit, versions, hardware.

PACKAGES = ("ctc-drafter", "torch", "transformers", "tokenizers")


def environment() -> dict[str, Any]:
    """`commit`, `versions` and `hardware` of a results file. Names no host, user or path."""
    return {"commit": _commit(), "versions": _versions(), "hardware": _hardware()}


def source_hash() -> str:
    """Hash of the package's source code, independent of git."""
    package = Path(__file__).parent
    files = sorted(package.rglob("*.py"))
    parts = [f"{file.relative_to(package)}\n{file.read_text(encoding='utf-8')}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _commit() -> str | None:
    """Commit of this source, with `-dirty` after local changes to the package; None outside a checkout."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", str(here)], check=True, capture_output=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        # The package alone: a bench that writes its results into the checkout must not mark itself.
        changes = subprocess.run([*git, "status", "--porcelain", "--", "."], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return found


def _hardware() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    """The model name; `platform.processor` is empty or only the architecture on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
