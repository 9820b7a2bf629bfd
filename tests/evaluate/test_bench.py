"""Many contenders in one run: chains and trees of a size, records that add up to rows, runs that go on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ctc_drafter.chat import encode_conversation
from ctc_drafter.cli import main
from ctc_drafter.decode.generate import Generation, generate
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.evaluate import methods
from ctc_drafter.evaluate.bench import BenchSettings, Entry, about_drafter, bench, parse_drafters, parse_sizes, partial
from ctc_drafter.evaluate.methods import BINS, Calibration, Chained, ChainedSession
from ctc_drafter.evaluate.tasks import Prompt, Task
from ctc_drafter.target.model import Target
from ctc_drafter.types import Candidates, TokenTree, UserError
from tiny_models import save_pair, tiny_drafter, tiny_llama, tiny_tokenizer

TASKS = [
    Task(
        "chat",
        tuple(Prompt(f"chat/{i}", f"c{i % 2}", turns) for i, turns in enumerate((("the cat", "and?"), ("mat",)))),
    ),
    Task("maths", (Prompt("m/0", "maths", ("how many cats?",)), Prompt("m/1", "maths", ("cat cat cat cat",)))),
]
SIZES = ("chain", 1, 6)


def measured(out: Path | None = None, **overrides: Any) -> dict[str, Any]:
    model = tiny_llama()
    drafter = tiny_drafter(model)
    entries = {"ours": Entry(drafter, about_drafter(drafter, None)), "prompt_lookup": Entry(PromptLookup(), {})}
    settings = BenchSettings(**{"sizes": SIZES, "max_new_tokens": 10, "watched": 2} | overrides)
    return bench(Target.wrap(model), tiny_tokenizer(), entries, TASKS, settings, meta={"target": "t"}, out=out)


@pytest.fixture(scope="module")
def unbroken() -> dict[str, Any]:
    return measured()


def without_clock(result: dict[str, Any]) -> Any:
    clock = ("seconds", "tokens_per_s", "gamma", "stages_ms")
    return [[{k: v for k, v in row.items() if k not in clock} for row in result[part]] for part in ("rows", "records")]


def test_every_contender_has_a_row_and_is_exact(unbroken: dict[str, Any]) -> None:
    keys = [("plain", None), *(("ours", size) for size in SIZES), *(("prompt_lookup", size) for size in SIZES)]
    assert [(row["task"], row["method"], row["nodes"]) for row in unbroken["rows"]] == [
        (task.name, *key) for task in TASKS for key in keys
    ]
    assert all(row["identical"] == row["compared"] == 2 for row in unbroken["rows"])
    assert unbroken["meta"]["complete"]
    assert unbroken["meta"]["drafters"]["ours"]["method"] == "ctc"
    assert unbroken["meta"]["drafters"]["ours"]["parameters"] > 1000


@pytest.mark.sparing
@pytest.mark.parametrize("batch_size", [1, 2])
def test_records_add_up_to_rows(unbroken: dict[str, Any], batch_size: int) -> None:
    result = unbroken if batch_size == 1 else measured(batch_size=2, watched=0)
    for row in result["rows"]:
        own = [r for r in result["records"] if all(r[k] == row[k] for k in ("task", "method", "nodes"))]
        assert [r["prompt"] for r in own] == [p.id for task in TASKS if task.name == row["task"] for p in task.prompts]
        for name in ("tokens", "steps", "seconds"):
            assert sum(r[name] for r in own) == pytest.approx(row[name])
        assert sum(sum(r["accepted"]) for r in own) == row["steps"] == sum(row["accept_histogram"])
        emitted = sum(i * n for i, n in enumerate(row["accept_histogram"])) + row["steps"]
        assert row["beta"] * row["steps"] == pytest.approx(row["tokens"] - sum(r["turns"] for r in own))
        assert emitted > row["beta"] * row["steps"] - 0.01  # the last draft of a row may be cut
    assert {r["category"] for r in result["records"] if r["task"] == "chat"} == {"c0", "c1"}


def test_trees_of_n_nodes_have_n_nodes(unbroken: dict[str, Any]) -> None:
    """The calibration counts every node that was verified; a chain has at most as many as the drafter drafts."""
    for row in (row for row in unbroken["rows"] if row["method"] == "ours"):
        steps = sum(first_turn_steps(row["task"], row["nodes"]))
        counted = sum(row["calibration"]["nodes"])
        assert counted == row["nodes"] * steps if row["nodes"] != "chain" else steps <= counted <= 3 * steps


def first_turn_steps(task: str, nodes: int | str) -> list[int]:
    """Verifications of the first turns."""
    model = tiny_llama()
    target, drafter, tokenizer = Target.wrap(model), tiny_drafter(model), tiny_tokenizer()
    contender = methods.decoding(target, tokenizer, 10).of_size("ours", drafter, nodes)
    prompts = [p for each in TASKS if each.name == task for p in each.prompts]
    texts = [encode_conversation(tokenizer, prompt.turns[:1], []) for prompt in prompts]
    return [contender.run([text], False, None).stats.steps for text in texts]


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, Any]) -> None:
    out, calls, original = tmp_path / "out.json", 0, methods.generate
    stop = 6 + 12 + 6 + 3  # warm-up, two turns and one turn of chat, then inside the extra runs

    def counted(*args: Any, **options: Any) -> Generation:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise RuntimeError("killed")
        return original(*args, **options)

    monkeypatch.setattr(methods, "generate", counted)
    with pytest.raises(RuntimeError, match="killed"):
        measured(out)
    file = partial(out)
    assert file is not None
    assert len(file.read_text().splitlines()) > 3
    file.write_text(file.read_text() + '{"records": [{"ta')  # cut off
    with pytest.raises(UserError, match=r"holds another run .*max_new_tokens was 10, is now 9"):
        measured(out, max_new_tokens=9)
    calls = stop
    result = measured(out)
    assert without_clock(result) == without_clock(unbroken)
    assert calls - stop == 6 + 6 * 4 + 6 * 2 + 6 * 4  # warm-up, extra runs of chat, maths and its extra runs
    assert not file.exists()
    assert without_clock(json.loads(out.read_text())) == without_clock(unbroken)


def test_the_chain_is_the_best_path() -> None:
    """Root -> a .5 -> b .1; root -> c .4 -> d .39: the likeliest child is not on the best path."""
    scores = torch.tensor([[0.5, 0.4, 0.39, 0.1]]).log()
    candidates = Candidates(
        torch.tensor([[1, 3, 4, 2]]), torch.tensor([[-1, -1, 1, 0]]), torch.tensor([[1, 1, 2, 2]]), scores
    )

    class Inner:
        asked: tuple[int, float] | None = None
        extend = join = select = staticmethod(lambda *_: None)

        def propose(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
            self.asked = (nodes, min_probability)
            return candidates

    inner = Inner()
    found = ChainedSession(inner).propose(torch.tensor([9]), 2, 0.0)
    assert (found.tokens.tolist(), found.parents.tolist()) == ([[3, 4]], [[-1, 0]])
    assert inner.asked == (64, 0.0)


def test_chains_of_rows_that_find_nothing() -> None:
    target = Target.wrap(tiny_llama())
    prompts = [[5, 6, 7, 8], [9, 10, 9, 10, 9]]
    expected = methods.plain_generate(target, prompts, max_new_tokens=9).tokens
    assert (
        generate(target, Chained(PromptLookup()), prompts, max_new_tokens=9, nodes=64, min_probability=0.0).tokens
        == expected
    )


def test_calibration_counts_nodes_by_what_was_promised() -> None:
    parents = torch.tensor([[0, 0, 0, 1]])
    scores = torch.tensor([[1.0, 0.62, 0.33, 0.58]]).log()
    ancestors = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]]).bool()
    valid = torch.ones(1, 4, dtype=torch.bool)
    tree = TokenTree(torch.tensor([[9, 1, 2, 3]]), parents, parents, ancestors, valid, scores)
    found = Calibration()
    found.add(tree, torch.tensor([[1, 3, 0, 0]]))  # root -> 1 -> 3
    found.add(tree, torch.tensor([[2, 3, 0, 0]]))  # root -> 2
    bins = {int(p * BINS): (p, hits) for p, hits in ((0.62, 1), (0.33, 1), (0.58, 1))}
    for i in range(BINS):
        promised, hits = bins.get(i, (0.0, 0))
        assert (found.nodes[i], found.accepted[i]) == (2 * (i in bins), hits)
        assert found.predicted[i] == pytest.approx(2 * promised)
    # Promised 1.24, 0.66 and 1.16 of two nodes each, one of which was accepted each time.
    assert found.error == pytest.approx((0.24 + 0.34 + 0.16) / 6)
    assert Calibration().error is None


def test_names_and_sizes() -> None:
    assert parse_sizes("chain, 8,16,8") == ("chain", 8, 16)
    assert parse_drafters(["a=x/y", "prompt_lookup"]) == {"a": "x/y", "prompt_lookup": "prompt_lookup"}
    for bad in ("0", "-3", "tree", ""):
        with pytest.raises(UserError, match="--nodes"):
            parse_sizes(bad)
    with pytest.raises(UserError, match="is taken"):
        parse_drafters(["plain=x"])


def test_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target, drafter = save_pair(tmp_path)
    (drafter / "train_log.jsonl").write_text('{"step": 5, "loss": 1.0, "seconds": 3.5, "tokens": 700}\n{"step": 9}\n')
    tasks, out = tmp_path / "mine.jsonl", tmp_path / "out.json"
    tasks.write_text('{"prompt": "the cat", "category": "cats"}\n{"prompt": "mat"}\n')
    options = ["--target", str(target), "--drafter", f"label={drafter}", "--drafter", "prompt_lookup"]
    options += ["--tasks", str(tasks), "--nodes", "chain,4", "--max-new-tokens", "6", "--json", str(out)]
    assert main(["bench", *options, "--watched", "1", "--copies", "own"]) == 0
    result = json.loads(out.read_text())
    assert [(row["method"], row["nodes"]) for row in result["rows"]] == [
        *(("plain", None), ("label", "chain"), ("label", 4), ("prompt_lookup", "chain"), ("prompt_lookup", 4))
    ]
    assert result["meta"]["drafters"]["label"]["training"] == {"steps": 9, "tokens": 700, "seconds": 3.5}
    assert {record["category"] for record in result["records"]} == {"cats", "mine"}
    assert "chain" in capfd.readouterr().out
