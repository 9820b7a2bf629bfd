"""PyTorch's threads beside those of another engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ctc_drafter.target.model import Target


@contextmanager
def one_thread_beside(target: Target) -> Iterator[None]:
    """Keeps PyTorch to one thread during a step or prefill, drafting included, of a target whose engine has its own.

    PyTorch's (OpenMP) wait awake for milliseconds after each operation, on the cores that the other engine needs next.
    It is the decoding thread's number, and the default of threads that first use PyTorch meanwhile: such a one computes
    with one thread from then on, unless it calls `torch.set_num_threads`. Those that have used it before keep theirs.
    The other engine's number of threads is taken from PyTorch's when the target is made.
    """
    threads = torch.get_num_threads()
    if not target.own_threads or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
