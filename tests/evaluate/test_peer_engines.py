"""llama.cpp and OpenVINO themselves: with the target's own weights they write what plain decoding writes."""

from functools import partial
from pathlib import Path

import pytest
import torch

from ctc_drafter.cli import main
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.evaluate.also import LLAMA_CPP, OPENVINO, also_contenders, located, parse_also
from ctc_drafter.evaluate.llama_cpp import MODES
from ctc_drafter.evaluate.methods import Decoding, steps_of
from ctc_drafter.files import CACHE, read_json
from ctc_drafter.target.gguf import converted
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from tiny_gguf import tiny_model, write_gguf

pytestmark = pytest.mark.peers
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1, 8, 2, 8, 1, 8, 2, 8]]
SAME = [LLAMA_CPP, *(f"{LLAMA_CPP}:{mode}" for mode in MODES), f"{OPENVINO}:f16", f"{OPENVINO}:f16:lookup"]
TOKENS = 24


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_gguf(tiny_model(request.param, tied=request.param == "qwen2"), folder / "tiny.gguf", quantised=False)
    return folder / "tiny.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("name", SAME)
def test_the_same_weights_write_plain_decodings_text(file: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 in llama.cpp, halves in OpenVINO; what these tiny models write is decided by more than rounding, but not
    by more than bfloat16, which OpenVINO computes in where the CPU has it."""
    if name.startswith(OPENVINO):
        genai = pytest.importorskip("openvino_genai")
        precise = partial(genai.LLMPipeline, INFERENCE_PRECISION_HINT="f32")
        monkeypatch.setattr(genai, "LLMPipeline", precise)
    target = Target.load(str(converted(file)))
    free = plain_generate(target, PROMPTS, max_new_tokens=TOKENS).tokens
    eos = frozenset({1, free[0][7], free[2][11]})
    wanted = plain_generate(target, PROMPTS, max_new_tokens=TOKENS, eos=eos).tokens
    assert len(wanted[0]) < TOKENS
    (contender,) = also_contenders(Decoding(target, eos, TOKENS), located(parse_also(name), str(file)))
    contender.prepare(3, 40)
    for prompts, tokens in ((PROMPTS[:1], wanted[:1]), (PROMPTS, wanted), (PROMPTS[2:], wanted[2:])):
        found = contender.run(prompts, False, None)
        assert found.tokens == tokens
        assert len(steps_of(found)) == len(prompts)
    assert contender.facts["weights"] == ("f16" if name.startswith(OPENVINO) else "f32")


CIRCLE = list(range(100, 106))


@pytest.mark.parametrize("name", [f"{LLAMA_CPP}:lookup", f"{OPENVINO}:f16:lookup"])
def test_lookup_drafts_what_repeats(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose tokens follow each other in a circle takes fewer steps than it writes tokens."""
    if name.startswith(OPENVINO):  # in bfloat16, on a CPU with AMX, OpenVINO 2026.4 divides by 0 for heads so small
        genai = pytest.importorskip("openvino_genai")
        monkeypatch.setattr(genai, "LLMPipeline", partial(genai.LLMPipeline, INFERENCE_PRECISION_HINT="f32"))
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        for token, following in zip(CIRCLE, CIRCLE[1:] + CIRCLE[:1], strict=True):
            model.lm_head.weight[following] = model.model.embed_tokens.weight[token]
    write_gguf(model, tmp_path / "circle.gguf", quantised=False)
    target = Target.load(str(converted(tmp_path / "circle.gguf")))
    decoding, prompt = Decoding(target, frozenset(), TOKENS), CIRCLE * 3
    (contender,) = also_contenders(decoding, located(parse_also(name), str(tmp_path / "circle.gguf")))
    found = contender.run([prompt], False, None)
    assert found.tokens == [CIRCLE * 4] == plain_generate(target, [prompt], max_new_tokens=TOKENS).tokens
    assert steps_of(found)[0] < TOKENS / 3


@pytest.mark.parametrize("name", [f"{LLAMA_CPP}:{kind}" for kind in ("bf16", "q8_0", "q4")])
def test_other_types_of_weights_are_read(file: Path, name: str) -> None:
    target = Target.load(str(converted(file)))
    (contender,) = also_contenders(Decoding(target, frozenset(), 4), located(parse_also(name), str(file)))
    assert [len(row) for row in contender.run(PROMPTS, False, None).tokens] == [4, 4, 4]
    assert contender.facts["weights"] == {"q4": "q4_0"}.get(name.partition(":")[2], name.partition(":")[2])


def test_what_openvino_does_not_read_is_one_line(file: Path) -> None:
    target = Target.load(str(converted(file)))
    (contender,) = also_contenders(Decoding(target, frozenset(), 4), located((OPENVINO,), str(file)))
    with pytest.raises(UserError, match=r"OpenVINO cannot load .*tiny.gguf: .*; give a GGUF file of"):
        contender.prepare(1, 8)


def test_bench_measures_them_beside_ours(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "the mat"}\n', encoding="utf-8")
    command = ["bench", "--target", str(file), "--drafter", "prompt_lookup", "--nodes", "8", "--tasks", "t"]
    command += ["--tasks-path", str(tmp_path), "--max-new-tokens", "8", "--json", str(tmp_path / "out.json")]
    assert main([*command, "--also", "llama.cpp,openvino:q8_0:lookup"]) == 0
    shown = capsys.readouterr().out
    result = read_json(tmp_path / "out.json")
    assert [result["meta"]["peers"][name]["weights"] for name in ("llama.cpp", "openvino:q8_0:lookup")] == [
        *("f32", "q8_0"),
    ]
    for row in result["rows"]:
        assert row["tokens_per_s"] > 0
        assert row["tokens"] == 16
        assert row["method"].partition(",")[0] in shown
    assert next(row for row in result["rows"] if row["method"] == "llama.cpp")["identical"] == 2
