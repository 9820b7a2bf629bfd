"""SGLang plugin (entry point `sglang.srt.plugins`): its DFlash model with our head.

Written against the source of SGLang 0.5.23, `srt/models/dflash.py` and `srt/speculative/dflash_worker_v2.py`. Tested
with stand-ins for those interfaces; it has not run on a GPU yet. SGLang verifies a chain, so it gets the best one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.models.dflash import DFlashDraftModel
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from ctc_drafter.integrations.head import CTCHead
from ctc_drafter.integrations.settings import ARCHITECTURE, HeadSettings
from ctc_drafter.types import UserError

WORKER = "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2"


def register() -> None:
    """Registers the model and puts our search in the place of the greedy choice of each frame."""
    ModelRegistry.models[ARCHITECTURE] = DFlashCTCDraftModel
    HookRegistry.register(f"{WORKER}._maybe_build_draft_sampler", build_sampler, HookType.AROUND)
    HookRegistry.register(f"{WORKER}._greedy_sample_from_vocab_parallel_head", sample_eagerly, HookType.AROUND)


class DFlashCTCDraftModel(DFlashDraftModel):
    """Raises `UserError` for a drafter with `carry`: SGLang does not tell it where a request's context ends."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = ""):
        super().__init__(config, quant_config=quant_config, prefix=prefix)
        settings = HeadSettings.of(getattr(config, "ctc_config", None))
        if settings.carry:
            raise UserError("SGLang cannot run a drafter with carry; train one with --no-carry, or use vLLM")
        self.ctc = CTCHead(settings)
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(input_ids, *args, **kwargs)
        self.seen = (input_ids, output.hidden_states)
        return output

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load_weights(self.ctc.take(weights))


class CTCSampler:
    """The search as SGLang captures it behind the draft layers. `out int64 [rows * F]`: the chains, at one address."""

    def __init__(self, head: CTCHead, embed: torch.nn.Module, lm_head: torch.Tensor, rows: int):
        self.head, self.embed, self.weight = head, embed, lm_head[: head.settings.vocab_size]
        self.out = torch.zeros(rows * head.settings.frames, dtype=torch.long, device=lm_head.device)

    def __call__(self, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> None:
        chains = self.chains(hidden_states, input_ids)
        self.out[: len(chains)].copy_(chains)

    def chains(self, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The best chains, `int64 [B*F]`, of block outputs `[B*(1+F), H]` and the blocks' tokens `[B*(1+F)]`."""
        block = 1 + self.head.settings.frames
        states, tokens = hidden_states.unflatten(0, (-1, block)), input_ids.unflatten(0, (-1, block))
        logits = states[:, 1:].to(self.weight.dtype) @ self.weight.t()
        # SGLang's Gemma 3 scales its embeddings in the module, as transformers does.
        scale = 1.0 if hasattr(self.embed, "embed_scale") else self.head.settings.embedding_scale
        return self.head.chains(states, tokens[:, 0], logits, lambda ids: self.embed(ids) * scale).flatten()


def build_sampler(original: Callable[..., Any], worker: Any) -> Any:
    """Wrapper of `DFlashWorkerV2._maybe_build_draft_sampler`, which runs once before the graphs are captured."""
    if not isinstance(worker.draft_model, DFlashCTCDraftModel):
        return original(worker)
    from sglang.srt.runtime_context import get_exec

    return sampler_of(worker, max(get_exec().graph.cuda_graph_config.decode.bs))


def sample_eagerly(original: Callable[..., Any], worker: Any, **options: Any) -> torch.Tensor:
    """Wrapper of `DFlashWorkerV2._greedy_sample_from_vocab_parallel_head`, for batches that no graph fits."""
    model = worker.draft_model
    if not isinstance(model, DFlashCTCDraftModel):
        chosen: torch.Tensor = original(worker, **options)
        return chosen
    assert model.seen is not None, "SGLang asks for drafts before it has run the draft layers"
    tokens, outputs = model.seen
    rows = len(options["hidden_states"]) // model.ctc.settings.frames * (1 + model.ctc.settings.frames)
    return sampler_of(worker, 1).chains(outputs[:rows], tokens[:rows])


def sampler_of(worker: Any, rows: int) -> CTCSampler:
    """Raises `UserError` where SGLang's settings do not fit the drafter."""
    settings, target = worker.draft_model.ctc.settings, worker.target_worker.model_runner.model
    if worker.block_size != 1 + settings.frames:
        raise UserError(
            f"the drafter fills {settings.frames} frames; start SGLang with "
            f"--speculative-num-draft-tokens {1 + settings.frames}"
        )
    weight = getattr(target.lm_head, "weight", None)
    if weight is None or not weight.is_floating_point():
        raise UserError("the target's LM head is quantised, which the CTC search cannot read; leave it as it is")
    if len(weight) < settings.vocab_size:
        raise UserError("the CTC drafter needs the whole LM head; run SGLang without tensor parallelism")
    return CTCSampler(worker.draft_model.ctc, target.get_input_embeddings(), weight, rows)
