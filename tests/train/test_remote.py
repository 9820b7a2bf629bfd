"""Answers from a real server of this package, and from ones that behave worse."""

import asyncio
import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ctc_drafter.chat import decode
from ctc_drafter.cli import main
from ctc_drafter.train import distill_server
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.distill import GREEDY, Distilled, Sampling, distill
from ctc_drafter.train.distill_server import Server, _probe, distill_remotely, server_key
from ctc_drafter.train.prompts import Prompt
from ctc_drafter.types import UserError
from serve_helpers import KEY, NAME, Running, running, tiny_service
from tiny_models import save_pair, tiny_llama, tiny_tokenizer

PROMPTS = [Prompt(f"row{i}", [5 + i + j for j in range(1 + i % 4)]) for i in range(14)]
SIZES = {"max_new_tokens": 8, "shard_size": 4, "eos": (1,), "progress": False}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(tiny_service()) as found:
        yield found


def ask(url: str, out: Path, prompts: list[Prompt] = PROMPTS, sampling: Sampling = GREEDY, **options) -> Distilled:
    where = Server(f"{url}/v1", NAME, KEY, **{"concurrency": 5, "retries": 2, **options})
    config = tiny_llama().config
    return distill_remotely(where, config, tiny_tokenizer(), prompts, out, sampling=sampling, **SIZES)


def shards(out: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(out.glob("shard-*"))}


@pytest.mark.sparing
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=3)], ids=["greedy", "drawn"]
)
def test_the_shards_are_those_of_distillation_in_process(server: Running, tmp_path: Path, sampling: Sampling) -> None:
    done = ask(server.url, tmp_path / "remote", sampling=sampling)
    target = server.service.target
    distill(target, tiny_tokenizer(), PROMPTS, tmp_path / "local", batch_size=2, sampling=sampling, **SIZES)
    assert shards(tmp_path / "remote") == shards(tmp_path / "local")
    assert (done.rows, done.found, done.left_out) == (14, 0, {})
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("remote", "local")]
    assert [manifest["ids"] for manifest in manifests] == ["written", "written"]
    for key in ("config", "tokenizer", "template", "prompts_hash"):
        assert manifests[0][key] == manifests[1][key]
    with pytest.raises(UserError, match="holds another run: dtype was float32, is now not said"):
        ask(server.url, tmp_path / "local", sampling=sampling)


@pytest.mark.slow
def test_goes_on_where_it_was_cut_off(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(server.url, tmp_path / "whole")
    answers, real = [0], distill_server.answer_ids

    def failing(*arguments):
        answers[0] += 1
        if answers[0] == 9:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(distill_server, "answer_ids", failing)
    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)):
        ask(server.url, tmp_path / "cut")
    monkeypatch.undo()
    assert ask(server.url, tmp_path / "cut").found > 0
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")


def test_a_finished_folder_needs_no_server(server: Running, tmp_path: Path) -> None:
    ask(server.url, tmp_path)
    assert ask("http://127.0.0.1:9", tmp_path, retries=0).found == len(PROMPTS)
    (tmp_path / "shard-00001.jsonl").unlink()
    with pytest.raises(UserError, match="did not answer a completion"):
        ask("http://127.0.0.1:9", tmp_path, retries=0)


