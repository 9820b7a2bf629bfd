"""Frozen values passed between stages (`Candidates`, `TokenTree`, `Acceptance`, ...) and `UserError`.

Shape letters used everywhere: B rows of a batch, N nodes of a tree without its root, F frames,
V vocabulary, T tokens of a row, S slots of a cache, H hidden size, K feature size, D depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


class UserError(ValueError):
    """Bad input. The message is one line that names the fix; the command line exits with code 2."""


@dataclass(frozen=True)
class Candidates:
    """Scored prefixes after the root, parents before their children.

    tokens:  int64 [B, C], last token of each prefix.
    parents: int64 [B, C], index of the prefix one token shorter, -1 for a child of the root.
    depths:  int64 [B, C], tokens in the prefix (1 for a child of the root).
    scores:  float [B, C], log of the probability that the target's text begins with the prefix, under
             the drafter; never above the parent's; -inf marks padding.
    free:    whether they took next to no time: copied by a drafter that mostly asks a network.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    scores: torch.Tensor
    free: bool = False

    def select(self, rows: torch.Tensor) -> Candidates:
        """Candidates of these rows, `int64 [R]` or `bool [B]`."""
        return Candidates(self.tokens[rows], self.parents[rows], self.depths[rows], self.scores[rows], self.free)

    @classmethod
    def nothing(cls, root: torch.Tensor) -> Candidates:
        """No prefix for any of the roots `int64 [B]`."""
        none = root.new_empty(len(root), 0)
        return cls(none, none, none, torch.empty(len(root), 0, device=root.device))


@dataclass(frozen=True)
class TokenTree:
    """The root (node 0) and the n nodes to verify, parents before their children.

    tokens:    int64 [B, 1+N], the root first.
    parents:   int64 [B, 1+N], the root is its own parent.
    depths:    int64 [B, 1+N], 0 for the root.
    ancestors: bool [B, 1+N, 1+N], [b, i, j] is true when j lies on the path from the root to i, i included.
    valid:     bool [B, 1+N], false for padding, which is never accepted.
    scores:    float [B, 1+N], log-probabilities as in `Candidates`, 0 for the root.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    valid: torch.Tensor
    scores: torch.Tensor

    def rows(self, start: int, end: int) -> TokenTree:
        """The trees of rows `start` to `end - 1`."""
        part = slice(start, end)
        return TokenTree(
            self.tokens[part],
            self.parents[part],
            self.depths[part],
            self.ancestors[part],
            self.valid[part],
            self.scores[part],
        )


@dataclass(frozen=True)
class Verification:
    """Logits and features of the target at each node of a tree.

    logits:   [B, 1+N, V], of the token that follows each node.
    features: [B, 1+N, K], the target's hidden states that the drafter asked for; None if none.
    """

    logits: torch.Tensor
    features: torch.Tensor | None


@dataclass(frozen=True)
class Acceptance:
    """The path through the tree that the target itself would have written.

    path:   int64 [B, 1+D], node indices from the root down; the last accepted node repeats as padding.
    counts: int64 [B], accepted nodes below the root, 0 to D.
    tokens: int64 [B, 1+D], tokens to emit: the accepted nodes' tokens, then the bonus token, which
            repeats as padding. `counts + 1` of them count.
    bonus:  int64 [B], the token that the target adds after the path: the next root.
    """

    path: torch.Tensor
    counts: torch.Tensor
    tokens: torch.Tensor
    bonus: torch.Tensor


# Pads Python lists of prefixes into `Candidates`.

# (token, log-probability, index of its parent or -1, depth)
Prefix = tuple[int, float, int, int]
PADDING: Prefix = (0, -math.inf, -1, 1)


def padded(rows: Sequence[Sequence[Prefix]], device: torch.device) -> Candidates:
    """Candidates of rows that differ in length."""
    width = max(map(len, rows))
    filled = [[*row, *[PADDING] * (width - len(row))] for row in rows]
    tokens, scores, parents, depths = ([[prefix[part] for prefix in row] for row in filled] for part in range(4))
    whole = torch.tensor([tokens, parents, depths], dtype=torch.long, device=device)
    return Candidates(whole[0], whole[1], whole[2], torch.tensor(scores, dtype=torch.float32, device=device))


def first_line(error: BaseException) -> str:
    """First line of an error's message, with the next one where it ends in a colon; what a terminal would obey is left
    out, and the end of very long ones. torch's advice to run a file that holds more than tensors is not passed on."""
    if refuses_pickle(error):
        return "not a file of tensors alone"
    lines = [printable(line) for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + " ..."


LONGEST_LINE = 600


def refuses_pickle(error: BaseException) -> bool:
    """Whether torch would not read a file because it holds more than tensors, which could run code."""
    return "weights_only" in str(error)


def printable(text: str) -> str:
    """A text without control characters: files and servers may hold those that a terminal obeys."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def listed_ids(listed: object) -> list[int]:
    """The end tokens that a configuration names as `eos_token_id`: none, one, or a list.

    Raises `UserError` for what are no tokens.
    """
    found = [] if listed is None else list(listed) if isinstance(listed, list | tuple) else [listed]
    tokens = [token for token in found if isinstance(token, int) and not isinstance(token, bool)]
    if len(tokens) < len(found):
        raise UserError(f"eos_token_id is {listed!r} in the target's configuration; give the number of a token there")
    return tokens


def own_code(config: object) -> bool:
    """Whether a configuration is of a model's own Python code, which the user has then allowed."""
    return type(config).__module__.startswith("transformers_modules")


def lacks_memory(error: Exception) -> bool:
    """Whether an error means out of memory, on a device or the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


# Packages that only some commands need -> what they are for, the name to install, the extra of ours that has them.
EXTRAS = {
    "fastapi": ("serving", "fastapi", "serve"),
    "starlette": ("serving", "fastapi", "serve"),
    "uvicorn": ("serving", "uvicorn", "serve"),
    "h11": ("serving", "h11", "serve"),
    "prometheus_client": ("serving", "prometheus-client", "serve"),
    "openai": ("talking to a server", "openai", "serve"),
    "llguidance": ("a structured answer", "llguidance", "serve"),
    "accelerate": ("training", "accelerate", "train"),
    "yaml": ("reading recipes", "pyyaml", "train"),
    "datasets": ("downloading data", "datasets", "train"),
    "matplotlib": ("drawing figures", "matplotlib", "bench"),
    "gguf": ("reading a GGUF file", "gguf", "gguf"),
    "torchao": ("an int8 target", "torchao", "quant"),
    "peft": ("a LoRA adapter", "peft", "lora"),
    "openvino": ("a target in OpenVINO", "openvino", "openvino"),
    "xllamacpp": ("measuring llama.cpp", "xllamacpp", "peers"),
    "openvino_genai": ("measuring OpenVINO", "openvino-genai", "peers"),
}


def missing_extra(error: BaseException) -> str | None:
    """The line that names the extra to install, if this error says that one of its packages is missing; else None."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in EXTRAS:
        return None
    work, package, extra = EXTRAS[name]
    return f"{work} needs {package}; pip install 'ctc-drafter[{extra}]'"
