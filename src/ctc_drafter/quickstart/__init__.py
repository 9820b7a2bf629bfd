"""The small target and drafter that ship with the package, so that `demo` needs no network.

`recipes/quickstart/` in the repository made them.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
TARGET_DIR = MODEL_DIR / "target"
DRAFTER_DIR = MODEL_DIR / "drafter"
SMOLLM2_DRAFTER_DIR = Path(__file__).parent / "smollm2"  # the drafter of the target `smollm2`
SAMPLE_DIR = MODEL_DIR / "sample"
