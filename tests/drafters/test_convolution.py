"""The dynamic convolution of a block: its sums by hand, its start, and that blocks do not see each other."""

import pytest
import torch

from ctc_drafter.drafters.convolution import DynamicConvolution
from ctc_drafter.drafters.registry import open_drafter
from helpers import tiny_drafter, tiny_target

ROW = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def random(width: int) -> DynamicConvolution:
    torch.manual_seed(0)
    found = DynamicConvolution(width)
    with torch.no_grad():
        found.base.normal_()
        found.correction.normal_()
    return found


def test_it_starts_as_the_identity():
    states = torch.randn(2, 6, 32)
    assert torch.equal(DynamicConvolution(32)(states, 3), states)


@pytest.mark.parametrize("width", [32, 24, 5])  # groups of 16, 8 and 1
@torch.no_grad()
def test_each_place_is_a_sum_of_two(width):
    """out_t = k0_t x_t + k1_t x_{t-1}, channel by channel; nothing comes before a block's first place."""
    mix, states, size = random(width), torch.randn(2, 6, width), 3
    found = mix(states, size)
    share = width // mix.groups
    for row in range(2):
        for place in range(6):
            change = (mix.correction @ states[row, place]).tolist()
            for channel in range(width):
                now = 1 + float(mix.base[0, channel]) + change[channel // share]
                before = float(mix.base[1, channel]) + change[mix.groups + channel // share]
                earlier = float(states[row, place - 1, channel]) if place % size else 0.0
                expected = now * float(states[row, place, channel]) + before * earlier
                assert float(found[row, place, channel]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_a_fresh_drafter_drafts_the_same_with_and_without():
    target = tiny_target()
    torch.manual_seed(0)
    without = tiny_drafter(target)
    with_it = tiny_drafter(target, convolution=True)
    assert not with_it.load_state_dict(without.state_dict(), strict=False).unexpected_keys
    features = target.hidden_features(ROW, without.feature_layers)
    given = (features, ROW, torch.tensor([[2, 4]]), target.embed)
    torch.testing.assert_close(with_it.draft_states(*given), without.draft_states(*given))


@torch.no_grad()
def test_training_and_decoding_agree(tmp_path):
    """Block outputs of many anchors at once, with trained kernels, are those of a session at each; also when loaded."""
    target = tiny_target()
    drafter = tiny_drafter(target, convolution=True)
    for layer in drafter.draft_layers:
        for mix in layer.convolutions:
            mix.base.normal_(std=0.3)
            mix.correction.normal_(std=0.3)
    drafter.save_pretrained(tmp_path)
    loaded = open_drafter(str(tmp_path))
    features = target.hidden_features(ROW, drafter.feature_layers)
    found = drafter.draft_states(features, ROW, torch.tensor([[2, 4]]), target.embed)
    for column, anchor in enumerate((2, 4)):
        session = loaded.begin(target.embed, target.head, 1)
        session.extend(ROW[:, :anchor], features[:, :anchor], torch.tensor([anchor]))
        session.catch_up()
        torch.testing.assert_close(session.draft_states(ROW[:, anchor]), found[:, column], atol=1e-4, rtol=1e-4)
