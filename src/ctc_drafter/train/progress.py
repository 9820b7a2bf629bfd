"""Progress of long runs: a bar in a terminal, a log line every 30 s elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EVERY = 30.0  # seconds between two log lines


class Progress:
    """Use it as a context, and call `update` when something is done.

    what: name of the run; total and done: in `unit`; show: whether anything is shown at all. Where `console` (standard
    error) is no terminal, a line is written at most every `EVERY` seconds, and one at the end. transient: the bar goes
    at the end, and there is no last line. clock: seconds.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        *,
        unit: str = "prompts",
        show: bool = True,
        transient: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.unit, self.show, self.clock = what, total, unit, show, clock
        self.transient = transient
        self.console = console or Console(stderr=True)
        self.before = self.done = done
        self.tokens: int | None = None
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _TokenRate()
        left = TimeRemainingColumn(elapsed_when_finished=True)
        hidden = not show or not self.console.is_terminal
        self._bar = Bar(*columns, left, console=self.console, transient=transient, disable=hidden)
        self._task = self._bar.add_task(what, total=total, completed=done, tokens=None)

    def __enter__(self) -> Progress:
        self.began = self.said = self.clock()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if not self.transient:
            self._say()

    def update(self, done: int, tokens: int | None = None, what: str | None = None) -> None:
        """done: in all; tokens: written since the run began, if that is a figure of it; what: a new name."""
        self.done, self.tokens, self.what = done, tokens, what or self.what
        self._bar.update(self._task, completed=done, tokens=tokens, description=self.what)
        if self.clock() - self.said >= EVERY:
            self._say()

    def _say(self) -> None:
        if self.show and not self.console.is_terminal:
            self.said = self.clock()
            print(self.line(self.said - self.began), file=self.console.file, flush=True)

    def line(self, seconds: float) -> str:
        """What is done after so many seconds, how fast, and how long the rest will take."""
        parts = [f"{self.what}: {self.done}/{self.total} {self.unit}"]
        if self.tokens is not None:
            parts.append(f"{self.tokens / max(seconds, 1e-9):,.0f} tokens/s")
        if self.done >= self.total:
            parts.append(duration(seconds))
        elif self.done > self.before:
            parts.append(f"{duration(seconds / (self.done - self.before) * (self.total - self.done))} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time in words: `12 s`, `34 min`, `5 h 06 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class TrainingProgress(TrainerCallback):
    """`Progress` in place of the Trainer's bar and the dictionaries that it prints; a line for each evaluation.

    Use it as a context around the training: an error or an interrupt ends the bar, too.
    """

    def __init__(self, **options: Any) -> None:
        """options: of its `Progress`."""
        self.progress: Progress | None = None
        self.options = options
        self.what = "train"

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        progress, self.progress = self.progress, None
        if progress is not None:
            progress.__exit__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.is_world_process_zero:
            if self.progress is None:
                self.progress = self._begin(state)
            self.progress.update(state.global_step, what=self.what)
        return control

    def _begin(self, state: TrainerState) -> Progress:
        return Progress("train", state.max_steps, state.global_step - 1, unit="steps", **self.options).__enter__()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        if logs and "loss" in logs:
            self.what = f"train (loss {logs['loss']:.3f})"
        evaluated = {key: value for key, value in (logs or {}).items() if key == "eval_loss" or "beta" in key}
        if self.progress is not None and evaluated:
            figures = ", ".join(f"{key} {value:.3f}" for key, value in evaluated.items())
            self.progress.console.print(f"step {state.global_step}: {figures}", soft_wrap=True, highlight=False)
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.__exit__()
        return control


class _TokenRate(ProgressColumn):
    """Tokens per second since the run began; nothing where none are counted."""

    def render(self, task: Task) -> Text:
        tokens = task.fields["tokens"]
        return Text("" if tokens is None else f"{tokens / max(task.elapsed or 0.0, 1e-9):,.0f} tokens/s")
