"""How `--dtype auto`, `--device`, `--attn`, adapters and variables of templates load a target."""

from __future__ import annotations

import json
import logging
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ctc_drafter.chat import apply_template
from ctc_drafter.cli import main
from ctc_drafter.load import (
    Loading,
    chosen_device,
    keep_quiet,
    load_config,
    load_pair,
    load_target,
    read_template,
    said_if_slow,
)
from ctc_drafter.steps import Steps
from ctc_drafter.target.checks import cpu_dtype
from ctc_drafter.types import UserError, missing_extra
from helpers import tiny_target
from tiny_models import save_pair, tiny_llama, tiny_tokenizer


def products(monkeypatch: pytest.MonkeyPatch, avx: bool, amx: bool) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(
    ("stored", "avx", "amx", "expected"),
    [
        ("bfloat16", False, False, "float32"),
        ("bfloat16", True, False, "bfloat16"),
        ("bfloat16", False, True, "bfloat16"),
        ("float16", True, True, "float32"),  # bfloat16 has fewer bits
        ("float32", True, True, "float32"),
    ],
)
def test_auto_on_a_cpu(stored: str, avx: bool, amx: bool, expected: str, tmp_path: Path, monkeypatch) -> None:
    """bfloat16 where the weights are in it and the CPU multiplies in it."""
    tiny_llama().to(getattr(torch, stored)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    products(monkeypatch, avx, amx)
    target, _ = load_target(str(tmp_path), "auto", "cpu")
    assert str(target.dtype) == f"torch.{expected}"


def test_auto_of_a_config_that_names_no_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    products(monkeypatch, True, True)
    config = tiny_llama().config
    config.dtype = None
    assert cpu_dtype(config) == torch.float32


def test_auto_elsewhere_is_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU transformers reads the dtype from the checkpoint; the same call here, as no GPU is needed to load."""
    from ctc_drafter.target.checks import load_causal_lm

    tiny_llama().to(torch.float16).save_pretrained(tmp_path)
    assert load_causal_lm(str(tmp_path), "cuda", dtype="auto").dtype == torch.float16


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("tpu9", "tpu9 is no device; give auto, cpu, cuda, cuda:1, mps"),
        ("cuda:one", "cuda:one is no device"),
        ("meta", "the meta device holds no weights"),
        ("xpu", "this machine offers no device xpu"),
        pytest.param("cuda:1", "this machine offers no CUDA device; use --device cpu",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one")),
        pytest.param("mps", "this machine offers no device mps",
                     marks=pytest.mark.skipif(sys.platform == "darwin", reason="may have one")),
    ],
)  # fmt: skip
def test_devices_that_are_not_there(device: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        chosen_device(device)
    assert "\n" not in str(caught.value)


def test_devices_that_are_there() -> None:
    assert (chosen_device("cpu"), chosen_device("cpu:0")) == ("cpu", "cpu:0")
    assert chosen_device("auto") in ("cpu", "cuda")


def test_attention_kernel_and_the_line_that_says_what_decodes(tmp_path: Path, caplog, monkeypatch) -> None:
    target, drafter = save_pair(tmp_path)
    with caplog.at_level("INFO"):
        lm, _, draft = load_pair(str(target), str(drafter), Loading(attn="eager", device="cpu"))
    assert lm.model.config._attn_implementation == "eager"
    assert draft is not None
    assert caplog.messages[-1] == f"{target}, float32, cpu"
    assert load_pair(str(target), None, Loading(device="cpu"))[0].model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("bits", ["4", "8"])
def test_bits_need_a_library(bits: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["generate", "--prompt", "a", f"--load-in-{bits}bit"]) == 2
    err = capsys.readouterr().err
    assert err == f"error: --load-in-{bits}bit needs bitsandbytes; pip install bitsandbytes\n"


def test_bits_are_one_or_the_other(capsys) -> None:
    assert main(["generate", "--prompt", "a", "--load-in-4bit", "--load-in-8bit"]) == 2
    assert capsys.readouterr().err == "error: give either --load-in-4bit or --load-in-8bit\n"


def test_bits_are_a_quantization_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    options = Loading(bits=4, device="cpu").options()
    assert options["quantization_config"].load_in_4bit
    assert options["device_map"] == {"": "cpu"}
    assert Loading(bits=8, device="cpu").options()["quantization_config"].load_in_8bit


# LoRA adapters.


def save_adapter(folder: Path, base: Path, rank: int = 2) -> dict[str, torch.Tensor]:
    """A folder as peft writes it, for the query projections; its weights by the module's name in the base."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0}
    config |= {
        "base_model_name_or_path": str(base),
        "target_modules": ["q_proj"],
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model, weights, deltas = tiny_llama(), {}, {}
    torch.manual_seed(3)
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            out, into = module.weight.shape
            a, b = torch.randn(rank, into), torch.randn(out, rank)
            weights |= {f"base_model.model.{name}.lora_{x}.weight": w for x, w in (("A", a), ("B", b))}
            deltas[f"{name}.weight"] = 2 * b @ a
    save_file(weights, folder / "adapter_model.safetensors")
    return deltas


def test_an_adapter_folder_is_base_and_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base, _ = save_pair(tmp_path)
    deltas = save_adapter(tmp_path / "adapter", base)
    merged = tiny_llama()
    state = merged.state_dict()
    merged.load_state_dict(state | {name: state[name] + delta for name, delta in deltas.items()})
    target, tokenizer = load_target(str(tmp_path / "adapter"), "float32", "cpu")
    ids = torch.tensor([tokenizer("the cat sat on the mat").input_ids])
    with torch.no_grad():
        found, expected, without = (model(ids).logits for model in (target.model, merged, tiny_llama()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, without, atol=1e-2)


def test_an_adapter_without_peft_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = save_pair(tmp_path)
    save_adapter(tmp_path / "adapter", base)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        load_target(str(tmp_path / "adapter"), "float32", "cpu")
    assert missing_extra(caught.value) == "a LoRA adapter needs peft; pip install 'ctc-drafter[lora]'"


def test_config_and_tokenizer_of_an_adapter_are_its_bases(tmp_path: Path) -> None:
    base, _ = save_pair(tmp_path)
    save_adapter(tmp_path / "adapter", base)
    config, tokenizer, ends = load_config(str(tmp_path / "adapter"))
    assert (config.model_type, tokenizer.chat_template, ends) == ("llama", tiny_tokenizer().chat_template, (1,))


def test_an_adapter_that_names_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="names no base_model_name_or_path"):
        load_target(str(tmp_path), "float32", "cpu")


# Variables of chat templates.

THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}<think>{% endif %}{{ depth }}"


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ([], "x"),
        (["enable_thinking=true"], "x<think>"),
        (["enable_thinking=false"], "x"),
        (["enable_thinking=yes", "depth=3"], "x<think>3"),
        (['depth="a b"'], "xa b"),
        (["depth=a=b"], "xa=b"),
    ],
)
def test_variables_are_defaults_of_the_template(variables: list[str], text: str) -> None:
    tokenizer = tiny_tokenizer(THINKS)
    read_template(tokenizer, None, variables)
    ask = [{"role": "user", "content": "x"}]
    assert tokenizer.decode(apply_template(tokenizer, ask)) == text
    assert tokenizer.decode(apply_template(tokenizer, ask, options={"depth": 7, "enable_thinking": False})) == "x7"


