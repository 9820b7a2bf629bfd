"""Plain decoding against stock `generate`: a small one end to end."""

import json

from benchmarks import plain_loop
from benchmarks.plain_loop import Side, markdown, measured
from helpers import tiny_target


def test_both_sides_take_turns_and_forwards_are_part_of_the_whole():
    sides = measured(tiny_target(), 3, 4, 2)
    assert [(side.name, side.rows, len(side.seconds)) for side in sides] == [("ours", 3, 2), ("stock", 3, 2)]
    assert all(0 < side.share < 1 for side in sides)


def test_the_table_has_the_median_of_the_rounds_ratios():
    sides = [Side("ours", 8, (1.0, 2.0, 2.0), 0.02), Side("stock", 8, (1.0, 3.0, 8.0), 0.07)]
    line = markdown(sides, 10).splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("8", "40.0", "26.7", "1.500 (1.000 to 4.000)", "2.0%", "7.0%")
    ]


def test_the_command_writes_a_results_file(tmp_path, capsys):
    out = tmp_path / "plain.json"
    plain_loop.main("tiny", "float32", "1,2", 3, 1, None, "cpu", False, True, out)
    found = json.loads(out.read_text())
    assert [side["rows"] for side in found["sides"]] == [1, 1, 2, 2]
    assert found["meta"]["cpu_time"]
    assert "| batch |" in capsys.readouterr().out
