"""The same promises on a CUDA device: `pytest -m gpu`."""

import pytest
import torch

from ctc_drafter import Speculator, speculate
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.sampling import Sampled, warpers
from ctc_drafter.target.model import Target
from helpers import ScriptedDrafter, tiny_drafter, tiny_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1]]


def on_gpu(dtype: torch.dtype) -> Target:
    return Target.wrap(tiny_target(dtype=dtype).model.to("cuda"))


@pytest.mark.parametrize("nodes", [1, 8, 64])
def test_drafts_never_change_the_output(nodes):
    target = on_gpu(torch.float32)
    expected = plain_generate(target, PROMPTS, max_new_tokens=24).tokens
    drafter = tiny_drafter(target).to("cuda")
    assert generate(target, drafter, PROMPTS, max_new_tokens=24, nodes=nodes).tokens == expected
    assert plain_generate(tiny_target(), PROMPTS, max_new_tokens=24).tokens == expected


def test_draws_are_those_of_the_cpu():
    target = on_gpu(torch.float32)
    options = {"max_new_tokens": 24, "sampler": Sampled([1, 2, 3], warpers(temperature=1.5, top_p=0.95))}
    expected = plain_generate(tiny_target(), PROMPTS, **options).tokens
    assert plain_generate(target, PROMPTS, **options).tokens == expected
    assert generate(target, tiny_drafter(target).to("cuda"), PROMPTS, **options).tokens == expected


def test_bfloat16_runs_with_the_stages_timed():
    target = on_gpu(torch.bfloat16)
    result = generate(target, tiny_drafter(target).to("cuda"), PROMPTS, max_new_tokens=24, timed=True)
    assert all(len(row) == 24 for row in result.tokens)
    assert result.stats.stages_ms["verify"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_speculator_takes_the_drafter_to_the_gpu(dtype):
    target = on_gpu(dtype)
    drafter = tiny_drafter(tiny_target())
    ids = torch.tensor(PROMPTS[:1], device="cuda")
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = target.model.generate(ids, **options)
    for found in (
        Speculator(target.model, drafter).generate(ids, **options),
        target.model.generate(ids, **options, custom_generate=speculate(drafter)),
    ):
        assert found.shape == expected.shape
        if dtype == torch.float32:
            assert torch.equal(found, expected)
    assert {weight.device.type for weight in drafter.parameters()} == {"cpu"}


def test_scripted_drafts_on_the_gpu_are_all_accepted():
    target = on_gpu(torch.float32)
    expected = plain_generate(target, PROMPTS[:1], max_new_tokens=24).tokens

    drafter = ScriptedDrafter([PROMPTS[0] + expected[0]], 4)
    result = generate(target, drafter, PROMPTS[:1], max_new_tokens=24, nodes=12)
    assert result.tokens == expected
    assert result.stats.beta > 4
