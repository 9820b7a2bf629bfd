"""One thread loads and decodes: why is said in serve/engine.py."""

import logging
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import tiny_models
from ctc_drafter import cli, load
from ctc_drafter.decode.batch import Batch, DecodingConfig, Method
from ctc_drafter.serve import server
from ctc_drafter.serve.engine import Engine, Worker, time_plain_steps
from ctc_drafter.serve.protocol import Sampling
from ctc_drafter.serve.requests import Failure, Finish
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import tiny_target
from serve_helpers import tiny_service, wait_until
from tiny_models import save_pair


def test_waits_before_the_address_are_told(caplog):
    caplog.set_level("INFO", "ctc_drafter")
    assert set(time_plain_steps(tiny_target(), 3)) == {1, 2, 3}
    assert caplog.messages == ["timing plain steps ..."]


def test_tasks_follow_each_other_on_one_thread():
    worker = Worker("busy")
    seen = []
    futures = [worker.begin(lambda n=n: seen.append((n, threading.current_thread().name))) for n in range(20)]
    assert worker.do(lambda: "last") == "last"
    assert seen == [(n, "busy") for n in range(20)]
    assert all(future.done() for future in futures)
    worker.close()
    worker.close()
    assert not worker.thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        worker.begin(lambda: None)


def test_a_task_that_was_called_off_is_left_out():
    worker, gate, seen = Worker("busy"), threading.Event(), []
    worker.begin(gate.wait)
    assert worker.begin(lambda: seen.append("no")).cancel()
    last = worker.begin(lambda: seen.append("yes"))
    gate.set()
    last.result(timeout=60)
    assert seen == ["yes"]
    worker.close()


def test_errors_reach_who_asked_and_the_worker_goes_on():
    worker = Worker("busy")
    with pytest.raises(UserError, match="no such model"):
        worker.do(lambda: (_ for _ in ()).throw(UserError("no such model")))
    with pytest.raises(SystemExit):
        worker.do(lambda: (_ for _ in ()).throw(SystemExit(3)))
    assert worker.do(lambda: 7) == 7
    worker.close()


def test_the_engine_decodes_where_its_model_was_loaded(monkeypatch):
    worker = Worker("engine")
    target = worker.do(lambda: Target.wrap(tiny_models.tiny_llama()))
    engine = Engine(
        {"plain": Method(target, tiny_models.tiny_drafter(target.model), DecodingConfig(4, 0.0))}, worker=worker
    )
    where = []
    monkeypatch.setattr(engine, "_run", lambda: where.append(threading.current_thread()))
    with engine:
        wait_until(lambda: where)
    assert where == [worker.thread]
    assert not worker.thread.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--budget",)])
def test_serve_loads_tries_and_decodes_on_one_thread(monkeypatch, tmp_path, options):
    """From the command line to an answer; the web side alone is left out."""
    save_pair(tmp_path)
    monkeypatch.setenv("CTC_DRAFTER_CACHE", str(tmp_path / "cache"))
    where = []

    def noted(work):
        def run(*args, **kwargs):
            where.append(threading.get_ident())
            return work(*args, **kwargs)

        return run

    def answer_one(listener, service, *_):
        with service.engine:
            told = queue.SimpleQueue()
            (completion,) = service.completions([[5, 6, 7]], Sampling(temperature=0), 8)
            completion.deliver = told.put
            service.engine.submit([completion])
            while not isinstance(told.get(timeout=60), (Finish, Failure)):
                pass

    monkeypatch.setattr(load, "load_target", noted(load.load_target))
    monkeypatch.setattr(server, "make_engine", noted(server.make_engine))
    monkeypatch.setattr(Batch, "advance", noted(Batch.advance))
    monkeypatch.setattr(server, "serve_on", answer_one)
    pair = ["--target", str(tmp_path / "target"), "--drafter", str(tmp_path / "drafter")]
    assert cli.main(["serve", "--port", "0", *pair, *options]) == 0
    assert len(where) > 4
    assert len(set(where)) == 1
    assert where[0] != threading.get_ident()


def test_an_engine_that_ends_by_an_error_says_why_and_leaves_nobody_waiting(monkeypatch, caplog):
    service = tiny_service()
    engine, told = service.engine, queue.SimpleQueue()
    monkeypatch.setattr(engine, "_take", lambda: 1 / 0)
    (completion,) = service.completions([[5, 6, 7]], Sampling(temperature=0), 8)
    completion.deliver = told.put
    with caplog.at_level(logging.CRITICAL), engine:
        engine.submit([completion])
        assert isinstance(told.get(timeout=60), Failure)
        wait_until(lambda: not engine.alive)
        assert not engine.load().open
    assert "division by zero" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api-key", ""], "the API key is empty"),
        (["--grace", "inf"], "grace is inf"),
        (["--timeout", "nan"], "timeout is nan"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(monkeypatch, capsys, options, message):
    monkeypatch.setattr(load, "load_target", lambda *_: pytest.fail("it was loaded"))
    assert cli.main(["serve", "--port", "0", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(load, "load_target", lambda *_: pytest.fail("it was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: cannot listen on 127.0.0.1, port {port}: ")
    assert message.endswith("give another --host or --port\n")
    assert message.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_while_a_model_is_loaded_ends_the_process_in_order(number, code):
    """Not by an abort: the thread that loads is inside torch then."""
    script = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started with
from ctc_drafter import cli, load
def busy(*_):
    print("loading", flush=True)
    while True:
        torch.ones(600, 600) @ torch.ones(600, 600)
load.load_target = busy
sys.exit(cli.main(["serve", "--port", "0"]))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"loading\n"
            time.sleep(0.5)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    assert err.endswith(b"interrupted\n" if number == signal.SIGINT else b"")
    assert b"Traceback" not in err


def test_a_folder_named_by_a_dot_has_its_own_name(monkeypatch, tmp_path):
    folder, _ = save_pair(tmp_path)
    monkeypatch.chdir(folder)
    names = []
    monkeypatch.setattr(server, "serve_on", lambda listener, service, *_: names.append(service.name))
    assert cli.main(["serve", "--port", "0", "--target", ".", "--drafter", "../drafter"]) == 0
    assert names == ["target"]
