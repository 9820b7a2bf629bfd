"""transformers' own generate as a contender: same text, same counters."""

import pytest

from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.evaluate.also import also_contenders, parse_also
from ctc_drafter.evaluate.hf_generate import HF, HF_LOOKUP
from ctc_drafter.evaluate.methods import Decoding
from ctc_drafter.types import UserError
from helpers import tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1]]


def test_what_generate_writes_is_plain_decodings():
    target = tiny_target()
    free = plain_generate(target, PROMPTS, max_new_tokens=20).tokens
    eos = frozenset({free[0][7], free[2][3]})
    wanted = plain_generate(target, PROMPTS, max_new_tokens=20, eos=eos)
    assert len({len(row) for row in wanted.tokens}) > 1
    for contender in also_contenders(Decoding(target, eos, 20), (HF, HF_LOOKUP)):
        for prompts, tokens in ((PROMPTS, wanted.tokens), (PROMPTS[:1], wanted.tokens[:1])):
            found = contender.run(prompts, False, None)
            assert found.tokens == tokens
            assert found.stats.tokens == sum(map(len, tokens))
            emitted = [sum(each + 1 for each in row) for row in found.accepted]
            assert emitted == [len(row) - 1 for row in tokens]
            if contender.method == HF:
                assert found.stats.beta == 1


def test_lookup_accepts_what_repeats():
    """A model whose text runs in a circle is copied from its own prompt."""
    target = tiny_target()
    (tokens,) = plain_generate(target, [[3, 1]], max_new_tokens=60).tokens
    prompt = [3, 1, *tokens[:40]]
    (contender,) = also_contenders(Decoding(target, frozenset(), 16), (HF_LOOKUP,))
    found = contender.run([prompt], False, None)
    assert found.tokens == plain_generate(target, [prompt], max_new_tokens=16).tokens
    assert len(found.accepted[0]) <= 15


def test_unknown_ways_are_refused():
    assert parse_also("hf, hf-lookup,hf") == (HF, HF_LOOKUP)
    assert parse_also("") == ()
    assert parse_also("hf-assisted=a/b") == ("hf-assisted=a/b",)
    for text, part in (
        ("hff", "--also hff is not known"),
        ("hf=x", "not known"),
        ("hf-assisted", "write hf-assisted=DIR"),
    ):
        with pytest.raises(UserError, match=part):
            parse_also(text)


@pytest.mark.slow
def test_an_assistant_drafts(tmp_path):
    """The target itself as its assistant is right always, so that some step accepts more than one token."""
    target = tiny_target()
    target.model.save_pretrained(tmp_path / "same")
    tiny_target(vocab_size=32).model.save_pretrained(tmp_path / "other")
    decoding = Decoding(target, frozenset(), 20)
    (contender,) = also_contenders(decoding, (f"hf-assisted={tmp_path / 'same'}",))
    found = contender.run(PROMPTS, False, None)
    assert contender.method == "hf-assisted"
    assert found.tokens == plain_generate(target, PROMPTS, max_new_tokens=20).tokens
    assert found.stats.beta > 1.5  # it stops where it is unsure, as transformers has it
    for place, part in (("other", "another vocabulary"), ("none", "no assistant could be loaded")):
        with pytest.raises(UserError, match=part):
            also_contenders(decoding, (f"hf-assisted={tmp_path / place}",))
