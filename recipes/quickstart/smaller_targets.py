"""Trains smaller targets: `python -m recipes.quickstart.smaller_targets CORPUS --out FOLDER`.

With them `bench --ablations --target FOLDER/NAME/target --data FOLDER/NAME/distilled` shows how acceptance changes with
the target: same text, same tokenizer, same prompts to answer as those of the sample that ships with the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from benchmarks.pages import run_alone
from ctc_drafter.load import load_target
from ctc_drafter.quickstart import SAMPLE_DIR, TARGET_DIR
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.distill import distill
from ctc_drafter.train.prompts import Prompt
from recipes.quickstart.build import ANSWER_TOKENS
from recipes.quickstart.pretrain import PERPLEXITY, PHASES, Phase, Shape, pretrain

SHAPES = {
    "small": Shape(layers=4, width=256, inner=640),  # 4.9 M parameters
    "tiny": Shape(layers=2, width=128, inner=320),  # 1.4 M
}


def make(corpus: Path, work: Path, shape: Shape, name: str, phases: tuple[Phase, ...] = PHASES) -> None:
    """`work/target`, and its answers in `work/distilled`. Goes on where it was killed.

    Raises `UserError` for a corpus without the sources of the shipped target.
    """
    if not (work / PERPLEXITY).is_file():
        AutoTokenizer.from_pretrained(TARGET_DIR).save_pretrained(work / "tokenizer")
        pretrain(corpus, work, phases, shape=shape)
    target, tokenizer = load_target(str(work / "target"), "bfloat16", "auto")
    sample = DistilledDataset.load([SAMPLE_DIR])
    prompts = [Prompt(f"{row.key:x}", row.ids[: row.answer_start].tolist()) for row in sample.rows]
    distill(target, tokenizer, prompts, work / "distilled", max_new_tokens=ANSWER_TOKENS, batch_size=64, name=name)


def main(
    corpus: Annotated[Path, typer.Argument(help="Folder of <source>.train.jsonl.gz and <source>.val.jsonl.gz files.")],
    out: Annotated[Path, typer.Option(help="Output folder, with a folder per target.")] = Path("runs/smaller"),
) -> None:
    """Trains the smaller targets and lets them answer."""
    for name, shape in SHAPES.items():
        make(corpus, out / name, shape, name)


if __name__ == "__main__":
    run_alone(main)
