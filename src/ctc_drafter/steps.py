"""How a target's decoding steps are computed: by PyTorch, compiled, exact, or in OpenVINO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctc_drafter.decode.batch import AUTO, Nodes
from ctc_drafter.decode.profile import reach
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.load import said_if_slow
from ctc_drafter.target.model import Target
from ctc_drafter.target.packed import unpack
from ctc_drafter.types import UserError


@dataclass(frozen=True)
class Steps:
    """compiled: with `compile_target`; exact: with `exact_target`; openvino: weights for `openvino_target`.

    Raises `UserError` for more than one of them.
    """

    compiled: bool = False
    exact: bool = False
    openvino: str | None = None

    def __post_init__(self) -> None:
        if self.compiled + self.exact + bool(self.openvino) > 1:
            raise UserError("give only one of --compile, --exact and --openvino")

    def dtype(self, wanted: str) -> str:
        """The dtype to load the target in; OpenVINO reads float32 weights, whatever it makes of them."""
        if self.openvino and wanted not in ("auto", "float32"):
            raise UserError(f"--openvino reads weights in float32; leave out --dtype {wanted}")
        return "float32" if self.openvino else wanted

    def of(self, target: Target, drafters: Sequence[Drafter], nodes: Nodes, rows: int) -> Target:
        """The target with its steps computed so, made ready now for these drafters, and for up to `nodes` nodes and
        `rows` rows; without drafters for plain decoding."""
        if self.compiled:
            return compiled(target, drafters, most_nodes(nodes, target), rows)
        if self.exact:
            from ctc_drafter.target.exact import exact_target

            unpack(target.model)
            return exact_target(target)
        if self.openvino:
            return in_openvino(target, drafters, self.openvino, most_nodes(nodes, target))
        return target


def most_nodes(nodes: Nodes, target: Target) -> int:
    """Nodes of the largest tree that may be verified."""
    return reach(target) if nodes == AUTO else nodes


def compiled(target: Target, drafters: Sequence[Drafter], nodes: int, rows: int) -> Target:
    """The target with graphs of `torch.compile`; drafters may ask for features of different layers."""
    from ctc_drafter.target.compiled import compile_target

    layers = list(dict.fromkeys(tuple(drafter.feature_layers) for drafter in drafters)) or [()]
    with said_if_slow("compiling the target's steps ..."):
        made = compile_target(target, layers[0])
        for each in layers:
            made.prepare(nodes if drafters else 0, rows, each)
    return made


def in_openvino(target: Target, drafters: Sequence[Drafter], weights: str, nodes: int) -> Target:
    """The target in OpenVINO, with weights of this type."""
    from ctc_drafter.target.openvino import openvino_target

    with said_if_slow("converting the target for OpenVINO ..."):
        made = openvino_target(target, weights, [layer for drafter in drafters for layer in drafter.feature_layers])
        made.prepare(nodes if drafters else 0)
    return made
