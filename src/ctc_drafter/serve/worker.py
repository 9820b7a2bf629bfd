"""The thread on which everything happens that computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Task = tuple[Callable[[], Any], "Future[Any]"]


class Worker:
    """Does one task after the other on a daemon thread, until it is closed.

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
        """Does it when those before it are done; its future has what it returned or raised."""
        if self._closed:
            raise RuntimeError("the worker is closed")
        future: Future[T] = Future()
        self._tasks.put((task, future))
        return future

    def do(self, task: Callable[[], T]) -> T:
        """Waits for what it returns; raises what it raised."""
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
            except BaseException as error:  # whoever waits for the future decides
                future.set_exception(error)
