"""Targets of the quickstart from a corpus of a few lines: they are made, answer, and are not made again."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from ctc_drafter.load import load_target
from ctc_drafter.quickstart import TARGET_DIR
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.types import UserError
from recipes.quickstart import pretrain, smaller_targets
from recipes.quickstart.pretrain import Phase, Shape

PHASES = (Phase("short", 64, steps=2, warmup=1, peak=1e-3, min_probability=1e-4), Phase("long", 128, 1, 0, 1e-4, 1e-5))


@pytest.fixture
def small_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    messages = [{"role": "user", "content": "who sat?"}, {"role": "assistant", "content": "the cat sat " * 40}]
    for split in ("train", "val"):
        with gzip.open(folder / f"cats.{split}.jsonl.gz", "wt") as out:
            out.writelines(json.dumps({"source": "cats", "messages": messages}) + "\n" for _ in range(40))
    for name in list(pretrain.MIX):
        monkeypatch.delitem(pretrain.MIX, name)
    monkeypatch.setitem(pretrain.MIX, "cats", 1.0)
    monkeypatch.setattr("recipes.quickstart.pretrain.TOKENS_PER_STEP", 256)
    monkeypatch.setattr(torch, "compile", lambda work: work)
    sample = DistilledDataset.load([smaller_targets.SAMPLE_DIR]).rows[:3]
    monkeypatch.setattr(smaller_targets.DistilledDataset, "load", lambda _: DistilledDataset(sample, None))
    return folder


@pytest.mark.slow
def test_a_smaller_target(small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, shape = tmp_path / "tiny", Shape(layers=1, width=64, inner=96, kv_heads=1)
    monkeypatch.setattr(smaller_targets, "ANSWER_TOKENS", 8)
    smaller_targets.make(small_corpus, work, shape, "tiny", PHASES)
    target, tokenizer = load_target(str(work / "target"), "float32", "cpu")
    its_tokenizer = load_target(str(TARGET_DIR), "float32", "cpu")[1]
    assert tokenizer.get_vocab() == its_tokenizer.get_vocab()
    assert (target.model.config.num_hidden_layers, target.model.config.hidden_size) == (1, 64)
    assert (work / "distilled" / "manifest.json").is_file()
    assert json.loads((work / "perplexity.json").read_text()).keys() == {"cats"}
    before = (work / "target" / "model.safetensors").stat().st_mtime_ns
    smaller_targets.make(small_corpus, work, shape, "tiny", PHASES)
    assert (work / "target" / "model.safetensors").stat().st_mtime_ns == before


def test_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the folder that holds the corpus files"):
        smaller_targets.make(tmp_path, tmp_path / "w", smaller_targets.SHAPES["tiny"], "tiny")


def test_sizes_are_as_said() -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from recipes.quickstart.pretrain import SHIPPED, target_config

    tokenizer = PreTrainedTokenizerFast.from_pretrained(TARGET_DIR)
    counts = {}
    for name, shape in {"shipped": SHIPPED, **smaller_targets.SHAPES}.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(target_config(tokenizer, shape))
        counts[name] = sum(weight.numel() for weight in model.parameters())
    assert [round(count / 1e6, 1) for count in counts.values()] == [14.6, 4.9, 1.4]
