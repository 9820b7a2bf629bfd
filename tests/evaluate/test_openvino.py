"""OpenVINO as a method under test, against a stand-in for its package: what its pipeline is given, what is counted."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.evaluate import openvino
from ctc_drafter.evaluate.gguf_weights import Weights
from ctc_drafter.evaluate.methods import Contender, Decoding, steps_of
from ctc_drafter.types import UserError
from helpers import tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1]]
WEIGHTS = Weights(Path("tiny.gguf"), "f16", 32)


class Package(ModuleType):
    """`openvino_genai` whose pipelines answer with plain decoding of `target`, in bursts of `burst` tokens."""

    class StreamerBase:
        pass

    def __init__(self, target: Any):
        super().__init__("openvino_genai")
        self.__version__, self.target, self.burst = "3.4", target, 1
        self.SchedulerConfig = self.GenerationConfig = SimpleNamespace
        self.StreamingStatus = SimpleNamespace(RUNNING=0)
        self.made: list[Any] = []
        self.settings: list[Any] = []

    def TokenizedInputs(self, ids: Any, mask: Any) -> Any:
        return [row[kept == 1].tolist() for row, kept in zip(ids, mask, strict=True)]

    def LLMPipeline(self, file: str, device: str, **options: Any) -> Any:
        if file == "damaged.gguf":
            raise RuntimeError("Exception from /a/b.cpp:7:\nUnsupported quantization type\n\n")
        self.made.append((file, device, options))
        return SimpleNamespace(generate=self.generate)

    def generate(self, prompts: list[list[int]], settings: Any, streamer: Any = None) -> Any:
        self.settings.append(settings)
        eos = getattr(settings, "stop_token_ids", set())
        rows = plain_generate(self.target, prompts, max_new_tokens=settings.max_new_tokens, eos=eos).tokens
        if streamer is not None:
            streamer.write(rows[0][0])  # the prefill's alone
            for start in range(1, len(rows[0]), self.burst):
                assert streamer.write(rows[0][start : start + self.burst]) == 0
            streamer.end()
        return SimpleNamespace(tokens=rows)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    found: Any = Package(tiny_target())
    tensors: Any = ModuleType("openvino")
    tensors.Tensor = lambda array: array
    monkeypatch.setitem(sys.modules, "openvino_genai", found)
    monkeypatch.setitem(sys.modules, "openvino", tensors)
    return found


def contender(package: Any, mode: str | None = None, eos: frozenset[int] = frozenset()) -> Contender:
    return openvino.contender(Decoding(package.target, eos, 13), "openvino", WEIGHTS, mode)


def test_answers_are_the_pipelines(package: Any) -> None:
    free = plain_generate(package.target, PROMPTS, max_new_tokens=13).tokens
    eos = frozenset({free[0][3], free[2][5]})
    wanted = plain_generate(package.target, PROMPTS, max_new_tokens=13, eos=eos).tokens
    assert len({len(row) for row in wanted}) > 1
    found = contender(package, eos=eos)
    for prompts, tokens in ((PROMPTS, wanted), (PROMPTS[:1], wanted[:1])):
        generation = found.run(prompts, False, None)
        assert generation.tokens == tokens
        assert generation.accepted == [[0] * (len(row) - 1) for row in tokens]
    assert package.settings[0].stop_token_ids == set(eos)
    assert package.settings[0].eos_token_id in eos


def test_one_pipeline_that_keeps_no_prompts(package: Any) -> None:
    found = contender(package)
    assert not package.made
    found.prepare(2, 30)
    found.run(PROMPTS[:1], False, None)
    ((file, device, options),) = package.made
    assert (file, device) == ("tiny.gguf", "CPU")
    assert options.keys() == {"scheduler_config", "INFERENCE_NUM_THREADS"}
    assert options["INFERENCE_NUM_THREADS"] == torch.get_num_threads()
    assert options["scheduler_config"].enable_prefix_caching is False
    (settings,) = package.settings
    assert vars(settings) == {"max_new_tokens": 13, "do_sample": False, "ignore_eos": True}


def test_lookup_counts_what_comes_at_a_time(package: Any) -> None:
    package.burst = 5  # 1, 5, 5 and 2 tokens
    found = contender(package, "lookup")
    generation = found.run(PROMPTS[:1], False, None)
    assert generation.accepted == [[4, 4, 1]]
    assert steps_of(generation) == [3]
    assert package.made[0][2]["prompt_lookup"] is True
    settings = package.settings[0]
    assert (settings.num_assistant_tokens, settings.max_ngram_size) == (10, 2)
    several = found.run(PROMPTS, False, None)  # whose steps it does not tell
    assert (several.accepted, steps_of(several)) == ([[]] * 3, [0] * 3)
    assert several.tokens == plain_generate(package.target, PROMPTS, max_new_tokens=13).tokens


def test_facts_name_version_and_weights(package: Any) -> None:
    assert contender(package).facts == {"engine": "openvino-genai 3.4", "weights": "f16"}


def test_what_it_cannot_read_is_one_line(package: Any) -> None:
    damaged = Weights(Path("damaged.gguf"), "q5_0", 32)
    found = openvino.contender(Decoding(package.target, frozenset(), 4), "openvino", damaged, None)
    with pytest.raises(UserError, match=r"OpenVINO cannot load damaged.gguf: Unsupported quantization type; give"):
        found.prepare(1, 8)
