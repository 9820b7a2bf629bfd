"""Other engines as methods under test, by their names in `--also`: transformers, llama.cpp, OpenVINO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ctc_drafter.evaluate import gguf_weights, hf_generate, llama_cpp, openvino
from ctc_drafter.evaluate.hf_generate import HF_ASSISTED, stock_contender
from ctc_drafter.evaluate.methods import Contender, Decoding
from ctc_drafter.target.names import gguf_file
from ctc_drafter.types import UserError

LLAMA_CPP, OPENVINO = "llama.cpp", "openvino"
NAMES = (*hf_generate.NAMES, LLAMA_CPP, OPENVINO)
MODES = {LLAMA_CPP: llama_cpp.MODES, OPENVINO: openvino.MODES}
TYPES = {LLAMA_CPP: gguf_weights.TYPES, OPENVINO: openvino.TYPES}
LIBRARIES = {LLAMA_CPP: "xllamacpp", OPENVINO: "openvino_genai"}


@dataclass(frozen=True)
class Peer:
    """Another engine. kind: type of its weights, None for the file's own; mode: a speculative mode of its."""

    engine: str
    kind: str | None = None
    mode: str | None = None
    place: str = ""  # of a GGUF file, if one is given

    @property
    def name(self) -> str:
        return ":".join(part for part in (self.engine, self.kind, self.mode) if part)

    def __str__(self) -> str:
        return f"{self.name}={self.place}" if self.place else self.name


def parse_peer(text: str) -> Peer:
    """`llama.cpp:q8_0:lookup=FILE`. Raises `UserError` for what the engine does not have."""
    name, _, place = text.partition("=")
    engine, *parts = name.split(":")
    kinds = [part for part in parts if part in TYPES[engine]]
    modes = [part for part in parts if part in MODES[engine]]
    if len(kinds) > 1 or len(modes) > 1 or len(kinds) + len(modes) < len(parts):
        raise UserError(
            f"--also {name} is not known; {engine} takes one of :{' :'.join(TYPES[engine])} for its weights, and one "
            f"of :{' :'.join(MODES[engine])}"
        )
    return Peer(engine, next(iter(kinds), None), next(iter(modes), None), place)


def is_peer(text: str) -> bool:
    return text.partition("=")[0].partition(":")[0] in MODES


def parse_also(text: str, known: Sequence[str] = NAMES) -> tuple[str, ...]:
    """`hf,hf-assisted=DIR,llama.cpp:q8_0` as names. Raises `UserError` for others than the `known` ones."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    peers = [parse_peer(name) for name in names if is_peer(name)]
    for name, equals, place in (name.partition("=") for name in names if not is_peer(name)):
        if name not in known or (equals and name != HF_ASSISTED):
            raise UserError(f"--also {name}{equals}{place} is not known; give some of {','.join(known)}")
        if name == HF_ASSISTED and not place:
            raise UserError(f"--also {name} needs its assistant, a model of the target's tokenizer; write {name}=DIR")
    if sum(name.startswith(HF_ASSISTED) for name in names) > 1:
        raise UserError(f"--also takes one {HF_ASSISTED}; compare assistants in runs of their own")
    if len({peer.name for peer in peers}) < len(peers):
        raise UserError("--also names an engine twice in the same way; compare files in runs of their own")
    return tuple(str(parse_peer(name)) if is_peer(name) else name for name in names)


def located(names: Sequence[str], target: str) -> tuple[str, ...]:
    """The same names; engines without a file of their own get the target's GGUF file.

    Raises `UserError` for a target without one, `ModuleNotFoundError` for an engine that is not installed.
    """
    return tuple(str(with_file(parse_peer(name), target)) if is_peer(name) else name for name in names)


def with_file(peer: Peer, target: str) -> Peer:
    import_module(LIBRARIES[peer.engine])
    if peer.place:
        return peer
    if (file := gguf_file(target)) is None:
        raise UserError(
            f"--also {peer.name} needs the weights of {target} in a GGUF file; write {peer.name}=FILE, with a file "
            "that llama.cpp's convert_hf_to_gguf.py made of it"
        )
    return Peer(peer.engine, peer.kind, peer.mode, str(file))


def also_contenders(decoding: Decoding, names: Sequence[str]) -> list[Contender]:
    """Contenders by names that `parse_also` and `located` returned."""
    return [peer_contender(decoding, parse_peer(n)) if is_peer(n) else stock_contender(decoding, n) for n in names]


def peer_contender(decoding: Decoding, peer: Peer) -> Contender:
    """Raises `UserError` for a file of another vocabulary than the target's, and for a target on another device."""
    if decoding.target.device.type != "cpu":
        raise UserError(f"--also {peer.name} is measured on CPUs; add --device cpu, or leave it out")
    weights = gguf_weights.weights(Path(peer.place), peer.kind)
    if weights.vocabulary != decoding.target.vocab_size:
        raise UserError(
            f"{peer.place} has {weights.vocabulary} tokens, the target {decoding.target.vocab_size}; give a file of "
            "the same model"
        )
    make = llama_cpp.contender if peer.engine == LLAMA_CPP else openvino.contender
    return make(decoding, peer.name, weights, peer.mode)
