"""Weights to start from are taken over whole, from our checkpoints and from others' formats."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ctc_drafter.cli import main
from ctc_drafter.drafters.baselines.dflash import DFlashDrafter
from ctc_drafter.drafters.registry import fresh_drafter
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.drafters.warm_start import read_start
from ctc_drafter.load import load_drafter
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from tiny_models import save_pair, tiny_llama, tiny_tokenizer
from train_helpers import write_jsonl

VOCABULARY, WIDTH = 280, 64
SAVED = {"architectures": None, "transformers_version": None, "dtype": None}  # what saving adds to a config
ROPE = {"rope_theta": 5000.0}


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.wrap(tiny_llama())


def tensors(drafter: TrainableDrafter) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in drafter.state_dict().items()}


def begun(target: Target, name: Path, method: str, **sizes: Any) -> TrainableDrafter:
    """As `train --init` makes it."""
    start = read_start(str(name))
    drafter = fresh_drafter(target, tiny_tokenizer(), 5, method, **start.sizes(method) | sizes)
    start.give_to(drafter)
    return drafter


def write_dflash(folder: Path, target: Target, **config: Any) -> DFlashDrafter:
    """A checkpoint as DFlash's authors lay it out, with a target layer and sizes that are nobody's default."""
    torch.manual_seed(3)
    sizes = {"draft_length": 5, "num_hidden_layers": 2, "num_key_value_heads": 4, "target_layer_ids": [1]}
    drafter = DFlashDrafter.for_target(target.config, mask_token_id=7, **ROPE, **sizes)
    folder.mkdir()
    save_file(tensors(drafter), folder / "model.safetensors")
    theirs = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": 6,
        "dflash_config": {"mask_token_id": 7, "target_layer_ids": [1]},
        "num_target_layers": 2,
        "hidden_size": WIDTH,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        **ROPE,
    }
    (folder / "config.json").write_text(json.dumps(theirs | config))
    return drafter.eval()


class ResBlock(nn.Module):
    """As the Medusa paper has it: x + SiLU(W x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + nn.functional.silu(self.linear(states))


def write_medusa(folder: Path, ending: str, heads: int = 3) -> nn.ModuleList:
    torch.manual_seed(4)
    made = nn.ModuleList(
        nn.Sequential(ResBlock(), ResBlock(), nn.Linear(WIDTH, VOCABULARY, bias=False)) for _ in range(heads)
    )
    folder.mkdir()
    if ending == "pt":
        torch.save(made.state_dict(), folder / "medusa_lm_head.pt")
    else:
        save_file(made.state_dict(), folder / "medusa_lm_head.safetensors")
    # Published ones say 2, whatever they hold.
    about = {"medusa_num_heads": 2, "medusa_num_layers": 2, "base_model_name_or_path": "some/vicuna"}
    (folder / "config.json").write_text(json.dumps(about))
    return made.requires_grad_(False)


def test_our_own_checkpoint(target: Target, tmp_path: Path) -> None:
    sizes = {"frames": 4, "draft_length": 3, "predictor_rank": 8, "predictor_width": 16, "draft_vocab_size": 50}
    first = fresh_drafter(target, tiny_tokenizer(), 1, **sizes)
    first.draft_only(torch.arange(0, 100, 2))
    first.save_pretrained(tmp_path)
    again = begun(target, tmp_path, "ctc")
    assert again.config.to_diff_dict() | SAVED == first.config.to_diff_dict() | SAVED
    expected = tensors(first)
    assert tensors(again).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(again).items())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["predictor_tied"]  # as folders from before there was a choice
    tables = fresh_drafter(target, tiny_tokenizer(), 1, **sizes, predictor_tied=False)
    tables.draft_only(torch.arange(0, 100, 2))
    tables.save_pretrained(tmp_path / "older")
    (tmp_path / "older" / "config.json").write_text(json.dumps(config))
    assert not begun(target, tmp_path / "older", "ctc").config.predictor_tied
    with pytest.raises(
        UserError, match=r"predictor\.\S+ is .* in this drafter; leave out options that change its size"
    ):
        begun(target, tmp_path, "ctc", predictor_rank=4)
    with pytest.raises(UserError, match="target with layer count 2, this one has 3"):
        begun(Target.wrap(tiny_llama(layers=3)), tmp_path, "ctc")


