"""Groups of options that several commands share: the model's and an answer's, each declared once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctc_drafter.cli.options import (
    AttnOption,
    AutoDtypeOption,
    BudgetOption,
    DeviceOption,
    DrafterOption,
    EightBitOption,
    FourBitOption,
    RevisionOption,
    SeedOption,
    TargetOption,
    TemperatureOption,
    TemplateArgOption,
    TemplateOption,
    TokenizerOption,
    TopKOption,
    TopPOption,
    TreesOption,
    TrustOption,
    refuse,
    tree_nodes,
)

if TYPE_CHECKING:
    from ctc_drafter.cli.answer import AnswerSettings
    from ctc_drafter.load import Loading
    from ctc_drafter.steps import Steps

PlainOption = Annotated[bool, typer.Option("--plain", help="Decode without a drafter, one token per step.")]


@dataclass(frozen=True)
class ModelOptions:
    """What is decoded, by what it is drafted, and how both are loaded."""

    target: TargetOption = None
    revision: RevisionOption = None
    trust_remote_code: TrustOption = False
    drafter: DrafterOption = None
    tokenizer: TokenizerOption = None
    dtype: AutoDtypeOption = "auto"
    device: DeviceOption = "auto"
    attn: AttnOption = None
    load_in_4bit: FourBitOption = False
    load_in_8bit: EightBitOption = False
    chat_template: TemplateOption = None
    chat_template_arg: TemplateArgOption = None

    def names(self, plain: bool = False) -> tuple[str, str | None]:
        """Target and drafter, those that stand for names left out among them; no drafter for plain decoding."""
        from ctc_drafter.load import default_target, pair

        return (self.target or default_target(), None) if plain else pair(self.target, self.drafter)

    def loading(self, steps: Steps | None = None) -> Loading:
        """How the target is loaded for steps computed in this way. Raises `UserError` for contradictions."""
        from ctc_drafter.load import Loading

        if self.load_in_4bit and self.load_in_8bit:
            refuse("give either --load-in-4bit or --load-in-8bit")
        return Loading(
            self.dtype if steps is None else steps.dtype(self.dtype),
            self.device,
            self.revision,
            self.trust_remote_code,
            self.tokenizer,
            self.attn,
            4 if self.load_in_4bit else 8 if self.load_in_8bit else None,
            self.chat_template,
            tuple(self.chat_template_arg or ()),
        )


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is decoded and sampled."""

    nodes: TreesOption = None
    plain: PlainOption = False
    temperature: TemperatureOption = None
    top_p: TopPOption = None
    top_k: TopKOption = None
    seed: SeedOption = 0
    budget: BudgetOption = False

    def settings(
        self, max_new_tokens: int, batch_size: int = 1, raw: bool = False, stop: Sequence[str] = ()
    ) -> AnswerSettings:
        """Raises `UserError` for contradictions."""
        from ctc_drafter.cli.answer import AnswerSettings

        return AnswerSettings(
            max_new_tokens,
            batch_size,
            tree_nodes(self.nodes),
            raw,
            self.temperature,
            self.top_k,
            self.top_p,
            self.seed,
            tuple(stop),
            self.budget,
        )


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are groups are spread out into their options; typer reads its signature."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    groups: dict[str, Any] = {each.name: each.annotation for each in own if is_dataclass(each.annotation)}

    @functools.wraps(command)
    def run(**options: Any) -> None:
        made = {}
        for name, group in groups.items():
            made[name] = group(**{each.name: options.pop(each.name) for each in fields(group) if each.name in options})
        command(**options, **made)

    parts = [
        inspect.signature(groups[each.name], eval_str=True).parameters.values() if each.name in groups else [each]
        for each in own
    ]
    flat = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in parts for each in part]
    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in flat}
    return run
