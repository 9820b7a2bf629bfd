"""Muon beside AdamW: which weights each of them has, that both step, and that a resumed run goes on the same."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW, Muon

from ctc_drafter.train.optimizer import MuonAndAdamW, hidden_matrices, muon_and_adamw
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.types import UserError
from helpers import tiny_drafter, tiny_target
from train_helpers import settings, written_rows


def drafter(width: int = 32):
    target = tiny_target()
    return target, tiny_drafter(target, predictor_rank=32, predictor_width=width, carry=True, copies=4)


def test_matrices_between_hidden_states_are_muons():
    _, model = drafter()
    layer = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    sizes = dict(model.named_parameters())
    expected = {"fc", "carry", *(f"predictor.{part}" for part in ("previous", "last", "root", "inner"))}
    expected |= {f"layers.0.{part}" for part in layer}
    expected = {f"{name}.weight" for name in expected if min(sizes[f"{name}.weight"].shape) >= 32}
    found = hidden_matrices(model, (model.config.vocab_size, 0))
    assert found == expected
    assert {"fc.weight", "carry.weight", "predictor.last.weight"} <= found
    assert not found & {"predictor.table.weight", "predictor.output.weight", "blank_head.weight"}


def test_each_weight_is_in_one_group():
    _, model = drafter()
    both = muon_and_adamw(model, (97, 0), ["predictor.table.weight"], TrainSettings(learning_rate=0.01))
    ids = [id(weight) for group in both.param_groups for weight in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    assert [group["lr"] for group in both.param_groups] == [0.01, 0.01, pytest.approx(0.03)]
    assert [group["weight_decay"] for group in both.param_groups] == [0.01, 0.0, 0.01]


def test_it_steps_as_both_do_and_goes_on_from_its_state():
    torch.manual_seed(0)
    start = [torch.randn(32, 32), torch.randn(5)]
    mine, theirs, later = ([torch.nn.Parameter(each.clone()) for each in start] for _ in range(3))
    build = [(Muon([first], lr=0.1), AdamW([second], lr=0.1)) for first, second in (mine, theirs, later)]
    both, again = MuonAndAdamW(*build[0]), MuonAndAdamW(*build[2])
    for step in range(4):
        gradients = [torch.randn(32, 32), torch.randn(5)]
        for weights in (mine, theirs, later):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
        for group in both.param_groups:
            group["lr"] = 0.1 / (1 + step)
        for part in build[1]:
            for group in part.param_groups:
                group["lr"] = 0.1 / (1 + step)
            part.step()
        both.step()
        if step == 2:
            again.load_state_dict(copy.deepcopy(both.state_dict()))
            with torch.no_grad():
                for weight, source in zip(later, mine, strict=True):
                    weight.copy_(source)
        elif step == 3:
            for group in again.param_groups:
                group["lr"] = 0.025
            again.step()
    for one, other, third in zip(mine, theirs, later, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
    both.zero_grad()
    assert all(weight.grad is None for weight in mine)


def test_a_resumed_run_gives_the_same_weights(tmp_path: Path):
    target, _ = drafter()
    rows = written_rows(target, 6)
    options = {"optimizer": "muon", "batch_size": 2, "save_every": 2, "learning_rate": 0.003}
    _, whole = drafter()
    before = whole.fc.weight.detach().clone()
    train_drafter(target, whole, rows, None, tmp_path / "whole", settings(steps=4, **options))
    assert not torch.equal(whole.fc.weight, before)
    checkpoints = tmp_path / "whole" / "checkpoints"
    (tmp_path / "whole" / "model.safetensors").unlink()
    shutil.rmtree(checkpoints / "checkpoint-4")
    _, resumed = drafter()
    train_drafter(target, resumed, rows, None, tmp_path / "whole", settings(steps=4, **options))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    _, other = drafter()
    with pytest.raises(UserError, match="optimizer"):
        train_drafter(
            target, other, rows, None, tmp_path / "whole", settings(steps=4, **options | {"optimizer": "adamw"})
        )
