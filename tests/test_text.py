import random
from types import SimpleNamespace

import pytest

from ctc_drafter.chat import TextStream, decode, encode_conversation, eos_ids
from ctc_drafter.types import UserError
from tiny_models import tiny_tokenizer


def test_template_gets_the_history_and_a_generation_prompt() -> None:
    tokenizer = tiny_tokenizer()
    ids = encode_conversation(tokenizer, ["the cat", "the hat"], ["sat"])
    expected = "<|bos|><|user|>the cat<|end|><|assistant|>sat<|end|><|user|>the hat<|end|><|assistant|>"
    assert tokenizer.decode(ids) == expected


def test_without_a_template_the_text_is_the_prompt() -> None:
    plain = tiny_tokenizer(template=None)
    assert plain.decode(encode_conversation(plain, ["the cat", "b"], ["a"])) == "the cat\na\nb"
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(encode_conversation(tokenizer, ["the cat"], raw=True)) == "the cat"


@pytest.mark.parametrize(("turns", "part"), [([], "empty"), (["a", " \n"], "empty"), (["\udce9"], "Unicode")])
def test_refused_prompts(turns: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        encode_conversation(tiny_tokenizer(), turns, ["x"] * (len(turns) - 1))


@pytest.mark.parametrize(("listed", "expected"), [(None, (1,)), (1, (1,)), (2, (1, 2)), ([2, 3], (1, 2, 3))])
def test_eos_of_config_and_tokenizer(listed: int | list[int] | None, expected: tuple[int, ...]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=listed))
    assert eos_ids(model, tiny_tokenizer()) == expected


def test_stream_never_shows_half_a_character() -> None:
    tokenizer = tiny_tokenizer()
    text = "the cat 🐈 naïve – 数学 the hat"
    ids = tokenizer(text).input_ids
    for seed in range(20):
        rng, stream, shown, rest = random.Random(seed), TextStream(tokenizer), "", ids
        while rest:
            size = rng.randint(0, 5)
            piece = stream.push(rest[:size])
            assert "\ufffd" not in piece
            shown, rest = shown + piece, rest[size:]
        assert shown + stream.close() == text


def test_stream_drops_a_character_that_never_ends() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer)
    ids = tokenizer("a 🐈").input_ids[:-1]
    assert decode(tokenizer, ids).endswith("\ufffd")
    assert stream.push(ids[:2]) + stream.push(ids[2:]) + stream.close() == "a "


def test_stream_holds_back_little_when_bytes_make_no_sense() -> None:
    tokenizer = tiny_tokenizer()
    stream, bad = TextStream(tokenizer), tokenizer("🐈").input_ids[0]
    shown = [stream.push([bad]) for _ in range(50)]
    assert "".join(shown).count("\ufffd") == 47
    assert len(stream.window) < 8
    assert stream.push(tokenizer("cat").input_ids).endswith("cat")
