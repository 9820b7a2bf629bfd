"""The soak test of the server: it counts what clients meet, notices what is wrong, and a short one is without fault."""

import asyncio
import json
import random
import sys
from collections import Counter
from pathlib import Path

import httpx2 as httpx
import pytest

from benchmarks import soak
from benchmarks.pages import insert_figures
from benchmarks.soak import CHAT, TEXT, Figures, Question, faults, markdown_soak, questions_of, row_of, visit
from ctc_drafter.target.model import Target
from serve_helpers import plain_texts, tiny_service
from tiny_models import save_pair, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
QUESTIONS = [Question(CHAT, {"messages": [], "max_tokens": 3}, "a cat"), Question(TEXT, {"prompt": [5]}, "a cat")]


def event(path: str, text: str | None) -> str:
    choice = {"text": text or ""} if path == TEXT else {"delta": {} if text is None else {"content": text}}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def reply_to(request: httpx.Request, words: list[str], end: str = "data: [DONE]\n\n") -> httpx.Response:
    """What a server answers: 400 or 413 to the rude, these words to the others, whole or one after the other."""
    try:
        body = json.loads(request.content)
    except ValueError:
        return httpx.Response(413 if len(request.content) > 1 << 20 else 400)
    if "wings" in body or len(request.content) > 100_000:
        return httpx.Response(400)
    path = request.url.path
    if body.get("stream"):
        return httpx.Response(200, text="".join(event(path, word) for word in [*words, None]) + end)
    text = "".join(words)
    return httpx.Response(200, json={"choices": [{"message": {"content": text}} if path == CHAT else {"text": text}]})


def met(handler, visits: int = 150) -> Figures:
    """What one client meets at such a server."""
    figures = Figures()

    async def all_of_them() -> None:
        transport = httpx.MockTransport(handler)
        async with httpx.AsyncClient(base_url="http://x", transport=transport) as client:
            random_ = random.Random(0)
            for _ in range(visits):
                await visit(client, random_, QUESTIONS, figures)

    asyncio.run(all_of_them())
    return figures


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    real = asyncio.sleep
    monkeypatch.setattr(soak.asyncio, "sleep", lambda seconds: real(0))


def test_right_answers_are_counted():
    figures = met(lambda request: reply_to(request, ["a", " cat"]))
    assert figures.mismatches == 0
    assert not figures.errors
    kinds = figures.outcomes
    assert kinds.keys() == {"rude", "left", "whole", "streamed"}
    assert kinds["whole"] + kinds["streamed"] == len(figures.seconds)
    assert sum(kinds.values()) == 150
    assert 0.2 * 150 < kinds["left"] < 0.4 * 150


@pytest.mark.parametrize("words", [["a", " hat"], ["a"], []])
def test_wrong_answers_are_mismatches(words):
    figures = met(lambda request: reply_to(request, words))
    assert figures.mismatches == len(figures.seconds) > 0
    assert not figures.errors


def test_an_error_within_a_stream_is_a_mismatch():
    def failing(request):
        end = f"data: {json.dumps({'error': {'message': 'gone'}})}\n\ndata: [DONE]\n\n"
        return reply_to(request, ["a", " cat"], end)

    figures = met(failing)
    assert 0 < figures.mismatches <= figures.outcomes["streamed"]


@pytest.mark.parametrize("status", [500, 503, 404])
def test_other_statuses_are_errors(status):
    figures = met(lambda request: httpx.Response(status))
    assert figures.errors[f"status {status}"] > 0
    assert not figures.seconds


def test_a_full_queue_is_none():
    figures = met(lambda request: httpx.Response(429) if b"max_tokens" in request.content else reply_to(request, []))
    assert figures.outcomes["queue full"] > 0
    assert not figures.errors


def test_a_stream_that_is_cut_is_an_error():
    figures = met(lambda request: reply_to(request, ["a", " cat"], end=""))
    assert figures.errors["a stream without its end"] > 0


def test_the_rude_must_be_refused():
    figures = met(
        lambda request: httpx.Response(200, json={"choices": [{"message": {"content": "a cat"}, "text": ""}]})
    )
    assert any("too large: 200" in error for error in figures.errors)


