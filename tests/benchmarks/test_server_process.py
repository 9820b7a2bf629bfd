"""A server's process: its address is found or given up, its words are passed on, and it ends with the block."""

import signal
import sys
import threading
import time

import pytest

from benchmarks.server_process import served, started
from ctc_drafter.types import UserError
from tiny_models import save_pair

TALKER = """
import signal, sys, time
def end(*_):
    for word in "last words of mine".split():
        time.sleep(0.1)
        print(word, file=sys.stderr)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("a note\\ncats on http://127.0.0.1:1; Ctrl-C stops", file=sys.stderr)
sys.stderr.write("x" * 199_999 + "\\n")  # more than a pipe holds
open(sys.argv[1], "w").close()
signal.pause()
"""


@pytest.fixture
def talker(tmp_path):
    """The command of one that says a lot, and the file that is there when all is said."""
    return [sys.executable, "-c", TALKER, str(tmp_path / "said")], tmp_path / "said"


def wait_for(path):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_last_words_are_passed_on_before_the_pipe_is_closed(talker, capfd):
    command, said = talker
    with started(command) as (process, url):
        wait_for(said)
    assert url == "http://127.0.0.1:1"
    assert process.returncode == 0
    assert capfd.readouterr().err == "x" * 199_999 + "\nlast\nwords\nof\nmine\n"
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(read)")]


@pytest.mark.parametrize("error", [BrokenPipeError, ValueError])
def test_it_is_read_though_our_standard_error_is_closed(talker, monkeypatch, error):
    def closed(_):
        raise error

    command, said = talker
    with monkeypatch.context() as patch, started(command) as (process, _):
        patch.setattr(sys.stderr, "write", closed)
        wait_for(said)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('a note'); print('error: no such thing')", "did not start: error: no such thing; mend"),
        ("", "did not start: it said nothing; mend"),
        # Dead, and a process of its own keeps its pipe open.
        (
            "import subprocess; print('busy', flush=True); subprocess.Popen(['sleep', '8'])",
            "did not start: busy; mend",
        ),
    ],
)
def test_a_dead_server_is_not_waited_for(script, message):
    begin = time.monotonic()
    with pytest.raises(UserError, match=message), started([sys.executable, "-c", script], last=1.0):
        pass
    assert time.monotonic() - begin < 7


def test_a_silent_server_is_given_up():
    script = "import time; print('loading', flush=True); time.sleep(60)"
    with (
        pytest.raises(UserError, match=r"silent for 0\.5 s \(before: loading\)"),
        started([sys.executable, "-c", script], silence=0.5),
    ):
        pass


def test_a_server_that_goes_on_saying_something_is_waited_for():
    script = """
import time
for _ in range(8):
    time.sleep(0.25)
    print("a tenth", flush=True)
print("it on http://127.0.0.1:1; stop", flush=True)
time.sleep(60)
"""
    with started([sys.executable, "-c", script], silence=1.5) as (_, url):
        assert url == "http://127.0.0.1:1"


def test_a_server_that_ignores_sigterm_is_killed():
    script = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("it on http://127.0.0.1:1; stop", flush=True)
while True:
    signal.pause()
"""
    with started([sys.executable, "-c", script], last=0.3) as (process, _):
        pass
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [("--log-level", "error"), ("--log-format", "json"), ()])
def test_the_address_is_named_whatever_the_log_leaves_out(tmp_path, options):
    target, drafter = save_pair(tmp_path)
    with served("--target", str(target), "--drafter", str(drafter), "--threads", "1", *options) as url:
        assert url.startswith("http://127.0.0.1:")


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why():
    with pytest.raises(UserError, match="did not start"), served("--batch-size", "nothing"):
        pass
