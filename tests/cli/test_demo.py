import importlib
import io
import re
import threading
import time
from collections import namedtuple

import pytest
from rich.console import Console

from ctc_drafter.cli.demo import (
    COLOURS,
    NEXT,
    Load,
    RunPrinter,
    StepClock,
    Total,
    demo,
    is_busy,
    summary,
    why_busy,
)
from ctc_drafter.decode.generate import Generation
from ctc_drafter.decode.stats import Stats
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.target.model import Target
from tiny_models import tiny_drafter, tiny_llama, tiny_tokenizer

module = importlib.import_module("ctc_drafter.cli.demo")  # the package has a command of that name


def printed(text: str, run: int, **options: object) -> str:
    """What a printer writes of a text whose tokens come `run` at a time."""
    tokenizer = tiny_tokenizer()
    console = Console(file=io.StringIO(), width=40, **options)
    printer = RunPrinter(console, tokenizer, mark_runs=True)
    ids = tokenizer(text).input_ids
    for start in range(0, len(ids), run):
        printer(0, ids[start : start + run])
    printer.close()
    assert 0 < printer.seconds < 60
    return console.file.getvalue()


def test_runs_alternate_in_colour() -> None:
    shown = printed("the cat sat", 2, force_terminal=True, color_system="256")
    codes = re.findall(r"\x1b\[38;5;(\d+)m", shown)
    palette = [re.sub(r"\D", "", colour) for colour in COLOURS]
    assert codes == (palette * len(codes))[: len(codes)]
    assert len(codes) > 1
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == "the cat sat\n"


@pytest.mark.parametrize(
    "options",
    [{}, {"force_terminal": True, "no_color": True}, {"force_terminal": True, "color_system": None}],
    ids=["pipe", "no colour wanted", "no colour possible"],
)
def test_separators_where_there_is_no_colour(options: dict[str, object]) -> None:
    shown = printed("the cat sat", 1, **options)
    assert "38;5" not in shown
    assert shown.count("|") > 1
    assert re.sub(r"\x1b\[[\d;]*m|\|", "", shown) == "the cat sat\n"


def test_long_lines_and_split_characters_stay_whole() -> None:
    text = "naïve 🐈 [bold]" * 20
    assert printed(text, 1).replace("|", "") == text + "\n"


def test_summary_says_when_outputs_differ() -> None:
    plain = Total([[1, 2, 3, 4]], Stats(tokens=4, steps=3, step_tokens=3), [[2.0, 40.0, 1.0]])
    same = Total([[1, 2, 3, 4]], Stats(tokens=4, steps=1, step_tokens=3), [[0.5, 1.0, 1.5]])
    other = Total([[1, 2, 3, 5]], Stats(tokens=4, steps=1, step_tokens=3), [[1.0]])
    for total, verdict in ((same, "identical: yes"), (other, "identical: NO")):
        console = Console(file=io.StringIO(), width=80)
        console.print(summary({"plain": plain, "ctc": total}))
        line = console.file.getvalue().splitlines()[-2]
        assert all(part in line for part in ("ctc", " 4.0 ", "2.00x", "3.00", verdict))


def test_times_are_the_decoders_own() -> None:
    total = Total()
    total.add(Generation([[1, 2, 3, 4]], Stats(tokens=4, seconds=3.0), [[]]), printing=1.0)
    total.add(Generation([[1, 2]], Stats(tokens=2, seconds=1.0), [[]]), printing=0.0)
    assert total.tokens_per_s == 2.0
    total.seconds[0] += [5.0, 90.0]
    assert total.tokens_per_s == 1.0


def test_a_busy_machine_is_noticed() -> None:
    assert not is_busy([])
    assert not is_busy([0.1] * 90 + [0.16] * 10)  # a tenth may be late
    assert is_busy([0.1] * 89 + [0.16] * 11)
    assert not is_busy([0.1] * 50 + [0.14] * 50)


EVEN = [0.1] * 100


