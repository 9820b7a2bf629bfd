"""`output_scores` and `output_logits` give stock's tuples, for rows that have ended and for right and wrong drafts."""

import pytest
import torch
from transformers import LlamaForCausalLM, LogitsProcessorList, Phi3ForCausalLM, StoppingCriteria

from ctc_drafter.decode.generate import generate
from ctc_drafter.decode.hf import speculate
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.types import UserError
from helpers import ScriptedDrafter, tiny_config, tiny_drafter, tiny_target

TARGET = tiny_target()
MODEL = TARGET.model
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7]]
PADDED = {
    "input_ids": torch.tensor([PROMPTS[0], [0] * 4 + PROMPTS[1]]),
    "attention_mask": torch.tensor([[1] * 6, [0] * 4 + [1] * 2]),
}
ASKED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
FREE = MODEL.generate(**PADDED, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=96)[:, 6:].tolist()


def close(mine: torch.Tensor, stock: torch.Tensor) -> None:
    """Equal but for float32 rounding; logits spread over several units, -inf must agree."""
    torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-4)


def drafters():
    scripts = [prompt + new for prompt, new in zip(PROMPTS, FREE, strict=True)]
    return [ScriptedDrafter(scripts, right) for right in (4, (0, 3, 1, 4))] + [tiny_drafter(TARGET), PromptLookup()]


SETTINGS = {
    "greedy": {"eos_token_id": 96},
    "one row ends early": {"eos_token_id": FREE[1][4]},
    "the other row ends early": {"eos_token_id": FREE[0][6], "pad_token_id": 11},
    "processors": {"eos_token_id": 96, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "processors and an end": {"eos_token_id": FREE[1][2], "repetition_penalty": 1.01, "suppress_tokens": [5]},
    "own": {"eos_token_id": FREE[1][1], "logits_processor": LogitsProcessorList([lambda ids, scores: scores * 2])},
}


@pytest.mark.sparing(4)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_scores_and_logits_are_those_of_generate(name, batch):
    inputs = {key: value[:batch] for key, value in PADDED.items()}
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0} | SETTINGS[name] | ASKED
    plain = MODEL.generate(**inputs, **options)
    for drafter in drafters():
        ours = MODEL.generate(**inputs, **options, custom_generate=speculate(drafter, nodes=12))
        assert torch.equal(ours.sequences, plain.sequences)
        for kind in ("scores", "logits"):
            mine, stock = getattr(ours, kind), getattr(plain, kind)
            assert isinstance(mine, tuple)
            assert [(each.shape, each.dtype) for each in mine] == [(each.shape, each.dtype) for each in stock]
            close(torch.stack(mine), torch.stack(stock))


@pytest.mark.parametrize("asked", ["output_scores", "output_logits"])
def test_each_alone(asked):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, asked: True}
    result = MODEL.generate(**PADDED, **options, custom_generate=speculate(PromptLookup()))
    assert (result.scores is None) == (asked != "output_scores")
    assert (result.logits is None) == (asked != "output_logits")


def test_transition_scores_are_those_of_generate():
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 96} | ASKED
    found = []
    for more in ({}, {"custom_generate": speculate(tiny_drafter(TARGET))}):
        result = MODEL.generate(**PADDED, **options, **more)
        found.append(MODEL.compute_transition_scores(result.sequences, result.scores, normalize_logits=True))
    close(found[1], found[0])


def test_sampled_scores_are_those_that_its_tokens_were_drawn_from():
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 7, "pad_token_id": 0, "eos_token_id": 96}
    result = MODEL.generate(**PADDED, **options, **ASKED, seeds=[1, 2], custom_generate=speculate(PromptLookup()))
    scores = torch.stack(result.scores, 1)
    assert ((scores > float("-inf")).sum(-1) == 7).all()
    assert (scores.gather(2, result.sequences[:, 6:, None]) > float("-inf")).all()
    text = torch.cat([PADDED["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
    positions = (text.cumsum(1) - 1).clamp(min=0)
    logits = MODEL(result.sequences, attention_mask=text, position_ids=positions).logits[:, 5:-1]
    close(torch.stack(result.logits, 1), logits)


def test_long_prompts_with_an_early_end():
    """Rows that ended are read anew, in chunks."""
    target = tiny_target(max_position_embeddings=2048)
    ids = torch.randint(5, 90, (2, 700), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    free = target.model.generate(ids, **options, eos_token_id=96)[:, 700:].tolist()
    options |= {"eos_token_id": free[0][2], **ASKED}
    plain = target.model.generate(ids, **options)
    ours = target.model.generate(ids, **options, custom_generate=speculate(PromptLookup()))
    assert torch.equal(ours.sequences, plain.sequences)
    close(torch.stack(ours.logits), torch.stack(plain.logits))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [Phi3ForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("end", [3, 12])
def test_rows_that_end_before_and_after_rotary_factors_change(kind, end):
    """Of Phi-3 stock reads the whole text anew at 24 tokens; of Llama it keeps what it has read."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3] * 2, "long_factor": [2.0, 4.0, 8.0, 16.0] * 2}
    own = {"original_max_position_embeddings": 24} if kind is Phi3ForCausalLM else {}
    config = tiny_config(max_position_embeddings=96, rope_parameters=rope).to_dict()
    config = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "head_dim")}
    model = kind(kind.config_class(**config | own | {"eos_token_id": None, "pad_token_id": 0})).eval()
    ids = torch.randint(5, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    free = model.generate(ids, **options)[:, 16:].tolist()
    options |= {"eos_token_id": next(token for token in free[0][end:] if token not in free[0][:end] + free[1])}
    plain = model.generate(ids, **options, **ASKED)
    assert plain.sequences.shape[1] == 40
    assert (plain.sequences[0] == 0).any()
    ours = model.generate(ids, **options, **ASKED, custom_generate=speculate(PromptLookup()))
    assert torch.equal(ours.sequences, plain.sequences)
    close(torch.stack(ours.logits), torch.stack(plain.logits))


class ByScores(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), scores is not None and bool(scores[-1].max() > 1e9))


def test_criteria_that_read_scores_are_refused_where_generate_would_show_them():
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "stopping_criteria": [ByScores()]}
    plain = MODEL.generate(**PADDED, **options)
    assert torch.equal(MODEL.generate(**PADDED, **options, custom_generate=speculate(PromptLookup())), plain)
    with pytest.raises(UserError, match="output_scores"):
        MODEL.generate(**PADDED, **options, **ASKED, custom_generate=speculate(PromptLookup()))


def test_nothing_is_recorded_unless_asked(monkeypatch):
    monkeypatch.setattr("ctc_drafter.decode.batch.Step.emitted_logits", None)
    assert generate(TARGET, PromptLookup(), PROMPTS, max_new_tokens=8).tokens
