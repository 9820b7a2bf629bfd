"""What operators need: other origins, idle connections, logs, versions, settings from files and variables."""

import http.client
import importlib.metadata
import json
import logging
import socket
import time
from types import SimpleNamespace

import pytest
import typer

from ctc_drafter.cli import app, main
from ctc_drafter.serve.metrics import JsonLines
from ctc_drafter.serve.server import check_origins
from ctc_drafter.types import UserError
from serve_helpers import KEY, running, tiny_service, wait_until

ORIGIN = "https://chat.example"
ASK = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def server():
    with running(tiny_service(), origins=[ORIGIN]) as at:
        yield at


@pytest.fixture(scope="module")
def closed():
    """Without other origins."""
    with running(tiny_service(), keep_alive=1) as at:
        yield at


def ask(server, method, path, body=None, **headers):
    """Status, headers and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        data = None if body is None else json.dumps(body)
        given = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | headers
        connection.request(
            method, path, data, {name.replace("_", "-"): value for name, value in given.items() if value}
        )
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()
    finally:
        connection.close()


PREFLIGHT = {
    "Authorization": "",
    "Access_Control_Request_Method": "POST",
    "Access_Control_Request_Headers": "authorization, content-type, x-stainless-os",
}


def test_a_preflight_needs_no_key(server):
    status, headers, _ = ask(server, "OPTIONS", "/v1/chat/completions", Origin=ORIGIN, **PREFLIGHT)
    assert status == 200
    assert headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in headers["access-control-allow-methods"]
    allowed = {name.strip().lower() for name in headers["access-control-allow-headers"].split(",")}
    assert {"authorization", "content-type", "x-stainless-os"} <= allowed


@pytest.mark.parametrize("key", [KEY, "wrong"])
def test_answers_and_errors_name_the_origin(server, key):
    reply = ask(server, "POST", "/v1/chat/completions", ASK, Origin=ORIGIN, Authorization=f"Bearer {key}")
    assert (reply[0], reply[1]["access-control-allow-origin"]) == (200 if key == KEY else 401, ORIGIN)


def test_other_origins_are_not_allowed(server, closed):
    status, headers, _ = ask(server, "OPTIONS", "/v1/models", Origin="https://evil.example", **PREFLIGHT)
    assert status == 400
    assert "access-control-allow-origin" not in headers
    for at, origin in ((server, "https://evil.example"), (closed, ORIGIN)):
        assert "access-control-allow-origin" not in ask(at, "GET", "/v1/models", Origin=origin)[1]


def test_origins_are_checked():
    assert check_origins(["*", "https://Chat.example:8443"]) == ["*", "https://chat.example:8443"]
    for wrong in ("chat.example", "https://chat.example/page", "", "null"):
        with pytest.raises(UserError, match="no origin"):
            check_origins([wrong])


def test_idle_connections_are_kept_as_long_as_is_said(server, closed):
    assert server.server.config.timeout_keep_alive == 75
    with socket.create_connection(("127.0.0.1", closed.port), timeout=20) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        begin, received = time.monotonic(), b""
        while data := idle.recv(4096):
            received += data
        assert received.startswith(b"HTTP/1.1 200")
        assert time.monotonic() - begin > 0.8


def test_version(server):
    status, _, body = ask(server, "GET", "/version", Authorization="")
    assert (status, json.loads(body)) == (200, {"version": importlib.metadata.version("ctc-drafter")})


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/version", "/metrics", "/page/style.css"])
def test_head_is_get_without_a_body(server, path):
    status, headers, body = ask(server, "HEAD", path)
    expected = ask(server, "GET", path)
    assert (status, body) == (expected[0], b"")
    if path != "/metrics":  # which counts requests
        assert headers["content-length"] == str(len(expected[2]))


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/v1//chat/completions", "//v1/chat/completions"])
def test_slashes_too_many(server, path):
    """As clients make them of base URLs; the key is asked for all the same."""
    expected = json.loads(ask(server, "POST", "/v1/chat/completions", ASK)[2])["choices"]
    status, _, body = ask(server, "POST", path, ASK)
    assert (status, json.loads(body)["choices"]) == (200, expected)
    assert ask(server, "POST", path, ASK, Authorization="")[0] == 401
    assert ask(server, "GET", "/health/")[0] == 200


def test_a_line_for_each_request(server, caplog):
    """A request's line comes behind its answer: those of other tests' requests may come meanwhile."""
    asked = [
        ("POST", "/v1/chat/completions", 200, "INFO", ASK),
        ("GET", "/v1/models/caf%C3%A9%0Aforged", 404, "INFO"),
        ("GET", "/health", 200, "DEBUG"),
    ]

    def told(method, path, status, level):
        wanted = {"method": method, "path": path, "status": status}
        lines = [record for record in caplog.records if hasattr(record, "fields")]
        return [each for each in lines if each.levelname == level and wanted.items() <= each.fields.items()]

    with caplog.at_level(logging.DEBUG, "ctc_drafter.serve"):
        for method, path, status, level, *body in asked:
            ask(server, method, path, *body)
            wait_until(lambda line=(method, path, status, level): told(*line))
    records = [told(*line[:4])[-1] for line in asked]
    line = records[0].getMessage()
    assert line.startswith("127.0.0.1 POST /v1/chat/completions 200 ")
    assert "\n" not in records[1].getMessage()
    parsed = json.loads(JsonLines().format(records[0]))
    assert parsed.keys() == {"time", "level", "message", "client", "method", "path", "status", "seconds"}
    assert (parsed["level"], parsed["status"], parsed["message"]) == ("info", 200, line)


# Settings of `serve` from files and variables.


@pytest.fixture
def served(monkeypatch):
    """Runs `serve` with these arguments up to the server; returns what would be served."""
    import ctc_drafter.load
    import ctc_drafter.serve.server as module

    found = SimpleNamespace(code=None)

    def stand_in(make, *arguments):
        found.key, found.host, found.port, found.hosts, found.origins, found.keep_alive = arguments
        found.service = make()

    monkeypatch.setattr(module, "serve", stand_in)
    monkeypatch.setattr(module, "make_engine", lambda *arguments: found.__dict__.update(rows=arguments[2]))
    monkeypatch.setattr(ctc_drafter.load, "load_pair", lambda target, drafter, _: (target, None, drafter))

    def run(*arguments):
        found.code = main(["serve", *arguments])
        return found

    return run


FILES = {
    "serve.yaml": "port: 9001\nbatch_size: 5\nallow-origin: [https://a.example, https://b.example]\nplain: true\n",
    "serve.toml": 'port=9001\nbatch-size=5\nallow-origin = ["https://a.example", "https://b.example"]\nplain=true',
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_settings(served, tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    found = served("--config", str(tmp_path / name))
    assert (found.code, found.port, found.rows) == (0, 9001, 5)
    assert list(found.origins) == ["https://a.example", "https://b.example"]
    assert found.host == "127.0.0.1"


def test_the_command_line_comes_before_variables_before_the_file(served, tmp_path, monkeypatch):
    (tmp_path / "serve.yaml").write_text("port: 9001\nhost: 0.0.0.0\nbatch-size: 3\nkeep-alive: 5\n")
    monkeypatch.setenv("CTC_DRAFTER_CONFIG", str(tmp_path / "serve.yaml"))
    monkeypatch.setenv("CTC_DRAFTER_PORT", "9002")
    monkeypatch.setenv("CTC_DRAFTER_BATCH_SIZE", "4")
    monkeypatch.setenv("CTC_DRAFTER_API_KEY", "abc")
    found = served("--batch-size", "6")
    assert (found.rows, found.port, found.host, found.keep_alive, found.key) == (6, 9002, "0.0.0.0", 5, "abc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 8000", "unknown key prot; did you mean port?"),
        ("config: a.yaml", "unknown key config"),
        ("wings: 2", "unknown key wings; see serve --help"),
        ("port: many", "'--port': Input should be a valid integer"),
        ("port: 70000", "'--port': Input should be less than or equal to 65535"),
        ("port: {a: 1}", "port has a value that no option takes"),
        ("host: [a, b]", "host has a value that no option takes"),
        ("- port", "holds no settings"),
        ("a: b: c", "is no YAML"),
        (None, "cannot be read"),
    ],
)
def test_bad_settings_are_one_clear_line(served, tmp_path, capsys, text, message):
    path = tmp_path / "serve.yaml"
    if text is not None:
        path.write_text(text)
    assert served("--config", str(path)).code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_unknown_fields_are_refused_unless_the_operator_says_otherwise(served):
    assert not served().service.limits.lenient
    assert served("--lenient").service.limits.lenient


def test_a_bad_variable_is_one_clear_line(served, monkeypatch, capsys):
    monkeypatch.setenv("CTC_DRAFTER_PORT", "many")
    assert served().code == 2
    assert "--port" in capsys.readouterr().err


def test_every_option_has_a_variable():
    command = typer.main.get_command(app).commands["serve"]
    assert command.context_settings["auto_envvar_prefix"] == "CTC_DRAFTER"
    assert all(param.allow_from_autoenv for param in command.params)
