import gzip
import hashlib
import json
import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ctc_drafter.cli import main
from ctc_drafter.evaluate.tasks import SOURCES, Prompt, Source, Task, read_prompts, read_tasks
from ctc_drafter.types import UserError
from tiny_models import save_pair


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


ASK = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "y"}]


def test_rows_of_data_sets(tmp_path: Path) -> None:
    """The same rows that `distill` reads (`test_prompts.py` has them all), from the same kinds of files."""
    rows = [
        {"instruction": "x", "input": "z", "output": ""},
        {"system_prompt": "s", "question": "x"},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "x"}, ASK[1]]},
        {"messages": ASK, "id": 7},
        {"messages": [ASK[0], ASK[2]]},
    ]
    expected = [
        Prompt("a/1", "a", ("x\n\nz",)),
        Prompt("a/2", "a", ("x",), "s"),
        Prompt("a/3", "a", ("x",), "s"),
        Prompt("7", "a", ("x", "y"), "", ("1",)),
        Prompt("a/5", "a", ("x", "y")),
    ]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert list(read_prompts(write(tmp_path / "a.jsonl", lines))) == expected
    assert list(read_prompts(write(tmp_path / "a.json", json.dumps(rows)))) == expected
    assert list(read_prompts(tmp_path / "a.jsonl.gz")) == expected


def test_odd_turns_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"messages": [ASK[0], {"role": "tool", "content": "3"}]}
    with caplog.at_level(logging.WARNING):
        (prompt,) = read_prompts(write(tmp_path / "a.jsonl", json.dumps(row)))
    assert prompt.turns == ("x",)
    assert "turns left out: 1 a turn of messages whose role is none of" in caplog.text


def test_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "p.txt", "one\n\n two\u2028still two \n"))
    assert [prompt.turns for prompt in prompts] == [("one",), ("two\u2028still two",)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ("[1]", "line 1: not an object; write one object a line"),
        ('{"text": "a"}', "line 1: no question, only a text"),
        ('{"turns": []}', "line 1: turns is empty"),
        ('{"turns": ["a", 3]}', "line 1: a turn of turns is no text"),
        ('{"turns": ["a", " "]}', "line 1: an empty turn of turns"),
        ('{"other": 1}', "line 1: no messages, conversations"),
        ('{"messages": [{"role": "user"}]}', "line 1: a turn of messages has no content"),
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


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serves the benchmarks' files on this machine; the paths that were asked for. No library but Python's is there."""
    asked: list[str] = []
    files = {f"/{name}{''.join(Path(SOURCES[name].url).suffixes)}": row for name, row in PUBLISHED.items()}
    contents = {
        path: (gzip.compress if path.endswith(".gz") else bytes)(json.dumps(row).encode())
        for path, row in files.items()
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path in contents else 404)
            self.end_headers()
            self.wfile.write(contents.get(self.path, b""))

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("CTC_DRAFTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for library in ("aiohttp", "requests", "datasets", "httpx"):
        monkeypatch.setitem(sys.modules, library, None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path, content in contents.items():
            url = f"http://127.0.0.1:{server.server_port}{path}"
            name = path[1:].partition(".")[0]
            monkeypatch.setitem(SOURCES, name, Source(url, hashlib.sha256(content).hexdigest()))
        yield asked
        server.shutdown()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_benchmarks_are_downloaded_once(name: str, published: list[str]) -> None:
    (task,) = read_tasks(None, [name])
    row = PUBLISHED[name]
    assert task.prompts[0].category == row.get("category", name)
    assert list(task.prompts[0].turns) in (row.get("turns"), ["a"], ["def f():"])
    assert read_tasks(None, [name]) == [task]
    assert len(published) == 1


@pytest.mark.slow
def test_bench_and_eval_download_their_default_tasks(published: list[str], tmp_path: Path, monkeypatch, capfd) -> None:
    """Without --tasks-path, on a plain install."""
    target, drafter = save_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = ["--target", str(target), "--max-new-tokens", "4", "--limit", "1", "--nodes", "2"]
    assert main(["eval", *options, "--drafter", str(drafter)]) == 0
    assert main(["bench", *options, "--drafter", f"ctc={drafter}"]) == 0
    assert published == ["/mt_bench.jsonl", "/gsm8k.jsonl"]
    assert "gsm8k" in capfd.readouterr().out


def test_downloads_that_fail(published: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES["gsm8k"]
    monkeypatch.setitem(SOURCES, "gsm8k", Source(source.url, "0" * 64))
    with pytest.raises(
        UserError, match=r"gsm8k could not be downloaded from http.*its SHA-256 is .*; give --tasks-path"
    ):
        read_tasks(None, ["gsm8k"])
    monkeypatch.setitem(SOURCES, "gsm8k", Source(f"{source.url}.gone", source.sha256))
    with pytest.raises(UserError, match="404"):
        read_tasks(None, ["gsm8k"])
    assert not list(tmp_path.glob("cache/tasks/*"))
    with pytest.raises(UserError, match="task mine has no file"):
        read_tasks(None, ["mine"])


def test_a_file_that_changed_in_the_cache_is_downloaded_again(published: list[str], tmp_path: Path) -> None:
    tasks = read_tasks(None, ["gsm8k"])
    (file,) = tmp_path.glob("cache/tasks/*")
    file.write_text('{"question": "another"}')
    assert read_tasks(None, ["gsm8k"]) == tasks
    assert len(published) == 2


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
