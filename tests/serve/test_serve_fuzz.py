"""Requests made from the server's own schema, valid and not: none of them is a server error."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from ctc_drafter.serve.server import create_app
from serve_helpers import tiny_service

SLOW_TO_MAKE = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
POSTS = {"/v1/chat/completions", "/v1/completions", "/v1/ctc/stream"}


def try_all(examples: int, **options) -> dict[str, list[int]]:
    """Tries so many requests of each kind at every operation; returns the statuses by path."""
    import schemathesis  # here, since it takes seconds, in every process that collects this file
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error

    service = tiny_service(max_new_tokens=2)
    statuses: dict[str, list[int]] = {}
    with service.engine:
        schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:

                @settings(max_examples=examples, suppress_health_check=SLOW_TO_MAKE, database=None, **options)
                @given(case=operation.as_strategy(generation_mode=mode))
                def check(case):
                    reply = case.call_and_validate(checks=[not_a_server_error])
                    statuses.setdefault(case.path, []).append(reply.status_code)

                check()
    return statuses


def test_no_server_errors():
    statuses = try_all(6, derandomize=True, phases=[Phase.generate])
    assert set(statuses) >= POSTS | {"/v1/models", "/health", "/metrics"}
    assert all(400 in statuses[path] for path in POSTS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_server_errors_in_many_requests():
    statuses = try_all(400)
    assert all({200, 400} <= set(statuses[path]) for path in POSTS)
