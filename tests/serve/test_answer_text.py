"""What is shown of an answer, against the whole text cut by hand."""

import time

from hypothesis import given
from hypothesis import strategies as st

from ctc_drafter.chat import AnswerText
from serve_helpers import cut
from tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LETTERS = st.text("abé☃", max_size=30)  # few letters, so that stop strings begin often; two of them are several tokens


@given(text=LETTERS, stops=st.lists(st.text("abé☃", min_size=1, max_size=4), max_size=3))
def test_shown_is_the_text_before_the_first_stop(text, stops):
    answer, shown, taken = AnswerText(TOKENIZER, stops), "", 0
    expected = cut(text, stops)
    tokens = TOKENIZER(text, add_special_tokens=False).input_ids
    for token in tokens:
        taken += 1
        shown += answer.push(token)
        assert expected.startswith(shown), "nothing is taken back"
        assert answer.shown == len(shown)
        if answer.stopped:
            break
    if not answer.stopped:
        shown += answer.close()
    assert shown == expected
    ended = next(
        (i for i in range(len(tokens) + 1) if cut(TOKENIZER.decode(tokens[:i]), stops) != TOKENIZER.decode(tokens[:i])),
        None,
    )
    assert taken == (len(tokens) if ended is None else ended)


def test_text_that_cannot_become_a_stop_is_not_held_back():
    answer = AnswerText(TOKENIZER, ["abc"])
    shown = [answer.push(TOKENIZER(letter, add_special_tokens=False).input_ids[0]) for letter in "xaabdab"]
    assert shown == ["x", "", "a", "", "abd", "", ""]
    assert answer.close() == "ab"


def test_the_longest_stop_strings_cost_little():
    """As many as a request may have, each of which nearly comes at every token: 28 us a token were measured."""
    stops = [number * "a" + "b" + (255 - number) * "a" for number in range(240, 256)]
    answer, (token,) = AnswerText(TOKENIZER, stops), TOKENIZER("a", add_special_tokens=False).input_ids
    begin = time.thread_time()
    for _ in range(2000):
        answer.push(token)
    assert time.thread_time() - begin < 2.0
    assert not answer.stopped


PIECES = st.lists(st.sampled_from(["<|user|>", "<|mask|>", "a", "b", "user", "|>"]), max_size=12)
STOPS = ["<|user|>", "a<|mask|>b", "user|>", "b", "|>a", "<|mask|><|user|>"]


@given(pieces=PIECES, stops=st.lists(st.sampled_from(STOPS), max_size=2))
def test_special_tokens_count_as_their_text_and_are_not_shown(pieces, stops):
    """Against the text that holds them, cut by hand."""
    tokens = TOKENIZER("".join(pieces), add_special_tokens=False).input_ids
    special = set(TOKENIZER.all_special_ids) | set(TOKENIZER.added_tokens_decoder)
    before = cut(TOKENIZER.decode(tokens, skip_special_tokens=False), stops)
    answer, shown, size, expected = AnswerText(TOKENIZER, stops), "", 0, ""
    for token in tokens:
        text = TOKENIZER.decode([token])
        expected += "" if token in special else before[size : size + len(text)]
        size += len(text)
        shown += answer.push(token)
        if answer.stopped:
            break
    assert shown + ("" if answer.stopped else answer.close()) == expected
    assert answer.stopped == (before != TOKENIZER.decode(tokens, skip_special_tokens=False))
    assert answer.shown == len(expected)
