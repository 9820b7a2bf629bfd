"""The command that hands a drafter to other engines. As in `cli`, the work is imported when it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ctc_drafter.options import DrafterOption, DtypeOption, TargetOption, refuse


def export(
    out: Annotated[Path, typer.Option("--out", help="New folder for the exported drafter.")],
    target: TargetOption = None,
    drafter: DrafterOption = None,
    layout: Annotated[Literal["speculators"], typer.Option("--format", help="How engines read it.")] = "speculators",
    width: Annotated[int, typer.Option("--width", min=1, help="Prefixes of each length that a search keeps.")] = 8,
    dtype: DtypeOption = "bfloat16",
) -> None:
    """Writes a drafter as vLLM and SGLang load it, with our plugin: vllm serve OUT."""
    import torch

    from ctc_drafter.chat import fingerprint
    from ctc_drafter.drafters.ctc import CTCDrafter
    from ctc_drafter.drafters.registry import open_drafter
    from ctc_drafter.integrations.speculators import export as write
    from ctc_drafter.load import load_config, pair, shipped
    from ctc_drafter.quickstart import DRAFTER_DIR, TARGET_DIR

    names = pair(target, drafter)
    name = names[0] or shipped(TARGET_DIR)
    config, tokenizer, _ = load_config(name)
    found = open_drafter(names[1] or shipped(DRAFTER_DIR))
    if not isinstance(found, CTCDrafter):
        refuse(f"engines run CTC drafters only, and {drafter} is another; give --drafter the folder of one")
    found.check_target(config, fingerprint(tokenizer))
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    left_out = write(found.to(getattr(torch, dtype)), config, place, out, width)
    note = f"; engines draft without {', '.join(left_out)}" if left_out else ""
    print(f"{out}: {layout}, {found.config.frames} frames{note}")
