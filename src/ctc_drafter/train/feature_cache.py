"""Target features cached in files, for training runs of several epochs.

They take much room: 24 kB a token for a target of width 4,096 in bfloat16. Computing them online costs a forward pass.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ctc_drafter.files import disk_errors, remove_leftovers, whole_or_nothing
from ctc_drafter.provenance import MANIFEST, claim, config_hash, digest, versions, weights_hash
from ctc_drafter.target.model import Target
from ctc_drafter.train.data import EMPTY_ROW, STATES, DistilledDataset, collate
from ctc_drafter.types import UserError

logger = logging.getLogger(__name__)
GB = 1e9
SHARD_BYTES = 2**29


class FeatureFiles:
    """The features of a text's rows, and with `last` also what the target's LM head reads, below a folder.

    `features-00000.safetensors` and on hold consecutive rows, tokens of all of them one behind the other: `features`
    `[tokens, K]` and `last` `[tokens, H]`, in the target's dtype. Files are there whole or not at all, so `fill` may be
    killed and repeated.
    """

    def __init__(
        self,
        folder: Path,
        target: Target,
        dataset: DistilledDataset,
        layers: Sequence[int],
        last: bool,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.folder, self.target, self.dataset, self.layers = folder, target, dataset, tuple(layers)
        self.names = STATES if last else STATES[:1]
        self.lengths = [len(row.ids) for row in dataset.rows]
        width = target.hidden_size * (len(self.layers) + last)
        self.token_bytes = width * target.dtype.itemsize
        self.shards = consecutive([length * self.token_bytes for length in self.lengths], shard_bytes)
        self._places = {row: (index, at) for index, shard in enumerate(self.shards) for at, row in enumerate(shard)}
        self._open: dict[int, Any] = {}

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.lengths) * self.token_bytes

    @property
    def missing(self) -> list[int]:
        """Files that are not there yet."""
        return [index for index in range(len(self.shards)) if not self.path(index).exists()]

    def path(self, index: int) -> Path:
        return self.folder / f"features-{index:05d}.safetensors"

    def open_folder(self, limit: float | None) -> None:
        """Claims the folder for these features, after saying how much room they take.

        Raises `UserError` for a folder of other features, and before anything is computed if they take more than
        `limit` GB, or than the disk has.
        """
        missing = sum(self.lengths[row] for index in self.missing for row in self.shards[index]) * self.token_bytes
        logger.info("features: %.3g GB in %s, %.3g GB of them are there", *self._sizes(missing))
        if limit is not None and self.bytes > limit * GB:
            raise UserError(
                f"the features take {self.bytes / GB:.3g} GB, the limit is {limit:g}; allow more with "
                f"--features-limit {self.bytes / GB * 1.01:.3g}, or compute them as they are needed: --features online"
            )
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if missing > free:
                raise UserError(
                    f"{self.folder} has room for {free / GB:.3g} GB, the features take {missing / GB:.3g} more; "
                    "make room there, or compute them as they are needed: --features online"
                )
            claim(self.folder / MANIFEST, self._manifest())
            remove_leftovers(self.folder, "features-*")

    def fill(self, batch_size: int, share: tuple[int, int] = (0, 1), progress: bool = True) -> None:
        """Computes what is missing, of several processes (number, count) this one's share. Raises `UserError` for a
        full disk."""
        # By number, not by place among the missing: other processes are writing theirs.
        mine = [index for index in self.missing if index % share[1] == share[0]]
        console = Console(stderr=True)
        for index in track(mine, "features", console=console, disable=not progress or not mine):
            states = self._compute(self.shards[index], batch_size)
            with disk_errors(self.folder), whole_or_nothing(self.path(index)) as temporary:
                try:
                    save_file(states, temporary)
                except SafetensorError as error:
                    raise OSError(str(error)) from error

    def read(self, row: int) -> dict[str, torch.Tensor]:
        """The states of a row of the dataset, `[T, ...]` each. Raises `UserError` for a damaged file."""
        index, at = self._places[row]
        begin = sum(self.lengths[each] for each in self.shards[index][:at])
        try:
            if index not in self._open:
                self._open[index] = safe_open(self.path(index), framework="pt")
            file = self._open[index]
            return {name: file.get_slice(name)[begin : begin + self.lengths[row]] for name in self.names}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path(index)} is damaged; delete it and run the same command again") from error

    def nothing(self) -> dict[str, torch.Tensor]:
        """The states of the row that teaches nothing."""
        size, dtype = self.target.hidden_size, self.target.dtype
        widths = dict(zip(STATES, (size * len(self.layers), size), strict=True))
        return {name: torch.zeros(2, widths[name], dtype=dtype) for name in self.names}

    def _compute(self, rows: Sequence[int], batch_size: int) -> dict[str, torch.Tensor]:
        by_length = sorted(rows, key=lambda row: self.lengths[row])
        found: dict[int, tuple[torch.Tensor, ...]] = {}
        for at in range(0, len(rows), batch_size):
            chosen = by_length[at : at + batch_size]
            tokens = collate([self.dataset[row] for row in chosen])["input_ids"].to(self.target.device)
            states = [each.cpu() for each in self.target.hidden_states(tokens, self.layers)]
            for place, row in enumerate(chosen):
                found[row] = tuple(each[place, : self.lengths[row]] for each in states)
        return {name: torch.cat([found[row][at] for row in rows]) for at, name in enumerate(self.names)}

    def _manifest(self) -> dict[str, Any]:
        model = self.target.model
        rows = digest(" ".join(f"{row.key}:{len(row.ids)}" for row in self.dataset.rows))
        return {
            "config": config_hash(model.config),
            "weights": weights_hash(model),
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "rows": {"count": len(self.lengths), "hash": rows},
            "layers": self.layers,
            "states": self.names,
            "files": len(self.shards),
            "versions": versions(),
        }

    def _sizes(self, missing: int) -> tuple[float, Path, float]:
        return self.bytes / GB, self.folder, (self.bytes - missing) / GB


class WithFeatures(DistilledDataset):
    """Rows that bring their features along."""

    def __init__(self, files: FeatureFiles):
        super().__init__(files.dataset.rows, files.dataset.manifest)
        self.files = files

    def __getitem__(self, index: int) -> dict[str, Any]:
        states = self.files.nothing() if index == EMPTY_ROW else self.files.read(index)
        return super().__getitem__(index) | states


def consecutive(sizes: Sequence[int], most: int) -> list[range]:
    """Splits a row of sizes into parts of at most `most`, or of one that is larger."""
    parts, begin, total = [], 0, 0
    for at, size in enumerate(sizes):
        if at > begin and total + size > most:
            parts.append(range(begin, at))
            begin, total = at, 0
        total += size
    return [*parts, range(begin, len(sizes))] if sizes else []
