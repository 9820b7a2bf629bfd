"""llama.cpp (`xllamacpp`) as a method under test: its server in this process, plain or with a speculative mode."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch

from ctc_drafter.decode.generate import Generation
from ctc_drafter.evaluate.gguf_weights import Weights
from ctc_drafter.evaluate.hf_generate import LOOKUP_MATCH, LOOKUP_TOKENS, cut
from ctc_drafter.evaluate.methods import Calibration, Contender, Decoding, counted
from ctc_drafter.types import UserError

# The binding has llama.cpp's server and no calls below it. The server's own endpoint takes and returns token ids; an
# answer is one request, whatever its length, so that what HTTP adds is about a millisecond an answer.

PACKAGE = "xllamacpp"
LOOKUP = "lookup"  # drafts of as many tokens, after matches of as many, as transformers' prompt lookup has here
NGRAMS = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")  # with llama.cpp's own settings
MODES = (LOOKUP, *NGRAMS)
ROOM = 64  # tokens behind the longest text: near the end of its context llama.cpp drafts less
DIRECT = build_opener(ProxyHandler({}))  # the server is in this process, whatever proxy the environment names


def contender(decoding: Decoding, name: str, weights: Weights, mode: str | None) -> Contender:
    """Greedy decoding of token ids on as many threads as torch has, until `decoding`'s ends or its limit.

    Nothing is kept between prompts. Raises `ModuleNotFoundError` without xllamacpp.
    """
    import xllamacpp

    engine = LlamaCpp(decoding, weights, mode)
    system = " ".join(part.split()[0] for part in xllamacpp.get_system_info().split(":")[-1].split("|") if part.strip())
    facts = {"engine": f"{PACKAGE} {xllamacpp.__version__}", "weights": weights.kind, "built_for": system}
    return Contender(name, None, engine.run, engine.prepare, facts)


class LlamaCpp:
    """A server that is started by `prepare`, and again when more rows or longer texts come than it was started for."""

    def __init__(self, decoding: Decoding, weights: Weights, mode: str | None):
        self.decoding, self.weights, self.mode = decoding, weights, mode
        self.server: Any = None
        self.rows = self.length = 0

    def prepare(self, rows: int, length: int) -> None:
        """rows: prompts of a batch. length: tokens of the longest prompt with its answer."""
        import xllamacpp

        if self.server is not None and rows <= self.rows and length <= self.length:
            return
        self.server = None  # the old one goes first, with its memory
        self.rows, self.length = max(rows, self.rows), max(length, self.length)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(self.weights.file)
        parameters.n_parallel, parameters.n_ctx = self.rows, self.rows * (self.length + ROOM)
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
        parameters.cache_prompt, parameters.cache_ram_mib = False, 0
        parameters.verbosity = -1  # no log
        if self.mode:
            set_mode(parameters.speculative, self.mode)
        try:
            self.server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise UserError(
                f"llama.cpp cannot load {self.weights.file}; give a GGUF file that it reads: llama.cpp=FILE"
            ) from error

    def run(self, prompts: list[list[int]], _timed: bool, _: Calibration | None) -> Generation:
        self.prepare(len(prompts), max(map(len, prompts)) + self.decoding.max_new_tokens)
        found = self.ask(prompts)
        rows = [cut(each["tokens"], sorted(self.decoding.eos)) for each in found]
        if not self.mode:
            return counted(rows, [[0] * (len(row) - 1) for row in rows])
        # How many drafted tokens all steps accepted is known, not how many each did.
        taken = [each.get("timings/draft_n_accepted") or 0 for each in found]
        steps = [len(each["tokens"]) - 1 - some for each, some in zip(found, taken, strict=True)]
        return counted(rows, [[] for _ in rows], steps)

    def ask(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """What the server's `/completion` returns for each prompt."""
        body = {
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "n_predict": self.decoding.max_new_tokens,
            "samplers": ["temperature"],
            "temperature": 0.0,
            "cache_prompt": False,
            "return_tokens": True,
            "response_fields": ["index", "tokens", "timings/draft_n_accepted"],
        }
        place, kind = f"{self.server.listening_address}/completion", {"Content-Type": "application/json"}
        try:
            with DIRECT.open(Request(place, json.dumps(body).encode(), kind)) as answer:
                found = json.load(answer)
        except HTTPError as error:
            raise UserError(f"llama.cpp refuses a prompt: {error.read(500).decode(errors='replace')}") from error
        return sorted(found, key=lambda each: each["index"]) if isinstance(found, list) else [found]


def set_mode(speculative: Any, mode: str) -> None:
    import xllamacpp

    name = "ngram-simple" if mode == LOOKUP else mode
    kinds = xllamacpp.common_speculative_type
    speculative.types = [kinds[f"COMMON_SPECULATIVE_TYPE_{name.replace('-', '_').upper()}"]]
    if mode == LOOKUP:
        speculative.ngram_simple.size_n, speculative.ngram_simple.size_m = LOOKUP_MATCH, LOOKUP_TOKENS
