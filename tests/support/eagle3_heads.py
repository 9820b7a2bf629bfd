"""Tiny EAGLE-3 heads in both published formats, and their forward pass written out from the authors' code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as fn

from ctc_drafter import Eagle3Drafter, Target
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.drafters.lm_head import DraftHead

LAYERS, WIDTH, HEADS, KV, DIM, INNER, VOCABULARY, DRAFTED = 8, 64, 4, 2, 16, 48, 280, 40
THETA, EPS = 5000.0, 1e-5
TEXT = [5, 9, 30, 31, 5, 9, 30, 77, 12]
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": KV,
    "head_dim": DIM, "num_hidden_layers": 1, "vocab_size": VOCABULARY, "rms_norm_eps": EPS, "rope_theta": THETA,
    "max_position_embeddings": 512, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip


def tensors_of(prefix: str, *, features: int = 3, normed: bool = False, bias: bool = False, drafted: int = DRAFTED):
    """Random weights by the authors' names; every norm and bias differs from what it would be if left out."""
    shapes = {
        "fc.weight": (WIDTH, features * WIDTH),
        "norm.weight": (WIDTH,),
        "lm_head.weight": (drafted, WIDTH),
        f"{prefix}.input_layernorm.weight": (WIDTH,),
        f"{prefix}.hidden_norm.weight": (WIDTH,),
        f"{prefix}.post_attention_layernorm.weight": (WIDTH,),
        f"{prefix}.mlp.gate_proj.weight": (INNER, WIDTH),
        f"{prefix}.mlp.up_proj.weight": (INNER, WIDTH),
        f"{prefix}.mlp.down_proj.weight": (WIDTH, INNER),
        f"{prefix}.self_attn.q_proj.weight": (HEADS * DIM, 2 * WIDTH),
        f"{prefix}.self_attn.k_proj.weight": (KV * DIM, 2 * WIDTH),
        f"{prefix}.self_attn.v_proj.weight": (KV * DIM, 2 * WIDTH),
        f"{prefix}.self_attn.o_proj.weight": (WIDTH, HEADS * DIM),
    }
    if normed:
        shapes |= {f"{prefix}.self_attn.{name}_norm.weight": (DIM,) for name in "qk"}
    if bias:
        shapes |= {
            f"{prefix}.self_attn.{name}_proj.bias": (HEADS * DIM if name == "q" else KV * DIM,) for name in "qkv"
        }
        shapes[f"{prefix}.self_attn.o_proj.bias"] = (WIDTH,)
    torch.manual_seed(7)
    found = {name: 0.3 * torch.randn(shape) + (1 if "norm" in name else 0) for name, shape in shapes.items()}
    if drafted < VOCABULARY:
        ids = torch.randperm(VOCABULARY)[:drafted].sort().values
        found["d2t"] = ids - torch.arange(drafted)
        found["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True)
    return found


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], file: str = "model.safetensors"):
    folder.mkdir(exist_ok=True)
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def of_the_authors(**more: Any) -> dict[str, Any]:
    """config.json as in SafeAILab's repositories."""
    return (
        {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": DRAFTED} | SIZES | more
    )


def of_speculators(kind: str = "llama", layer: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """config.json as vllm-project/speculators writes it."""
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "some/model"}},
        "draft_vocab_size": DRAFTED,
        "transformer_layer_config": {"model_type": kind} | SIZES | (layer or {}),
        "norm_before_residual": False,
    } | more  # fmt: skip


# The oracle: their forward pass, one text at a time, nothing cached, no code of ours.


