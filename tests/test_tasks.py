from pathlib import Path

import pytest

from ctc_drafter.evaluate.tasks import read_prompts, read_tasks
from ctc_drafter.types import UserError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "name", "category", "turns"),
    [
        ('{"id": "a/1", "benchmark": "a", "category": "math", "turns": ["x", "y"]}', "a/1", "math", ("x", "y")),
        ('{"question_id": 81, "category": "writing", "turns": ["x", "y"]}', "81", "writing", ("x", "y")),
        ('{"question": "How many?", "answer": "#### 3"}', "task/1", "task", ("How many?",)),
        ('{"task_id": "HumanEval/0", "prompt": "def f():\\n", "test": "t"}', "HumanEval/0", "task", ("def f():\n",)),
        ('{"prompt": ["x", "y"], "prompt_id": 7}', "7", "task", ("x", "y")),
    ],
)
def test_formats(tmp_path: Path, row: str, name: str, category: str, turns: tuple[str, ...]) -> None:
    (prompt,) = read_prompts(write(tmp_path / "task.jsonl", row + "\n\n"))
    assert (prompt.id, prompt.category, prompt.turns) == (name, category, turns)


def test_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "p.txt", "one\n\n two\u2028still two \n"))
    assert [prompt.turns for prompt in prompts] == [("one",), ("two\u2028still two",)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ("[1]", "line 1: not a JSON object"),
        ('{"text": "a"}', "line 1: no text"),
        ('{"turns": []}', "line 1: no text"),
        ('{"turns": ["a", 3]}', "line 1: no text"),
        ('{"turns": ["a", " "]}', "line 1: no text"),
        ("\n \n", "holds no prompt"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, text: str, part: str) -> None:
    path = write(tmp_path / "task.jsonl", text)
    with pytest.raises(UserError, match=part) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.txt")
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path / "none.jsonl")


def test_tasks_are_found_by_name(tmp_path: Path) -> None:
    for name in ("gsm8k", "mt_bench"):
        write(tmp_path / f"{name}.jsonl", '{"prompt": "a"}')
    assert [task.name for task in read_tasks(tmp_path, ["mt_bench", "gsm8k"])] == ["mt_bench", "gsm8k"]
    with pytest.raises(UserError, match=r"no task gsm9k; .* has gsm8k, mt_bench"):
        read_tasks(tmp_path, ["gsm8k", "gsm9k"])
    with pytest.raises(UserError, match="no task was named"):
        read_tasks(tmp_path, [])
    with pytest.raises(UserError, match="not a folder"):
        read_tasks(tmp_path / "none", ["gsm8k"])
