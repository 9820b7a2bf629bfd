"""`ctc-drafter serve` as a process: its address, its last words, and an error when it dies or says nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO

from ctc_drafter.types import UserError

SILENCE = 600.0  # seconds without a word: downloads, and the compilation of thirty layers, say nothing for minutes
LAST = 60.0  # seconds from SIGTERM to SIGKILL; a server gives its answers 15
TURN = 0.1  # seconds between two looks at a process
MARK = " on http"


@contextmanager
def served(*options: str, silence: float = SILENCE) -> Iterator[str]:
    """`ctc-drafter serve OPTIONS` as a process on a free port, until the block ends; gives its address.

    Raises `UserError` with what the server said when it did not start.
    """
    command = [sys.executable, "-m", "ctc_drafter.cli", "serve", "--port", "0", *options]
    with started(command, silence=silence) as (_, url):
        yield url


@contextmanager
def started(
    command: Sequence[str], *, silence: float = SILENCE, last: float = LAST
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process and the address that it names ("... on http://...; ..."); SIGTERM ends it with the block,
    SIGKILL `last` seconds later. What else it says goes to our standard error, to its last word.

    Raises `UserError` with its last line when it ends before it serves, or is silent for so many seconds.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    output = Output()
    reader = threading.Thread(target=output.read, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        yield process, _wait_for_address(process, output, silence)
    finally:
        process.terminate()
        try:
            process.wait(last)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(last)


@dataclass
class Output:
    """What a server says. words: moment of its newest line."""

    said: str = "it said nothing"
    words: float = field(default_factory=time.monotonic)
    address: str = ""
    ended: threading.Event = field(default_factory=threading.Event)
    known: threading.Event = field(default_factory=threading.Event)

    def read(self, pipe: IO[str]) -> None:
        """Up to the address, then on to our standard error in any case: a server whose pipe is full would wait for
        ever. Closes the pipe, which a process of the server's own may hold longer than the server lives."""
        with pipe:
            for line in pipe:
                self.said, self.words = line.strip() or self.said, time.monotonic()
                if self.address:
                    with suppress(OSError, ValueError):  # ours is closed
                        sys.stderr.write(line)
                elif MARK in line:
                    self.address = line.split(" on ")[1].split(";")[0]
                    self.known.set()
        self.ended.set()


def _wait_for_address(process: subprocess.Popen[str], output: Output, silence: float) -> str:
    while not output.known.wait(TURN):
        if process.poll() is not None:
            output.ended.wait(1.0)  # a process of its own may hold the pipe
        if output.known.is_set():
            break
        if output.ended.is_set() or process.poll() is not None:
            raise UserError(f"the server did not start: {output.said}; mend its options")
        if time.monotonic() - output.words > silence:
            raise UserError(
                f"the server named no address and was silent for {silence:g} s (before: {output.said}); "
                "look at what it does"
            )
    return output.address
