"""A tiny server on a free port of this machine, and what plain decoding answers to the same requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from openai import OpenAI

import tiny_models
from ctc_drafter.chat import TextStream, eos_ids
from ctc_drafter.decode.batch import DecodingConfig, Method
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Sampled, warpers
from ctc_drafter.drafters.base import Drafter, NoDrafter
from ctc_drafter.serve.engine import Engine
from ctc_drafter.serve.server import Server, bind, make_engine, make_server
from ctc_drafter.serve.service import Limits, Service
from ctc_drafter.target.model import Target
from ctc_drafter.types import Candidates

NAME = "tiny"
KEY = "secret"


@dataclass(frozen=True)
class Running:
    service: Service
    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = KEY, **options: object) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 30, **options})


def tiny_service(batch_size: int = 3, queue: int = 16, drafter: Drafter | None = None, **limits: float) -> Service:
    """Not started. An untrained drafter unless another one is given."""
    model = tiny_models.tiny_llama()
    target, tokenizer = Target.wrap(model), tiny_models.tiny_tokenizer()
    engine = make_engine(
        target, drafter or tiny_models.tiny_drafter(model), batch_size, queue, nodes=8, min_probability=0.0
    )
    return Service(engine, target, tokenizer, NAME, Limits(**limits))


def blocked_service(batch_size: int = 1, queue: int = 1, **limits: float) -> tuple[Service, Turnstile]:
    """One whose verifications wait for the turnstile; answers have one token, the prefill's, before it opens."""
    target, turnstile = Target.wrap(tiny_models.tiny_llama()), Turnstile()
    engine = Engine({"draft": Method(target, turnstile, DecodingConfig(1, 0.0))}, batch_size, queue)
    return Service(engine, target, tiny_models.tiny_tokenizer(), NAME, Limits(**limits)), turnstile


@contextmanager
def running(service: Service, api_key: str | None = KEY, port: int = 0, **options: Any) -> Iterator[Running]:
    """Serves from another thread until the block ends; port 0 takes a free one. options: of `make_server`."""
    with bind("127.0.0.1", port) as listener, service.engine:
        server = make_server(service, api_key, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Running(service, server, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def plain_tokens(
    service: Service, prompt: list[int], limit: int, *, n: int = 1, seed=None, **settings
) -> list[list[int]]:
    """The oracle: plain decoding with the same settings."""
    sampler = ARGMAX if seed is None else Sampled(seed, warpers(**settings))
    eos = eos_ids(service.target.model, service.tokenizer)
    return plain_generate(service.target, [prompt] * n, max_new_tokens=limit, eos=eos, sampler=sampler).tokens


def text_of(service: Service, tokens: list[int]) -> str:
    stream = TextStream(service.tokenizer)
    return stream.push(tokens) + stream.close()


def plain_texts(service: Service, prompt: list[int], limit: int, **settings) -> list[str]:
    return [text_of(service, tokens) for tokens in plain_tokens(service, prompt, limit, **settings)]


def cut(text: str, stops: list[str]) -> str:
    """A text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


class Turnstile(NoDrafter):
    """Lets so many verifications through as it was told to, and then waits."""

    def __init__(self) -> None:
        self.passes = threading.Semaphore(0)

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        assert self.passes.acquire(timeout=20)
        return super().propose(root, nodes, min_probability)

    def open(self, count: int = 10_000) -> None:
        self.passes.release(count)

    @contextmanager
    def dripping(self, seconds: float) -> Iterator[None]:
        """Lets one verification through every so often."""
        done = threading.Event()

        def drip() -> None:
            while not done.wait(seconds):
                self.open(1)

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
