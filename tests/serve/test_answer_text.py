"""What is shown of an answer, against the whole text cut by hand."""

from hypothesis import given
from hypothesis import strategies as st

from ctc_drafter.serve.requests import AnswerText
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
