"""What users import: every drafter at the top of the package, lazily, with types; drafters opened by name."""

import ast
import importlib.metadata
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ctc_drafter
import tiny_models
from ctc_drafter import AutoDrafter, PromptLookup, Target, UserError, generate, plain_generate, speculate
from ctc_drafter.drafters.registry import TRAINED, fresh_drafter, method_of
from ctc_drafter.load import load_drafter
from ctc_drafter.train.publish import Made, _use
from helpers import tiny_drafter, tiny_target

TREE = ast.parse(Path(ctc_drafter.__file__).read_text(encoding="utf-8"))
SMALL = {
    "ctc": {"frames": 4, "draft_length": 3, "predictor_rank": 8, "predictor_width": 16},
    "ctc-linear": {"frames": 4, "draft_length": 3, "predictor_rank": 8, "predictor_width": 16},
    "ctc-paper": {"frames": 4, "draft_length": 3},
}


def for_type_checkers() -> dict[str, str]:
    """Public name -> module, as the block for type checkers imports it."""
    block = next(node for node in TREE.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_lists_of_public_names_agree() -> None:
    lazily = {name: f"ctc_drafter.{home}" for name, home in ctc_drafter._HOMES.items()}
    assert lazily == for_type_checkers()
    assert set(ctc_drafter.__all__) == {*lazily, "__version__"}
    assert len(ctc_drafter.__all__) == len(set(ctc_drafter.__all__))
    assert set(dir(ctc_drafter)) >= set(ctc_drafter.__all__)
    for name, home in lazily.items():
        found = getattr(ctc_drafter, name)
        assert getattr(found, "__module__", home) == home, "the place where it is defined"


def test_every_drafter_and_its_config_are_public() -> None:
    for method in TRAINED.values():
        assert getattr(ctc_drafter, method.name) is method.drafter
        assert getattr(ctc_drafter, method.drafter.config_class.__name__) is method.drafter.config_class
    assert {"PromptLookup", "NoDrafter", "AutoDrafter", "DecodingConfig", "Budget", "budget_for"} <= {*dir(ctc_drafter)}


def test_the_version_is_the_installed_one() -> None:
    assert ctc_drafter.__version__ == importlib.metadata.version("ctc-drafter")


def test_type_checkers_know_what_comes_back() -> None:
    for name in ("from_pretrained", "for_target"):
        assert typing.get_type_hints(getattr(ctc_drafter.CTCDrafter, name))["return"] is typing.Self


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'CTCDraft'"):
        ctc_drafter.CTCDraft  # noqa: B018


def test_looking_costs_nothing() -> None:
    code = "import sys, ctc_drafter as c; dir(c); c.__all__; c.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def fresh(model, method: str):
    drafter = fresh_drafter(Target.wrap(model), tiny_models.tiny_tokenizer(), 1, method, **SMALL.get(method, {}))
    return drafter.eval()


@pytest.mark.parametrize("method", TRAINED)
def test_a_card_imports_from_the_top(method: str) -> None:
    drafter = fresh(tiny_models.tiny_llama(), method)
    text = _use(drafter, Made("target", "place", method, "command"))
    block = ast.parse(text.split("```python\n")[1].split("```")[0])
    ours = [node for node in block.body if isinstance(node, ast.ImportFrom) and "ctc_drafter" in str(node.module)]
    assert {node.module for node in ours} == {"ctc_drafter"}
    names = {alias.name for node in ours for alias in node.names}
    assert names == {"speculate", type(drafter).__name__}
    assert names <= {*ctc_drafter.__all__}


# AutoDrafter: whatever `--drafter` opens.


@pytest.mark.parametrize("method", TRAINED)
def test_our_own_folders_open(method: str, tmp_path: Path) -> None:
    model = tiny_models.tiny_llama()
    drafter = fresh(model, method)
    drafter.save_pretrained(tmp_path)
    for name in (str(tmp_path), tmp_path):
        found = AutoDrafter.from_pretrained(name)
        assert type(found) is type(drafter)
        assert not found.training
        assert method_of(found) == method
    expected = drafter.state_dict()
    for target in (model, Target.wrap(model)):
        found = AutoDrafter.from_pretrained(tmp_path, target)
        assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


def test_a_target_gives_device_and_dtype_and_is_checked(tmp_path: Path) -> None:
    model = tiny_models.tiny_llama()
    tiny_models.tiny_drafter(model).save_pretrained(tmp_path)
    half = tiny_models.tiny_llama().to(torch.bfloat16)
    assert AutoDrafter.from_pretrained(tmp_path).dtype == torch.float32
    found = AutoDrafter.from_pretrained(tmp_path, half)
    assert {value.dtype for value in found.parameters()} == {torch.bfloat16}
    other = tiny_target()
    with pytest.raises(UserError, match="made for a target with vocabulary 280, this one has 97"):
        AutoDrafter.from_pretrained(tmp_path, other)
    with pytest.raises(UserError, match="str is no target; give a Target, or a model of transformers"):
        AutoDrafter.from_pretrained(tmp_path, "target")


def test_prompt_lookup_serves_any_target() -> None:
    assert isinstance(AutoDrafter.from_pretrained("prompt_lookup"), PromptLookup)
    assert isinstance(AutoDrafter.from_pretrained("prompt_lookup", tiny_target()), PromptLookup)


def dflash_folder(folder: Path, model) -> torch.nn.Module:
    """As z-lab publishes them: our tensors, their configuration."""
    drafter = fresh(model, "dflash")
    drafter.save_pretrained(folder)
    own = json.loads((folder / "config.json").read_text())
    theirs = {key: own[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")}
    theirs |= {key: own[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")}
    theirs |= {"architectures": ["DFlashDraftModel"], "model_type": "qwen3", "rope_theta": own["rope_theta"]}
    theirs |= {"num_target_layers": own["target_num_layers"], "block_size": own["draft_length"] + 1}
    theirs |= {"max_position_embeddings": own["max_position_embeddings"]}
    theirs["dflash_config"] = {key: own[key] for key in ("target_layer_ids", "mask_token_id")}
    (folder / "config.json").write_text(json.dumps(theirs))
    return drafter


def medusa_folder(folder: Path, model) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    weights = {}
    for head in range(2):
        weights[f"{head}.0.linear.weight"] = torch.randn(hidden, hidden)
        weights[f"{head}.0.linear.bias"] = torch.zeros(hidden)
        weights[f"{head}.1.weight"] = torch.randn(vocabulary, hidden)
    save_file(weights, folder / "medusa_lm_head.safetensors")


@pytest.mark.parametrize("kind", ["dflash", "medusa"])
def test_published_folders_open_with_their_target(kind: str, tmp_path: Path) -> None:
    model, folder = tiny_models.tiny_llama(), tmp_path / kind
    made = {"dflash": dflash_folder, "medusa": medusa_folder}[kind](folder, model)
    with pytest.raises(UserError, match=r"authors' format, and needs its target: AutoDrafter\.from_pretrained"):
        AutoDrafter.from_pretrained(folder)
    for target in (model, Target.wrap(model)):
        found = AutoDrafter.from_pretrained(folder, target)
        assert method_of(found) == kind
        if made is not None:
            assert torch.equal(found.state_dict()["norm.weight"], made.state_dict()["norm.weight"])
    by_command = load_drafter(str(folder), Target.wrap(model), tiny_models.tiny_tokenizer())
    expected = by_command.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    plain = plain_generate(Target.wrap(model), [[5, 6, 7]], max_new_tokens=8).tokens
    assert generate(Target.wrap(model), found, [[5, 6, 7]], max_new_tokens=8).tokens == plain


def test_names_that_hold_no_drafter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no drafter could be loaded from"):
        AutoDrafter.from_pretrained(tmp_path / "missing")
    tiny_models.tiny_llama().save_pretrained(tmp_path / "target")
    with pytest.raises(UserError, match="holds no drafter but a model of type llama"):
        AutoDrafter.from_pretrained(tmp_path / "target")
    with pytest.raises(UserError, match="use from_pretrained"):
        AutoDrafter()


# Drafters that are not where the model is.


def test_drafters_of_another_dtype_or_device_are_named() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target).to(torch.bfloat16)
    with pytest.raises(UserError, match=r"is in bfloat16, the model in float32; call drafter.to\(model.dtype\)"):
        generate(target, drafter, [[3, 1, 4]], max_new_tokens=4)
    assert drafter.dtype == torch.bfloat16, "nothing is moved"
    generate(target, drafter.to(torch.float32), [[3, 1, 4]], max_new_tokens=4)
    part = tiny_drafter(target)
    next(part.children()).to(torch.bfloat16)
    with pytest.raises(UserError, match="bfloat16"):
        generate(target, part, [[3, 1, 4]], max_new_tokens=4)


def test_drafters_without_weights_are_refused() -> None:
    target = tiny_target()
    with torch.device("meta"):
        drafter = tiny_drafter(target)
    with pytest.raises(UserError, match=r"no weights yet, only shapes \(meta device\); load it with"):
        speculate(drafter)
    with pytest.raises(UserError, match="has no weights yet"):
        generate(target, drafter, [[3, 1, 4]], max_new_tokens=4)


def test_a_model_elsewhere_is_named() -> None:
    """As on a machine with a GPU: a stand-in for the model's device, since this test needs none."""

    class Elsewhere:
        device, dtype = torch.device("cuda", 0), torch.float32

    from ctc_drafter.target.checks import check_placement

    with pytest.raises(UserError, match=r"is on cpu, the model on cuda:0; call drafter.to\(model.device\)"):
        check_placement(Elsewhere(), tiny_drafter(tiny_target()))
