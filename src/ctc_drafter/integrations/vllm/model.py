"""vLLM model of the CTC drafter: its DFlash model with blank head, predictor and prefix search.

vLLM hands `get_top_tokens` the frames alone, `[B*F, H]`. What the search needs besides, the root and the block's output
there, `forward` has just seen: a block is [root, F masks]. vLLM verifies a chain, so the best one is what it gets.
Interfaces: vLLM 0.32, `model_executor/models/qwen3_dflash.py`, `v1/spec_decode`, `v1/worker/gpu/spec_decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM, DFlashQwen3Model

from ctc_drafter.drafters.block import Carry
from ctc_drafter.integrations.head import CTCHead
from ctc_drafter.integrations.settings import HeadSettings, check_vllm


class DFlashCTCModel(DFlashQwen3Model):
    """The draft layers. carried `[B, 1+F, H]`: what each request's newest committed token adds to its block.
    carry_root: the map of the root's embedding to what it adds to each place of its block."""

    carried: torch.Tensor | None
    carry_root: Carry | None

    def __init__(self, *, vllm_config: VllmConfig, start_layer_id: int = 0, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, start_layer_id=start_layer_id, prefix=prefix)
        settings = HeadSettings.of(self.config.ctc_config)
        self.scale, self.block = settings.embedding_scale, 1 + settings.frames
        rows = vllm_config.scheduler_config.max_num_seqs
        carried = torch.zeros(rows, self.block, settings.hidden_size) if settings.carry else None
        self.register_buffer("carried", carried, persistent=False)
        self.carry_root = None

    def embed_tokens_scaled(self, tokens: torch.Tensor) -> torch.Tensor:
        """The target's embeddings `[..., H]` of tokens `int64 [...]`."""
        return self.embed_tokens(tokens) * self.scale

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What goes into the layers, `[B*(1+F), H]`. Part of the compiled graph, so `carried` keeps its address."""
        states = self.embed_tokens_scaled(input_ids)
        if self.carry_root is not None:
            states = states + self.carry_root(states[:: self.block]).flatten(0, -2)[: len(states)].to(states.dtype)
        if self.carried is None:
            return states
        places = self.carried.flatten(0, 1)
        index = torch.arange(len(input_ids), device=input_ids.device).clamp(max=len(places) - 1)
        return states + places[index].to(states.dtype)


class DFlashCTCForCausalLM(DFlashQwen3ForCausalLM):
    """tokens, outputs: of the blocks that `forward` saw last, `[B*(1+F)]` and `[B*(1+F), H]`.

    Raises `UserError` when vLLM's settings would bypass the search, see `check_vllm`.
    """

    model_cls = DFlashCTCModel
    tokens: torch.Tensor
    outputs: torch.Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        speculative = vllm_config.speculative_config
        settings = HeadSettings.of(getattr(speculative.draft_model_config.hf_config, "ctc_config", None))
        check_vllm(speculative, vllm_config.parallel_config.pipeline_parallel_size, settings)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.ctc = CTCHead(settings)
        self.model.carry_root = self.ctc.carry_root
        # At fixed addresses, since a graph that is replayed runs no Python: its copies into them are replayed with it.
        size = vllm_config.scheduler_config.max_num_seqs * self.model.block
        self.register_buffer("tokens", torch.zeros(size, dtype=torch.long), persistent=False)
        self.register_buffer("outputs", torch.zeros(size, settings.hidden_size), persistent=False)
        if settings.carry:
            ask_for_newest()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load_weights(self.ctc.take(weights))

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        outputs = super().forward(input_ids, positions, inputs_embeds)
        count = min(len(outputs), len(self.tokens))  # graphs are padded
        self.tokens[:count].copy_(input_ids[:count])
        self.outputs[:count].copy_(outputs[:count])
        return outputs

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The best chains, `int64 [B*F]`, of outputs at the frames, `[B*F, H]`."""
        block = self.model.block
        rows = len(hidden_states) // (block - 1)
        tokens, outputs = (each[: rows * block].unflatten(0, (rows, block)) for each in (self.tokens, self.outputs))
        logits = self.logits_processor(self.lm_head, hidden_states).unflatten(0, (rows, block - 1))
        return self.ctc.chains(outputs, tokens[:, 0], logits, self.model.embed_tokens_scaled).flatten()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("vLLM asks for the frames' logits, which would bypass CTC; please report its settings")

    def take_newest(self, states: torch.Tensor) -> None:
        """Takes the projected features of each request's newest committed token, `[B, H]`."""
        if self.ctc.carry is not None:
            self.model.carried[: len(states)].copy_(self.ctc.carry(self.model.hidden_norm(states)))


def ask_for_newest() -> None:
    """Has vLLM's two model runners tell the model which context states are the newest of each request.

    A model is shown the context of all requests end to end, and not where one of them ends.
    """
    from vllm.v1.spec_decode.dflash import DFlashProposer

    hook(DFlashProposer, "set_inputs_first_pass", newest_of_proposer)
    try:
        from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator
    except ImportError:  # before it had a second model runner
        return
    hook(DFlashSpeculator, "prepare_context_anchor", newest_of_speculator)


def hook(owner: Any, name: str, before: Callable[..., None]) -> None:
    """Has `before` called with our model and a method's own arguments, ahead of the method; once only."""
    original = getattr(owner, name)
    if getattr(original, "tells_newest", False):
        return

    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = drafter_of(self.model)
        if isinstance(model, DFlashCTCForCausalLM):
            before(model, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    method.tells_newest = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def drafter_of(model: Any) -> Any:
    """The model itself, where vLLM has wrapped it to capture it."""
    return model.unwrap() if hasattr(model, "unwrap") else model


def newest_of_proposer(
    model: DFlashCTCForCausalLM,
    _proposer: Any,
    *,
    target_hidden_states: torch.Tensor,
    cad: Any,
    num_rejected_tokens_gpu: torch.Tensor | None,
    **_: Any,
) -> None:
    """Newest context states from `DFlashProposer.set_inputs_first_pass`, which vLLM calls with keywords."""
    last = cad.query_start_loc[1:] - 1
    if num_rejected_tokens_gpu is not None:
        last = last - num_rejected_tokens_gpu
    model.take_newest(target_hidden_states[last.long()])


def newest_of_speculator(
    model: DFlashCTCForCausalLM, speculator: Any, input_batch: Any, num_rejected: torch.Tensor
) -> None:
    """Newest context states from `DFlashSpeculator.prepare_context_anchor`."""
    rows = input_batch.num_reqs
    last = input_batch.query_start_loc[1 : rows + 1] - 1 - num_rejected[:rows]
    model.take_newest(speculator.hidden_states[last.clamp(min=0).long()])
