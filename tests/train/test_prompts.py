"""Prompts from every usual row format; what is unusable is counted, never fatal, never silent."""

import gzip
import json
import logging
from pathlib import Path

import pytest
from tokenizers import processors

from ctc_drafter.chat import encode_text
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.prompts import read_prompts
from ctc_drafter.types import UserError
from tiny_models import tiny_tokenizer
from train_helpers import write_jsonl

TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "the hat"},
    {"role": "assistant", "content": "sat too"},
]


def texts(path: Path | str, **options) -> list[str]:
    tokenizer = tiny_tokenizer()
    return sorted(tokenizer.decode(prompt.ids) for prompt in read_prompts(path, tokenizer, **options).prompts)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK[:2]},
        {"prompt": "the cat"},
        {"turns": ["the cat", "later"]},
        {"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]},
    ],
)
def test_formats(tmp_path: Path, row: dict) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    assert texts(file) == ["<|bos|><|user|>the cat<|end|><|assistant|>"]


ASKED = "<|bos|><|user|>the cat<|end|><|assistant|>"
ASK, SAT = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}
PARTS = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "the cat", "input": "", "output": "x"}, "the cat"),
        ({"instruction": "the cat", "input": "a hat", "output": "x"}, "the cat\n\na hat"),
        (
            {"instruction": "the cat", "context": "a hat", "response": "x", "category": "qa"},
            "the cat\n\na hat",
        ),  # Dolly
        ({"question": "the cat", "choices": ["a", "b"], "answer": 1}, "the cat\n\nA. a\nB. b"),  # MMLU
        ({"question": "the cat", "choices": {"text": ["a", "b"], "label": ["1", "2"]}}, "the cat\n\n1. a\n2. b"),  # ARC
        ({"conversations": [ASK, SAT]}, "the cat"),
        ({"messages": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]}, "the cat"),
        ({"conversation": [ASK, SAT], "model": "m"}, "the cat"),  # lmsys
        ({"prompt": [ASK], "completion": [SAT]}, "the cat"),  # TRL
        ({"messages": [{"role": "user", "content": PARTS}]}, "the cat"),
        ({"prompt": ["the cat", "later"]}, "the cat"),
        ({"messages": None, "prompt": "the cat"}, "the cat"),
        ({"problem": "the cat", "solution": "x"}, "the cat"),
        ({"question": "the cat", "document": "a hat"}, "the cat\n\na hat"),
    ],
)
def test_formats_of_data_sets(tmp_path: Path, row: dict, asked: str) -> None:
    assert texts(write_jsonl(tmp_path / "a.jsonl", [row])) == [ASKED.replace("the cat", asked)]


@pytest.mark.parametrize(
    "row",
    [
        {"system_prompt": "be brief", "question": "the cat", "response": "x"},  # OpenOrca
        {"system": "be brief", "conversations": [{"from": "human", "value": "the cat"}]},
        {"messages": [{"role": "developer", "content": "be brief"}, ASK]},
        {"system": "unused", "messages": [{"role": "system", "content": "be brief"}, ASK]},
    ],
)
def test_system_prompts(tmp_path: Path, row: dict) -> None:
    found = texts(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert found == [ASKED.replace("<|bos|>", "<|bos|><|system|>be brief<|end|>")]


def test_earlier_questions_and_answers_as_pairs(tmp_path: Path) -> None:
    row = {"instruction": "the cat", "history": [["hat", "mat"]]}
    found = texts(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert found == [ASKED.replace("<|bos|>", "<|bos|><|user|>hat<|end|><|assistant|>mat<|end|>")]


def test_one_question_about_three_texts(tmp_path: Path) -> None:
    rows = [{"instruction": "Summarise the text.", "input": text, "output": ""} for text in ("cat", "hat", "mat")]
    found = read_prompts(write_jsonl(tmp_path / "a.jsonl", rows), tiny_tokenizer())
    assert len(found.prompts) == found.counts["used"] == 3


@pytest.mark.parametrize(
    ("turns", "reason", "found"),
    [
        ([ASK, {"role": "assistant", "content": ""}], "a turn of messages whose content is empty", {ASKED}),
        ([ASK, {"role": "tool", "content": "3"}], "whose role is none of system", {ASKED}),
        ([ASK, {"role": "assistant", "content": None, "tool_calls": [1]}], "has no content, value or text", {ASKED}),
        ([ASK, {"content": "x"}], "a turn of messages has no role or from", {ASKED}),
        ([ASK, {"role": "assistant", "content": [{"type": "image"}]}], "whose content has parts without text", {ASKED}),
        # The question of an answer that is missing may be asked, but is no history.
        ([{"role": "user", "content": "hat"}, {"role": "assistant", "content": " "}, ASK], "is empty",
         {ASKED, ASKED.replace("the cat", "hat")}),
        # An answer without its question is no history either.
        ([{"role": "user", "content": [{"type": "image"}]}, SAT, ASK], "parts without text", {ASKED}),
    ],
)  # fmt: skip
def test_an_odd_turn_costs_that_turn(tmp_path: Path, turns: list[dict], reason: str, found: set[str]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    assert {text for seed in range(8) for text in texts(file, seed=seed)} == found
    read = read_prompts(file, tiny_tokenizer())
    (said,) = read.odd
    assert reason in said
    assert read.odd[said] == read.counts["used"] == 1
    assert said in str(read)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"other": 1}, "no messages, conversations, conversation, turns, prompt, instruction, question"),
        ({"messages": [{"role": "user", "text": None}]}, "a turn of messages has no content, value or text"),
        ({"conversations": [{"speaker": "user", "content": "x"}]}, "a turn of conversations has no role or from"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "a turn of messages whose role is none of system"),
        ({"messages": [SAT]}, "messages has no user turn"),
        ({"messages": []}, "messages is empty"),
        ({"conversation": "x"}, "conversation is no list"),
        ({"instruction": "x", "input": {"a": 1}}, "input is no text"),
        ({"question": "x", "choices": "a b"}, "choices is no list of texts"),
        ({"question": " "}, "empty question"),
        ({"prompt": {"a": 1}}, "prompt is no list"),
    ],
)
def test_reasons_name_the_key(tmp_path: Path, row: dict, reason: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "good"}, row])
    assert any(found.startswith(f"bad ({reason}") for found in read_prompts(file, tiny_tokenizer()).counts)


