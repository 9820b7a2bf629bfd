"""`ctc-drafter demo`: plain decoding and the drafter on the same prompts, and the speedup."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import TextStream, encode_conversation, eos_ids
from ctc_drafter.decode.generate import Generation, generate, plain_generate
from ctc_drafter.decode.stats import Stats
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.registry import method_of
from ctc_drafter.target.model import Target

PROMPTS = (
    "Maya bakes 4 trays of 12 muffins. She sells 30 of them for $2 each. How much money does she make?",
    "What are some good ways to relax after a long day at work?",
    "Write a Python function that returns the sum of the even numbers in a list.",
)
# Middle luminance: at least 3.5:1 against black and against white.
COLOURS = ("color(33)", "color(166)", "color(134)")
SEPARATOR = "|"
WARM_UP_TOKENS = 16
SILENT = 2  # more runs of each prompt, at most
SECONDS = 40.0  # no further round begins that would end later than this
SLOW = 1.5  # times the median: a step that something else held up
MANY_SLOW = 0.1  # share of such steps from which a speedup says little
TAKEN = 0.15  # share of a core that others may take from a thread
NEXT = """\
Next, a model of your own:
  ctc-drafter generate --target owner/model --prompt "..."
      copies from the text, needs no training
  ctc-drafter distill, then train
      a drafter for your model: docs/training.md
"""

Decode = Callable[[list[int], int, Callable[[int, list[int]], None] | None], Generation]


class RunPrinter:
    """Prints a row's text as it comes. Tokens of one verification share a colour, or stand between separators.

    `seconds` is the time spent printing, which is not the decoder's.
    """

    def __init__(self, console: Console, tokenizer: PreTrainedTokenizerBase, mark_runs: bool):
        self.console, self.mark_runs = console, mark_runs
        self.stream = TextStream(tokenizer)
        self.coloured = has_colours(console)
        self.runs = 0
        self.seconds = 0.0

    def __call__(self, _row: int, tokens: list[int]) -> None:
        start = time.perf_counter()
        text = self.stream.push(tokens)
        if text and self.mark_runs and self.runs and not self.coloured:
            text = SEPARATOR + text
        self._show(text)
        self.runs += 1
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        self._show(self.stream.close())
        self.console.print()

    def _show(self, text: str) -> None:
        style = COLOURS[self.runs % len(COLOURS)] if self.mark_runs and self.coloured else ""
        self.console.print(Text(text, style), end="", soft_wrap=True)


@dataclass
class Total:
    """One method over all prompts. seconds: of each prompt, one number for each time that it was decoded.

    steps: seconds of every step of the runs without printing, prefills left out.
    """

    outputs: list[list[int]] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    seconds: list[list[float]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def add(self, generation: Generation, printing: float) -> None:
        """The next prompt; `printing` seconds were not the decoder's."""
        self.outputs.extend(generation.tokens)
        self.stats += generation.stats
        self.seconds.append([generation.stats.seconds - printing])

    @property
    def tokens_per_s(self) -> float:
        """By the median time of each prompt: what else the machine did for a moment must not count."""
        return self.stats.tokens / max(sum(statistics.median(each) for each in self.seconds), 1e-9)


def demo(
    target: Target,
    drafter: Drafter,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    nodes: int,
    max_new_tokens: int = 128,
    prompts: Sequence[str] = PROMPTS,
) -> None:
    """Streams both decodings of each prompt, then prints speed, tokens per step and whether they agree.

    For the speed both decode each prompt up to `SILENT` times more, in turn and without printing, as long as that takes
    no more than `SECONDS` in all.
    """
    begin = time.perf_counter()
    eos = eos_ids(target.model, tokenizer)

    def plain(prompt: list[int], limit: int, on_tokens: Callable[[int, list[int]], None] | None) -> Generation:
        return plain_generate(target, [prompt], max_new_tokens=limit, eos=eos, on_tokens=on_tokens)

    def drafted(prompt: list[int], limit: int, on_tokens: Callable[[int, list[int]], None] | None) -> Generation:
        return generate(target, drafter, [prompt], max_new_tokens=limit, nodes=nodes, eos=eos, on_tokens=on_tokens)

    name = method_of(drafter)
    methods: dict[str, Decode] = {"plain": plain, name: drafted}
    totals = {name: Total() for name in methods}
    encoded = [encode_conversation(tokenizer, [prompt]) for prompt in prompts]
    for run in methods.values():
        run(encoded[0], WARM_UP_TOKENS, None)
    for prompt, ids in zip(prompts, encoded, strict=True):
        console.rule(style="dim")
        console.print(Text(prompt, "bold"), soft_wrap=True)
        for method, run in methods.items():
            console.print(Text(f"\n{title(console, method)}", "dim"))
            printer = RunPrinter(console, tokenizer, mark_runs=method != "plain")
            generation = run(ids, max_new_tokens, printer)
            printer.close()
            totals[method].add(generation, printer.seconds)
    console.rule(style="dim")
    begun = Load.now()
    with console.status("Measuring again without printing"):
        for _ in range(SILENT):
            round_began = time.perf_counter()
            for place, ids in enumerate(encoded):
                for method, run in methods.items():
                    clock = StepClock()
                    totals[method].seconds[place].append(run(ids, max_new_tokens, clock).stats.seconds)
                    totals[method].steps += clock.steps
            now = time.perf_counter()
            if now - begin + (now - round_began) > SECONDS:
                break
    console.print(summary(totals))
    on_cpu = target.device.type == "cpu"
    reason = why_busy(totals["plain"].steps, begun, Load.now(), torch.get_num_threads() if on_cpu else 0)
    if reason:
        console.print(BUSY.format(reason), style="yellow", soft_wrap=True)
    console.print(NEXT, soft_wrap=True, end="")


