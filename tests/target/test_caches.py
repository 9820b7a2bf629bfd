"""Static caches, and prompts that go through in chunks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.families import family_model
from benchmarks.family_checks import stock_continuations
from ctc_drafter.decode import prefill as prefill_file
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.target.cache import BLOCK, GrowableStaticLayer, reserve, static_cache
from ctc_drafter.target.model import CACHES, Target
from ctc_drafter.types import UserError
from helpers import VOCABULARY, ScriptedDrafter, tiny_drafter, tiny_target

KINDS = ["Llama", "Mistral, sliding", "Gemma 3", "GPT-2", "OPT"]


def text(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def states(tokens: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 1, tokens, 4), torch.randn(batch, 1, tokens, 4)


def test_a_full_layer_moves_to_a_larger_tensor_and_keeps_its_place_until_then():
    cache = static_cache(2, 10)
    layer = cache.layers[0]
    assert reserve(cache, 10) == BLOCK
    keys, values = states(10)
    layer.update(keys, values)
    place = layer.keys.data_ptr()
    reserve(cache, BLOCK - 10)
    assert layer.keys.data_ptr() == place
    assert cache.get_seq_length() == 10
    assert reserve(cache, BLOCK) == 2 * BLOCK
    more = states(BLOCK)
    layer.update(*more)
    assert torch.equal(layer.keys[:, :, : BLOCK + 10], torch.cat([keys, more[0]], 2))
    assert torch.equal(layer.values[:, :, : BLOCK + 10], torch.cat([values, more[1]], 2))
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(layer.keys[:, :, :10], keys[1:])
    assert cache.layers[1].keys is None


def test_a_count_does_not_change_behind_the_callers_back():
    layer = GrowableStaticLayer(8)
    layer.update(*states(3))
    before = layer.get_seq_length()
    layer.update(*states(2))
    assert (before, layer.get_seq_length()) == (3, 5)


def test_unknown_caches_are_refused():
    with pytest.raises(UserError, match="quantized cache cannot be gathered"):
        Target.wrap(tiny_target().model, "quantized")


@pytest.mark.sparing
@pytest.mark.parametrize("kind", CACHES)
def test_rows_outgrow_a_static_cache_and_leave_it(kind):
    """Answers cross the first block of slots; one row ends early and another goes on."""
    model = tiny_target(max_position_embeddings=512).model
    prompts = [text(BLOCK - 12), text(7, 1), text(90, 2)]
    expected = stock_continuations(model, prompts, 24)
    target = Target.wrap(model, kind)
    eos = {expected[1][6]}
    cut = [row[: next((i + 1 for i, token in enumerate(row) if token in eos), 24)] for row in expected]
    assert len({len(row) for row in cut}) > 1
    scripts = [p + t for p, t in zip(prompts, expected, strict=True)]
    for drafter in (ScriptedDrafter(scripts, (4, 0, 3)), tiny_drafter(target)):
        assert generate(target, drafter, prompts, max_new_tokens=24, eos=eos).tokens == cut
    assert plain_generate(target, prompts, max_new_tokens=24, eos=eos).tokens == cut


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", KINDS)
def test_a_prompt_in_chunks_is_a_prompt_at_once(family, kind, monkeypatch):
    target = Target(family_model(family), kind)
    prompts = [text(50), text(33, 1), text(16, 2), text(5, 3)]
    whole = prefill(target, prompts, (0, 2))
    monkeypatch.setattr(prefill_file, "CHUNK", 16)
    parts = prefill(target, prompts, (0, 2))
    torch.testing.assert_close(parts.logits, whole.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(parts.logits.argmax(-1), whole.logits.argmax(-1))
    for row, prompt in enumerate(prompts):
        size = len(prompt)
        torch.testing.assert_close(parts.features[row, :size], whole.features[row, :size], atol=1e-4, rtol=1e-4)
        for mine, other in zip(parts.cache.layers, whole.cache.layers, strict=True):
            torch.testing.assert_close(mine.keys[row, :, :size], other.keys[row, :, :size], atol=1e-4, rtol=1e-4)
    assert parts.cache.get_seq_length() == whole.cache.get_seq_length() == 50


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.slow
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Gemma 3"])
def test_no_tensor_grows_with_the_square_of_the_prompt(family, kernel, kind):
    model = family_model(family, kernel)
    model.config.max_position_embeddings = 4096
    target, sizes = Target(model, kind), []
    for length in (1024, 2048):
        with Largest() as largest:
            prefill(target, [text(length)])
        sizes.append(largest.elements)
    assert sizes[1] <= 2 * sizes[0]
    assert sizes[1] <= 4 * prefill_file.CHUNK * 2048  # a chunk's attention with its four heads


LONG = """
import sys, torch
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
sys.path.insert(0, sys.argv[1])
from helpers import ScriptedDrafter, tiny_config
from memory import peak_memory
from ctc_drafter.decode.generate import generate
from ctc_drafter.target.model import Target

config = tiny_config(num_hidden_layers=1, max_position_embeddings=20000, attn_implementation=sys.argv[2])
model = LlamaForCausalLM(config).eval()
target = Target.wrap(model, sys.argv[3])
prompt = [1 + i * i % 96 for i in range(16000)]
generate(target, ScriptedDrafter([prompt[:64]], 2), [prompt[:64]], max_new_tokens=4)
before = peak_memory()
tokens = generate(target, ScriptedDrafter([prompt], 2), [prompt], max_new_tokens=16).tokens[0]
print(len(tokens), (peak_memory() - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "kind"), [("sdpa", "dynamic"), ("sdpa", "static"), ("eager", "dynamic")])
def test_sixteen_thousand_tokens_fit_into_little_memory(kernel, kind):
    """Eager attention at once would take 4 GB, a dense mask 1 GB; the cache takes 4 MB."""
    command = [sys.executable, "-c", LONG, str(Path(__file__).parents[1] / "support"), kernel, kind]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, megabytes = run.stdout.split()
    assert int(tokens) == 16
    assert float(megabytes) < (500 if kernel == "eager" else 250)
