"""Requests made from the server's own schema, valid and not: no server error, every answer as the schema says."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ctc_drafter.serve.server import create_app
from serve_helpers import tiny_service

pytestmark = pytest.mark.slow

SLOW_TO_MAKE = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
POSTS = {
    "/v1/chat/completions": {"messages"},
    "/v1/completions": {"prompt"},
    "/v1/responses": {"input"},
    "/v1/ctc/stream": {"messages"},
}
# Requests that the model answers, which random ones hardly are: a conversation alone, or with some settings.
GOOD = {"messages": [{"role": "user", "content": "the cat"}], "prompt": "the cat", "input": "the cat"}
PATIENCE = 120  # seconds of a request; the first ones compile


def try_all(examples: int, **options) -> dict[str, list[int]]:
    """Tries so many requests of each kind at every operation; returns the statuses by path."""
    import schemathesis  # here, since it takes seconds, in every process that collects this file

    service, statuses = tiny_service(max_new_tokens=2), {}
    options |= {"max_examples": examples, "suppress_health_check": SLOW_TO_MAKE, "database": None, "deadline": None}
    with service.engine:
        schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
        for found in schema.get_all_operations():
            try_operation(found.ok(), settings(**options), statuses)
    return statuses


def try_operation(operation, limits: settings, statuses: dict[str, list[int]]) -> None:
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

    def ask(case) -> None:
        reply = case.call(timeout=PATIENCE)
        statuses.setdefault(case.path, []).append(reply.status_code)
        case.validate_response(reply, checks=checks)

    for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
        limits(given(case=operation.as_strategy(generation_mode=mode))(ask))()
    needed = POSTS.get(operation.path)
    if needed is None:
        return

    @limits
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE), data=st.data())
    def ask_well(case, data) -> None:
        """What is served, and up to three fields of what is asked at random."""
        names = sorted(case.body.keys() - needed - {"model"})
        some = data.draw(st.sets(st.sampled_from(names), max_size=3)) if names else ()
        case.body = {name: GOOD[name] for name in needed} | {name: case.body[name] for name in some}
        ask(case)

    ask_well()


def test_no_server_errors():
    statuses = try_all(6, derandomize=True, phases=[Phase.generate])
    assert set(statuses) >= {*POSTS, "/v1/models", "/v1/ctc/about", "/health", "/version", "/metrics"}
    assert all({200, 400} <= set(statuses[path]) for path in POSTS)


@pytest.mark.timeout(1800)
def test_no_server_errors_in_many_requests():
    statuses = try_all(200)
    assert all(400 in statuses[path] for path in POSTS)
    # A random chat is seldom a good one: one request in a hundred or so.
    assert all(200 in statuses[path] for path in ("/v1/completions", "/v1/responses"))
