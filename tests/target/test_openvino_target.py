"""Targets in OpenVINO: drafts change nothing, bit for bit where weights are integers; what is kept between runs."""

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.families import family_model
from ctc_drafter.cli import main
from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.decode.sampling import Sampled, warpers
from ctc_drafter.files import CACHE
from ctc_drafter.quickstart import DRAFTER_DIR, TARGET_DIR
from ctc_drafter.target import openvino as module
from ctc_drafter.target import openvino_graph
from ctc_drafter.target.model import Target
from ctc_drafter.target.openvino import OpenVINOTarget, openvino_target, plain_steps, tried
from ctc_drafter.types import UserError
from helpers import VOCABULARY, ScriptedDrafter, tiny_drafter, tiny_target

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quiet_tracing")]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1]]
NEW = 12
FAMILIES = [
    "Qwen2",
    "Mistral, sliding",
    "Gemma 2, soft caps",
    "Gemma 3",
    "GPT-2",
    "Falcon, rotary",
    "OLMo 2",
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv(CACHE, str(folder))
    return folder


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(num_hidden_layers=2)


def made_of(target: Target, weights: str) -> OpenVINOTarget:
    return openvino_target(target, weights, tiny_drafter(target).feature_layers)


def text(count: int) -> list[int]:
    return torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("weights", ["f32", "int8"])
def test_drafts_change_nothing(target, weights):
    """One by one, and rows of different lengths that leave and join; a text that crosses the first block of slots."""
    made = made_of(target, weights)
    prompts = [*PROMPTS, text(250)]
    expected = plain_generate(made, prompts[:1], max_new_tokens=NEW).tokens
    expected += [plain_generate(made, [each], max_new_tokens=NEW).tokens[0] for each in prompts[1:]]
    scripts = [p + t for p, t in zip(prompts, expected, strict=True)]
    for drafter in (ScriptedDrafter(scripts, (4, 0, 3)), tiny_drafter(target)):
        assert [generate(made, drafter, [p], max_new_tokens=NEW, nodes=8).tokens[0] for p in prompts] == expected
        assert generate(made, drafter, prompts, max_new_tokens=NEW, nodes=8).tokens == expected
        many = dict(generate_many(made, drafter, prompts, in_flight=2, max_new_tokens=NEW, nodes=8))
        assert [many[place] for place in range(len(prompts))] == expected


def test_float32_writes_what_the_model_writes(target):
    expected = plain_generate(target, PROMPTS, max_new_tokens=NEW).tokens
    assert plain_generate(made_of(target, "f32"), PROMPTS, max_new_tokens=NEW).tokens == expected


def test_trees_round_as_plain_steps_bit_for_bit(target, monkeypatch):
    errors = []
    monkeypatch.setattr(module, "difference", lambda *pair: errors.append(torch.equal(*pair)) or 0.0)
    tried(made_of(target, "int8"))
    assert errors[-2:] == [True, False]  # as plain steps; not as the model in float32


def test_sampled_drafts_change_nothing(target):
    made = made_of(target, "int8")
    options = {"max_new_tokens": NEW, "nodes": 8}
    tokens = []
    for size in (0, 4):
        sampler = Sampled([1, 2, 3], warpers(temperature=0.8))
        tokens.append(generate(made, ScriptedDrafter(PROMPTS, (size,)), PROMPTS, sampler=sampler, **options).tokens)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """Biases, windows with masks of their own, learned positions with transposed weights, partial rotation."""
    target = Target.wrap(family_model(family))
    made = openvino_target(target, "f32")
    assert (
        plain_generate(made, PROMPTS, max_new_tokens=NEW).tokens
        == plain_generate(target, PROMPTS, max_new_tokens=NEW).tokens
    )
    rounded = openvino_target(target, "int8")
    expected = plain_generate(rounded, PROMPTS, max_new_tokens=NEW).tokens
    drafter = ScriptedDrafter([p + t for p, t in zip(PROMPTS, expected, strict=True)], (3,))
    assert generate(rounded, drafter, PROMPTS, max_new_tokens=NEW, nodes=8).tokens == expected


def folders(place: Path) -> list[str]:
    """Kept graphs and what is left of some, without locks."""
    return [each.name for each in place.iterdir() if each.suffix != ".lock"]


def test_a_converted_target_is_kept_whole(target, cache, monkeypatch, caplog):
    caplog.set_level("INFO", "ctc_drafter")
    shutil.rmtree(cache, ignore_errors=True)
    expected = plain_generate(made_of(target, "int8"), PROMPTS, max_new_tokens=NEW).tokens
    (kept,) = (cache / openvino_graph.FOLDER / name for name in folders(cache / openvino_graph.FOLDER))
    made = openvino_graph.converted
    monkeypatch.setattr(openvino_graph, "converted", lambda *_: pytest.fail("converted again"))
    assert plain_generate(made_of(target, "int8"), PROMPTS, max_new_tokens=NEW).tokens == expected
    monkeypatch.setattr(openvino_graph, "converted", made)
    (kept / openvino_graph.NAME).write_text("<net")
    assert plain_generate(made_of(target, "int8"), PROMPTS, max_new_tokens=NEW).tokens == expected
    assert "converting it again" in caplog.text
    assert folders(kept.parent) == [kept.name]
    # Another model, other weights: another folder.
    made_of(tiny_target(seed=1, num_hidden_layers=2), "int8")
    made_of(target, "f32")
    assert len(folders(kept.parent)) == 3


def test_a_cache_folder_that_cannot_be_written_costs_time_only(target, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "ctc_drafter")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    assert plain_steps(made_of(target, "int8"), torch.tensor([3, 1, 4]), 2).shape == (1, VOCABULARY)
    assert "could not be kept" in caplog.text


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (tiny_target(dtype=torch.bfloat16), "float32 target on the CPU; give --dtype float32"),
        (tiny_target(attn_implementation="eager"), None),
    ],
    ids=["bfloat16", "eager"],
)
def test_targets_that_do_not_go(target, words):
    if words is None:
        assert openvino_target(target, "f32").engine == "OpenVINO f32"
        return
    with pytest.raises(UserError, match=words):
        openvino_target(target)


def test_what_cannot_be_converted_is_named():
    with pytest.raises(UserError, match=r"MixtralForCausalLM cannot be converted \(no conversion rule .*grouped_mm"):
        openvino_target(Target.wrap(family_model("Mixtral")), "f32")


def test_a_drafter_of_other_blocks_is_refused(target):
    made = openvino_target(target, "f32")
    with pytest.raises(UserError, match=r"no features of blocks .*layers=\.\.\."):
        generate(made, tiny_drafter(target), PROMPTS, max_new_tokens=4)


def test_the_command(capsys):
    arguments = ["--target", str(TARGET_DIR), "--drafter", str(DRAFTER_DIR), "--prompt", "What is 2 x 3?"]
    arguments += ["--max-new-tokens", "16", "--temperature", "0", "--openvino", "int8"]
    main(["generate", *arguments])
    drafted = capsys.readouterr().out
    main(["generate", *arguments, "--plain"])
    assert capsys.readouterr().out == drafted != ""


def test_one_way_to_compute_steps_at_a_time(capsys):
    assert main(["generate", "--prompt", "Hi", "--openvino", "f32", "--exact"]) == 2
    assert "only one of --compile, --exact and --openvino" in capsys.readouterr().err
    assert main(["generate", "--prompt", "Hi", "--openvino", "f32", "--dtype", "bfloat16"]) == 2
    assert "leave out --dtype bfloat16" in capsys.readouterr().err
