"""The bench of the server: what it counts, by hand, and two tiny servers measured from end to end."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import serving
from benchmarks.pages import insert_figures
from benchmarks.serving import Measured, Reply, ask, ask_all, markdown_serving, measure_all, rows_of, totals
from ctc_drafter.types import UserError
from serve_helpers import NAME, plain_texts, running, tiny_service
from tiny_models import save_pair

ROOT = Path(__file__).parents[2]


def measured(seconds: float, verifications: float, *texts: str) -> Measured:
    """Answers of 11 tokens, in 1, 2, 3, ... seconds."""
    return Measured([Reply(text, 11, 1.0 + i) for i, text in enumerate(texts)], seconds, verifications)


def test_rows_by_hand():
    found = {
        (1, "plain"): [measured(4.0, 20, "a", "b"), measured(2.0, 20, "a", "b")],
        (1, "ctc"): [measured(2.0, 5, "a", "b"), measured(0.5, 5, "a", "x")],
        (4, "plain"): [measured(1.0, 20, "a", "b"), measured(1.0, 20, "a", "b")],
        (4, "ctc"): [measured(2.0, 10, "a", "b"), measured(2.0, 10, "a", "b")],
    }
    rows = {(row["clients"], row["method"]): row for row in rows_of(found)}
    one = rows[1, "ctc"]
    assert one["tokens_per_s_rounds"] == [11.0, 44.0]
    assert one["tokens_per_s"] == 27.5
    assert one["gamma_rounds"] == [2.0, 4.0]
    assert one["gamma"] == 3.0
    assert one["beta"] == 40 / 10  # the first token of an answer is the prefill's
    assert (one["p50_s"], one["p95_s"]) == (1.5, 2.0)
    assert (one["identical"], one["compared"]) == (3, 4)
    assert rows[1, "plain"]["gamma"] == rows[4, "plain"]["gamma"] == 1.0
    assert rows[4, "ctc"]["gamma"] == 0.5
    assert rows[4, "ctc"]["beta"] == 2.0


def test_turns_are_taken(monkeypatch):
    asked = []
    monkeypatch.setattr(serving, "measure_once", lambda *call: asked.append(call) or measured(1.0, 1, "a"))
    found = measure_all({"plain": "P", "ctc": "C"}, [{}] * 9, [1, 4], rounds=2)
    assert [(url, count) for url, _, count in asked[4:]] == [
        *(("C", 1), ("P", 1), ("C", 4), ("P", 4)),
        *(("P", 1), ("C", 1), ("P", 4), ("C", 4)),
    ]
    assert [len(bodies) for _, bodies, _ in asked] == [1, 1, 4, 4, *[9] * 8]
    assert {key: len(rounds) for key, rounds in found.items()} == dict.fromkeys(found, 2)
    assert len(found) == 4


def test_clients_get_plain_decodings_answers_and_count_what_the_server_counts():
    with running(tiny_service(), api_key=None) as server:
        service, questions = server.service, ["the cat", "a hat?", "sat", "on the mat"]
        bodies = serving.bodies_of([serving.Prompt(text, "", (text,)) for text in questions], 20)
        before = totals(server.url)
        replies, seconds = ask_all(server.url, bodies, 3)
        after = totals(server.url)
        for body, reply in zip(bodies, replies, strict=True):
            ids = service.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
            assert [reply.text] == plain_texts(service, list(ids), 20)
        assert after[0] - before[0] == sum(reply.tokens for reply in replies)
        assert 0 < after[1] - before[1] <= after[0] - before[0]
        assert max(reply.seconds for reply in replies) <= seconds <= sum(reply.seconds for reply in replies)
        with pytest.raises(UserError, match="the server refused a prompt: "):
            ask(server.client(), {"model": NAME, "messages": []})


@pytest.mark.slow
def test_two_servers_from_end_to_end(tmp_path, monkeypatch, capsys):
    target, drafter = save_pair(tmp_path)
    tasks, out, page = tmp_path / "cats.jsonl", tmp_path / "serve-tiny.json", tmp_path / "page.md"
    tasks.write_text("".join(json.dumps({"prompt": f"the cat {number}"}) + "\n" for number in range(4)))
    options = ["measure", "--tasks", str(tasks), "--json", str(out), "--clients", "1,2", "--rounds", "2"]
    options += ["--max-new-tokens", "12", "--", "--target", str(target), "--drafter", str(drafter), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["serving", *options])
    with pytest.raises(SystemExit) as done:
        serving.main()
    assert done.value.code == 0
    result = json.loads(out.read_text())
    assert [(row["clients"], row["method"]) for row in result["rows"]] == [
        *((1, "ctc"), (1, "plain"), (2, "ctc"), (2, "plain"))
    ]
    for row in result["rows"]:
        assert row["identical"] == row["compared"] == row["requests"] == 8
        assert row["beta"] == 1 if row["method"] == "plain" else row["beta"] >= 1
    page.write_text("<!-- figures: results -->\nold\n<!-- end of figures -->\n")
    monkeypatch.setattr(sys, "argv", ["serving", "report", str(page), str(out)])
    with pytest.raises(SystemExit):
        serving.main()
    assert markdown_serving([result]) in page.read_text()


def test_a_server_that_dies_is_one_line():
    with running(tiny_service(), api_key=None) as server:
        url, client = server.url, server.client()
    for asking in (
        lambda: totals(url),
        lambda: ask(client, {"model": NAME, "messages": []}),
        lambda: ask_all(url, [], 1),
    ):
        with pytest.raises(UserError, match="the server does not answer any more"):
            asking()


def test_the_docs_have_the_figures_of_the_results():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "results").glob("serve-*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert insert_figures(page, markdown_serving(results)) == page
    assert all(
        row["identical"] == row["compared"]
        for result in results
        if "--dtype" not in result["meta"]["serve"]
        for row in result["rows"]
    )
