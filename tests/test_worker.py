"""One thread loads and decodes: why is said in serve/worker.py."""

import logging
import threading

import pytest

import tiny_models
from ctc_drafter import cli, load
from ctc_drafter.decode.batch import Method
from ctc_drafter.decode.choose import ARGMAX
from ctc_drafter.serve.engine import Engine
from ctc_drafter.serve.worker import Worker
from ctc_drafter.target import Target
from ctc_drafter.types import UserError
from serve_helpers import wait_until


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
    engine = Engine({"plain": Method(target, tiny_models.tiny_drafter(target.model), 4, 0.0, ARGMAX)}, worker=worker)
    where = []
    monkeypatch.setattr(engine, "_run", lambda: where.append(threading.current_thread()))
    with engine:
        wait_until(lambda: where)
    assert where == [worker.thread]
    assert not worker.thread.is_alive()


def test_serve_loads_on_the_engines_thread(monkeypatch, capsys):
    where = []

    def refuse(*_):
        where.append(threading.current_thread().name)
        raise UserError("this is as far as the test goes")

    monkeypatch.setattr(load, "load_target", refuse)
    assert cli.main(["serve"]) == 2
    assert where == ["engine"]
    assert "as far as the test goes" in capsys.readouterr().err


def test_an_engine_that_ends_by_an_error_is_not_alive_and_says_why(monkeypatch, caplog):
    target = Target.wrap(tiny_models.tiny_llama())
    engine = Engine({"plain": Method(target, tiny_models.tiny_drafter(target.model), 4, 0.0, ARGMAX)})
    monkeypatch.setattr(engine, "_run", lambda: 1 / 0)
    with caplog.at_level(logging.CRITICAL), engine:
        wait_until(lambda: not engine.alive and caplog.records)
        assert not engine.load().open
    assert "division by zero" in caplog.text
