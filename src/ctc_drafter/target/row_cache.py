"""`RowCache`: decoding state that sees to its rows itself, in place of a `Cache` whose slots are positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ctc_drafter.types import TokenTree, Verification


class RowCache(ABC):
    """What a batch asks of the state of targets that follow chains; trees have `cache.py` and `decode/verify.py`.

    Places are those of the rows in the batch. A verification counts once it is committed, and can be undone until the
    next call of any other kind.
    """

    @abstractmethod
    def verify(self, target: Any, tree: TokenTree, layers: Sequence[int] = ()) -> Verification:
        """Logits and features of each node of a tree that is a chain: node i is the child of node i - 1.

        Invalid nodes are not read; what comes back for them is that of the row's last valid node.
        """

    @abstractmethod
    def commit(self, counts: Sequence[int]) -> None:
        """The root and `counts[b]` nodes of the newest verification belong to row b's text."""

    @abstractmethod
    def undo(self) -> None:
        """As if the newest verification had never been, committed or not."""

    @abstractmethod
    def resting(self) -> set[int]:
        """Places of rows for which a plain step is the best: it lets the snapshot move on within the same forward."""

    @abstractmethod
    def join(self, new: Any) -> None:
        """Puts the rows of another cache of this kind behind the others."""

    @abstractmethod
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Leaves these rows, `int64 [R]`, in this order; named as in transformers' `Cache`."""

    @abstractmethod
    def get_seq_length(self) -> int:
        """Tokens of the longest row; named as in transformers' `Cache`."""

    @abstractmethod
    def extent(self) -> RowExtent:
        """What `join` adds to can be cut back to this."""


class RowExtent(ABC):
    """The state of a cache before a `join`."""

    @abstractmethod
    def cut(self, cache: Any) -> None:
        """Removes everything added since."""
