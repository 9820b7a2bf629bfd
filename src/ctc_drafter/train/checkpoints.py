"""Complete checkpoints only, and distributed training: processes, FSDP2."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from ctc_drafter.files import write_atomic
from ctc_drafter.target.features import decoder_blocks
from ctc_drafter.types import UserError

# Complete checkpoints: a checksum of every file, written last.

logger = logging.getLogger(__name__)
SEAL = "files.json"


def seal(checkpoint: Path) -> None:
    """Marks a checkpoint as whole."""
    files = {file.name: _checksum(file) for file in sorted(checkpoint.iterdir()) if file.name != SEAL}
    write_atomic(checkpoint / SEAL, [json.dumps(files, indent=2)])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below `folder`, None if there is none yet.

    Newer ones that a killed run left unsealed are removed. Raises `UserError` if the newest sealed one is
    missing files or has changed.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if not (checkpoint / SEAL).is_file():
            logger.warning("%s was cut off while it was written; going on from the one before", checkpoint)
            shutil.rmtree(checkpoint)
            continue
        _verify(checkpoint)
        return checkpoint
    return None


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """`global_step`, `max_steps`, `log_history` and more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    assert isinstance(state, dict)
    return state


def _verify(checkpoint: Path) -> None:
    try:
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        damaged = [name for name, checksum in files.items() if _checksum(checkpoint / name) != checksum]
    except (OSError, ValueError, AttributeError):
        damaged = ["a file"]
    if damaged:
        raise UserError(
            f"{checkpoint} is damaged ({damaged[0]} is missing or has changed); "
            "delete this folder to go on from the checkpoint before"
        )


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# Several processes of one training run, as `accelerate launch` and `torchrun` start them.


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
