"""Estimates against the thing itself: parameters and bytes of a real step, operations by formula."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from ctc_drafter.cli import main
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.registry import TRAINED, blank_drafter
from ctc_drafter.drafters.trainable import AnchorBatch, LossOptions
from ctc_drafter.train.estimate import (
    Answers,
    Estimate,
    PeakMemory,
    Plan,
    TextSize,
    distill_cost,
    duration,
    estimate,
    memory_errors,
    savings,
)
from ctc_drafter.train.objective import label_anchors
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.types import UserError
from helpers import tiny_config, tiny_target

ROWS, LENGTH, ANCHORS = 3, 40, 6
GEMMA = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 3, "sliding_window": 16, "intermediate_size": 96}
SIZES = {"vocab_size": 5000, "hidden_size": 64, "num_hidden_layers": 2}


def fresh(config) -> CTCDrafter:
    return CTCDrafter.for_target(config, frames=5, draft_length=4)


def plan(**overrides) -> Plan:
    settings = TrainSettings(**{"batch_size": ROWS, "anchors": ANCHORS, "anchor_chunk": 9, "epochs": 2, **overrides})
    return Plan(tiny_config(**SIZES), torch.float32, fresh, settings, TextSize(30, 30 * LENGTH, LENGTH))


@pytest.fixture(scope="module")
def found() -> Estimate:
    return estimate(plan())


def test_the_counter_counts_what_is_there() -> None:
    known = torch.ones(250)
    with PeakMemory([known]) as counter:
        first = known + 1  # 1000 bytes
        second = torch.cat([first, first])  # 2000
        view = second[:10]
        del first, second
        assert counter.now == 2000
        del view
        third = known * 2
    assert (counter.now, counter.peak, third.nbytes) == (1000, 3000, 1000)


def test_a_step_holds_what_a_real_one_holds(found: Estimate) -> None:
    target = tiny_target(**SIZES)
    drafter = fresh(target.config).train()
    tokens = torch.randint(5000, (ROWS, LENGTH))
    positions = torch.arange(5, 5 + ANCHORS).expand(ROWS, -1)
    features = target.hidden_features(tokens, drafter.feature_layers)
    target.model.requires_grad_(False)
    anchors = label_anchors(tokens, torch.full((ROWS,), LENGTH), positions, torch.ones_like(positions).bool(), 4)
    weights = [*target.model.parameters(), *drafter.parameters(), *drafter.buffers()]
    batch = AnchorBatch(features, tokens, anchors, LossOptions("prefix", 0.8, 9))
    with PeakMemory([*weights, features, tokens]) as counter:
        drafter(batch, target.embed, target.head).backward()
    assert found.step - features.nbytes == pytest.approx(counter.peak, rel=0.1)
    assert found.target_parameters == sum(weight.numel() for weight in target.model.parameters())
    assert found.drafter_parameters == sum(weight.numel() for weight in drafter.parameters())
    assert found.weights == 4 * found.target_parameters


def test_steps_and_operations(found: Estimate) -> None:
    assert found.steps == 30 // ROWS * 2
    assert found.features == 30 * LENGTH * 64 * 2 * 4
    # At least the target's matrices once; the frames' logits forward, again, and twice backward.
    target = 2 * ROWS * LENGTH * 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    logits = 2 * ROWS * ANCHORS * 5 * 64 * 5000
    assert target + 3 * logits < found.flops / found.steps < target + 14 * logits


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_chunks_of_anchors_are_counted_for_every_method(method: str) -> None:
    """A step in three chunks does the operations of a step in one; tied tables, which it works out thrice, are next."""
    loss = {"loss": TRAINED[method].training["loss"]} if "loss" in TRAINED[method].training else {}
    parts, whole = plan(anchor_chunk=6, **loss), plan(anchor_chunk=ROWS * ANCHORS, **loss)
    fresh = blank_drafter(method, **({"predictor_tied": False, "joint_tokens": 0} if method == "ctc" else {}))
    found, expected = (estimate(dataclasses.replace(each, fresh=fresh)) for each in (parts, whole))
    assert found.flops == expected.flops > 0


@pytest.mark.slow
def test_tied_tables_are_worked_out_in_every_chunk() -> None:
    """Forward and backward, of all 5,000 tokens: two times more in three chunks."""
    fresh = blank_drafter("ctc", predictor_rank=8, predictor_tied=True, joint_tokens=0)
    chunks = plan(anchor_chunk=6), plan(anchor_chunk=ROWS * ANCHORS)
    found, expected = (estimate(dataclasses.replace(each, fresh=fresh)) for each in chunks)
    assert found.flops - expected.flops == expected.steps * 2 * (2 * 2 * 5000 * 64 * 8)


@pytest.mark.slow
def test_every_saving_saves() -> None:
    """With more logits in a chunk than weights, whose gradients are held for each chunk."""
    large = {"anchors": 30, "anchor_chunk": 64}
    options = savings(plan(**large))
    assert [saved for _, saved in options] == sorted((saved for _, saved in options), reverse=True)
    assert {"--set anchor_chunk=32", "--dtype bfloat16"} <= {option for option, _ in options}
    smaller = estimate(plan(**large | {"anchor_chunk": 32}))
    assert dict(options)["--set anchor_chunk=32"] == estimate(plan(**large)).memory - smaller.memory > 0


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")])
def test_too_little_memory_names_what_helps(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctc_drafter.train.estimate.savings", lambda _: [("--batch-size 4", 2_500_000_000)])
    with pytest.raises(UserError, match=r"needs about 0\.\d+ GB; --batch-size 4 saves 2\.50 GB$"), memory_errors(plan):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), memory_errors(plan):
        raise RuntimeError("a bug")


@pytest.mark.slow
def test_what_a_distillation_costs() -> None:
    config = tiny_config(**SIZES, tie_word_embeddings=False)
    answers = Answers(prompts=10, prompt_tokens=30, new_tokens=20, rows=4)
    cost = distill_cost(config, torch.bfloat16, answers)
    target = tiny_target(**SIZES)
    matrices = sum(w.numel() for name, w in target.model.named_parameters() if w.ndim == 2 and "embed" not in name)
    head = 64 * 5000
    assert cost.writing_flops == 10 * 20 * 2 * matrices
    assert cost.reading_flops == 10 * 2 * (30 * (matrices - head) + head)
    weights = 2 * sum(w.numel() for w in target.model.parameters())
    cache = (30 + 10) * 2 * 2 * 2 * 16 * 2  # tokens, keys and values, layers, heads, their size, bytes
    assert cost.writing_bytes == 3 * 20 * weights + 10 * 20 * cache
    assert cost.hours(rate=1e9, bandwidth=1e30) == pytest.approx((cost.reading_flops + cost.writing_flops) / 1e9 / 3600)
    assert cost.hours(rate=1e30, bandwidth=1e9) == pytest.approx(cost.writing_bytes / 1e9 / 3600)
    sliding = AutoConfig.for_model("gemma3_text", **GEMMA)
    assert distill_cost(sliding, torch.bfloat16, answers).writing_bytes > 0


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tiny_models import save_pair

    target, _ = save_pair(tmp_path)
    (tmp_path / "p.txt").write_text("the cat\nthe hat\n")
    common = ["--target", str(target)]
    assert main(["distill", *common, "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "a")]) == 0
    capfd.readouterr()
    train = ["train", *common, "--data", str(tmp_path / "a"), "--out", str(tmp_path / "d"), "--held-out", "0"]
    assert main([*train, "--estimate", "--flops", "1e12", "--batch-size", "2", "--anchors", "4"]) == 0
    shown = capfd.readouterr().out
    assert "seconds at 1 TFLOP/s (given)" in shown
    assert "steps: 1" in shown
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_recomputing_keeps_less(found: Estimate) -> None:
    wide = dataclasses.replace(plan(), text=TextSize(3, 360, 120))
    more = wide.with_settings(anchors=60, anchor_chunk=60)
    assert estimate(more.with_settings(recompute=True)).step < estimate(more).step


@pytest.mark.parametrize(
    ("hours", "said"),
    [(1234.56, "1,234.6 hours"), (1.0, "1.0 hours"), (0.5, "30.0 minutes"), (0.01, "36 seconds"), (0.0, "0 seconds")],
)
def test_short_times_are_no_hours(hours: float, said: str) -> None:
    assert duration(hours) == said
