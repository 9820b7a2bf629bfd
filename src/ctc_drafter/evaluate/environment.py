"""What a measurement ran on: commit, versions, hardware."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("ctc-drafter", "torch", "transformers", "tokenizers")


def environment() -> dict[str, Any]:
    """`commit`, `versions` and `hardware` of a results file. Names no host, user or path."""
    return {"commit": _commit(), "versions": _versions(), "hardware": _hardware()}


def source_hash() -> str:
    """Of the package's code, whatever commit it is of, or none."""
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    parts = [f"{file.relative_to(package)}\n{file.read_text(encoding='utf-8')}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _commit() -> str | None:
    """Commit of this source, with `-dirty` after local changes to the package; None outside a checkout."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parents[1])]
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
