"""Answers from a real server of this package, and from ones that behave worse."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ctc_drafter.chat import decode
from ctc_drafter.cli import main
from ctc_drafter.train import distill_server
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.distill import GREEDY, Distilled, Sampling, distill
from ctc_drafter.train.distill_server import Server, distill_remotely
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
