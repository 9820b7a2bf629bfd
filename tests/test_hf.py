import pytest
import torch
from transformers import LlamaForCausalLM

from ctc_drafter.decode.hf import speculate
from ctc_drafter.types import UserError
from helpers import tiny_config, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7]]


def padded():
    ids = torch.tensor([PROMPTS[0], [0] * 4 + PROMPTS[1]])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [0] * 4 + [1] * 2])}


def model_and_drafter():
    target = tiny_target()
    return target.model, tiny_drafter(target)


@pytest.mark.parametrize("batch", [1, 2])
def test_generate_returns_what_it_always_returned(batch):
    model, drafter = model_and_drafter()
    inputs = {key: value[:batch] for key, value in padded().items()}
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=speculate(drafter)), plain)
    eos = int(plain[0, 12])
    plain = model.generate(**inputs, **options, eos_token_id=eos)
    assert torch.equal(model.generate(**inputs, **options, eos_token_id=eos, custom_generate=speculate(drafter)), plain)


def test_a_dictionary_when_asked_for():
    model, drafter = model_and_drafter()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    plain = model.generate(**padded(), **options)
    result = model.generate(**padded(), **options, custom_generate=speculate(drafter))
    assert type(result) is type(plain)
    assert torch.equal(result.sequences, plain.sequences)


def test_streams():
    model, drafter = model_and_drafter()
    got: list[int] = []
    decode = speculate(drafter, on_tokens=lambda _row, tokens: got.extend(tokens))
    ids = torch.tensor(PROMPTS[:1])
    result = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0, custom_generate=decode)
    assert result[0, ids.shape[1] :].tolist() == got


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "greedily"),
        ({"num_beams": 2}, "beams"),
        ({"repetition_penalty": 1.3}, "RepetitionPenalty"),
        ({"max_time": 5.0}, "MaxTime"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
    ],
)
def test_what_it_cannot_honour_is_refused(options, message):
    model, drafter = model_and_drafter()
    with pytest.raises(UserError, match=message):
        model.generate(**padded(), max_new_tokens=4, pad_token_id=0, custom_generate=speculate(drafter), **options)


def test_another_targets_drafter_is_refused():
    _, drafter = model_and_drafter()
    other = LlamaForCausalLM(tiny_config(num_hidden_layers=2))
    with pytest.raises(UserError, match="layer count"):
        other.generate(torch.tensor([[1]]), max_new_tokens=2, pad_token_id=0, custom_generate=speculate(drafter))