@pytest.mark.parametrize("method", ["ctc", "dflash"])
def test_a_dflash_checkpoint(method: str, target: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = write_dflash(tmp_path / "theirs", target)
    with caplog.at_level("INFO"):
        drafter = begun(target, tmp_path / "theirs", method).eval()
    assert ("fresh: blank_head, joint, predictor; not used: none" in caplog.text) == (method == "ctc")
    tokens = torch.randint(VOCABULARY, (1, 20))
    features = target.hidden_features(tokens, drafter.feature_layers)
    anchors = torch.tensor([[4, 11]])
    # Frames behind the first 5 are not theirs, and change them: as many are asked for.
    drafter = begun(
        target, tmp_path / "theirs", method, **({"frames": 5, "draft_length": 4} if method == "ctc" else {})
    )
    with torch.no_grad():
        found, expected = (
            each.draft_states(features, tokens, anchors, target.embed) for each in (drafter.eval(), theirs)
        )
    assert torch.equal(found, expected)


def test_a_dflash_checkpoint_drafts(target: Target, tmp_path: Path) -> None:
    write_dflash(tmp_path / "theirs", target)
    drafter = load_drafter(str(tmp_path / "theirs"), target, tiny_tokenizer())
    assert isinstance(drafter, DFlashDrafter)
    assert (drafter.config.draft_length, drafter.config.mask_token_id) == (5, 7)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"block_size": None}, "config.json is not DFlash's"),
        ({"dflash_config": {"target_layer_ids": [1]}}, "mask_token_id is missing"),
        ({"hidden_size": 32}, "hidden size 32"),
        ({"intermediate_size": 100}, r"layers\.0\.mlp\.\S+ is .* in this drafter"),
    ],
)
def test_dflash_configs_that_do_not_fit(target: Target, tmp_path: Path, config: dict, said: str) -> None:
    write_dflash(tmp_path / "theirs", target, **config)
    with pytest.raises(UserError, match=said):
        begun(target, tmp_path / "theirs", "ctc")


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_published_medusa_heads(ending: str, target: Target, tmp_path: Path, capfd) -> None:
    heads = write_medusa(tmp_path / "heads", ending)
    drafter = load_drafter(str(tmp_path / "heads"), target, tiny_tokenizer())
    assert isinstance(drafter, TrainableDrafter)
    assert drafter.config.draft_length == 3
    tokens = torch.randint(VOCABULARY, (1, 12))
    features, last = target.hidden_states(tokens, drafter.feature_layers)
    with torch.no_grad():
        blocks = drafter.draft_states(features, tokens, torch.tensor([[7]]), target.embed)[0]
        step = drafter.steps(blocks, target.embed, drafter.outputs(target.head))
        for place, head in enumerate(heads):
            found = step(torch.zeros(1, 1, place + 1, dtype=torch.long), None)[0, 0]
            torch.testing.assert_close(found, head(last[0, 6]).float(), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_started_from(target: Target, tmp_path: Path) -> None:
    write_medusa(tmp_path / "heads", "pt")
    with pytest.raises(UserError, match="no weights that this drafter could start from; use --method medusa"):
        begun(target, tmp_path / "heads", "dflash")
    (tmp_path / "heads" / "medusa_lm_head.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"cannot be read .*download them again"):
        read_start(str(tmp_path / "heads"))
    (tmp_path / "heads" / "medusa_lm_head.pt").unlink()
    with pytest.raises(UserError, match=r"has no medusa_lm_head\.safetensors or medusa_lm_head\.pt"):
        read_start(str(tmp_path / "heads"))
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="holds no drafter to start from"):
        read_start(str(tmp_path / "model"))
    with pytest.raises(UserError, match="no drafter could be loaded from"):
        read_start(str(tmp_path / "nowhere"))


def test_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, first = save_pair(tmp_path)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"the cat {number} sat"} for number in range(4)])
    common, answers = ["--target", str(model)], str(tmp_path / "answers")
    distill = ["distill", *common, "--prompts", str(prompts), "--max-new-tokens", "12", "--out", answers]
    assert main(distill) == 0
    out = tmp_path / "out"
    train = ["train", *common, "--data", answers, "--out", str(out), "--held-out", "0", "--set", "progress=no"]
    few = ["--steps", "1", "--learning-rate", "1e-9"]
    assert main([*train, *few, "--init", str(first)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["frames"], config["predictor_rank"]) == (4, 8)
    expected, found = read_start(str(first)).weights, read_start(str(out)).weights
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=1e-6)
    sizes = ["--frames", "4", "--draft-length", "3", "--predictor-rank", "8"]
    assert main([*train, *few, *sizes]) == 2
    assert "holds another run" in capfd.readouterr().err
