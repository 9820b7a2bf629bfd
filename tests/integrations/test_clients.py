"""litellm, langchain-openai and llama-index against our server: `make test-clients`.

In an environment of their own, where neither torch nor this package is installed.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

pytestmark = pytest.mark.clients
ROOT = Path(__file__).parents[2]
SERVER = os.environ.get("CTC_DRAFTER_PYTHON", str(ROOT / ".venv" / "bin" / "python"))  # the package's environment
KEY = "some-key"
ASK = [{"role": "user", "content": "What is 2 x 3?"}]
HISTORY = [*ASK, {"role": "assistant", "content": "2 x 3 = 6."}, {"role": "user", "content": "And 2 x 4?"}]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|user|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Bonn", "Ulm"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = WEATHER["function"]["parameters"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the small pair that ships, with a chat template that takes tools."""
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(TEMPLATE)
    command = [SERVER, "-m", "ctc_drafter.cli", "serve", "--target", "tiny", "--port", "0", "--threads", "1"]
    command += ["--chat-template", str(template), "--api-key", KEY, "--name", "tiny"]
    said: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        while " on http" not in (said[-1] if said else ""):
            said.append(process.stdout.readline())
            assert said[-1], "".join(said)
        reader = threading.Thread(target=lambda: said.extend(process.stdout or ()))
        reader.start()
        try:
            yield said[-1].split(" on ")[1].split(";")[0] + "/v1"
        finally:
            process.terminate()
            reader.join()


def raw(server: str, **body: Any) -> dict[str, Any]:
    """The message that the server gives without any client."""
    body = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 24} | body
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with urlopen(Request(f"{server}/chat/completions", json.dumps(body).encode(), headers), timeout=120) as reply:
        return json.load(reply)["choices"][0]["message"]


def test_here_is_neither_torch_nor_the_package() -> None:
    """Or clients would be tested with our versions of what they need."""
    assert "torch" not in sys.modules
    assert "ctc_drafter" not in sys.modules


# litellm


def litellm_ask(server: str, **options: Any) -> Any:
    import litellm

    options = {"messages": ASK, "temperature": 0, "max_tokens": 24} | options
    return litellm.completion("openai/tiny", api_base=server, api_key=KEY, timeout=120, **options)


def test_litellm(server: str) -> None:
    expected = raw(server)["content"]
    assert expected
    message = litellm_ask(server).choices[0].message
    assert message.content == expected
    assert "".join(chunk.choices[0].delta.content or "" for chunk in litellm_ask(server, stream=True)) == expected
    again = litellm_ask(server, messages=[*ASK, message.model_dump(), HISTORY[-1]])
    whole = [*ASK, {"role": "assistant", "content": expected}, HISTORY[-1]]
    assert again.choices[0].message.content == raw(server, messages=whole)["content"]


def test_litellm_calls_tools(server: str) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    reply = litellm_ask(server, max_tokens=100, **options).choices[0]
    (call,) = reply.message.tool_calls
    (expected,) = raw(server, max_tokens=100, **options)["tool_calls"]
    assert reply.finish_reason == "tool_calls"
    assert (call.function.name, call.function.arguments) == ("weather", expected["function"]["arguments"])
    back = [*ASK, reply.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "wet"}]
    assert litellm_ask(server, messages=back, tools=[WEATHER]).choices[0].message.role == "assistant"


def test_litellm_says_what_the_server_says(server: str) -> None:
    import litellm

    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm_ask(server, temperature=9)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion("openai/tiny", messages=ASK, api_base=server, api_key="another", max_retries=0)


# langchain


def langchain_model(server: str, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model="tiny", base_url=server, api_key=KEY, temperature=0, timeout=120, **({"max_tokens": 24} | options)
    )


def test_langchain(server: str) -> None:
    turns = [("human" if turn["role"] == "user" else "ai", turn["content"]) for turn in HISTORY]
    expected = raw(server, messages=HISTORY)["content"]
    model = langchain_model(server)
    found = model.invoke(turns)
    assert found.content == expected
    assert found.usage_metadata["output_tokens"] > 0
    assert "".join(str(piece.content) for piece in model.stream(turns)) == expected
    assert [each.content for each in model.batch([turns, turns])] == [expected] * 2


def test_langchain_calls_tools_and_follows_schemas(server: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    model = langchain_model(server, max_tokens=100)
    bound = model.bind_tools([WEATHER], tool_choice="any", parallel_tool_calls=False)
    question = HumanMessage("rain?")
    answer = bound.invoke([question])
    (call,) = answer.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["town"] in ("Bonn", "Ulm")
    told = model.bind_tools([WEATHER]).invoke([question, answer, ToolMessage("wet", tool_call_id=call["id"])])
    assert told.type == "ai"
    named = model.bind_tools([WEATHER], tool_choice="weather").invoke([question])
    assert [each["name"] for each in named.tool_calls] == ["weather"]
    shaped = model.with_structured_output({"title": "place", **SCHEMA}, method="json_schema")
    assert shaped.invoke("where?")["town"] in ("Bonn", "Ulm")


def test_langchain_by_responses(server: str) -> None:
    found = langchain_model(server, use_responses_api=True).invoke("What is 2 x 3?")
    assert found.text == raw(server)["content"]


# llama-index


def llama_model(server: str, **options: Any) -> Any:
    from llama_index.llms.openai_like import OpenAILike

    shape = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 1024}
    return OpenAILike(
        model="tiny",
        api_base=server,
        api_key=KEY,
        temperature=0,
        timeout=120.0,
        **shape,
        **({"max_tokens": 24} | options),
    )


def test_llama_index(server: str) -> None:
    from llama_index.core.llms import ChatMessage

    turns = [ChatMessage(role=turn["role"], content=turn["content"]) for turn in HISTORY]
    expected = raw(server, messages=HISTORY)["content"]
    model = llama_model(server)
    assert model.chat(turns).message.content == expected
    assert "".join(piece.delta or "" for piece in model.stream_chat(turns)) == expected
    assert model.complete("What is 2 x 3?").text == raw(server)["content"]


def test_llama_index_calls_tools(server: str) -> None:
    from llama_index.core.tools import FunctionTool

    def weather(town: str) -> str:
        """The weather of a town"""
        return "wet"

    model = llama_model(server, max_tokens=100)
    tool = FunctionTool.from_defaults(weather)
    options: dict[str, Any] = {"tool_required": True, "allow_parallel_tool_calls": False}
    reply = model.chat_with_tools([tool], user_msg="rain?", **options)
    names = [call.tool_name for call in model.get_tool_calls_from_response(reply, error_on_no_tool_call=False)]
    assert names in ([], ["weather"])  # a text without end may reach the limit first
