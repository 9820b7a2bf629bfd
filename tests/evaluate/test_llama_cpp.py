"""llama.cpp as a method under test, against a stand-in for its binding: what its server is asked, what is counted."""

import json
import sys
import threading
from enum import IntEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ctc_drafter.cli import main
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.evaluate import llama_cpp
from ctc_drafter.evaluate.gguf_weights import Weights
from ctc_drafter.evaluate.methods import Contender, Decoding, steps_of
from ctc_drafter.types import UserError
from helpers import tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1]]
WEIGHTS = Weights(Path("tiny.gguf"), "f32", 32)
KINDS = IntEnum("KINDS", [f"COMMON_SPECULATIVE_TYPE_{name}" for name in ("NGRAM_SIMPLE", "NGRAM_MAP_K4V")])


class Binding(ModuleType):
    """`xllamacpp` whose servers answer over HTTP with plain decoding of `target`."""

    def __init__(self, target: Any):
        super().__init__("xllamacpp")
        self.__version__, self.common_speculative_type = "1.2", KINDS
        self.target, self.started, self.asked, self.accepted = target, [], [], None

    def get_system_info(self) -> str:
        return "CPU : SSE3 = 1 | AVX2 = 1 | "

    def CommonParams(self) -> Any:
        parts = {name: SimpleNamespace() for name in ("model", "cpuparams", "cpuparams_batch")}
        return SimpleNamespace(**parts, speculative=SimpleNamespace(types=[], ngram_simple=SimpleNamespace()))

    def Server(self, parameters: Any) -> Any:
        if parameters.model.path == "damaged.gguf":
            raise RuntimeError("Failed to init server, please check the input params.")
        self.started.append(parameters)
        binding = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = binding.answer(self.path, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_: object) -> None:
                """Nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.servers.append(server)
        return SimpleNamespace(listening_address=f"http://127.0.0.1:{server.server_address[1]}")

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        assert path == "/completion"
        self.asked.append(body)
        several = isinstance(body["prompt"][0], list)
        prompts = body["prompt"] if several else [body["prompt"]]
        if max(map(len, prompts)) > 40:
            return 400, {"error": {"message": "exceeds the available context size"}}
        tokens = plain_generate(self.target, prompts, max_new_tokens=body["n_predict"]).tokens
        found = [{"index": index, "tokens": row} for index, row in enumerate(tokens)]
        for each in found if self.accepted is not None else ():
            each["timings/draft_n_accepted"] = self.accepted
        return 200, found[::-1] if several else found[0]


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> Any:
    found: Any = Binding(tiny_target())
    found.servers = []
    monkeypatch.setitem(sys.modules, "xllamacpp", found)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing goes there
    yield found
    for server in found.servers:
        server.shutdown()
        server.server_close()


def contender(binding: Any, mode: str | None = None, eos: frozenset[int] = frozenset(), tokens: int = 12) -> Contender:
    return llama_cpp.contender(Decoding(binding.target, eos, tokens), "llama.cpp", WEIGHTS, mode)


def test_answers_are_the_servers_up_to_our_ends(binding: Any) -> None:
    free = plain_generate(binding.target, PROMPTS, max_new_tokens=12).tokens
    eos = frozenset({free[0][3], free[2][5]})
    wanted = plain_generate(binding.target, PROMPTS, max_new_tokens=12, eos=eos).tokens
    assert len({len(row) for row in wanted}) > 1
    found = contender(binding, eos=eos)
    for prompts, tokens in ((PROMPTS, wanted), (PROMPTS[:1], wanted[:1])):
        generation = found.run(prompts, False, None)
        assert generation.tokens == tokens
        assert generation.accepted == [[0] * (len(row) - 1) for row in tokens]
        assert steps_of(generation) == [len(row) - 1 for row in tokens]


def test_what_the_server_is_asked(binding: Any) -> None:
    contender(binding, tokens=7).run(PROMPTS[:1], False, None)
    (body,) = binding.asked
    assert body["prompt"] == PROMPTS[0]
    assert (body["n_predict"], body["temperature"], body["samplers"]) == (7, 0.0, ["temperature"])
    assert (body["cache_prompt"], body["return_tokens"]) == (False, True)


def test_one_server_with_room_and_threads(binding: Any) -> None:
    found = contender(binding)
    assert not binding.started
    found.prepare(2, 30)
    found.run(PROMPTS[:2], False, None)
    found.run(PROMPTS[:1], False, None)
    (parameters,) = binding.started
    assert parameters.model.path == "tiny.gguf"
    assert parameters.n_parallel == 2
    assert parameters.n_ctx >= 2 * 30
    threads = parameters.cpuparams.n_threads, parameters.cpuparams_batch.n_threads
    assert threads == (torch.get_num_threads(),) * 2
    assert (parameters.cache_prompt, parameters.cache_ram_mib) == (False, 0)
    assert parameters.speculative.types == []
    found.run(PROMPTS, False, None)  # more rows than it was started for
    assert [each.n_parallel for each in binding.started] == [2, 3]


def test_modes_are_llama_cpps(binding: Any) -> None:
    for mode, kind, settings in (
        ("lookup", "NGRAM_SIMPLE", {"size_n": 2, "size_m": 10}),
        ("ngram-simple", "NGRAM_SIMPLE", {}),
        ("ngram-map-k4v", "NGRAM_MAP_K4V", {}),
    ):
        contender(binding, mode).prepare(1, 20)
        speculative = binding.started[-1].speculative
        assert speculative.types == [KINDS[f"COMMON_SPECULATIVE_TYPE_{kind}"]]
        assert vars(speculative.ngram_simple) == settings


def test_steps_of_a_mode_are_tokens_less_what_was_accepted(binding: Any) -> None:
    for accepted, steps in ((None, 11), (4, 7)):
        binding.accepted = accepted
        generation = contender(binding, "lookup").run(PROMPTS[:1], False, None)
        assert (generation.accepted, steps_of(generation)) == ([[]], [steps])
        assert generation.stats.tokens == 12


def test_facts_name_version_weights_and_instructions(binding: Any) -> None:
    assert contender(binding).facts == {"engine": "xllamacpp 1.2", "weights": "f32", "built_for": "SSE3 AVX2"}


def test_what_it_refuses_is_one_line(binding: Any) -> None:
    with pytest.raises(UserError, match=r"llama.cpp refuses a prompt: .*exceeds the available context size"):
        contender(binding).run([[1] * 41], False, None)
    damaged = Weights(Path("damaged.gguf"), "f32", 32)
    with pytest.raises(UserError, match=r"llama.cpp cannot load damaged.gguf; give a GGUF file that it reads"):
        llama_cpp.contender(Decoding(binding.target, frozenset(), 4), "llama.cpp", damaged, None).prepare(1, 8)


@pytest.mark.parametrize(("name", "package"), [("llama.cpp", "xllamacpp"), ("openvino", "openvino-genai")])
def test_a_missing_engine_is_one_line(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "the cat"}\n', encoding="utf-8")
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    command = ["bench", "--target", "tiny", "--also", name, "--tasks", "t", "--tasks-path", str(tmp_path)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"needs {package}; pip install 'ctc-drafter[peers]'" in error
