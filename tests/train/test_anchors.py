"""Where a drafter learns, and what: anchors, labels, and a loss that does not depend on chunks or batches."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ctc_drafter.ctc.lattice import lattice
from ctc_drafter.ctc.loss import ctc_loss, ctc_objective
from ctc_drafter.drafters import block
from ctc_drafter.drafters.lm_head import usual_chunk
from ctc_drafter.drafters.trainable import AnchorBatch, LossOptions
from ctc_drafter.train.data import LengthSampler, collate
from ctc_drafter.train.objective import draw_anchors, label_anchors
from train_helpers import pair, written_rows


def test_draws_cover_the_answer_and_nothing_else() -> None:
    lengths, start, keys = torch.tensor([9, 6, 5]), torch.tensor([4, 5, 1]), torch.tensor([1, 2, 3])
    seen: list[set[int]] = [set(), set(), set()]
    for step in range(50):
        positions, used = draw_anchors(lengths, start, keys, 3, seed=f"0:{step}")
        assert used.tolist() == [[True] * 3, [True, False, False], [True] * 3]
        for row in range(3):
            drawn = positions[row][used[row]].tolist()
            assert len(set(drawn)) == len(drawn)
            seen[row] |= set(drawn)
    assert seen == [{3, 4, 5, 6, 7}, {4}, {0, 1, 2, 3}]


def test_draws_depend_on_seed_and_row_alone() -> None:
    lengths, start, keys = torch.tensor([60, 80]), torch.tensor([4, 5]), torch.tensor([1, 2])
    torch.manual_seed(0)
    both, _ = draw_anchors(lengths, start, keys, 6, seed="0:1")
    torch.manual_seed(1)
    alone, _ = draw_anchors(lengths[1:], start[1:], keys[1:], 6, seed="0:1")
    assert both[1].tolist() == alone[0].tolist()
    assert both.tolist() != draw_anchors(lengths, start, keys, 6, seed="0:2")[0].tolist()


def test_labels_end_with_the_text() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 0, 0]])
    positions, used = torch.tensor([[1, 3], [1, 0]]), torch.tensor([[True, True], [True, False]])
    anchors = label_anchors(tokens, torch.tensor([5, 3]), positions, used, draft_length=3)
    assert anchors.prefixes[0].tolist() == [[11, 12, 13, 14], [13, 14, 14, 14]]
    assert anchors.prefixes[1, 0].tolist()[:2] == [21, 22]
    yes, no = True, False
    assert anchors.valid.tolist() == [[[yes, yes, yes], [yes, no, no]], [[yes, no, no], [no, no, no]]]


@pytest.mark.parametrize("objective", ["prefix", "ctc"])
def test_chunks_change_neither_loss_nor_gradients(objective) -> None:
    target, drafter = pair()
    batch = collate([written_rows(target, 3)[i] for i in range(3)])
    positions, used = draw_anchors(batch["lengths"], batch["answer_start"], batch["key"], 5, seed="0")
    anchors = label_anchors(batch["input_ids"], batch["lengths"], positions, used, drafter.config.draft_length)
    features = target.hidden_features(batch["input_ids"], drafter.feature_layers)
    results = []
    for chunk in (100, 4, 1):
        drafter.zero_grad()
        given = AnchorBatch(features, batch["input_ids"], anchors, LossOptions(objective, 0.8, chunk))
        loss = drafter(given, target.embed, target.head)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in drafter.parameters() if p.grad is not None)])
    assert len(results[0]) == 1 + len(list(drafter.parameters()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


def test_ctc_takes_as_many_labels_as_the_frames_hold() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[1, 1, 2], [1, 2, 3], [1, 2, 1]])
    valid = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
    part = lattice(torch.randn(3, 3, 5), torch.randn(3, 3), labels, None)
    assert ctc_objective(part, labels, valid).tolist() == ctc_loss(part, labels, torch.tensor([2, 3, 2])).tolist()


def test_sampler_is_a_fixed_permutation_of_like_lengths() -> None:
    lengths = [i * 37 % 101 for i in range(103)]
    sampler = LengthSampler(lengths, batch_size=4, seed=0, window=32)
    first = list(sampler)
    assert sorted(first) == list(range(103)) == list(range(len(sampler)))
    assert first == list(sampler)
    spread = [max(b) - min(b) for at in range(0, 100, 4) if (b := [lengths[i] for i in first[at : at + 4]])]
    assert sum(spread) / len(spread) < 6
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_draft_layers_may_run_again_in_the_backward_pass() -> None:
    target, drafter = pair()
    batch = collate([written_rows(target, 2)[i] for i in range(2)])
    positions, used = draw_anchors(batch["lengths"], batch["answer_start"], batch["key"], 5, seed="0")
    anchors = label_anchors(batch["input_ids"], batch["lengths"], positions, used, drafter.config.draft_length)
    features = target.hidden_features(batch["input_ids"], drafter.feature_layers)
    given, kept, gradients = (features, batch["input_ids"], anchors), [], []
    for recompute in (False, True):
        drafter.zero_grad()
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            options = LossOptions("prefix", 0.8, 4, recompute=recompute)
            loss = drafter(AnchorBatch(*given, options), target.embed, target.head)
        loss.backward()
        kept.append(sum(saved))
        gradients.append([p.grad.clone() for p in drafter.parameters()])
    assert kept[1] < 0.5 * kept[0]
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


def test_long_rows_take_their_anchors_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = pair()
    rows, length, anchors = 2, 96, 48
    tokens = torch.randint(target.vocab_size, (rows, length))
    features = target.hidden_features(tokens, drafter.feature_layers)
    positions = torch.randint(length, (rows, anchors)).sort(1).values
    masks: list[int] = []
    real = block.block_mask

    def counting(*arguments: Any) -> torch.Tensor:
        masks.append(real(*arguments).numel())
        return real(*arguments)

    monkeypatch.setattr(block, "block_mask", counting)
    gradients, kept, found = [], [], []
    for budget in (2**26, 2**13):
        monkeypatch.setattr(block, "MASK_AT_A_TIME", budget)
        masks.clear()
        drafter.zero_grad()
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = drafter.draft_states(features, tokens, positions, target.embed)
        assert max(masks) <= budget
        outputs.square().sum().backward()
        found.append(outputs.detach())
        kept.append(sum(saved))
        gradients.append([p.grad.clone() for p in drafter.parameters() if p.grad is not None])
    assert len(masks) > 2 * 8  # several parts, forward and again
    assert kept[1] < 0.2 * kept[0]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("length", [64, 2048, 8192, 131072])
def test_masks_do_not_grow_with_anchors_and_length(rows: int, length: int) -> None:
    some = block.anchors_at_a_time(rows, length, 9)
    assert rows * some * 9 * (length + some * 9) <= block.MASK_AT_A_TIME
    assert rows * (some + 1) * 9 * (length + (some + 1) * 9) > block.MASK_AT_A_TIME
    assert some >= (32 if length <= 8192 else 6)


def test_the_usual_chunk_shrinks_with_the_vocabulary() -> None:
    assert (usual_chunk(8192, 7), usual_chunk(131072, 7), usual_chunk(10**9, 7)) == (512, 32, 1)


MEMORY = """
import torch
from dataclasses import replace
from torch import nn
from ctc_drafter.drafters.chunked import chunked_sum
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.lm_head import usual_chunk
from ctc_drafter.drafters.trainable import LossInputs, LossOptions
from helpers import tiny_config
from memory import peak_memory
torch.manual_seed(0)
V, H, N = 131072, 64, 512
config = tiny_config(vocab_size=V, hidden_size=H)
drafter = CTCDrafter.for_target(config, frames=8, draft_length=7).train()
embed, head = nn.Embedding(V, H).requires_grad_(False), nn.Linear(H, V, bias=False).requires_grad_(False)
for weight in drafter.parameters():
    weight.grad = torch.zeros_like(weight) + 1e-30  # touched, so that it is there already
before = peak_memory()
blocks, prefixes = torch.randn(N, 9, H, requires_grad=True), torch.randint(V, (N, 8))
inputs = LossInputs(blocks, prefixes, torch.ones(N, 7).bool())
size = usual_chunk(V, 7)
chunks = inputs.split(size)
part = lambda states, n: drafter.loss(replace(chunks[n], states=states), embed, head, LossOptions()).sum()
chunked_sum(part, blocks, size, drafter.parameters()).backward()
print((peak_memory() - before) / 1e9)
"""


@pytest.mark.slow
def test_the_loss_of_a_large_vocabulary_needs_less_than_two_gigabytes() -> None:
    here = Path(__file__).parent
    path = os.pathsep.join(
        [
            str(here),
            str(here.parent / "support"),
            str(here.parents[1]),
            str(here.parents[1] / "src"),
            os.environ.get("PYTHONPATH", ""),
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.1 < float(done.stdout) < 2.0
