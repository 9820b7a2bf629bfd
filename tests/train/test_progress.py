"""Progress of long runs where the output is no terminal: a line every 30 s that says what is left."""

import io
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ctc_drafter.evaluate import runner
from ctc_drafter.train.progress import Progress, TrainingProgress, duration


def test_a_line_every_half_minute_and_one_at_the_end() -> None:
    now, out = [0.0], io.StringIO()
    with Progress("distill", 100, 20, console=Console(file=out), clock=lambda: now[0]) as progress:
        for done in range(21, 61):
            now[0] += 2
            progress.update(done, 50 * (done - 20))
    assert out.getvalue().splitlines() == [
        "distill: 35/100 prompts, 25 tokens/s, 2 min left",  # 15 in 30 s, 65 to go: 130 s
        "distill: 50/100 prompts, 25 tokens/s, 2 min left",
        "distill: 60/100 prompts, 25 tokens/s, 80 s left",
    ]


def test_runs_without_tokens_and_runs_that_are_done() -> None:
    now, out = [0.0], io.StringIO()
    with Progress("gsm8k", 3, unit="rows", console=Console(file=out), clock=lambda: now[0]) as progress:
        now[0] = 7200.0
        progress.update(3, what="mt_bench")
    assert out.getvalue().splitlines() == ["mt_bench: 3/3 rows, 2 h 00 min"] * 2


def test_nothing_is_shown_where_nothing_is_wanted() -> None:
    out = io.StringIO()
    with Progress("distill", 2, show=False, console=Console(file=out)) as progress:
        progress.update(2, 9)
    assert out.getvalue() == ""


def test_a_terminal_has_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with Progress("distill", 2, console=console, clock=lambda: 0.0) as progress:
        progress.update(2, 9)
    assert "2/2" in out.getvalue()
    assert "tokens/s" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (18_360, "5 h 06 min")]
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_training_writes_lines_with_its_loss() -> None:
    now, out = [0.0], io.StringIO()
    lines: Any = TrainingProgress(console=Console(file=out), clock=lambda: now[0])
    for step in range(11, 21):  # resumed after step 10
        state = SimpleNamespace(max_steps=40, global_step=step, is_world_process_zero=True)
        lines.on_step_end(None, state, None)
        lines.on_log(None, state, None, {"loss": 4.0 - step / 10})
        now[0] += 10
    lines.on_train_end(None, state, None)
    assert out.getvalue().splitlines() == [
        "train (loss 2.700): 14/40 steps, 3 min left",
        "train (loss 2.400): 17/40 steps, 3 min left",
        "train (loss 2.100): 20/40 steps, 3 min left",
        "train (loss 2.100): 20/40 steps, 3 min left",
    ]


def test_evaluations_have_a_line_each() -> None:
    out = io.StringIO()
    bar: Any = TrainingProgress(console=Console(file=out), clock=lambda: 0.0)
    state = SimpleNamespace(max_steps=40, global_step=8, is_world_process_zero=True)
    bar.on_step_end(None, state, None)
    bar.on_log(None, state, None, {"eval_loss": 2.5, "eval_beta_16": 1.75, "eval_runtime": 3.0, "epoch": 1.0})
    bar.on_log(None, state, None, {"loss": 3.0, "grad_norm": 1.0})
    assert out.getvalue().splitlines() == ["step 8: eval_loss 2.500, eval_beta_16 1.750"]


def test_an_interrupt_ends_the_bar_and_shows_the_cursor() -> None:
    out = io.StringIO()
    bar: Any = TrainingProgress(console=Console(file=out, force_terminal=True, width=80))
    state = SimpleNamespace(max_steps=40, global_step=1, is_world_process_zero=True)
    hide, show = "\x1b[?25l", "\x1b[?25h"
    with suppress(KeyboardInterrupt), bar:
        bar.on_step_end(None, state, None)
        assert out.getvalue().count(hide) == 1
        raise KeyboardInterrupt
    assert out.getvalue().count(show) == 1
    bar.on_train_end(None, state, None)
    assert out.getvalue().count(show) == 1, "only once"


def test_measurements_count_the_prompts_that_were_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time left is that of prompts measured now."""
    shown: list[tuple[int, int]] = []

    class Noted(Progress):
        def update(self, done: int, tokens: int | None = None, what: str | None = None) -> None:
            shown.append((done, self.total))

    monkeypatch.setattr(runner, "Progress", Noted)
    known = [SimpleNamespace(task="a", index=0), SimpleNamespace(task="a", index=1)]
    journal: Any = SimpleNamespace(
        done=lambda task: {record.index for record in known}, add=lambda records: None, extras=[], records=known
    )
    journal.add_extra = lambda extra: None
    bench: Any = SimpleNamespace(batch_size=2, contenders=[], timed=True, first_turns=lambda prompts, count: [])
    bench.measure = lambda task, batch, order: [SimpleNamespace(tokens=5) for _ in batch]
    bench.prepare = lambda tasks: None
    tasks: Any = [SimpleNamespace(name="a", prompts=[None] * 5)]
    assert len(list(runner._batches(bench, tasks, journal, Console(file=io.StringIO())))) == 2
    assert shown == [(2, 5), (4, 5), (5, 5)]