BUSY = "This machine is busy: {}. The speedup means little now; close other programs and try again."


@dataclass(frozen=True)
class Load:
    """Seconds, from any beginning. wall: by the clock. thread: of a core, for this thread. process: of cores, for this
    process. machine: of cores, for all that runs on the machine; of virtual machines, what others took from it too."""

    wall: float
    thread: float
    process: float
    machine: float

    @classmethod
    def now(cls) -> Load:
        # `guest` and `guest_nice` are in `user` and `nice` already.
        idle = {"idle", "iowait", "guest", "guest_nice"}
        machine = sum(value for name, value in psutil.cpu_times()._asdict().items() if name not in idle)
        return cls(time.perf_counter(), time.thread_time(), time.process_time(), machine)

    def __sub__(self, other: Load) -> Load:
        return Load(
            self.wall - other.wall,
            self.thread - other.thread,
            self.process - other.process,
            self.machine - other.machine,
        )


class StepClock:
    """An `on_tokens` callback that notes the seconds between steps."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._before: float | None = None

    def __call__(self, _row: int, _tokens: list[int]) -> None:
        now = time.perf_counter()
        if self._before is not None:
            self.steps.append(now - self._before)
        self._before = now


def why_busy(steps: Sequence[float], before: Load, after: Load, threads: int) -> str | None:
    """What says that something else took the machine's time; None where nothing does.

    Equal steps whose times are far from equal show what comes and goes. What is there all the time slows all of them
    alike: then the machine has fewer cores left than the `threads` that decode, or this thread, which always has work,
    lacks a core at times. threads: 0 where the CPU does not decode, and only waits.
    """
    if is_busy(steps):
        return f"more than {MANY_SLOW:.0%} of the plain steps took over {SLOW} times their median"
    spent, cores = after - before, psutil.cpu_count() or 1
    if not threads or spent.wall <= 0:
        return None
    others = max(spent.machine - spent.process, 0.0) / spent.wall
    if others > cores - min(threads, cores) + TAKEN * min(threads, cores):
        return f"other programs kept {others:.1f} of its {cores} cores at work, and decoding has {threads} threads"
    share = spent.thread / spent.wall
    if share < 1 - TAKEN:
        return f"decoding had a core for {share:.0%} of the time only"
    return None


def is_busy(steps: Sequence[float]) -> bool:
    """Whether equal steps took times that are far from equal."""
    if not steps:
        return False
    slow = SLOW * statistics.median(steps)
    return sum(step > slow for step in steps) > MANY_SLOW * len(steps)


def has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def title(console: Console, method: str) -> str:
    """Headline of an answer: the method, and how its steps are marked."""
    if method == "plain":
        return "plain decoding: one token per step"
    shown = {"ctc": "CTC drafter", "prompt_lookup": "prompt lookup"}.get(method, method)
    runs = "each run of one colour" if has_colours(console) else f"the text between two {SEPARATOR}"
    return f"{shown}: {runs} is one step"


def summary(totals: dict[str, Total]) -> Table:
    """The closing table; the first method is the baseline."""
    table = Table("method", "tokens/s", "speedup", "tokens per step", "output")
    first = next(iter(totals.values()))
    for name, total in totals.items():
        same = "yes" if total.outputs == first.outputs else "NO"
        gamma = total.tokens_per_s / first.tokens_per_s
        table.add_row(
            name, f"{total.tokens_per_s:.1f}", f"{gamma:.2f}x", f"{total.stats.beta:.2f}", f"identical: {same}"
        )
    return table
