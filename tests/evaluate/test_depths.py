"""Shorter drafts on the same weights: no prefix is longer, output stays, and the best depth is found."""

import json
from pathlib import Path

import pytest
import torch

from ctc_drafter.cli import main
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.drafters.base import Drafter, NoDrafter
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import TRAINED, trained_method
from ctc_drafter.evaluate.bench import Entry, at_depths, parse_depths, shortened
from ctc_drafter.evaluate.report_page import page
from ctc_drafter.evaluate.results import read_results
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from tiny_models import save_pair, tiny_drafter, tiny_llama

SIZES = {"frames": 5, "draft_length": 5}
PROMPTS = [[5, 9, 2, 7, 5, 9, 2], [3, 4]]


@torch.inference_mode()
def deepest(target: Target, drafter: Drafter) -> int:
    """The longest of more prefixes than there are of one token."""
    state = prefill(target, PROMPTS, drafter.feature_layers)
    session = drafter.begin(target.embed, target.head, len(PROMPTS))
    session.extend(state.tokens, state.features, state.lengths)
    return int(session.propose(state.logits.argmax(-1), 400, 0.0).depths.max())


@pytest.mark.sparing(2)
@pytest.mark.parametrize("name", TRAINED)
def test_no_prefix_is_longer_and_output_stays(name: str) -> None:
    target = Target.wrap(tiny_llama())
    kind = trained_method(name).drafter
    known = kind.config_class.__dataclass_fields__
    sizes = {key: size for key, size in SIZES.items() if key in known}
    torch.manual_seed(0)
    drafter = kind.for_target(target.config, **sizes).eval()
    plain = plain_generate(target, PROMPTS, max_new_tokens=12)
    assert deepest(target, drafter) > 1
    for depth in (1, 3, 5):
        shorter = shortened(drafter, depth)
        assert deepest(target, shorter) <= depth
        found = generate(target, shorter, PROMPTS, max_new_tokens=12, nodes=12, min_probability=0.0)
        assert found.tokens == plain.tokens
    assert drafter.config.draft_length == 5
    assert generate(target, drafter, PROMPTS, max_new_tokens=12, nodes=12, min_probability=0.0).tokens == plain.tokens


@pytest.mark.parametrize("name", ["dflash", "dspark", "ctc"])
def test_blocks_with_convolutions_can_be_shorter(name: str) -> None:
    target = Target.wrap(tiny_llama())
    torch.manual_seed(0)
    drafter = trained_method(name).drafter.for_target(target.config, draft_length=5, convolution=True).eval()
    plain = plain_generate(target, PROMPTS, max_new_tokens=8)
    found = generate(target, shortened(drafter, 3), PROMPTS, max_new_tokens=8, nodes=12, min_probability=0.0)
    assert found.tokens == plain.tokens


def test_entries() -> None:
    drafter = tiny_drafter(tiny_llama())
    own = drafter.config.draft_length
    entries = {"ours": Entry(drafter, {"method": "ctc"}), "prompt_lookup": Entry(PromptLookup(), {})}
    found = at_depths(entries, (1, own, own + 1))
    assert list(found) == [
        "ours, depth 1", f"ours, depth {own}", *(f"prompt_lookup, depth {depth}" for depth in (1, own, own + 1))
    ]  # fmt: skip
    assert found["ours, depth 1"].facts == {"method": "ctc", "of": "ours", "draft_length": 1}
    assert at_depths(entries, ()) == entries
    with pytest.raises(UserError, match=f"ours drafts {own} tokens at most"):
        at_depths(entries, (99,))
    with pytest.raises(UserError, match="NoDrafter has no depth"):
        at_depths({"silent": Entry(NoDrafter(), {})}, (1,))


def test_parse() -> None:
    assert parse_depths("3, 5,3") == (3, 5)
    assert parse_depths("") == ()
    for text in ("0", "x", "-1"):
        with pytest.raises(UserError, match=f"--depths {text} is no depth"):
            parse_depths(text)


@pytest.mark.slow
def test_command_and_page(tmp_path: Path) -> None:
    target, drafter = save_pair(tmp_path)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "bench-depths.json"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "mat"}\n')
    options = ["--target", str(target), "--drafter", f"ours={drafter}", "--drafter", "prompt_lookup"]
    options += ["--tasks", str(prompts), "--nodes", "4", "--max-new-tokens", "8", "--depths", "1,2", "--copies", "own"]
    assert main(["bench", *options, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["method"] for row in result["rows"]][1:] == [
        "ours, depth 1", "ours, depth 2", "prompt_lookup, depth 1", "prompt_lookup, depth 2"
    ]  # fmt: skip
    text = page(read_results([out]))
    best = max((row for row in result["rows"] if row["method"].startswith("ours")), key=lambda row: row["gamma"])
    assert f"| ours | {best['method'][-1]} | {best['gamma']:.2f} | " in text
