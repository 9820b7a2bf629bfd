"""What a draft costs: floating-point operations of its matrix products, and the measured time, beside parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.copying import innermost
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.trainable import TrainableDrafter, network_of
from ctc_drafter.files import number
from ctc_drafter.target.model import Target

CONTEXT, ACCEPTED, NODES = 64, 4, 16  # of the draft that is counted


def own_text(target: Target) -> list[int]:
    """What the target writes by itself, `CONTEXT + ACCEPTED + 1` tokens: a text after which drafters are as sure as
    they usually are."""
    start = min(100, target.vocab_size - 1)
    return [start, *plain_generate(target, [[start]], max_new_tokens=CONTEXT + ACCEPTED).tokens[0]]


@torch.no_grad()
def draft_flops(target: Target, drafter: Drafter, text: Sequence[int]) -> int | None:
    """Operations (two for a multiplication and its addition) of one draft by the network, copies left out.

    Counted are matrix products and attention of a draft of `NODES` nodes after the text (`own_text`), taking in its
    `ACCEPTED` newest tokens; and the products of the compiled searches, which are known by their sizes. What runs again
    for each level of a tree (heads, EAGLE's layer) is counted as often as it ran. None without a network.
    """
    network = network_of(innermost(drafter))
    if not isinstance(network, TrainableDrafter):
        return None
    tokens = torch.tensor([list(text)], device=target.device)
    features = target.hidden_features(tokens[:, :-1], network.feature_layers)
    context = tokens.shape[1] - 1 - ACCEPTED
    session = network.begin(*target.draft_modules, 1)

    def told(start: int, end: int) -> None:
        count = torch.tensor([end - start], device=target.device)
        session.extend(tokens[:, start:end], features[:, start:end], count)

    told(0, context)
    session.propose(tokens[:, context], NODES, 0.0)
    told(context, context + ACCEPTED)
    # Other kernels of attention are not counted, nor are packed products by themselves.
    packed = {torch.ops.mkldnn._linear_pointwise: packed_flops} if torch.backends.mkldnn.is_available() else {}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=packed) as counter:
        session.propose(tokens[:, -1], NODES, 0.0)
    return int(counter.get_total_flops()) + (searched(network) if target.device.type == "cpu" else 0)


def packed_flops(states: torch.Size, blocks: torch.Size, *_: Any, **_named: Any) -> int:
    """Operations of `PackedLinear`'s product of states `[..., in]` with weights `[out, in]`."""
    return 2 * states.numel() * blocks[0]


def searched(drafter: TrainableDrafter) -> int:
    """Operations of the searches in `ctc/search_cpu.py` for `NODES` expansions, which no counter sees.

    Each expansion takes, for each token, the bias of a prefix (`predictor_rank` products and the MLP), the normaliser
    and the children's sum, one product a frame each, and the joint terms; without blanks one frame is left to ask.
    """
    config: Any = drafter.config
    rank, width = getattr(config, "predictor_rank", 0), getattr(config, "predictor_width", 0)
    if isinstance(drafter, CTCDrafter):
        columns, frames = config.draft_vocab_size or config.vocab_size, config.frames
    elif hasattr(drafter, "predictor"):
        columns, frames = config.vocab_size, 1
    else:
        return 0
    joint_rank = getattr(config, "joint_rank", 0)
    joint = joint_rank * (width + frames * config.joint_tokens) if getattr(config, "joint_tokens", 0) else 0
    return 2 * NODES * (columns * (rank + 2 * frames) + rank * width + joint)


def costs(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """A line for each drafter of a result of `bench`: name, parameters, operations and milliseconds of a draft,
    learning rate."""
    for name, facts in result["meta"].get("drafters", {}).items():
        parameters, flops, rate = (facts.get(key) for key in ("parameters", "draft_flops", "learning_rate"))
        yield [
            name,
            f"{parameters / 1e6:.2f} M" if parameters else "none",
            f"{flops / 1e6:.0f} M" if flops else "-",
            number(draft_ms(result, name), 2),
            f"{rate:g}" if rate else "-",
        ]


def draft_ms(result: Mapping[str, Any], method: str) -> float | None:
    """Milliseconds of a verification that drafting took, the mean over tasks, in trees of `NODES` nodes or else of the
    size that was measured last."""
    rows = [row for row in result["rows"] if row["method"] == method and "draft" in row.get("stages_ms", {})]
    if not rows:
        return None
    size = NODES if any(row["nodes"] == NODES for row in rows) else rows[-1]["nodes"]
    found = [float(row["stages_ms"]["draft"]) for row in rows if row["nodes"] == size]
    return sum(found) / len(found)


def cost_table(result: Mapping[str, Any]) -> Table:
    """`costs` for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("drafter", no_wrap=True)
    for name in ("parameters", "FLOPs/draft", "draft ms", "learning rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in costs(result):
        table.add_row(*line)
    return table
