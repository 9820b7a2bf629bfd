"""The whole recipe of the shipped model: `python -m ctc_drafter.quickstart.build CORPUS`.

pretrain the target -> let it answer training prompts -> train the drafter on those answers -> train it on, half of the
time without copies -> package both.
Every step resumes where it was killed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pages import run_alone
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.registry import choose_vocabulary, fresh_drafter
from ctc_drafter.load import load_target
from ctc_drafter.provenance import tensors_hash
from ctc_drafter.quickstart import MODEL_DIR
from ctc_drafter.quickstart.card import write_card
from ctc_drafter.quickstart.pretrain import PERPLEXITY, pretrain
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.distill import distill
from ctc_drafter.train.prompts import read_prompts
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.train.trainer import train_drafter

# What the target answers: folder -> rows of the corpus. Reasoning and long prose are hard to draft and need more
# text than small talk, so they are also carried on from inside their answers.
PROMPTS: dict[str, dict[str, Any]] = {
    "wide": {"pattern": "*.train.*", "per_file": 1500},
    "reasoning": {"pattern": "gsm8k*.train.*"},
    "reasoning-cut": {"pattern": "gsm8k*.train.*", "cuts": 3},
    "prose-cut": {"pattern": "wildbench*.train.*", "cuts": 6},
    "chat-cut": {"pattern": "arena_hard*.train.*", "cuts": 6},
    "instructions": {"pattern": "flan_cot*.train.*", "per_file": 6000},
}
ANSWER_TOKENS = 128
HELD_OUT = 0.02
DRAFTER: dict[str, Any] = {
    "frames": 8,
    "draft_length": 7,
    "num_hidden_layers": 1,
    "predictor_rank": 64,
    "predictor_width": 256,
    "carry": True,
    "copies": 16,
    "lookup_length": 15,
    # Of 8,192 tokens: the rest is half a percent of what the target writes, and most of what a draft costs.
    "draft_vocab_size": 3072,
}
TRAINING = TrainSettings.parse(
    {
        "steps": 5000,
        "batch_size": 16,
        "anchors": 32,
        "learning_rate": 2e-3,
        "min_learning_rate": 2e-5,
        "bf16": True,
        "eval_every": 500,
        "eval_positions": 512,
    }
)
# Engines that do not know the text draft without copies, so half of what it learns now is to do without.
MIXED = TRAINING.model_copy(update={"steps": 2500, "learning_rate": 1e-3, "copy_dropout": 0.5, "seed": 1})
FINISHED = "drafter-mixed"


def build(
    corpus: Annotated[Path, typer.Argument(help="Folder of <source>.train.jsonl.gz and <source>.val.jsonl.gz files.")],
    work: Annotated[Path, typer.Option(help="Where checkpoints and distilled text go.")] = Path("runs/quickstart"),
    out: Annotated[Path, typer.Option(help="Where the finished model goes.")] = MODEL_DIR,
) -> None:
    """Trains the quickstart target and drafter from a folder of text and packages them."""
    target_dir = work / "target"
    if not (work / PERPLEXITY).is_file():
        pretrain(corpus, work)
    target, tokenizer = load_target(str(target_dir), "bfloat16", "auto")
    folders, known = [work / "distilled" / name for name in PROMPTS], set[str]()
    for folder, rows in zip(folders, PROMPTS.values(), strict=True):
        found = read_prompts(corpus, tokenizer, max_prompt_tokens=512, **rows).prompts
        prompts = [prompt for prompt in found if prompt.id not in known]
        known |= {prompt.id for prompt in prompts}
        distill(target, tokenizer, prompts, folder, max_new_tokens=ANSWER_TOKENS, batch_size=64, name="quickstart")
    train_rows, held_out = DistilledDataset.load(folders).split(HELD_OUT)
    drafter = fresh_drafter(target, tokenizer, seed=0, **DRAFTER)
    choose_vocabulary(drafter, train_rows.answer_counts(target.vocab_size))
    train_drafter(target, drafter, train_rows, held_out, work / "drafter", TRAINING)
    start = tensors_hash(drafter.state_dict().items())
    train_drafter(target, drafter, train_rows, held_out, work / FINISHED, MIXED, start=start)
    package(corpus, work, out)


def package(corpus: Path, work: Path, out: Path) -> None:
    """Both models in bfloat16, the tokenizer and the model card."""
    _, held_out = DistilledDataset.load([work / "distilled" / name for name in PROMPTS]).split(HELD_OUT)
    AutoModelForCausalLM.from_pretrained(work / "target", dtype=torch.bfloat16).save_pretrained(out / "target")
    AutoTokenizer.from_pretrained(work / "target").save_pretrained(out / "target")
    CTCDrafter.from_pretrained(work / FINISHED).to(torch.bfloat16).save_pretrained(out / "drafter")
    write_card(corpus, work, out, [work / "drafter", work / FINISHED], held_out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_alone(build)
