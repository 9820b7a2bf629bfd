"""The teacher loss: the target's probabilities at the right places, and what drafters make of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ctc_drafter.drafters.registry import trained_method
from ctc_drafter.drafters.trainable import AnchorBatch, LossOptions
from ctc_drafter.train.objective import label_anchors
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.types import UserError
from helpers import tiny_target
from train_helpers import settings, written_rows

LENGTH = 3
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8, 1, 0, 0, 0]])
LENGTHS = torch.tensor([10, 7])


def fresh(target, name: str):
    method = trained_method(name)
    torch.manual_seed(0)
    drafter = method.drafter.for_target(target.config, draft_length=LENGTH, **method.sizes)
    drafter.start_from(target.norm_scale, target.head)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return drafter


def lessons(name: str, logits: torch.Tensor, label: int, teacher: torch.Tensor) -> float:
    """What a token adds to the loss, term by term."""
    drafted = logits.softmax(-1).tolist()
    wanted = teacher.softmax(-1).tolist()
    if name == "dspark":
        apart = sum(abs(mine - theirs) for mine, theirs in zip(drafted, wanted, strict=True))
        return 0.9 * apart - 0.1 * float(logits.log_softmax(-1)[label])
    return -sum(p * float(log) for p, log in zip(wanted, logits.log_softmax(-1), strict=True))


@pytest.mark.parametrize("name", ["medusa", "hydra++", "dspark", "eagle"])
def test_each_token_is_compared_with_what_the_target_says_there(name: str) -> None:
    """Against the target's own logits, position by position; anchors near the end have fewer labels."""
    target = tiny_target()
    drafter = fresh(target, name)
    positions, used = torch.tensor([[1, 4, 8], [0, 5, 5]]), torch.tensor([[True] * 3, [True, True, False]])
    anchors = label_anchors(TOKENS, LENGTHS, positions, used, LENGTH)
    features, last = target.hidden_states(TOKENS, drafter.feature_layers)
    given = [AnchorBatch(features, TOKENS, anchors, LossOptions("teacher", 0.5, chunk), last) for chunk in (2, 128)]
    losses = [drafter(batch, target.embed, target.head).detach() for batch in given]
    torch.testing.assert_close(losses[0], losses[1])

    with torch.no_grad():
        said = target.model(TOKENS).logits
        blocks = drafter.draft_states(features, TOKENS, positions, target.embed)
        total = 0.0
        for row, column in used.nonzero().tolist():
            place, prefix = int(positions[row, column]), anchors.prefixes[row, column]
            block = blocks[row, column].unsqueeze(0)
            logits = list(drafter.known_logits(block, prefix.unsqueeze(0), target.embed, target.head))
            inside = range(min(LENGTH, int(LENGTHS[row]) - 1 - place))
            parts = [lessons(name, logits[u][0], int(prefix[1 + u]), said[row, place + u]) for u in inside]
            total += sum(0.5**u * part for u, part in enumerate(parts)) / sum(0.5**u for u in inside)
    assert float(losses[0]) == pytest.approx(total, rel=1e-3)


def test_states_after_an_anchor_begin_with_its_root() -> None:
    states = torch.arange(20.0).view(2, 10, 1)
    positions = torch.tensor([[0, 8], [3, 3]])
    anchors = label_anchors(TOKENS, LENGTHS, positions, torch.tensor([[True, True], [True, False]]), LENGTH)
    expected = [[0, 1, 2], [8, 9, 9], [13, 14, 15]]
    assert anchors.states_after(states).squeeze(-1).tolist() == expected


def test_a_perfect_drafter_has_nothing_to_learn_but_the_targets_doubt() -> None:
    target = tiny_target()
    drafter = fresh(target, "medusa")
    logits = torch.randn(4, 97)
    teacher, labels = logits.softmax(-1), torch.zeros(4, dtype=torch.long)
    entropy = -(teacher * teacher.log()).sum(-1)
    torch.testing.assert_close(drafter.teacher_score(logits, labels, teacher), -entropy)
    other = drafter.teacher_score(torch.randn(4, 97), labels, teacher)
    assert (other < -entropy).all()


def test_a_target_that_scales_its_logits_is_no_teacher(tmp_path: Path) -> None:
    target = tiny_target()
    rows = written_rows(target, 2)
    hook = target.model.register_forward_hook(lambda _m, _i, output: replace(output, logits=0.5 * output.logits))
    with pytest.raises(UserError, match="changes its logits behind the LM head; train with --loss prefix"):
        train_drafter(target, fresh(target, "medusa"), rows, None, tmp_path, settings(steps=1, loss="teacher"))
    hook.remove()
    done = train_drafter(target, fresh(target, "medusa"), rows, None, tmp_path, settings(steps=1, loss="teacher"))
    assert done.steps == 1
