"""The paper's own figures, to stand beside ours where they are marked as the paper's.

Source: Wen, Gui and Feng, "Speculative Decoding with CTC-based Draft Model for LLM Inference Acceleration" (NeurIPS
2024), Table 1 and the time breakdown; Vicuna 7B, 13B and 33B, greedy.
"""

from __future__ import annotations

MODELS = ("Vicuna 7B", "Vicuna 13B", "Vicuna 33B")

# (task, method) -> γ and β of each model
TABLE: dict[tuple[str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {
    ("MT-bench", "Medusa"): ((2.13, 1.97, 1.93), (2.58, 2.60, 2.55)),
    ("MT-bench", "Hydra"): ((2.36, 2.17, 2.15), (3.04, 3.06, 2.85)),
    ("MT-bench", "CTC-drafter"): ((2.78, 2.52, 2.20), (3.56, 3.51, 3.53)),
    ("GSM8K", "Medusa"): ((2.33, 2.21, 2.10), (2.78, 2.68, 2.46)),
    ("GSM8K", "CTC-drafter"): ((2.43, 2.66, 2.16), (3.53, 3.53, 3.40)),
}

# Shares of a step on Vicuna 7B
TIME = {"base model": 0.636, "draft": 0.149, "transform": 0.054, "others": 0.161}
