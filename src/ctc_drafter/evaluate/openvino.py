"""OpenVINO GenAI (`openvino-genai`) as a method under test: its LLM pipeline on a CPU, plain or with prompt lookup."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ctc_drafter.decode.generate import Generation
from ctc_drafter.evaluate.gguf_weights import Weights
from ctc_drafter.evaluate.hf_generate import LOOKUP_MATCH, LOOKUP_TOKENS, Bursts, accepted, cut
from ctc_drafter.evaluate.methods import Calibration, Contender, Decoding, counted
from ctc_drafter.types import UserError

PACKAGE = "openvino-genai"
LOOKUP = "lookup"
MODES = (LOOKUP,)
TYPES = ("f16", "q8_0", "q4_0", "q4_1", "q4")  # of GGUF files that its reader takes
MANY = 1 << 20  # tokens that one step of its scheduler may read: every prompt at once, as without a scheduler


def contender(decoding: Decoding, name: str, weights: Weights, mode: str | None) -> Contender:
    """Greedy decoding of token ids on as many threads as torch has, until `decoding`'s ends or its limit.

    Raises `ModuleNotFoundError` without openvino-genai.
    """
    import openvino_genai

    engine = OpenVINO(decoding, weights, mode)
    facts = {"engine": f"{PACKAGE} {openvino_genai.__version__}", "weights": weights.kind}
    return Contender(name, None, engine.run, engine.prepare, facts)


class OpenVINO:
    """A pipeline that `prepare` reads from the GGUF file and compiles; it serves prompts of any number and length."""

    def __init__(self, decoding: Decoding, weights: Weights, mode: str | None):
        self.decoding, self.weights, self.mode = decoding, weights, mode
        self.pipeline: Any = None

    def prepare(self, _rows: int, _length: int) -> None:
        import openvino_genai

        if self.pipeline is not None:
            return
        # The usual scheduler keeps prompts it has read and would not read a second turn's history again, as all other
        # methods here do.
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = False, MANY
        options: dict[str, Any] = {"scheduler_config": scheduler, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        if self.mode == LOOKUP:
            options["prompt_lookup"] = True
        try:
            self.pipeline = openvino_genai.LLMPipeline(str(self.weights.file), "CPU", **options)
        except (RuntimeError, IndexError, ValueError) as error:  # whatever its reader of GGUF files stumbles over
            reason = str(error).strip().splitlines()[-1]  # behind the place in its sources
            raise UserError(
                f"OpenVINO cannot load {self.weights.file}: {reason}; give a GGUF file of Llama, Qwen2 or "
                f"Qwen3 whose weights are {', '.join(TYPES[:-1])}: openvino=FILE"
            ) from error

    def run(self, prompts: list[list[int]], _timed: bool, _: Calibration | None) -> Generation:
        import openvino_genai

        self.prepare(len(prompts), 0)
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.do_sample = self.decoding.max_new_tokens, False
        if self.mode == LOOKUP:
            settings.num_assistant_tokens, settings.max_ngram_size = LOOKUP_TOKENS, LOOKUP_MATCH
        if ends := sorted(self.decoding.eos):
            settings.eos_token_id, settings.stop_token_ids = ends[0], set(ends)
        else:
            settings.ignore_eos = True
        bursts = Bursts()
        if self.mode and len(prompts) == 1:  # what a step accepted is seen in what it hands out, of one row only
            found = self.pipeline.generate(inputs(prompts), settings, streamer(bursts, len(prompts[0])))
        else:
            found = self.pipeline.generate(inputs(prompts), settings)
        rows = [cut(list(row), ends) for row in found.tokens]
        if not self.mode:
            return counted(rows, [[0] * (len(row) - 1) for row in rows])
        return counted(rows, [accepted(len(row), bursts) if bursts.sizes else [] for row in rows])


def inputs(prompts: list[list[int]]) -> Any:
    """Padded on the left, with their mask."""
    import openvino
    import openvino_genai

    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))


def streamer(bursts: Bursts, prompt: int) -> Any:
    """Notes the size of each burst of tokens, the prompt's first, as transformers' streamers get it."""
    import openvino_genai

    bursts.sizes.append(prompt)

    class Sizes(openvino_genai.StreamerBase):
        def write(self, tokens: int | list[int]) -> Any:
            bursts.sizes.append(1 if isinstance(tokens, int) else len(tokens))
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """Nothing is held back."""

    return Sizes()
