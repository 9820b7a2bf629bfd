"""A hybrid target, with recurrent layers, through the commands, the server and `generate` of transformers."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.family_checks import stock_continuations
from ctc_drafter.chat import eos_ids
from ctc_drafter.cli import main
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.serve.server import make_engine
from ctc_drafter.serve.service import Limits, Service
from ctc_drafter.speculator import Speculator
from ctc_drafter.target.model import Target
from serve_helpers import NAME, plain_texts, running
from tiny_models import tiny_tokenizer

SIZES = {
    "vocab_size": 280,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3.5 with its tokenizer."""
    place = tmp_path_factory.mktemp("hybrid")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("qwen3_5_text", **SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.mark.slow
def test_from_prompts_to_a_drafter_in_three_commands(folder: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("CTC_DRAFTER_CACHE", str(tmp_path / "cache"))
    target, answers, drafter = ["--target", str(folder)], tmp_path / "answers", tmp_path / "drafter"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat {n}"}) + "\n" for n in range(12)))
    assert main(["distill", *target, "--prompts", str(prompts), "--out", str(answers), "--max-new-tokens", "16"]) == 0
    train = ["train", *target, "--data", str(answers), "--out", str(drafter), "--steps", "2", "--batch-size", "2"]
    train += ["--set", "progress=no", "--set", "warmup-steps=1", "--frames", "3", "--draft-length", "2"]
    assert main([*train, "--held-out", "0"]) == 0
    capfd.readouterr()
    generate = ["generate", *target, "--prompt", "the cat", "--max-new-tokens", "12"]
    shown = []
    for more in (["--plain"], ["--drafter", str(drafter)], ["--drafter", str(drafter), "--budget", "--nodes", "2"]):
        assert main([*generate, *more]) == 0
        shown.append(capfd.readouterr().out)
    assert len(set(shown)) == 1

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    tasks.joinpath("chat.jsonl").write_text('{"turns": ["the cat", "and?"]}\n{"turns": ["hat", "mat"]}\n')
    options = ["--tasks-path", str(tasks), "--tasks", "chat", "--max-new-tokens", "8", "--dtype", "float32"]
    both, out = [*target, "--drafter", str(drafter)], tmp_path / "out.json"
    assert main(["exactness", *both, *options, "--batch-size", "2", "--json", str(out)]) == 0
    assert {row["different"] for row in json.loads(out.read_text())["rows"]} == {0}
    bench = ["--drafter", f"ctc={drafter}", "--drafter", "prompt_lookup", "--nodes", "chain,8"]
    assert main(["bench", *target, *bench, *options, "--json", str(out)]) == 0
    assert all(row["identical"] == row["compared"] for row in json.loads(out.read_text())["rows"])


def hybrid(folder: Path) -> Target:
    return Target.load(str(folder))


def test_stock_generate_is_matched(folder: Path) -> None:
    model, tokenizer = hybrid(folder).model, tiny_tokenizer()
    fast = Speculator(model)
    inputs = tokenizer("the cat sat on the mat and the", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    assert torch.equal(fast.generate(**inputs, **options), expected)
    tokenizer.padding_side, tokenizer.pad_token = "left", "<|end|>"
    batch = tokenizer(["the cat sat", "hat"], padding=True, return_tensors="pt")
    rows = fast.generate(**batch, **options)
    for prompt, row in zip(("the cat sat", "hat"), rows, strict=True):
        ids = tokenizer(prompt).input_ids
        (alone,) = stock_continuations(model, [ids], 24)
        until = alone.index(1) + 1 if 1 in alone else len(alone)
        assert row.tolist()[batch.input_ids.shape[1] :][:until] == alone[:until]


@pytest.mark.slow
def test_the_server_answers_as_plain_decoding(folder: Path) -> None:
    target, tokenizer = hybrid(folder), tiny_tokenizer()
    engine = make_engine(target, PromptLookup(), 3, 8, nodes=8, min_probability=0.0)
    service = Service(engine, target, tokenizer, NAME, Limits())
    assert service.target.chain is not None
    prompts = ["the cat", "and the hat sat on the mat", "a"]
    assert eos_ids(target.model, tokenizer)
    with running(service) as server:
        client = server.client()
        for text in prompts:
            ids = tokenizer(text).input_ids
            reply = client.completions.create(model=NAME, prompt=text, max_tokens=16, temperature=0)
            assert [reply.choices[0].text] == plain_texts(service, ids, 16)
