"""Decoding engine with continuous batching: one worker thread, a bounded queue."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch

from ctc_drafter.decode.batch import Method
from ctc_drafter.decode.profile import fitting, plain_method, time_steps
from ctc_drafter.serve.method_batch import MethodBatch
from ctc_drafter.serve.requests import ERROR, Completion, Failure, failure
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError

# Decoding loop: requests wait in a bounded queue, join a batch between its steps, and leave when done.

LOG = logging.getLogger(__name__)
SHUTDOWN = Failure("shutdown", "the server is shutting down; try another one, or later")
TIMEOUT = Failure("timeout", "the answer took longer than the server allows; ask for fewer tokens")


class QueueFull(Exception):
    """No room for more requests. seconds: when to ask again, estimated."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class ShuttingDown(Exception):
    """No requests are taken any more."""


@dataclass(frozen=True)
class Load:
    """Load of the engine: running rows, waiting rows, and whether new ones are accepted."""

    running: int
    waiting: int
    open: bool


class Engine:
    """Decodes completions on a thread of its own, at most `batch_size` at a time, with up to `queue` more waiting.

    methods: by name; the first one is the default. worker: the one that loaded what they run; a new one
    without, and closed with the engine either way. Use it as a context, or call `start` and `close`.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        batch_size: int = 8,
        queue: int = 64,
        speedup: Speedup | None = None,
        worker: Worker | None = None,
    ):
        for name, value in {"batch size": batch_size, "queue": queue}.items():
            if value < 1:
                raise UserError(f"the {name} is {value}; give at least 1")
        self.batches = {name: MethodBatch(method) for name, method in methods.items()}
        self.batch_size, self.queue, self.speedup = batch_size, queue, speedup
        self._waiting: deque[Completion] = deque()
        self._joining: deque[Completion] = deque()  # taken from the queue, and not in a batch yet
        self._wake = threading.Condition()
        self._worker = worker
        self._running: Future[None] | None = None
        self._stop_at: float | None = None  # from then on nothing is decoded
        self._served, self._busy_seconds = 0, 0.0

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        self._worker = self._worker or Worker("engine")
        self._running = self._worker.begin(self._run)
        self._running.add_done_callback(self._told)

    def drain(self, grace: float) -> None:
        """Refuses new requests and those that wait; running rows have `grace` seconds left."""
        with self._wake:
            if self._stop_at is None or time.monotonic() + grace < self._stop_at:
                self._stop_at = time.monotonic() + grace
            self._wake.notify()

    def close(self) -> None:
        """Ends all running rows and the thread."""
        self.drain(0.0)
        if self._worker is not None:
            self._worker.close()

    @property
    def alive(self) -> bool:
        return self._running is not None and not self._running.done() and self._stop_at is None

    def load(self) -> Load:
        running = len(self._joining) + sum(len(batch.completions) for batch in self.batches.values())
        return Load(running, len(self._waiting), self.alive)

    @property
    def most(self) -> int:
        """Largest number of completions running or waiting."""
        return self.batch_size + self.queue

    def submit(self, completions: Sequence[Completion]) -> None:
        """Takes all of these completions, or raises `QueueFull` or `ShuttingDown`."""
        with self._wake:
            if not self.alive:
                raise ShuttingDown
            if len(self._waiting) + len(completions) > self.most - self.load().running:
                raise QueueFull(self._wait_estimate())
            self._waiting.extend(completions)
            self._wake.notify()

    def _wait_estimate(self) -> int:
        each = self._busy_seconds / self._served if self._served else 1.0
        return max(1, min(60, round(each * len(self._waiting))))

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self.load().running or self._stop_at is not None):
                    self._wake.wait()
                self._take()
                stop_at = self._stop_at
            if stop_at is not None and (time.monotonic() >= stop_at or not self.load().running):
                self._end(SHUTDOWN)
                return
            begin = time.perf_counter()
            while self._joining:
                if self._wanted(self._joining[0]):
                    self._admit(self._joining[0])
                self._joining.popleft()
            for batch in self.batches.values():
                self._step(batch)
            self._busy_seconds += time.perf_counter() - begin

    def _told(self, running: Future[None]) -> None:
        """A loop that ended by an error leaves a server that refuses everything; its log says why."""
        if (error := running.exception()) is None:
            return
        LOG.critical("the engine stopped", exc_info=error)
        with self._wake:  # a submission from now on finds it dead
            completions = [
                *self._waiting,
                *self._joining,
                *(completion for batch in self.batches.values() for completion in batch.completions),
            ]
        for completion in completions:
            completion.deliver(ERROR)

    def _take(self) -> None:
        """Takes the completions from the queue that join now, and lets those go that nobody waits for."""
        staying = deque[Completion]()
        while self._waiting:
            completion = self._waiting.popleft()
            if self._wanted(completion):
                (self._joining if self.load().running < self.batch_size else staying).append(completion)
        self._waiting = staying

    def _wanted(self, completion: Completion) -> bool:
        """Whether it is still wanted: not cancelled, within its deadline, and the server not shutting down."""
        return not (completion.cancelled or self._late(completion) or self._turned_away(completion))

    def _turned_away(self, completion: Completion) -> bool:
        if self._stop_at is not None:
            completion.deliver(SHUTDOWN)
        return self._stop_at is not None

    def _late(self, completion: Completion) -> bool:
        if not completion.cancelled and time.monotonic() > completion.deadline:
            completion.cancelled = True
            completion.deliver(TIMEOUT)
        return completion.cancelled

    def _admit(self, completion: Completion) -> None:
        try:
            self.batches[completion.method].admit(completion)
            self._served += 1
        except Exception as error:
            LOG.exception("a prompt of %d tokens could not be decoded", len(completion.prompt))
            completion.cancelled = True  # should it have come as far as the batch
            completion.deliver(failure(error))

    def _step(self, batch: MethodBatch) -> None:
        try:
            for completion in batch.completions:
                self._late(completion)
            batch.drop()
            if not batch.completions:
                return
            rows, begin = len(batch.completions), time.perf_counter()
            tokens = batch.step()
        except Exception:
            LOG.exception("a step of %d rows failed", len(batch.completions))
            for completion in batch.clear():
                completion.deliver(ERROR)
            return
        if self.speedup is not None and batch is next(iter(self.batches.values())):
            self.speedup.count(rows, tokens, time.perf_counter() - begin)

    def _end(self, why: Failure) -> None:
        for batch in self.batches.values():
            for completion in batch.clear():
                completion.deliver(why)


# Single worker thread that owns the model.

T = TypeVar("T")
Task = tuple[Callable[[], Any], "Future[Any]"]


class Worker:
    """Single worker thread (daemon) that owns the model: runs tasks one after the other until closed.

    Models are loaded, compiled and run on the same one. OpenMP (libgomp) keeps workers for each thread that computes,
    and once those of two threads outnumber the cores it lets none of them wait awake: plain decoding of a small model
    took three times as long (docs/log.md). And CUDA graphs belong to the thread that captured them. Not a
    `ThreadPoolExecutor`: its threads hold up the end of the process until they are done.
    """

    def __init__(self, name: str):
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._closed = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def begin(self, task: Callable[[], T]) -> Future[T]:
        """Queues a task; its future has the result or the exception."""
        if self._closed:
            raise RuntimeError("the worker is closed")
        future: Future[T] = Future()
        self._tasks.put((task, future))
        return future

    def do(self, task: Callable[[], T]) -> T:
        """Runs a task and waits for its result; raises its exception."""
        return self.begin(task).result()

    def close(self) -> None:
        """Waits for the tasks there are, and ends the thread."""
        self._closed = True
        self._tasks.put(None)
        self.thread.join()

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None:
            task, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:  # raised where the future's result is read
                future.set_exception(error)


# Estimated speedup over plain decoding.

PROMPT = 64


class Speedup:
    """γ: seconds that plain steps of the same number of rows would have taken, over the seconds that were taken.

    plain: seconds of a plain step by number of rows, as `time_plain_steps` measures them; numbers between are
    interpolated. An estimate: plain steps slow down with long texts, and are timed once on short ones.
    """

    def __init__(self, plain: Mapping[int, float]):
        self.sizes, self.seconds = np.array(sorted(plain)), np.array([plain[size] for size in sorted(plain)])
        self.plain_seconds = self.taken_seconds = 0.0

    def count(self, rows: int, tokens: int, seconds: float) -> None:
        """A step of `rows` rows that emitted `tokens` tokens."""
        self.plain_seconds += tokens / rows * float(np.interp(rows, self.sizes, self.seconds))
        self.taken_seconds += seconds

    @property
    def gamma(self) -> float:
        """0 before the first step."""
        return self.plain_seconds / self.taken_seconds if self.taken_seconds else 0.0


def time_plain_steps(target: Target, batch_size: int) -> dict[int, float]:
    """Median seconds of a plain step with 1, 2, 4, ... rows; warms the target up as well."""
    sizes = [*(1 << power for power in range((batch_size - 1).bit_length())), batch_size]
    LOG.info("timing plain steps ...")
    plain, context = [plain_method(target)], fitting(target, PROMPT, 0)
    return {size: time_steps(plain, size, context)[0].ms / 1e3 for size in sizes}
