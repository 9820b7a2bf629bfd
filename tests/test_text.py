import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from ctc_drafter.chat import TextStream, decode, encode_conversation, encode_text, eos_ids
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


def with_begin_token():
    """A tokenizer that puts its begin token before every text, as Llama's does."""
    tokenizer = tiny_tokenizer()
    special = [("<|bos|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize(
    ("text", "begins"),
    [("the cat", 1), ("<|bos|>the cat", 1), ("<|bos|><|bos|>the cat", 2), ("the <|bos|>cat", 2), ("", 1)],
)
def test_a_text_has_one_begin_token_unless_it_has_more(text: str, begins: int) -> None:
    tokenizer = with_begin_token()
    ids = encode_text(tokenizer, text)
    assert ids.count(tokenizer.bos_token_id) == begins
    assert encode_conversation(tokenizer, [text or "x"], raw=True).count(tokenizer.bos_token_id) == begins


def test_a_text_that_the_template_made_is_read_as_the_conversation() -> None:
    tokenizer = with_begin_token()
    turns = [{"role": "user", "content": "the cat"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert encode_text(tokenizer, text) == encode_conversation(tokenizer, ["the cat"])


@pytest.mark.parametrize(("turns", "part"), [([], "empty"), (["a", " \n"], "empty"), (["\udce9"], "Unicode")])
def test_refused_prompts(turns: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        encode_conversation(tiny_tokenizer(), turns, ["x"] * (len(turns) - 1))


def test_a_template_that_refuses_is_named() -> None:
    tokenizer = tiny_tokenizer(template="{{ raise_exception('no cats') }}")
    with pytest.raises(UserError, match="chat template refuses the conversation: no cats"):
        encode_conversation(tokenizer, ["the cat"])


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


TEXTS = [
    "the cat 🐈 naïve – 数学 the hat",
    "  two  spaces, and\n\nlines ",
    "👩\u200d👩\u200d👧 families; a\ufffdb",
    "🐈🐈\u200d⬛",
    "e\u0301 x",
]


def bytelevel() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def metaspace(**options: bool) -> PreTrainedTokenizerFast:
    """Words with their spaces, as SentencePiece has them; letters that it knows, and bytes for all others."""
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "t"), ("c", "at"), ("▁", "cat")]
    letters = sorted({*"▁abcdefghilmnoprstuvwx", *(left + right for left, right in merges)})
    words = {word: number for number, word in enumerate([*known, *letters])}
    tokenizer = Tokenizer(models.BPE(words, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options
    )


@pytest.mark.parametrize("make", [bytelevel, metaspace])
@pytest.mark.parametrize("text", TEXTS)
def test_stream_is_the_decoded_whole(make: Callable[[], PreTrainedTokenizerFast], text: str) -> None:
    """Token by token and in pieces, also when it ends within a character; special tokens between characters are left
    out."""
    tokenizer, rng = make(), random.Random(0)
    for _ in range(40):
        ids = tokenizer(text, add_special_tokens=False).input_ids[: rng.choice([None, -1, -2])]
        ends = [end for end in range(len(ids) + 1) if not decode(tokenizer, ids[:end]).endswith("\ufffd")]
        for end in sorted(rng.sample(ends, min(len(ends), rng.randint(0, 3))), reverse=True):
            ids.insert(end, rng.choice([tokenizer.bos_token_id, tokenizer.eos_token_id]))
        last = max(end for end in range(len(ids) + 1) if not decode(tokenizer, ids[:end]).endswith("\ufffd"))
        whole, stream, shown, rest = decode(tokenizer, ids[:last]), TextStream(tokenizer), "", ids
        while rest:
            size = rng.choice([1, 1, 1, 4])
            shown, rest = shown + stream.push(rest[:size]), rest[size:]
            assert whole.startswith(shown)
        if "\ufffd" not in decode(tokenizer, ids[last:]) or make is bytelevel:
            assert shown + stream.close() == whole


def test_stream_keeps_the_space_behind_a_special_token() -> None:
    tokenizer = metaspace()
    stream = TextStream(tokenizer)
    ids = tokenizer("the cat", add_special_tokens=False).input_ids
    pieces = [stream.push([token]) for token in [*ids[:1], tokenizer.bos_token_id, *ids[1:]]]
    assert "".join(pieces) == "the cat"


@pytest.mark.parametrize("make", [bytelevel, metaspace])
def test_stream_of_tokens_that_make_no_sense(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    """Those of a random model, lone bytes between words: little is held back, and nothing is lost or said twice.

    Byte fallback decodes a whole run of bytes together, so that what three of them mean cannot be known in time: only
    the letters between such runs are compared."""
    tokenizer = make()
    for seed in range(50):
        ids = random.Random(seed).choices(range(3, len(tokenizer)), k=60)
        stream = TextStream(tokenizer)
        shown = "".join(stream.push([token]) for token in ids)
        assert len(stream.window) < 12
        shown, whole = shown + stream.close(), decode(tokenizer, ids)
        if make is bytelevel:
            assert shown.rstrip("\ufffd") == whole.rstrip("\ufffd")
        words = [word for token in ids if len(word := decode(tokenizer, [token])) > 1 and "\ufffd" not in word]
        assert all(shown.count(word) >= words.count(word) for word in words)
