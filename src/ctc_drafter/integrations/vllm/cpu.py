"""Patch of vLLM 0.20 to 0.33 on CPUs, which samples wrongly with any kind of speculation.

The stand-in for its Triton kernel `expand_kernel` writes temperatures, top-k and top-p of draft tokens into an int64
copy of the tensor that it was given, and drops the copy: what is used then is memory that nobody has written.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


def patch_cpu_sampling() -> None:
    """Replaces vLLM's `expand_batch_to_tokens`, where the kernel is broken. On a CPU only."""
    from vllm.v1.sample import rejection_sampler

    if rejection_sampler.expand_batch_to_tokens is expand or kernel_works():
        return
    logger.warning("This vLLM samples drafts wrongly on a CPU; the CTC plugin mends it.")
    rejection_sampler.expand_batch_to_tokens = expand


def kernel_works() -> bool:
    """Whether vLLM's CPU replacement of the kernel writes to the tensor it is given."""
    from vllm.utils import cpu_triton_utils

    output = torch.zeros(3)
    try:
        cpu_triton_utils._expand_kernel_impl(output, torch.tensor([0.5, 2.0]), torch.tensor([1, 3]), 0, 1)
    except (AttributeError, RuntimeError, TypeError):  # another version's, or its C++ part is not loaded yet
        return False
    return output.tolist() == [0.5, 2.0, 2.0]


def expand(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Values of requests `[B]` for each of their tokens, `[num_tokens]`; `cu_num_tokens [B]` counts those so far."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
    values = torch.where(x == replace_from, torch.as_tensor(replace_to, dtype=x.dtype, device=x.device), x)
    return values.repeat_interleave(counts, output_size=num_tokens)
