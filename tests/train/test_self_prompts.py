"""Prompts that a chat model writes itself: found on token ids, sampled by seeds, dropped for a reason, never twice."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ctc_drafter.cli import main
from ctc_drafter.decode.batch import Batch
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.decode.sampling import Sampled, row_seeds, warpers
from ctc_drafter.provenance import digest
from ctc_drafter.target.model import Target
from ctc_drafter.train import distill as distill_module
from ctc_drafter.train import self_prompts
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.distill import Sampling, sampler_for
from ctc_drafter.train.prompts import Prompt, read_prompts
from ctc_drafter.train.self_prompts import (
    Begun,
    SelfPrompts,
    UserTurn,
    distill_self,
    opening_turn,
    select,
    user_turn,
    write_prompts,
)
from ctc_drafter.train.trainer import DrafterTrainer
from ctc_drafter.types import UserError
from tiny_models import TEMPLATE, tiny_chat_model, tiny_tokenizer

pytestmark = pytest.mark.slow

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ ('USER: ' if m['role'] == 'user' else 'ASSISTANT: ') + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS += ["<start_of_turn>", "<end_of_turn>"]


def tokenizer_with(template: str | None):
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    return tokenizer


@pytest.mark.parametrize(
    ("template", "opening", "closing"),
    [
        (CHATML, "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n", "<|im_end|>"),
        (LLAMA3, "<|bos|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        (GEMMA, "<|bos|><start_of_turn>user\n", "<end_of_turn>"),
        (TEMPLATE, "<|bos|><|user|>", "<|end|>"),
    ],
    ids=["chatml", "llama3", "gemma", "tiny"],
)
def test_the_turn_is_what_the_template_puts_around_the_text(template, opening, closing):
    tokenizer = tokenizer_with(template)
    found = opening_turn(tokenizer)
    assert tokenizer.decode(found.opening) == opening
    assert tokenizer.decode(found.closing[:1]) == closing
    before = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the mat"}]
    later = user_turn(tokenizer, before)
    assert "the mat" in tokenizer.decode(later.opening)
    messages = [*before, {"role": "user", "content": "a hat"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == [*later.opening, *tokenizer("a hat").input_ids, *later.closing]


def test_a_turn_that_ends_with_plain_text():
    tokenizer = tokenizer_with(VICUNA)
    found = opening_turn(tokenizer)
    assert tokenizer.decode(found.closing) == " ASSISTANT:"
    end = self_prompts.EndsWith(found.closing)
    assert end(torch.tensor([[1, 2, *found.closing]]), None).tolist() == [True]
    assert end(torch.tensor([[*found.closing, 1]]), None).tolist() == [False]
    assert end(torch.tensor([found.closing[1:]]), None).tolist() == [False]


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("+ m['content'] +", "+ m['content'] | upper +"),
        CHATML.replace("+ m['content'] +", "+ m['content'] + m['content'] +"),
        CHATML.replace("+ m['content'] +", "+ 'of ' ~ m['content'] | length ~ ' letters: ' + m['content'] +"),
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{{ raise_exception('no user') }}",
    ],
    ids=["upper case", "twice", "length first", "nothing around it", "refuses users"],
)
def test_templates_that_open_no_user_turn(template):
    with pytest.raises(UserError, match=r"opens no user turn.*give --prompts FILE"):
        opening_turn(tokenizer_with(template))


def test_a_base_model():
    with pytest.raises(UserError, match=r"no chat template.*base model.*--prompts FILE"):
        opening_turn(tokenizer_with(None))


def test_what_is_dropped_and_why():
    tokenizer = tokenizer_with(TEMPLATE)
    texts = ["the cat", "  ", "The  CAT!", "123 + 4", "half \ufffd", "the hat", "a <|end|> b", "mat", "more"]
    records = {
        place: {"place": place, "ended": place != 5, "ids": tokenizer(text).input_ids, "text": text}
        for place, text in enumerate(texts)
    }
    records[7]["ids"] = [*records[7]["ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    turn = UserTurn([1], [1])
    openings = dict.fromkeys(range(len(texts)), Begun(turn, []))
    kept, counts = select(tokenizer, records, openings, 5)
    assert [each.messages[-1]["content"] for each in kept.values()] == ["the cat", "more"]
    assert counts == Counter({"no text": 4, "used": 2, "empty": 1, "repeated": 1, "cut off": 1})
    asked = [{"role": "user", "content": "more"}]
    assert kept[8].prompt.ids == tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert list(select(tokenizer, records, openings, 1)[0]) == [0]


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.wrap(tiny_chat_model())


WANTED = SelfPrompts(6, max_tokens=24, seed=3)
DRAWN = Sampling(temperature=1.0, seed=2)  # greedy answers of such a model never end
SIZES = {"max_new_tokens": 24, "batch_size": 5, "shard_size": 4, "progress": False, "sampling": DRAWN}


def contents(out: Path) -> dict[str, str]:
    """Files by name; the attempts in the order of their numbers, since they end in another one."""
    found = {file.relative_to(out).as_posix(): file.read_text() for file in sorted(out.rglob("*")) if file.is_file()}
    return {
        name: "\n".join(sorted(text.splitlines(), key=lambda line: json.loads(line)["place"]))
        if name.endswith(self_prompts.PROMPTS)
        else text
        for name, text in found.items()
    }


@pytest.fixture(scope="module")
def unbroken(target: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("unbroken")
    turns = list(distill_self(target, tiny_tokenizer(), out, SelfPrompts(6, max_tokens=24, seed=3, turns=2), **SIZES))
    assert [folder.name for folder, *_ in turns] == [out.name, "turn-2"]
    return contents(out)


def test_attempts_are_sampled_by_their_own_seeds(target: Target, unbroken: dict[str, str]) -> None:
    tokenizer = tiny_tokenizer()
    turn = opening_turn(tokenizer)
    records = [json.loads(line) for line in unbroken["self-prompts.jsonl"].splitlines()]
    base = int(digest("3:self:1"), 16) & 0x7FFFFFFF
    for record in records[:6]:
        sampler = Sampled(row_seeds(base, [record["place"]]), warpers())
        alone = plain_generate(target, [turn.opening], max_new_tokens=24, eos=[1], sampler=sampler).tokens[0]
        assert alone == [*record["ids"], *([1] if record["ended"] else [])]
        assert len(alone) == 24 or record["ended"]


def test_the_answers_are_the_targets_to_these_prompts(target: Target, unbroken: dict[str, str]) -> None:
    tokenizer = tiny_tokenizer()
    records = map(json.loads, unbroken["self-prompts.jsonl"].splitlines())
    texts = {record["prompt"] for record in records if "prompt" in record}
    rows = [json.loads(line) for name in unbroken if name.startswith("shard") for line in unbroken[name].splitlines()]
    assert len(rows) == 6
    for row in rows:
        shown = tokenizer.decode(row["prompt_ids"])
        text = shown.removeprefix("<|bos|><|user|>").removesuffix("<|end|><|assistant|>")
        assert text in texts
        sampler = sampler_for([Prompt(row["id"], row["prompt_ids"])], DRAWN)
        options = {"max_new_tokens": 24, "eos": [1], "sampler": sampler}
        assert [row["answer_ids"]] == plain_generate(target, [row["prompt_ids"]], **options).tokens
    manifest = json.loads(unbroken["manifest.json"])
    assert manifest["source"]["name"] == "self"
    assert manifest["source"]["temperature"] == 1.0
    assert manifest["source"]["counts"]["used"] == 6


def test_the_file_of_attempts_can_be_read_as_prompts(tmp_path: Path, unbroken: dict[str, str]) -> None:
    """By a server's distillation: the same prompts, repeated ones and those without use left out."""
    file = tmp_path / "p.jsonl"
    file.write_text(unbroken["self-prompts.jsonl"])
    found = {prompt.id for prompt in read_prompts(file, tiny_tokenizer()).prompts}
    rows = [json.loads(line) for name in unbroken if name.startswith("shard") for line in unbroken[name].splitlines()]
    assert found >= {row["id"] for row in rows}
    assert len(found) <= sum('"prompt"' in line for line in unbroken["self-prompts.jsonl"].splitlines())


