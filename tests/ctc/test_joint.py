"""Joint terms of frame and prefix: by brute force in the lattice, and in both searches."""

import pytest
import torch

from ctc_drafter.ctc.joint import JointOfPrefixes, JointTerms
from ctc_drafter.ctc.kernels_cpu import bfloat16_bits
from ctc_drafter.ctc.lattice import lattice
from ctc_drafter.ctc.loss import prefix_log_probs
from ctc_drafter.ctc.search import prefix_search
from ctc_drafter.ctc.search_cpu import FrameTerms, LowRankBias, best_prefixes
from helpers import paths

N, F, U, V, K = 3, 4, 3, 5, 2


def example(dtype=torch.float64, seed=0, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    shapes = (N, F, V), (N, F), (N, U + 1, V), (N, U + 1, F, K)
    frames, blanks, bias, values = (
        (scale * torch.randn(*s, generator=generator, dtype=torch.float64)).to(dtype) for s in shapes
    )
    columns = torch.rand(N, F, V, generator=generator).argsort(-1)[..., :K]
    labels = torch.tensor([[1, 1, 4], [0, 3, 3], [2, 0, 2]])
    return frames, blanks, labels, bias, JointTerms(columns, values)


def dense(frames, blanks, labels, bias, terms):
    """[N, U+1, F, V+1] log-probabilities, which the lattice never makes."""
    tokens = frames[:, None] + bias[:, :, None]
    where = terms.columns[:, None].expand(-1, U + 1, -1, -1)
    tokens = tokens.scatter_add(3, where, terms.values)
    return torch.cat([tokens, blanks[:, None, :, None].expand(-1, U + 1, -1, -1)], -1).log_softmax(-1)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_equals_dense_softmax(dtype, error, scale):
    given = example(dtype, scale=scale)
    others = torch.tensor([[[0, 1], [2, 3], [4, 0]]]).expand(N, -1, -1)
    found = lattice(*given[:4], others, given[4])
    probs = dense(
        *(each.double() for each in given[:2]),
        given[2],
        given[3].double(),
        JointTerms(given[4].columns, given[4].values.double()),
    )
    at = given[2][:, :, None, None].expand(-1, -1, F, 1)
    for ours, reference in (
        (found.emit, probs[:, :-1].gather(3, at)[..., 0]),
        (found.stay[:, 1:], probs[:, 1:].gather(3, at)[..., 0]),
        (found.blank, probs[..., -1]),
        (found.others, probs[:, :-1].gather(3, others[:, :, None].expand(-1, -1, F, -1)).transpose(2, 3)),
    ):
        torch.testing.assert_close(ours.double().exp(), reference.exp(), rtol=0, atol=error)


def test_gradcheck():
    frames, blanks, labels, bias, terms = example()

    def parts(frames, blanks, bias, values):
        found = lattice(frames, blanks, labels, bias, None, JointTerms(terms.columns, values))
        return found.emit, found.stay[:, 1:], found.blank

    assert torch.autograd.gradcheck(parts, [each.requires_grad_() for each in (frames, blanks, bias, terms.values)])


@pytest.mark.parametrize("value", [-60.0, 60.0])
def test_terms_of_all_that_a_frame_can_hold_stay_finite(value):
    """Very negative terms of nearly all mass take away more than rounding leaves."""
    frames, blanks, labels, bias, terms = example(torch.float32)
    frames.scatter_(2, terms.columns, 30.0)
    values = torch.full_like(terms.values, value).requires_grad_()
    found = lattice(frames, blanks, labels, bias, None, JointTerms(terms.columns, values))
    (found.emit.clamp(min=-1e3).sum() + found.blank.sum()).backward()
    assert (found.emit <= 1e-5).all()
    assert values.grad.isfinite().all()


def problem(seed=0, scale=1.0, rank=2, width=3, count=K, size=4):
    """Frames, blanks, root, tables of a bias, root states, and joint terms with what they are made of."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return scale * torch.randn(*shape, generator=generator)

    frames, blanks, root = normal(N, F, size), normal(N, F), torch.tensor([2, 0, 1])
    tables = [normal(size, rank), normal(size, width), normal(size, width), normal(rank, width), torch.ones(rank)]
    first, earlier, later, *rest = (t.bfloat16().float() for t in tables)
    rest = [t.numpy() for t in (*rest, (2 * normal(rank, size)).to(torch.int8))]
    bias = LowRankBias(first.numpy(), bfloat16_bits(earlier), bfloat16_bits(later), *rest)
    columns = frames.topk(count).indices
    terms = FrameTerms(*(t.numpy() for t in (columns, normal(N, F, count, 5), normal(N, F, 5), normal(5, width))))
    return frames, blanks, root, bias, normal(N, width), terms


def functions(row_bias, states, terms):
    """The bias and the terms after prefixes, as the level-by-level search asks for them."""
    table, inner, scale, output = (torch.from_numpy(row_bias[i]).float() for i in (0, 3, 4, 5))
    earlier, later = (torch.from_numpy(row_bias[i]).view(torch.bfloat16).float() for i in (1, 2))
    columns, tokens, frames, prefix = map(torch.from_numpy, terms)

    def hidden(recent):
        mixed = later[recent[..., 0]] + states.unsqueeze(1)
        mixed = mixed + earlier[recent[..., 1].clamp(min=0)] * (recent[..., 1:2] >= 0)
        return torch.nn.functional.silu(mixed)

    def bias(recent):
        return (scale * (table[recent[..., 0]] + hidden(recent) @ inner.T)) @ output

    def values(recent):
        mixed = torch.nn.functional.silu(frames.unsqueeze(1) + (hidden(recent) @ prefix.T).unsqueeze(2))
        return torch.einsum("bwfj,bfkj->bwfk", mixed, tokens)

    return bias, JointOfPrefixes(columns, values)


@pytest.mark.parametrize("seed", range(3))
def test_both_searches_give_the_lattice_s_prefix_probabilities(seed):
    frames, blanks, root, bias, states, terms = problem(seed)
    made, joint = functions(bias, states, terms)
    levels = prefix_search(frames, blanks, root, made, width=64, depth=3, joint=joint)
    first = best_prefixes(frames, blanks, root, bias, states, count=40, depth=3, joint=terms)
    for row in range(N):
        whole, best = paths(levels, row), paths(first, row)
        assert list(best.values()) == pytest.approx(sorted(whole.values(), reverse=True)[: len(best)], abs=1e-5)
        for prefix, probability in best.items():
            assert probability == pytest.approx(whole[prefix], abs=1e-5)
        for prefix, probability in whole.items():
            labels = torch.tensor([prefix])
            recents = [[root[row].item(), -1]]
            for token in prefix:
                recents.append([token, recents[-1][0]])
            recent = torch.tensor([recents]).expand(N, -1, -1)
            of_row = JointTerms(joint.columns[row : row + 1], joint.values(recent)[row : row + 1])
            found = lattice(
                frames[row : row + 1], blanks[row : row + 1], labels, made(recent)[row : row + 1], None, of_row
            )
            assert prefix_log_probs(found, labels)[0, -1].exp().item() == pytest.approx(probability, abs=1e-5)


def test_terms_of_nothing_change_nothing():
    frames, blanks, root, bias, states, terms = problem(4)
    without = best_prefixes(frames, blanks, root, bias, states, count=20, depth=3)
    zero = terms._replace(tokens=0 * terms.tokens)
    found = best_prefixes(frames, blanks, root, bias, states, count=20, depth=3, joint=zero)
    assert torch.equal(found.tokens, without.tokens)
    torch.testing.assert_close(found.scores, without.scores)
