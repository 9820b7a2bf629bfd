"""`custom_generate/generate.py` of saved drafters, which `generate` of transformers loads by the drafter's name.

    model.generate(**inputs, custom_generate="owner/drafter", trust_remote_code=True)

Every saved drafter has a copy of this file. It stands alone: of the package it needs what it imports by name.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

try:
    from ctc_drafter import AutoDrafter, Speculator, UserError
except ImportError as error:
    raise ImportError("this drafter needs the ctc_drafter package; install CTC-drafter from its repository") from error

# Drafters that were loaded, by model and name: `generate` runs this for every call, and may be called often. They hold
# parts of the model, not the model itself, and are gone when it is.
LOADED: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def generate(model: Any, drafter: str | None = None, revision: str | None = None, **arguments: Any) -> Any:
    """What `model.generate(**arguments)` gives, drafted by the drafter of the repository that this file lies in.

    `generate` does not say which one that is, so its frame is asked. Raises `UserError` where another caller does not
    say it either, and for arguments that cannot be honoured.
    """
    frame = inspect.currentframe()
    caller = {} if frame is None or frame.f_back is None else frame.f_back.f_locals
    name = drafter or caller.get("custom_generate")
    if not isinstance(name, str | os.PathLike):
        raise UserError("which drafter is not known; give drafter=, the folder or repository of this file")
    loaded = LOADED.setdefault(model, {})
    key = f"{os.fspath(name)}@{revision}"
    if key not in loaded:
        loaded[key] = AutoDrafter.from_pretrained(at(os.fspath(name), revision), model)
    return Speculator(model, loaded[key]).generate(**arguments)


def at(name: str, revision: str | None) -> str:
    """The folder of a repository's files at a branch, tag or commit; without one, and for a folder, the name."""
    if revision is None or Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    return str(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
