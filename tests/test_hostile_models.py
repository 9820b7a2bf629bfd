"""Models, templates and drafters that were made to hurt: one line that names the fix, no traceback, no hang."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctc_drafter.chat import apply_template, check_template_ends, encode_conversation, eos_ids
from ctc_drafter.cli import main
from ctc_drafter.drafters.ctc import CTCDrafter, CTCDrafterConfig
from ctc_drafter.drafters.registry import open_drafter
from ctc_drafter.drafters.warm_start import read_start
from ctc_drafter.files import disk_errors
from ctc_drafter.load import load_config, load_target
from ctc_drafter.types import UserError
from tiny_models import save_pair, tiny_drafter, tiny_llama, tiny_tokenizer

BAD_TEMPLATES = [
    "{{ 1 / 0 }}",
    "{{ range(10**9) }}",
    "{{ messages + 1 }}",
    "{{ messages[9].content.x }}",
    "{{ messages[0]['content'] * -1.5 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ ''.__class__.__mro__ }}",
    "{% if %}",
    "{{ raise_exception('no') }}",
    "{{ messages | sort(attribute=7) | join(1) | nothing }}",
    "{{ '%d' % 'x' }}",
    "{{ 10**400 * 1.5 }}",
]
# A second or two: nothing can end the thread, and one that took years would slow the tests behind it.
LONG = "{% for i in range(99999) %}{% for i in range(300) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_templates_that_fail_are_one_line(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    with pytest.raises(UserError, match="the chat template refuses") as raised:
        encode_conversation(tokenizer, ["hi"])
    assert "\n" not in str(raised.value)


def test_templates_that_do_not_end_are_one_line() -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"does not end.*--chat-template"):
        check_template_ends(tiny_tokenizer(LONG), seconds=0.1)
    assert time.monotonic() - begin < 5
    check_template_ends(tiny_tokenizer(), seconds=5)
    check_template_ends(tiny_tokenizer("{{ 1 / 0 }}"), seconds=5)  # said when it is used
    check_template_ends(tiny_tokenizer(None), seconds=5)


def test_a_template_that_works_is_not_changed() -> None:
    messages = [{"role": "user", "content": "the cat"}]
    tokenizer = tiny_tokenizer()
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert apply_template(tokenizer, messages) == list(expected)


@pytest.mark.parametrize("listed", ["x", [1, "x"], 1.5, {"a": 1}, [[1]], True])
def test_end_tokens_that_are_none_are_one_line(listed: object) -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = listed
    with pytest.raises(UserError, match="eos_token_id"):
        eos_ids(model, tiny_tokenizer())


def test_end_tokens_of_a_folder(tmp_path: Path) -> None:
    target, _ = save_pair(tmp_path)
    (target / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(UserError) as raised:
        load_config(str(target))
    assert "\n" not in str(raised.value)


@pytest.mark.timeout(60)
def test_a_hundred_thousand_layers_are_refused_at_once(tmp_path: Path) -> None:
    target, drafter = save_pair(tmp_path)
    for folder in (target, drafter):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 100_000}))
    for load in (
        lambda: load_target(str(target), "float32", "cpu"),
        lambda: load_config(str(target)),
        lambda: open_drafter(str(drafter)),
    ):
        with pytest.raises(UserError, match="100000"):
            load()


# Drafters.


@pytest.mark.parametrize("change", ["beyond", "negative", "twice"])
def test_a_draft_vocabulary_with_wrong_tokens_is_refused(change: str, tmp_path: Path) -> None:
    drafter = tiny_drafter(tiny_llama()).pruned(torch.arange(0, 200, 2))
    drafter.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["d2t"] = {
        "beyond": tensors["d2t"] + 200,
        "negative": tensors["d2t"] - 50,
        "twice": tensors["d2t"] - 2 * (torch.arange(100) == 1),
    }[change]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="d2t"):
        open_drafter(str(tmp_path))


def test_a_draft_vocabulary_in_another_order_is_taken(tmp_path: Path) -> None:
    tiny_drafter(tiny_llama()).pruned(torch.arange(0, 200, 2)).save_pretrained(tmp_path)
    found = open_drafter(str(tmp_path))
    assert isinstance(found, CTCDrafter)
    assert found.vocabulary is not None
    assert found.vocabulary.tolist() == list(range(0, 200, 2))


@pytest.mark.parametrize("sizes", [{"draft_length": 10**9, "frames": 10**9}, {"num_hidden_layers": 10**6}])
def test_absurd_sizes_of_a_drafter_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at most"):
        CTCDrafterConfig(**sizes)


OUTPUT, RESIDUAL = torch.zeros(280, 64), torch.zeros(64, 64)


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        [OUTPUT],
        OUTPUT,
        {"0.0.linear.weight": RESIDUAL, "0.1.weight": torch.tensor(1.0)},
        {"1.0.linear.weight": RESIDUAL, "1.1.weight": OUTPUT},
        {"0.0.linear.weight": RESIDUAL, "0.1.weight": "text"},
        {"0.0.linear.weight": RESIDUAL, "0.1.weight": OUTPUT, "2.1.weight": OUTPUT},
        {0: OUTPUT},
        {},
    ],
)
def test_medusa_files_that_are_none_are_one_line(content: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 1}')
    file = tmp_path / "medusa_lm_head.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError) as raised:
        read_start(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)


# Disks.


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        pytest.param("safetensors", id="safetensors"),
        OSError(28, "No space left on device"),
    ],
)
def test_full_disks_are_one_line_whatever_library_writes(error, tmp_path: Path) -> None:
    from safetensors import SafetensorError

    error = (
        SafetensorError("Error while serializing: I/O error: No space left on device")
        if error == "safetensors"
        else error
    )
    with pytest.raises(UserError, match="cannot write to"), disk_errors(tmp_path):
        raise error


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), disk_errors(tmp_path):
        raise RuntimeError("shapes cannot be multiplied")


def test_an_export_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch, capfd) -> None:
    from safetensors import SafetensorError

    from ctc_drafter.integrations import export as module

    target, drafter = save_pair(tmp_path)
    names = ["export", "--target", str(target), "--drafter", str(drafter), "--out"]
    (tmp_path / "file").write_text("")
    assert main([*names, str(tmp_path / "file" / "x")]) == 2
    assert "cannot write" in capfd.readouterr().err

    def full(*_: object) -> None:
        (tmp_path / "out" / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    assert main([*names, str(tmp_path / "out")]) == 2
    assert "No space left" in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir()), "the same command may run again"