def rms(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return states * (states.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight


def frequencies(scaled: bool) -> torch.Tensor:
    """Rotary frequencies, by hand; llama3's scaling as its authors give it."""
    plain = THETA ** (-torch.arange(0, DIM, 2).float() / DIM)
    if not scaled:
        return plain
    old, factor, low, high = (LLAMA3[key] for key in ("original_max_position_embeddings", "factor", *BANDS))
    turns = old * plain / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * plain / factor + smooth * plain


BANDS = ("low_freq_factor", "high_freq_factor")


def rotated(states: torch.Tensor, scaled: bool) -> torch.Tensor:
    """`[T, heads, D]` at positions 0, 1, .."""
    angles = torch.arange(len(states)).unsqueeze(1) * frequencies(scaled)
    cosines, sines = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second = states[..., : DIM // 2], states[..., DIM // 2 :]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)


class Theirs:
    def __init__(self, tensors: dict[str, torch.Tensor], prefix: str, embed: torch.Tensor, **flags: bool):
        self.all, self.prefix, self.flags = tensors, prefix, flags
        self.embed = tensors.get("embed_tokens.weight", embed)

    def linear(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return fn.linear(states, self.all[f"{self.prefix}.{name}.weight"], self.all.get(f"{self.prefix}.{name}.bias"))

    def norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return rms(states, self.all[f"{self.prefix}.{name}.weight"])

    def layer(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs `[T, H]` of pairs: embeddings of tokens `[T]` and hidden states `[T, H]`, causally."""
        normed = self.norm("hidden_norm", hidden)
        pairs = torch.cat([self.norm("input_layernorm", self.embed[tokens]), normed], -1)
        heads = [self.linear(f"self_attn.{name}_proj", pairs).unflatten(-1, (-1, DIM)) for name in "qkv"]
        if self.flags.get("normed"):
            heads[:2] = [self.norm(f"self_attn.{name}_norm", each) for name, each in zip("qk", heads, strict=False)]
        queries, keys = (rotated(each, self.flags.get("scaled", False)) for each in heads[:2])
        keys, values = (each.repeat_interleave(HEADS // KV, 1) for each in (keys, heads[2]))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(DIM)
        hidden_from = torch.ones(len(tokens), len(tokens)).triu(1).bool()
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden_from, -math.inf).softmax(-1), values)
        states = (normed if self.flags.get("norm_before_residual") else hidden) + self.linear(
            "self_attn.o_proj", mixed.flatten(1)
        )
        inner = self.norm("post_attention_layernorm", states)
        gated = fn.silu(self.linear("mlp.gate_proj", inner)) * self.linear("mlp.up_proj", inner)
        return states + self.linear("mlp.down_proj", gated)

    def log_probs(self, features: torch.Tensor, text: list[int], drafted: list[int]) -> torch.Tensor:
        """`[1+D, V]`, -inf outside of the draft vocabulary: after text, whose last token is the root, and after each
        drafted token. features `[len(text)-1, K]`: of the target, of all tokens but the root."""
        if self.flags.get("norm_before_fc"):
            features = rms(features, self.all["input_norm.weight"])
        if self.flags.get("fc_norm"):
            parts = features.chunk(features.shape[-1] // WIDTH, -1)
            features = torch.cat([rms(part, self.all[f"fc_norm.{i}.weight"]) for i, part in enumerate(parts)], -1)
        hidden, tokens, found = features @ self.all["fc.weight"].T, text[1:], []
        for place in range(len(drafted) + 1):
            out = self.layer(torch.tensor(tokens), hidden)[-1]
            shown = rms(out, self.all["norm.weight"])
            logits = self.all["lm_head.weight"] @ shown
            wide = torch.full((VOCABULARY,), -math.inf)
            count = torch.arange(len(logits))
            wide[count + self.all.get("d2t", torch.zeros_like(count))] = logits.log_softmax(-1)
            found.append(wide)
            tokens = tokens + drafted[place : place + 1]
            fed = shown if self.flags.get("norm_output") else out
            hidden = torch.cat([hidden, fed.unsqueeze(0)])
        return torch.stack(found)


@torch.no_grad()
def features_of(target: Target, text: list[int], inputs_of: list[int]) -> torch.Tensor:
    """Inputs of these blocks, `[T, K]`, as transformers gives them."""
    states = target.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    return torch.cat([states[block][0] for block in inputs_of], -1)


def paths_of(candidates: Any, row: int) -> dict[tuple[int, ...], float]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(candidates.tokens[row].tolist(), candidates.parents[row].tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    scores = candidates.scores[row].tolist()
    return {path: score for path, score in zip(paths, scores, strict=True) if score > -math.inf}


@torch.inference_mode()
def compare(target: Target, drafter: Eagle3Drafter, theirs: Theirs, inputs_of: list[int]) -> None:
    """Two ragged rows that come in two parts, a draft between them, trees of 12 nodes."""
    rows = [TEXT[:-1], [7, 8]]
    state = prefill(target, rows, drafter.feature_layers)
    session: Any = drafter.begin(target.embed, target.head, 2)
    session.head = DraftHead(session.head.embed, drafter.lm_head)  # in full precision
    session.extend(state.tokens[:, :2], state.features[:, :2], torch.tensor([2, 1]))
    session.propose(torch.tensor([1, 2]), 12)
    rest = torch.tensor([list(range(2, 8)), [1] * 6])
    features = state.features.gather(1, rest.unsqueeze(-1).expand(-1, -1, state.features.shape[-1]))
    session.extend(state.tokens.gather(1, rest), features, torch.tensor([6, 1]))
    roots = [TEXT[-1], 50]
    candidates = session.propose(torch.tensor(roots), 12)
    for row, text in enumerate(rows):
        found = paths_of(candidates, row)
        assert len(found) >= 12
        assert max(map(len, found)) > 1
        known = features_of(target, text, inputs_of)
        for path, score in found.items():
            steps = theirs.log_probs(known, [*text, roots[row]], list(path[:-1]))
            assert score == pytest.approx(float(sum(steps[i, token] for i, token in enumerate(path))), abs=1e-3)
        best = int(theirs.log_probs(known, [*text, roots[row]], [])[0].argmax())
        assert max(found, key=found.__getitem__) == (best,)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, bool]]] = {
    # config.json; options of the weights; flags of the oracle
    "authors": (of_the_authors(), {}, {}),
    "authors, all tokens": (of_the_authors(draft_vocab_size=VOCABULARY), {"drafted": VOCABULARY}, {}),
    "authors, layers by eagle_config": (
        of_the_authors(eagle_config={"eagle_aux_hidden_state_layer_ids": [6, 1, 7]}), {}, {},
    ),
    "authors, biases": (of_the_authors(attention_bias=True), {"bias": True}, {}),
    "speculators": (of_speculators(), {}, {}),
    "speculators, residual": (of_speculators(norm_before_residual=True), {}, {"norm_before_residual": True}),
    "speculators, qwen3": (of_speculators("qwen3"), {"normed": True}, {"normed": True}),
    "speculators, norm before fc": (
        of_speculators(norm_before_fc=True, norm_output=True), {}, {"norm_before_fc": True, "norm_output": True},
    ),
    "speculators, norms before fc": (
        of_speculators(fc_norm=True, eagle_aux_hidden_state_layer_ids=[1, 3, 4, 7]),
        {"features": 4},
        {"fc_norm": True},
    ),
    "speculators, scaled": (of_speculators(layer={"rope_scaling": LLAMA3}), {}, {"scaled": True}),
}  # fmt: skip


def made(case: str, folder: Path) -> tuple[str, dict[str, torch.Tensor], str, dict[str, bool], list[int]]:
    config, options, flags = CASES[case]
    prefix = "layers.0" if case.startswith("speculators") else "midlayer"
    tensors = tensors_of(prefix, **options)
    layers = config.get("eagle_aux_hidden_state_layer_ids") or config.get("eagle_config", {}).get(
        "eagle_aux_hidden_state_layer_ids"
    )
    torch.manual_seed(3)
    if flags.get("norm_before_fc"):
        tensors["input_norm.weight"] = 1 + 0.3 * torch.randn(3 * WIDTH)
    if flags.get("fc_norm"):
        tensors |= {f"fc_norm.{i}.weight": 1 + 0.3 * torch.randn(WIDTH) for i in range(len(layers))}
    return write(folder / "head", tensors, config), tensors, prefix, flags, layers or [2, LAYERS // 2, LAYERS - 3]