def test_later_turns_go_on_from_the_conversation(unbroken: dict[str, str]) -> None:
    first = {
        row["id"]: row
        for name in unbroken
        if name.startswith("shard")
        for row in map(json.loads, unbroken[name].splitlines())
    }
    later = [
        json.loads(line) for name in unbroken if name.startswith("turn-2/shard") for line in unbroken[name].splitlines()
    ]
    assert later
    for row in later:
        begun = first[row["source"]]
        assert begun["answer_ids"][-1] == 1
        assert row["prompt_ids"][: len(begun["prompt_ids"])] == begun["prompt_ids"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", range(5))
def test_killed_at_each_stage_and_repeated(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, str], stage: int
) -> None:
    """Prompts, answers, second turns, their answers: each is killed after a row."""
    calls, real = [0], self_prompts.plain_generate_many

    def stopping(*args, **options):
        number, calls[0] = calls[0], calls[0] + 1
        for count, found in enumerate(real(*args, **options)):
            if number == stage and count == 1:
                raise Killed
            yield found

    monkeypatch.setattr(self_prompts, "plain_generate_many", stopping)
    monkeypatch.setattr(distill_module, "plain_generate_many", stopping)
    wanted = SelfPrompts(6, max_tokens=24, seed=3, turns=2)
    with pytest.raises(Killed):
        list(distill_self(target, tiny_tokenizer(), tmp_path, wanted, **SIZES))
    monkeypatch.undo()
    for file in tmp_path.rglob("*.jsonl"):
        if "shard" not in file.name:
            with file.open("a") as journal:
                journal.write('{"place": 5, "ids": [1')  # torn
    list(distill_self(target, tiny_tokenizer(), tmp_path, wanted, **SIZES))
    assert contents(tmp_path) == unbroken


