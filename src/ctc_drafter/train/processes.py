"""Several processes of one training run, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import os

from accelerate import PartialState
from transformers import PreTrainedModel

from ctc_drafter.target.features import decoder_blocks
from ctc_drafter.types import UserError


def join_processes(device: str) -> PartialState:
    """This process among the run's; the only one unless a launcher says otherwise. `device`: cpu, cuda or auto.

    Call it before models are loaded: it chooses the process's GPU.
    """
    cpu = device == "cpu" or not has_cuda()
    # Without a launcher's variables the state must stay as a later caller makes it.
    return PartialState(cpu=cpu) if "LOCAL_RANK" in os.environ else PartialState()


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def share_of(accumulate: int, processes: int) -> int:
    """Forward passes of a step that fall to each process. Raises `UserError` if they cannot be shared evenly."""
    if accumulate % processes:
        raise UserError(
            f"{processes} processes cannot share the {accumulate} forward passes of a step evenly; "
            f"give --set accumulate={-(-accumulate // processes) * processes}, or a multiple of {processes}"
        )
    return accumulate // processes


def shard_layers(model: PreTrainedModel) -> None:
    """Spreads the decoder layers' weights over the processes (FSDP2); each is put together while it computes.

    Embedding and LM head stay whole, since the drafter reads them too.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        raise UserError("--shard-target spreads the target over several processes; start them with accelerate launch")
    device = "cuda" if has_cuda() else "cpu"
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for block in decoder_blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)  # a block that nothing wraps would stay whole
    model.to(device)  # what is whole; layers are there already