MEMORY = [(float(second), size << 20) for second, size in enumerate([1, 5, 3, 50, 40, 60, 40, 90, 40, 55, 53, 54])]
GOOD = row_of(Figures([1.0, 2.0, 3.0], Counter(whole=3), memory=MEMORY), (5 << 20, 6 << 20), (9, 10))


def test_memory_by_quarter_is_the_median_of_its_samples():
    assert soak.quarters(MEMORY) == [3 << 20, 50 << 20, 40 << 20, 54 << 20]
    assert soak.quarters(MEMORY[:5]) == [1 << 20, 5 << 20, 3 << 20, 45 << 20]


def test_what_is_wrong_with_a_run():
    assert GOOD["p50_s"] == 2.0
    assert faults(GOOD) == []
    grown = [[second, size + (second > 8) * (30 << 20)] for second, size in GOOD["memory"]]
    wrong = {
        "2 answers are not plain decoding's": {"mismatches": 2},
        "errors: {'status 500': 1}": {"errors": {"status 500": 1}},
        "the server died": {"died": True},
        "no answer was compared": {"answers": 0},
        "memory grew by 34 MB from the second quarter to the last": {"memory": grown},
        "9 file descriptors were left open": {"files_after": 18},
    }
    for text, change in wrong.items():
        assert faults(GOOD | change) == [text]
    assert faults(GOOD | {"memory": grown}, growth=35 << 20) == []


def test_the_answers_are_plain_decodings():
    service = tiny_service()
    target, tokenizer = Target.wrap(tiny_llama()), tiny_tokenizer()
    found = questions_of(target, tokenizer, 8)
    assert {question.path for question in found} == {CHAT, TEXT}
    assert {"seed" in question.body for question in found} == {True, False}
    for question in found:
        ids = question.body.get("prompt") or list(
            tokenizer.apply_chat_template(question.body["messages"], add_generation_prompt=True, return_dict=False)
        )
        given = {name: question.body[name] for name in ("temperature", "top_p", "seed") if name in question.body}
        settings = given if "seed" in given else {}
        assert [question.answer] == plain_texts(service, ids, question.body["max_tokens"], **settings)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [["--batch-size", "4"], ["--budget", "--batch-size", "3", "--nodes", "40"]])
def test_ten_clients(tmp_path, monkeypatch, capsys, options):
    monkeypatch.undo()  # clients wait
    target, drafter = save_pair(tmp_path)
    out, page = tmp_path / "soak.json", tmp_path / "page.md"
    given = ["run", "--target", str(target), "--clients", "10", "--seconds", "5", "--questions", "8"]
    given += ["--growth", "300"]  # a server that has just begun
    monkeypatch.setattr(
        sys, "argv", ["soak", *given, "--json", str(out), "--", "--drafter", str(drafter), "--queue", "4", *options]
    )
    with pytest.raises(SystemExit) as done:
        soak.main()
    row = json.loads(out.read_text())["row"]
    assert not done.value.code, (row, capsys.readouterr().err)
    assert row["mismatches"] == 0
    assert row["answers"] > 0
    assert row["outcomes"]["left"] > 0
    page.write_text("<!-- figures: soak -->\nold\n<!-- end of figures -->\n")
    monkeypatch.setattr(sys, "argv", ["soak", "report", str(page), str(out)])
    with pytest.raises(SystemExit):
        soak.main()
    assert markdown_soak([json.loads(out.read_text())]) in page.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wrong_answers_end_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    target, drafter = save_pair(tmp_path)
    real = soak.questions_of
    spoilt = lambda *given: [Question(each.path, each.body, each.answer + "x") for each in real(*given)]  # noqa: E731
    monkeypatch.setattr(soak, "questions_of", spoilt)
    given = ["run", "--target", str(target), "--clients", "2", "--seconds", "4", "--questions", "3"]
    monkeypatch.setattr(sys, "argv", ["soak", *given, "--", "--drafter", str(drafter)])
    with pytest.raises(SystemExit) as done:
        soak.main()
    assert done.value.code == 1
    assert "answers are not plain decoding's" in capsys.readouterr().err


def test_the_docs_have_the_figures_of_the_results():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "results").glob("soak-*.json"))]
    assert insert_figures(page, markdown_soak(results), "soak") == page
    assert [faults(result["row"]) for result in results] == [[] for _ in results]