@pytest.mark.parametrize(
    ("variable", "line"),
    [
        ("thinking", "is no variable; write NAME=VALUE"),
        ("a b=1", "is no variable"),
        ("think=1", "has no variable think"),
        ("depth=[1]", "is neither text, number, true nor false"),
        ("depth=null", "is neither text"),
    ],
)
def test_variables_that_would_be_ignored(variable: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        read_template(tiny_tokenizer(THINKS), None, [variable])


def test_a_line_of_the_hub_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own handler, and not by the root's as well."""
    hub, told, roots = logging.getLogger("huggingface_hub"), [], logging.Handler()
    assert hub.handlers
    roots.emit = told.append  # type: ignore[method-assign]
    monkeypatch.setattr(hub, "propagate", True)
    monkeypatch.setattr(logging.root, "handlers", [roots])
    logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
    assert len(told) == 1
    keep_quiet()
    logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
    assert len(told) == 1


def test_compiling_is_no_silent_wait(monkeypatch, caplog):
    caplog.set_level("INFO", "ctc_drafter")
    monkeypatch.setattr("ctc_drafter.steps.said_if_slow", partial(said_if_slow, seconds=0.0))
    monkeypatch.setattr("ctc_drafter.target.compiled.compile_target", lambda *_: SlowlyPrepared(caplog))
    Steps(compiled=True).of(tiny_target(), [], 0, 1)
    assert caplog.messages == ["compiling the target's steps ..."]


class SlowlyPrepared:
    """A target whose graphs are ready once the log has a line."""

    def __init__(self, log):
        self.log = log

    def prepare(self, *_):
        end = time.monotonic() + 60
        while not self.log.messages and time.monotonic() < end:
            time.sleep(0.01)
