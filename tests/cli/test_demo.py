import io
import re

import pytest
from rich.console import Console

from ctc_drafter.cli.demo import COLOURS, RunPrinter, Total, demo, summary
from ctc_drafter.decode.generate import Generation
from ctc_drafter.decode.stats import Stats
from ctc_drafter.target.model import Target
from tiny_models import tiny_drafter, tiny_llama, tiny_tokenizer


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
        assert all(part in line for part in ("ctc", " 4 ", "2.00", "3.00", verdict))


def test_times_are_the_decoders_own() -> None:
    total = Total()
    total.add(Generation([[1, 2, 3, 4]], Stats(tokens=4, seconds=3.0), [[]]), printing=1.0)
    total.add(Generation([[1, 2]], Stats(tokens=2, seconds=1.0), [[]]), printing=0.0)
    assert total.tokens_per_s == 2.0
    total.seconds[0] += [5.0, 90.0]
    assert total.tokens_per_s == 1.0


def test_demo_shows_both_decodings_of_each_prompt() -> None:
    model = tiny_llama()
    console = Console(file=io.StringIO(), width=80)
    prompts = ["the cat", "a hat"]
    target, drafter = Target.wrap(model), tiny_drafter(model)
    demo(target, drafter, tiny_tokenizer(), console, nodes=4, max_new_tokens=8, prompts=prompts)
    shown = console.file.getvalue()
    assert [shown.count(part) for part in ("plain decoding", "CTC drafter", "identical: yes")] == [2, 2, 2]