@pytest.mark.parametrize(
    ("threads", "thread", "process", "machine", "reason"),
    [
        (2, 10.0, 20.0, 20.5, None),  # two threads on four cores, and hardly anything else
        (2, 10.0, 20.0, 40.0, None),  # others have the other two cores
        (2, 10.0, 20.0, 44.0, "2.4 of its 4 cores"),
        (4, 10.0, 30.0, 40.0, "1.0 of its 4 cores"),
        (4, 10.0, 36.0, 40.0, None),
        (9, 10.0, 30.0, 40.0, "1.0 of its 4 cores"),  # more threads than cores
        (1, 8.0, 8.0, 8.5, "a core for 80% of the time"),  # a quota, or neighbours that a container does not show
        (1, 9.0, 9.0, 9.5, None),
        (2, 10.0, 20.0, 3.0, None),  # counters of another place
        (0, 1.0, 1.0, 44.0, None),  # the CPU waits for another device
    ],
)
def test_a_machine_that_is_evenly_busy_is_noticed(
    monkeypatch: pytest.MonkeyPatch, threads: int, thread: float, process: float, machine: float, reason: str | None
) -> None:
    monkeypatch.setattr(module.psutil, "cpu_count", lambda: 4)
    before = Load(100.0, 5.0, 7.0, 9_000.0)
    after = Load(110.0, 5.0 + thread, 7.0 + process, 9_000.0 + machine)
    found = why_busy(EVEN, before, after, threads)
    assert found is None if reason is None else reason in found
    uneven = why_busy([0.1] * 80 + [0.2] * 20, before, after, threads)
    assert "1.5 times their median" in uneven
    assert why_busy(EVEN, before, before, threads) is None


def test_the_load_is_that_of_thread_process_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that works is this process's and not this thread's; time that is idle or counted twice is nobody's."""
    times = namedtuple("times", "user nice system idle iowait irq softirq steal guest guest_nice")
    monkeypatch.setattr(module.psutil, "cpu_times", lambda: times(1, 2, 4, 1000, 1000, 8, 16, 32, 1, 2))
    begin = Load.now()
    assert begin.machine == 1 + 2 + 4 + 8 + 16 + 32

    def work() -> None:
        while time.thread_time() < 0.2:
            pass

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    spent = Load.now() - begin
    assert spent.process >= 0.2 > spent.thread
    assert spent.wall >= 0.2
    assert spent.machine == 0


@pytest.mark.parametrize("busy", [False, True])
def test_the_demo_says_when_the_machine_is_evenly_busy(monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    monkeypatch.setattr(module, "is_busy", lambda steps: False)
    clock = iter([Load(0.0, 0.0, 0.0, 0.0), Load(10.0, 5.0 if busy else 10.0, 10.0, 10.0)])
    monkeypatch.setattr(Load, "now", classmethod(lambda cls: next(clock)))
    console = Console(file=io.StringIO(), width=80)
    options = {"nodes": 4, "max_new_tokens": 4, "prompts": ["the cat"]}
    demo(Target.wrap(tiny_llama()), PromptLookup(), tiny_tokenizer(), console, **options)
    shown = console.file.getvalue()
    assert ("This machine is busy: decoding had a core for 50% of the time only." in shown) == busy


def test_a_clock_of_steps_leaves_the_prefill_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 5.5, 7.0])
    monkeypatch.setattr("ctc_drafter.cli.demo.time.perf_counter", lambda: next(times))
    clock = StepClock()
    for _ in range(3):
        clock(0, [1])
    assert clock.steps == [0.5, 1.5]


def test_demo_shows_both_decodings_of_each_prompt() -> None:
    model = tiny_llama()
    console = Console(file=io.StringIO(), width=80)
    prompts = ["the cat", "a hat"]
    target, drafter = Target.wrap(model), tiny_drafter(model)
    demo(target, drafter, tiny_tokenizer(), console, nodes=4, max_new_tokens=8, prompts=prompts)
    shown = console.file.getvalue()
    assert [shown.count(part) for part in ("plain decoding", "CTC drafter", "identical: yes")] == [2, 2, 2]
    assert "ctc-drafter generate --target" in shown


def test_demo_names_the_method_that_it_shows() -> None:
    console = Console(file=io.StringIO(), width=80)
    options = {"nodes": 4, "max_new_tokens": 4, "prompts": ["the cat"]}
    demo(Target.wrap(tiny_llama()), PromptLookup(), tiny_tokenizer(), console, **options)
    shown = console.file.getvalue()
    assert "prompt lookup" in shown
    assert "CTC" not in shown
    assert any("prompt_lookup" in line and "identical" in line for line in shown.splitlines())


def test_the_next_steps_fit_a_narrow_terminal() -> None:
    assert max(map(len, NEXT.splitlines())) <= 80
