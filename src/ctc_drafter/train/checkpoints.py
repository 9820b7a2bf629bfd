"""Complete checkpoints only, every five minutes and at SIGTERM; distributed training: processes, FSDP2."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ctc_drafter.files import write_atomic
from ctc_drafter.target.features import decoder_blocks
from ctc_drafter.types import UserError, first_line, refuses_pickle

# Complete checkpoints: a checksum of every file, written last.

logger = logging.getLogger(__name__)
SEAL = "files.json"
ESSENTIAL = ("model.safetensors", "trainer_state.json")


def seal(checkpoint: Path) -> None:
    """Marks a checkpoint as whole."""
    there = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != SEAL)
    files = {file.relative_to(checkpoint).as_posix(): _checksum(file) for file in there}
    write_atomic(checkpoint / SEAL, [json.dumps(files, indent=2)])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below `folder`, None if there is none yet. Nothing is changed.

    Raises `UserError` if the newest sealed one is missing files or has changed.
    """
    for checkpoint in _checkpoints(folder):
        if (checkpoint / SEAL).is_file():
            _verify(checkpoint)
            return checkpoint
    return None


def unsealed(folder: Path) -> list[Path]:
    """Checkpoints that are newer than the newest sealed one, newest first."""
    newest = itertools.takewhile(lambda checkpoint: not (checkpoint / SEAL).is_file(), _checkpoints(folder))
    return list(newest)


def remove_unsealed(folder: Path) -> None:
    """Removes what a killed run left unsealed. For folders that are known to be this run's."""
    for checkpoint in unsealed(folder):
        logger.warning("%s was cut off while it was written; going on from the one before", checkpoint)
        shutil.rmtree(checkpoint)


@contextmanager
def tensors_alone(checkpoint: Path | None) -> Iterator[None]:
    """Raises `UserError` where training goes on from files that hold more than tensors, which torch does not read."""
    try:
        yield
    except (UnpicklingError, RuntimeError) as error:
        if checkpoint is None or not refuses_pickle(error):
            raise
        raise UserError(
            f"{checkpoint} holds more than tensors, which is never run; delete this folder to go on"
        ) from error


# When checkpoints are due besides those of every so many steps.

EVERY = 300.0  # seconds


class Stopped(KeyboardInterrupt):
    """Training was told to stop by a signal, and has written a checkpoint. code: exit status."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class DueCheckpoints(TrainerCallback):
    """A checkpoint at the end of a step, `seconds` after the last one by the clock of any process, or once `asked` to
    stop, which ends the training then. Comes before callbacks that look at `should_save`."""

    def __init__(self, seconds: float = EVERY):
        self.seconds, self.last = seconds, time.monotonic()
        self.asked: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        due = torch.tensor([float(time.monotonic() - self.last >= self.seconds), float(self.asked or 0)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # All processes save, and stop, at the same step.
            due = due.to(args.device)
            torch.distributed.all_reduce(due, torch.distributed.ReduceOp.MAX)
        late, asked = due.tolist()
        if late or asked:
            control.should_save = True
        if asked:
            self.asked = int(asked)
            control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.last = time.monotonic()
        return control

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask inside; a second one ends at once. On other threads than the main one nothing is
        changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _frame: Any) -> None:
            if self.asked is not None:
                raise KeyboardInterrupt
            self.asked = number
            logger.warning("stopping behind this step, with a checkpoint; once more stops at once")

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first. Raises `UserError` for something else of that name."""
    named = [path for path in folder.glob("checkpoint-*") if _step(path) >= 0]
    wrong = next((path for path in named if path.is_symlink() or not path.is_dir()), None)
    if wrong is not None:
        raise UserError(f"{wrong} is no folder of a checkpoint; move it away, or give --out another folder")
    return sorted(named, key=_step, reverse=True)


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """`global_step`, `max_steps`, `log_history` and more. Raises `UserError` for a damaged one."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        whole = all(isinstance(state[name], int) for name in ("global_step", "max_steps"))
        if not whole or not all(isinstance(entry, dict) for entry in state["log_history"]):
            raise TypeError("not a state")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged_checkpoint(checkpoint, "trainer_state.json") from error
    assert isinstance(state, dict)
    return state


def damaged_checkpoint(checkpoint: Path, file: str) -> UserError:
    return UserError(
        f"{checkpoint} is damaged ({file} is missing or has changed); "
        "delete this folder to go on from the checkpoint before"
    )


def _verify(checkpoint: Path) -> None:
    try:
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        missing = [name for name in ESSENTIAL if name not in files]
        damaged = missing + [name for name, checksum in files.items() if _other(checkpoint, name, checksum)]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        damaged = ["a file"]
    if damaged:
        raise damaged_checkpoint(checkpoint, first_line(ValueError(damaged[0])))


def _other(checkpoint: Path, name: str, checksum: object) -> bool:
    """Whether a file is not the one that was sealed. A name that leads elsewhere is none, nor is a link or a device."""
    file = checkpoint / name
    inside = file.is_file() and file.resolve() == checkpoint.resolve() / name
    return not inside or _checksum(file) != checksum


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
