import pytest
import torch

from benchmarks.families import VOCABULARY, family_model
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.decode.tree import ancestor_matrix
from ctc_drafter.decode.verify import tree_mask, verify
from ctc_drafter.target.cache import compact
from ctc_drafter.target.model import CACHES, Target
from ctc_drafter.types import TokenTree

T, F = True, False
PARENTS = [0, 0, 0, 1, 3, 2]  # root -> 1 -> 3 -> 4, root -> 2 -> 5
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1], [8, 2, 8, 1, 8]]


def small_tree(batch: int) -> TokenTree:
    parents = torch.tensor([PARENTS]).expand(batch, -1)
    depths = torch.tensor([[0, 1, 1, 2, 3, 2]]).expand(batch, -1)
    tokens = torch.randint(0, VOCABULARY, parents.shape, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(parents.shape, dtype=torch.bool)
    return TokenTree(tokens, parents, depths, ancestor_matrix(parents), ones, torch.zeros(parents.shape))


def same(mine: torch.Tensor, other: torch.Tensor) -> None:
    """Equal to 5e-6 of the largest value: float32 sums in another order, nothing more."""
    assert (mine - other).abs().max() <= 5e-6 * other.abs().max()


FAMILIES = ["Llama", "Mistral, sliding", "Gemma 2, soft caps", "Gemma 3", "GPT-2", "OPT", "Mixtral", "DeepSeek-V3"]


def test_the_mask_as_a_matrix():
    tree = small_tree(1)
    mask = tree_mask(tree, torch.tensor([[T, T, F]]))
    assert mask[0].tolist() == [
        [T, T, F, T, F, F, F, F, F],
        [T, T, F, T, T, F, F, F, F],
        [T, T, F, T, F, T, F, F, F],
        [T, T, F, T, T, F, T, F, F],
        [T, T, F, T, T, F, T, T, F],
        [T, T, F, T, F, T, F, F, T],
    ]


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_node_sees_what_its_path_alone_would(family, kind):
    target = Target(family_model(family), kind)
    layers = (0, 2)
    state = prefill(target, PROMPTS, layers)
    tree = small_tree(len(PROMPTS))
    result = verify(target, state.cache, state.lengths, tree, layers)
    for row, prompt in enumerate(PROMPTS):
        for node in range(tree.tokens.shape[1]):
            path = tree.ancestors[row, node].nonzero().flatten()
            fresh = prefill(target, [prompt + tree.tokens[row, path].tolist()], layers)
            logits = target.model(fresh.tokens).logits[0, -1]
            same(result.logits[row, node], logits)
            same(result.features[row, node], fresh.features[0, -1])


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_compacted_cache_is_a_fresh_prefill(family, kind):
    target = Target(family_model(family), kind)
    state = prefill(target, PROMPTS)
    tree = small_tree(len(PROMPTS))
    first = state.cache.get_seq_length()
    verify(target, state.cache, state.lengths, tree)
    path = torch.tensor([[0, 1, 3, 4], [0, 2, 2, 2], [0, 2, 5, 5]])
    counts = torch.tensor([3, 1, 2])
    compact(state.cache, state.lengths, first, path, counts)
    assert state.cache.get_seq_length() == max(len(p) + c + 1 for p, c in zip(PROMPTS, [3, 1, 2], strict=True))
    for row, prompt in enumerate(PROMPTS):
        kept = path[row, : counts[row] + 1]
        fresh = prefill(target, [prompt + tree.tokens[row, kept].tolist()])
        size = fresh.cache.get_seq_length()
        for mine, other in zip(state.cache.layers, fresh.cache.layers, strict=True):
            same(mine.keys[row, :, :size], other.keys[0, :, :size])
            same(mine.values[row, :, :size], other.values[0, :, :size])