@pytest.mark.parametrize("begins", [False, True])
def test_begin_tokens_of_texts_are_those_of_completions(tmp_path: Path, begins: bool) -> None:
    """One where the tokenizer puts one or the text has one, none otherwise; never two."""
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "cat sat"}, {"text": "<|bos|>hat sat"}])
    tokenizer = tiny_tokenizer()
    if begins:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|bos|> $A", None, [("<|bos|>", 0)])
    found = {tuple(prompt.ids) for prompt in read_prompts(file, tokenizer, cuts=1).prompts}
    cat, hat = (tokenizer(text, add_special_tokens=False).input_ids for text in ("cat", "hat"))
    assert found == {(*([0] if begins else []), *cat), (0, *hat)}
    assert found == {tuple(encode_text(tokenizer, text)) for text in ("cat", "<|bos|>hat")}


def test_turns_are_drawn_with_their_history(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"cat {i}"}, *TALK[1:]]} for i in range(20)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    found = texts(tmp_path)
    late = [text for text in found if "the hat" in text]
    assert 0 < len(late) < len(found) == 20
    assert all(text.endswith("sat<|end|><|user|>the hat<|end|><|assistant|>") for text in late)
    assert found == texts(tmp_path)
    assert found != texts(tmp_path, seed=1)


def test_without_a_template_text_is_encoded_plainly(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(template=None)
    (prompt,) = read_prompts(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the cat"}]), tokenizer).prompts
    assert prompt.ids == tokenizer("the cat").input_ids


def test_bad_rows_are_counted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "good"},
        "{not json",
        "[]",
        {"prompt": "  "},
        {"prompt": 3},
        {"messages": [{"role": "narrator", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": "x"},
        {"turns": []},
        {"other": 1},
        {"prompt": "\ud800"},
        {"text": "a book"},
        {"prompt": "good"},
        {"prompt": "long " * 20},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with caplog.at_level(logging.WARNING):
        found = read_prompts(tmp_path, tiny_tokenizer(), max_prompt_tokens=30)
    assert len(found.prompts) == 1
    assert sum(n for reason, n in found.counts.items() if reason.startswith("bad")) == 11
    assert found.counts["plain text"] == found.counts["repeated"] == found.counts["longer than 30 tokens"] == 1
    assert sum(found.counts.values()) == len(rows) + 1
    assert "not JSON" in caplog.text


def test_a_damaged_archive_gives_what_it_still_holds(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"prompt": f"cat {i * 7919}"}) + "\n" for i in range(3000))
    whole = gzip.compress(lines.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found = read_prompts(tmp_path, tiny_tokenizer())
    assert 0 < len(found.prompts) < 3000
    assert found.counts["bad (the rest of a damaged file)"] == 1


def test_caps(tmp_path: Path) -> None:
    for name in ("a.train.jsonl", "b.val.jsonl"):
        write_jsonl(tmp_path / name, [{"prompt": f"{name} {i}"} for i in range(10)])
    assert len(texts(tmp_path)) == 20
    assert len(texts(tmp_path, per_file=3)) == 6
    assert len(texts(tmp_path, limit=5)) == 5
    assert all("train" in text for text in texts(tmp_path, pattern="*.train.*"))


def test_ids_do_not_depend_on_files(tmp_path: Path) -> None:
    first, second = (write_jsonl(tmp_path / name, [{"prompt": "the cat"}]) for name in ("a.jsonl", "b.jsonl"))
    assert read_prompts(first, tiny_tokenizer()).prompts == read_prompts(second, tiny_tokenizer()).prompts


def test_path_without_usable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; expected \.jsonl"):
        read_prompts(tmp_path / "none", tiny_tokenizer())
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no usable files; expected \.jsonl"):
        read_prompts(tmp_path, tiny_tokenizer())
    write_jsonl(tmp_path / "books.jsonl", [{"text": "a book"}])
    with pytest.raises(UserError, match=r"no usable rows \(.*1 plain text.*expected \.jsonl"):
        read_prompts(tmp_path, tiny_tokenizer())


def test_cuts_end_inside_answers_and_texts(tmp_path: Path) -> None:
    """The conversation itself stays, cuts open the answer to its drawn turn; plain text is only cut."""
    answered = [TALK[0], {"role": "assistant", "content": "the cat sat"}]
    rows = [{"messages": answered}, {"text": "a hat too"}, {"messages": [TALK[2], TALK[2]]}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    opening = "<|bos|><|user|>the cat<|end|><|assistant|>"
    asked = [text for text in texts(file, cuts=5) if text.startswith(opening) or not text.startswith("<|bos|>")]
    assert asked == sorted([opening, opening + "the", opening + "the cat", "a", "a hat"])
    assert len(texts(file, cuts=1)) == 4
    assert texts(file, cuts=1) == texts(file, cuts=1)


def test_a_json_list_and_a_text_file(tmp_path: Path) -> None:
    opening = "<|bos|><|user|>{}<|end|><|assistant|>"
    share = [{"conversations": [{"from": "human", "value": "the cat"}]}, {"instruction": "the hat"}, 7]
    (tmp_path / "share.json").write_text(json.dumps(share))
    (tmp_path / "lines.txt").write_bytes(b"the mat\n\nno \xff text\nsat\n")
    assert texts(tmp_path / "share.json") == sorted(map(opening.format, ["the cat", "the hat"]))
    assert texts(tmp_path / "lines.txt") == sorted(map(opening.format, ["the mat", "sat"]))
    found = read_prompts(tmp_path / "lines.txt", tiny_tokenizer())
    assert sum(n for reason, n in found.counts.items() if reason.startswith("bad")) == 1
    with pytest.raises(UserError, match="no usable files"):
        read_prompts(tmp_path, tiny_tokenizer())


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder elsewhere stands for the hub: the same library reads both."""
    import datasets

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, **options: real(f"hub/{name}", *a, **options))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("hub/some/chats").mkdir(parents=True)
    write_jsonl(Path("hub/some/chats/train.jsonl"), [{"prompt": "the cat"}, {"messages": TALK[:1]}, {"turns": ["hat"]}])
    write_jsonl(Path("hub/some/chats/test.jsonl"), [{"prompt": "held back"}])
    opening = "<|bos|><|user|>{}<|end|><|assistant|>"
    assert texts("hub:some/chats") == sorted(map(opening.format, ["the cat", "hat"]))
    assert texts("hub:some/chats:test") == [opening.format("held back")]
    for wrong, said in (("hub:chats", "names no data set; write hub:owner/name"), ("hub:some/chats:dev", "dev")):
        with pytest.raises(UserError, match=said):
            read_prompts(wrong, tiny_tokenizer())


def test_a_template_that_opens_no_answer(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the cat"}])
    closed = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    with pytest.raises(UserError, match=r"no generation prompt \('<\|assistant\|>' must stand.*--chat-template"):
        read_prompts(file, tiny_tokenizer(closed))
    llama2 = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
    assert read_prompts(file, tiny_tokenizer(llama2 + "<|end|>{% endif %}{% endfor %}")).prompts


def test_what_is_no_unicode_is_counted(tmp_path: Path) -> None:
    """Half an emoji in a plain text, or in an answer that is cut; brackets without end."""
    half = '"the cat \\ud83d and the hat and the mat"'
    talk = f'{{"messages": [{{"role": "user", "content": "cat"}}, {{"role": "assistant", "content": {half}}}]}}'
    lines = [f'{{"text": {half}}}', talk, "[" * 100_000, '{"prompt": "hat"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = read_prompts(tmp_path, tiny_tokenizer(), cuts=8)
    assert found.counts["bad (not JSON)"] == 1
    assert found.counts["bad (refused by template or tokenizer)"] >= 2
    assert found.counts["used"] >= 2


def test_cuts_of_a_row_share_its_source(tmp_path: Path) -> None:
    """And so lie on one side of a split, whichever file they stand in."""
    rows = [
        {"messages": [{"role": "user", "content": f"cat {i}"}, TALK[3] | {"content": "the mat sat " * 9}]}
        for i in range(30)
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    prompts = read_prompts(tmp_path, tiny_tokenizer(), cuts=4).prompts
    assert len({prompt.source for prompt in prompts}) == 30 < len(prompts)
    lines = [
        json.dumps({"id": prompt.id, "source": prompt.source, "prompt_ids": prompt.ids, "answer_ids": [5, 6]})
        for prompt in prompts
    ]
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "shard-00000.jsonl").write_text("\n".join(lines))
    sides = DistilledDataset.load([folder]).split(0.3)
    assert all(len(side) for side in sides)
    assert not {row.source for row in sides[0].rows} & {row.source for row in sides[1].rows}
