"""Train a drafter for a chat model without a data set: python examples/train_drafter.py [MODEL [FOLDER]].

The model writes prompts and answers them, a drafter learns from the answers, and both generate together. The numbers
here are for a first look; a drafter worth using wants 10,000 answers and more (docs/training.md). Each command may be
killed; the same one resumes.
"""

import sys
from pathlib import Path

from ctc_drafter.cli import main

model = sys.argv[1] if sys.argv[1:] else "tiny"
folder = Path(sys.argv[2] if sys.argv[2:] else "runs/example")
answers, drafter = str(folder / "answers"), str(folder / "drafter")


def run(*arguments: str) -> None:
    print("ctc-drafter", *arguments, flush=True)
    if code := main(list(arguments)):
        sys.exit(code)


run("distill", "--target", model, "--prompts", "self", "--limit", "8", "--max-new-tokens", "32", "--out", answers)
run("train", "--target", model, "--data", answers, "--out", drafter, "--steps", "3", "--batch-size", "4")
run("generate", "--target", model, "--drafter", drafter, "--prompt", "How are you?", "--max-new-tokens", "32")