class Scripted(BaseHTTPRequestHandler):
    """Gives text alone; fails every second time, as a busy server does; refuses some prompts; garbles some texts."""

    calls: int
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).calls += 1
        if "return_token_ids" in body or body["prompt"][0] == 9:
            self.reply(400, {"error": {"message": "not served"}})
        elif type(self).calls % 2:
            self.reply(503, {"error": {"message": "busy"}}, {"Retry-After": "0.01"})
        else:
            text = "the cat" if body["prompt"][0] != 10 else "<|end|>x"
            choice = {"index": 0, "text": text, "finish_reason": "stop"}
            self.reply(200, {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})

    def reply(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[str]:
    Scripted.calls = 0
    served = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()
    thread.join()


def test_text_alone_is_encoded_and_what_cannot_be_is_counted(scripted: str, tmp_path: Path) -> None:
    done = ask(scripted, tmp_path, concurrency=1)
    assert done.left_out == {"refused by the server": 1, "text that its ids do not give back": 1}
    assert done.rows == 12
    assert json.loads((tmp_path / "manifest.json").read_text())["ids"] == "encoded"
    tokenizer = tiny_tokenizer()
    for row in DistilledDataset.load([tmp_path]).rows:
        answer = row.ids[row.answer_start :].tolist()
        assert answer[-1] == tokenizer.eos_token_id
        assert decode(tokenizer, answer) == "the cat"
    assert ask(scripted, tmp_path).found == 14


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did not answer a completion.*start the server, or mend --server"):
        ask("http://127.0.0.1:9", tmp_path, retries=0)


def test_a_wrong_key_or_name(server: Running, tmp_path: Path) -> None:
    for options in ({"api_key": "wrong"}, {"model": "other"}):
        where = Server(**{"url": f"{server.url}/v1", "model": NAME, "api_key": KEY, "retries": 0, **options})
        with pytest.raises(UserError, match="mend --server, --model or --api-key"):
            distill_remotely(where, tiny_llama().config, tiny_tokenizer(), PROMPTS, tmp_path, **SIZES)


def test_on_the_command_line(server: Running, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target, _ = save_pair(tmp_path)
    prompts = tmp_path / "p.txt"
    prompts.write_text("the cat\nthe hat\n")
    options = ["distill", "--target", str(target), "--prompts", str(prompts), "--max-new-tokens", "6"]
    remote_options = ["--server", f"{server.url}/v1", "--model", NAME, "--api-key", KEY, "--out", str(tmp_path / "a")]
    assert main([*options, *remote_options]) == 0
    assert "2 answers" in capfd.readouterr().out
    assert main([*options, "--out", str(tmp_path / "b")]) == 0
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


def test_openais_own_key_goes_to_openai_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--server` names any host, and the variable is set on many machines."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.delenv("CTC_DRAFTER_SERVER_API_KEY", raising=False)
    assert server_key("https://api.openai.com/v1", None) == "sk-secret"
    for url in (
        "http://127.0.0.1:8000/v1",
        "http://api.openai.com/v1",
        "https://api.openai.com.evil.example/v1",
        "https://api.openai.com@evil.example/v1",
        "https://evil.example/api.openai.com",
    ):
        assert server_key(url, None) is None, url
        assert server_key(url, "given") == "given"
    monkeypatch.setenv("CTC_DRAFTER_SERVER_API_KEY", "mine")
    assert server_key("http://127.0.0.1:8000/v1", None) == "mine"


def test_nothing_of_the_environment_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_WEBHOOK_SECRET", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "users-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Key: users-secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://users-secret.example")
    seen: list[bytes] = []

    class Echo(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(str(self.headers).encode() + self.rfile.read(int(self.headers["Content-Length"])))
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    with answering(Echo) as url, pytest.raises(UserError):
        asyncio.run(_probe(Server(url, "m", retries=0), Prompt("a", [1])))
    assert seen
    assert not any(b"users-secret" in request for request in seen)


def replying(body: bytes, kind: str = "application/json", status: int = 200, **headers: str) -> type:
    class Reply(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    return Reply


@contextmanager
def answering(handler: type) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def reply(**choice: object) -> bytes:
    first = {"index": 0, "text": "a", "finish_reason": "length", "logprobs": None} | choice
    return json.dumps({"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": [first]}).encode()


@pytest.mark.sparing(3)
@pytest.mark.parametrize(
    "handler",
    [
        replying(b"<html>hello</html>", "text/html"),
        replying(b"", "application/json"),
        replying(b"null"),
        replying(b"[]"),
        replying(b"{}"),
        replying(b'{"choices": null}'),
        replying(b'{"choices": []}'),
        replying(b'{"choices": [null]}'),
        replying(b'{"choices": ["a"]}'),
        replying(reply(text=None)),
        replying(reply(text=7, token_ids=[1])),
        replying(reply(token_ids=["x"])),
        replying(reply(token_ids=[1.5])),
        replying(reply(token_ids=[10**30])),
        replying(reply(token_ids=[-1])),
        replying(reply(token_ids=[[1]])),
        replying(reply(token_ids=[None])),
        replying(reply(token_ids=[1] * 100)),
        replying(reply(text="a" * 10_000_000, token_ids=None)),
        replying(reply(text="\ud800")),
        replying(gzip.compress(b" " * (80 << 20)), Content_Encoding="gzip"),
        replying(b"\x1b[31mred\x1b]0;title\x07", "text/plain", 404),
    ],
)
def test_a_hostile_server_costs_a_line_or_a_row_and_nothing_else(handler, tmp_path, capfd, caplog) -> None:
    """What it says is not believed: rows that cannot be are left out, everything else is one line."""
    config, tokenizer = tiny_llama().config, tiny_tokenizer()
    prompts = [Prompt("a", [5, 9, 2])]
    with answering(handler) as url:
        where = Server(url, "m", retries=0, timeout=5.0)
        said, done = None, None
        try:
            done = distill_remotely(where, config, tokenizer, prompts, tmp_path / "out", max_new_tokens=8, eos=[1])
        except UserError as error:
            said = str(error)
        if said is not None:
            assert "\n" not in said
            assert "\x1b" not in said
            assert url in said
        else:
            for row in DistilledDataset.load([tmp_path / "out"]).rows if done.rows else ():
                assert len(row.ids) <= 3 + 8 + 1
                assert all(0 <= token < 280 for token in row.ids.tolist())
    assert "\x1b" not in caplog.text + "".join(capfd.readouterr())


def test_a_server_that_asks_for_years_of_patience_is_asked_again_soon(tmp_path) -> None:
    begin = time.monotonic()
    busy = replying(b"{}", status=503, Retry_After="1000000000")
    with answering(busy) as url, pytest.raises(UserError):
        asyncio.run(_probe(Server(url, "m", retries=1, timeout=5.0), Prompt("a", [1])))
    assert time.monotonic() - begin < 60


def test_a_server_that_drips_its_answer_is_given_up(tmp_path) -> None:
    """A byte now and then resets the client's own clock; a request has one for the whole."""

    class Drip(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            with suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)

        def log_message(self, *_: object) -> None: ...

    begin = time.monotonic()
    with answering(Drip) as url, pytest.raises(UserError, match="took longer than"):
        asyncio.run(_probe(Server(url, "m", retries=0, timeout=0.3), Prompt("a", [1])))
    assert time.monotonic() - begin < 20