def test_more_of_them_and_more_turns_later(target: Target, tmp_path: Path, unbroken: dict[str, str]) -> None:
    list(distill_self(target, tiny_tokenizer(), tmp_path, SelfPrompts(3, max_tokens=24, seed=3), **SIZES))
    before = json.loads(contents(tmp_path)["manifest.json"])["prompts"]
    list(distill_self(target, tiny_tokenizer(), tmp_path, SelfPrompts(6, max_tokens=24, seed=3, turns=2), **SIZES))
    found = contents(tmp_path)
    assert before == 3
    assert {name: text for name, text in found.items() if "shard" in name} == {
        name: text for name, text in unbroken.items() if "shard" in name
    }
    assert len(DistilledDataset.load([tmp_path])) == sum(
        len(text.splitlines()) for name, text in unbroken.items() if "shard" in name
    )


def test_a_folder_of_other_prompts(target: Target, tmp_path: Path) -> None:
    write_prompts(target, tiny_tokenizer(), tmp_path, WANTED, progress=False)
    for change in ({"temperature": 0.5}, {"seed": 4}, {"max_tokens": 9}):
        other = SelfPrompts(**{"limit": 6, "max_tokens": 24, "seed": 3, **change})
        with pytest.raises(UserError, match=f"holds another run: {next(iter(change))} was"):
            write_prompts(target, tiny_tokenizer(), tmp_path, other, progress=False)


def test_a_target_that_writes_nothing_usable(target: Target, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no prompt that can be used in 66 attempts \(0 prompts.*cut off"):
        write_prompts(target, tiny_tokenizer(), tmp_path, SelfPrompts(2, max_tokens=1, seed=8), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --limit"),
        (["--limit", "3", "--server", "http://127.0.0.1:9/v1"], "leave out --server"),
        (["--limit", "3", "--cuts", "1"], "--cuts is about files"),
        (["--limit", "3", "--prompt-temperature", "0"], "give more than 0"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path, capfd) -> None:
    assert main(["distill", "--prompts", "self", "--out", str(tmp_path / "x"), *options]) == 2
    assert message in capfd.readouterr().err


def test_options_of_self_prompts_alone(tmp_path, capfd) -> None:
    arguments = ["distill", "--prompts", "p.jsonl", "--out", str(tmp_path / "x"), "--turns", "2"]
    assert main(arguments) == 2
    assert "give --prompts self as well" in capfd.readouterr().err


@pytest.mark.slow  # three commands twice; each stage of the first one in this process above
def test_three_commands_each_killed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From a chat model to its drafter without a data set, with what an unbroken run leaves."""
    tiny_chat_model().save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target = ["--target", str(tmp_path / "target")]

    def distill(out: Path) -> int:
        options = ["--prompts", "self", "--limit", "6", "--max-prompt-tokens", "24", "--turns", "2", "--seed", "3"]
        options += ["--max-new-tokens", "24", "--temperature", "1.0", "--batch-size", "5", "--shard-size", "4"]
        return main(["distill", *target, *options, "--out", str(out)])

    def train(out: Path) -> int:
        options = ["--steps", "6", "--batch-size", "2", "--anchors", "2", "--set", "progress=no", "--held-out", "0"]
        options += ["--set", "save-every=2", "--set", "warmup-steps=1", "--frames", "3", "--draft-length", "2"]
        return main(["train", *target, "--data", str(out / "answers"), *options, "--out", str(out / "drafter")])

    def generate(out: Path) -> int:
        options = ["--drafter", str(out / "drafter"), "--prompt", "the cat", "--max-new-tokens", "16"]
        return main(["generate", *target, *options])

    def killed(module: object, name: str, calls: int, command: Callable[[Path], int], out: Path) -> None:
        left, real = [calls], getattr(module, name)

        def stopping(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **options)

        monkeypatch.setattr(module, name, stopping)
        with pytest.raises(Killed):
            command(out)
        monkeypatch.undo()

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert distill(unbroken / "answers") == 0
    killed(self_prompts, "decode", 3, lambda out: distill(out / "answers"), broken)
    killed(distill_module.Shards, "add", 3, lambda out: distill(out / "answers"), broken)
    assert distill(broken / "answers") == 0
    assert contents(broken / "answers") == contents(unbroken / "answers")
    assert train(unbroken) == 0
    killed(DrafterTrainer, "anchor_losses", 4, train, broken)
    assert train(broken) == 0
    weights = [load_file(out / "drafter" / "model.safetensors") for out in (unbroken, broken)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    capfd.readouterr()
    killed(Batch, "step", 1, generate, broken)
    capfd.readouterr()
    assert generate(broken) == 0
    answer = capfd.readouterr().out
    assert main(["generate", *target, "--plain", "--prompt", "the cat", "--max-new-tokens", "16"]) == 0
    assert answer == capfd.readouterr().out
