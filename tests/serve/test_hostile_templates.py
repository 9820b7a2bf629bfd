"""Chat templates that fail, in the server: a 400 that says so, and no error of the server."""

from dataclasses import replace

import pytest

from ctc_drafter.serve.messages import Message
from ctc_drafter.serve.middleware import APIError
from serve_helpers import tiny_service
from test_hostile_models import BAD_TEMPLATES
from tiny_models import tiny_tokenizer

ASK = [Message(role="user", content="the cat")]


@pytest.fixture(scope="module")
def service():
    return tiny_service()


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_templates_that_fail_are_the_requests_error(service, template):
    with pytest.raises(APIError) as raised:
        replace(service, tokenizer=tiny_tokenizer(template)).encode_chat(ASK)
    assert raised.value.status == 400
    message = raised.value.body.error.message
    assert message.startswith("the model's chat template refuses these messages: ")
    assert "\n" not in message


def test_a_template_that_works(service):
    assert service.encode_chat(ASK)[0]
