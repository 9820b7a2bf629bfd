from pathlib import Path

import pytest

from ctc_drafter.evaluate.tasks import SOURCES, Prompt, Task, read_prompts, read_tasks
from ctc_drafter.types import UserError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "name", "category", "turns"),
    [
        ('{"id": "a/1", "benchmark": "a", "category": "math", "turns": ["x", "y"]}', "a/1", "math", ("x", "y")),
        ('{"question_id": 81, "category": "writing", "turns": ["x", "y"]}', "81", "writing", ("x", "y")),
        ('{"question_id": 7, "category": "rag", "turns": ["x"], "reference": null}', "7", "rag", ("x",)),
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


def test_a_file_of_prompts_is_a_task(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jsonl", '{"prompt": "a"}')
    write(tmp_path / "other.jsonl", '{"prompt": "b"}')
    assert [task.name for task in read_tasks(tmp_path, [str(file), "other"])] == ["mine", "other"]
    assert [task.name for task in read_tasks(None, [str(file)])] == ["mine"]


PUBLISHED = {
    "mt_bench": {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": None},
    "gsm8k": {"question": "a", "answer": "#### 1"},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f():", "canonical_solution": "c", "test": "t"},
    "spec_bench": {"question_id": 300, "category": "rag", "turns": ["a"]},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_benchmarks_are_downloaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str | None, **options: object) -> list[dict[str, object]]:
        asked.append((path, config, options["split"]))
        return [PUBLISHED[name]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (task,) = read_tasks(None, [name])
    assert asked == [(SOURCES[name].path, SOURCES[name].name, SOURCES[name].split)]
    row = PUBLISHED[name]
    assert task.prompts[0].category == row.get("category", name)
    assert list(task.prompts[0].turns) in (row.get("turns"), ["a"], ["def f():"])


def test_downloads_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_args: object, **_options: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"gsm8k could not be downloaded \(no route\); give --tasks-path"):
        read_tasks(None, ["gsm8k"])
    with pytest.raises(UserError, match="task mine has no file"):
        read_tasks(None, ["mine"])


@pytest.mark.parametrize(
    ("limit", "chosen"), [(None, "abcdefgh"), (9, "abcdefgh"), (8, "abcdefgh"), (4, "aceg"), (3, "acf"), (1, "a")]
)
def test_a_limit_takes_prompts_from_all_of_the_file(limit: int | None, chosen: str) -> None:
    task = Task("sorted", tuple(Prompt(id=name, category="x", turns=(name,)) for name in "abcdefgh"))
    assert "".join(prompt.id for prompt in task.some(limit).prompts) == chosen


def test_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match="2 tasks are called test"):
        read_tasks(None, [str(tmp_path / "a/test.jsonl"), str(tmp_path / "b/test.jsonl")])
    with pytest.raises(UserError, match="2 tasks are called test"):
        read_tasks(tmp_path / "a", ["test", "test"])
