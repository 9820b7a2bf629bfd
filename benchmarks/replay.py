"""What chains cost on a small random hybrid: a step's time by drafted and by unread tokens, forwards per token.

`python -m benchmarks.replay` prints both tables for `docs/performance.md`; run it where nothing else runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from benchmarks.family_checks import prompts_of
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.evaluate.exactness import ScriptedDrafter, ScriptedSession
from ctc_drafter.files import markdown_table
from ctc_drafter.target.chain_test import chain_tree
from ctc_drafter.target.model import Target
from ctc_drafter.types import Candidates

UNREAD = (0, 2, 4, 8, 12)  # committed tokens behind the snapshot; beyond 8 it moves on
DRAFTED = (0, 3, 5, 8)
ROUNDS, CONTEXT, LENGTH = 15, 256, 96


def hybrid(kind: str, hidden: int, layers: int) -> Target:
    """A random model of a hybrid type, a quarter of its layers attention."""
    sizes: dict[str, Any] = {
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 128),
        "head_dim": 64,
        "linear_num_key_heads": hidden // 64,
        "linear_num_value_heads": hidden // 64,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    return Target.wrap(transformers.AutoModelForCausalLM.from_config(config).eval())


@torch.inference_mode()
def step_ms(target: Target, unread: int, drafted: int) -> float:
    """Median milliseconds of a verification of so many drafted tokens, with so many unread ones before them."""
    text = prompts_of(target.vocab_size, [CONTEXT + unread + drafted + 1])[0]
    cache = target.new_cache()
    cache.feed(target, [text[:CONTEXT]])
    cache.take()
    cache.settle()
    tree, times = chain_tree(torch.tensor([text[CONTEXT + unread :]])), []
    for turn in range(ROUNDS + 3):
        cache.unread = [text[CONTEXT : CONTEXT + unread]]
        begin = time.perf_counter()
        cache.verify(target, tree)
        cache.undo()
        times += [1e3 * (time.perf_counter() - begin)] if turn >= 3 else []
    return statistics.median(times)


class Path(ScriptedDrafter):
    """Drafts the text alone, without decoys."""

    def begin(self, embed: Any, head: Any, batch_size: int) -> PathSession:
        return PathSession(self, list(range(batch_size)))


class PathSession(ScriptedSession):
    """See `DraftSession`."""

    def levels(self, scripts: torch.Tensor) -> Candidates:
        order = torch.arange(scripts.shape[1]).expand_as(scripts)
        return Candidates(scripts % self.drafter.vocab_size, order - 1, order + 1, -0.01 * order.float())


def forwards_per_token(target: Target, drafted: int, right: int) -> float:
    """Verifications over tokens that they emit, of drafts of which so many tokens are right."""
    prompt = prompts_of(target.vocab_size, [16])
    text = plain_generate(target, prompt, max_new_tokens=LENGTH, eos=()).tokens
    drafter = Path([prompt[0] + text[0]], right, target.vocab_size, drafted)
    found = generate(target, drafter, prompt, max_new_tokens=LENGTH, eos=(), nodes=drafted, min_probability=0.0)
    assert found.tokens == text
    return len(found.accepted[0]) / (LENGTH - 1)


def tables(target: Target) -> str:
    """Both tables as Markdown."""
    size = f"{sum(weight.numel() for weight in target.model.parameters()) / 1e6:.0f} million parameters"
    head = [f"ms, {type(target.model).__name__}, {size}", *(f"{unread} unread" for unread in UNREAD)]
    rows = [(f"{n} drafted", *(f"{step_ms(target, unread, n):.1f}" for unread in UNREAD)) for n in DRAFTED]
    head2, rows2 = ["drafted", "all right", "half right", "1/(1+n)"], []
    for n in DRAFTED[1:]:
        found = (f"{forwards_per_token(target, n, right):.3f}" for right in (n, n // 2))
        rows2.append((str(n), *found, f"{1 / (1 + n):.3f}"))
    return f"{markdown_table(head, rows)}\n\nForwards per token:\n\n{markdown_table(head2, rows2)}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.replay", description="Prints what chains cost.")
    parser.add_argument("--kind", default="qwen3_5_text", help="model type of transformers")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size, a multiple of 128")
    parser.add_argument("--layers", type=int, default=8, help="layers, a multiple of 4")
    given = parser.parse_args(arguments)
    sys.stdout.write(tables(hybrid(given.kind, given.hidden, given.layers)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
