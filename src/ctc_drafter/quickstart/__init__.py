"""The small target and drafter that ship with the package, so that `demo` needs no network.

Reading order: `corpus` (text and tokenizer), `pretrain` (the target), `build` (the whole recipe),
`sample` (a little of the distilled text, for `bench --quick`), `smaller` (smaller targets, for comparison).
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
TARGET_DIR = MODEL_DIR / "target"
DRAFTER_DIR = MODEL_DIR / "drafter"
SAMPLE_DIR = MODEL_DIR / "sample"
