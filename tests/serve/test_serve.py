"""OpenAI's own client against the server: every answer is plain decoding's."""

import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from ctc_drafter.decode.prefill import prefill
from ctc_drafter.evaluate.exactness import ScriptedDrafter
from serve_helpers import KEY, NAME, cut, plain_texts, plain_tokens, running, text_of, tiny_service, wait_until

MESSAGES = [{"role": "system", "content": "be a cat"}, {"role": "user", "content": "sat on the mat?"}]
NEW = 30


@pytest.fixture(scope="module")
def server():
    with running(tiny_service()) as at:
        yield at


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def prompt(server):
    return list(server.service.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False))


def chat(client, **options):
    options = {"model": NAME, "messages": MESSAGES, "max_tokens": NEW, "temperature": 0, **options}
    return client.chat.completions.create(**options)


def joined(chunks, count=1):
    """Texts and reasons of a stream's choices."""
    texts, reasons = [""] * count, [None] * count
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    return texts, reasons


def test_greedy_chat(server, client, prompt):
    (text,) = plain_texts(server.service, prompt, NEW)
    reply = chat(client)
    assert reply.choices[0].message.content == text != ""
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), NEW)
    assert reply.model == NAME
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == ([text], ["length"])
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == reply.usage
    assert len(chunks) > 4
    assert chat(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3


@pytest.mark.slow
def test_sampled_choices_are_those_of_plain_sampling(server, client, prompt):
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 11, "n": 3}
    expected = plain_texts(server.service, prompt, NEW, n=3, seed=11, temperature=0.9, top_p=0.8)
    assert len(set(expected)) == 3
    assert [choice.message.content for choice in chat(client, **options).choices] == expected
    assert joined(chat(client, **options, stream=True), 3)[0] == expected
    first, second = (chat(client, temperature=None).choices[0].message.content for _ in range(2))
    assert first != second, "without a temperature it is 1, and without a seed every answer differs"


def test_completions(server, client):
    service = server.service
    texts = ["the cat", "the hat"]
    ids = [list(service.tokenizer(text).input_ids) for text in texts]
    expected = [text for prompt in ids for text in plain_texts(service, prompt, 12, n=2, seed=5, temperature=1.0)]
    for given in (texts, ids):
        reply = client.completions.create(model=NAME, prompt=given, n=2, seed=5, max_tokens=12)
        assert [choice.text for choice in reply.choices] == expected
        assert reply.usage.prompt_tokens == sum(map(len, ids))
    stream = client.completions.create(model=NAME, prompt=ids, n=2, seed=5, max_tokens=12, stream=True)
    assert joined(stream, 4)[0] == expected
    assert client.completions.create(model=NAME, prompt="the cat").usage.completion_tokens <= 16


def test_eos_ends_an_answer(server, client, prompt):
    """Seeds are tried until one draws the eos token early."""
    service = server.service
    for seed in range(400):
        (tokens,) = plain_tokens(service, prompt, NEW, seed=seed, temperature=1.5)
        if len(tokens) < NEW - 4:
            break
    assert tokens[-1] == service.tokenizer.eos_token_id
    reply = chat(client, seed=seed, temperature=1.5)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.content == text_of(service, tokens)
    assert reply.usage.completion_tokens == len(tokens)


def test_nothing_of_a_stop_string_is_shown(server, client, prompt):
    (text,) = plain_texts(server.service, prompt, NEW)
    middle = len(text) // 2
    cases = [[text[middle : middle + 3]], [text[middle : middle + 6], "never"], ["never", text[5:7], text[6:9]]]
    for stops in cases:
        expected = cut(text, stops)
        assert expected != text
        reply = chat(client, stop=stops)
        assert reply.choices[0].message.content == expected
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.completion_tokens < NEW
        chunks = list(chat(client, stop=stops, stream=True, logprobs=True))
        assert joined(chunks) == ([expected], ["stop"])
    assert chat(client, stop=text[middle : middle + 3]).choices[0].message.content == cut(text, cases[0])
    almost = text[middle : middle + 3] + "~~"
    assert joined(chat(client, stop=almost, stream=True)) == ([text], ["length"])


def test_logprobs_are_the_targets_own(server, client, prompt):
    service = server.service
    (tokens,) = plain_tokens(service, prompt, 12, seed=3, temperature=0.7)
    logs = torch.stack(
        [prefill(service.target, [prompt + tokens[:i]]).logits[0].log_softmax(-1) for i in range(len(tokens))]
    )
    options = {"seed": 3, "temperature": 0.7, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    content = chat(client, **options).choices[0].logprobs.content
    assert [service.tokenizer.decode([token]) for token in tokens] == [entry.token for entry in content]
    own = [entry.logprob for entry in content]
    torch.testing.assert_close(torch.tensor(own), logs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1))
    for entry, row in zip(content, logs, strict=True):
        best = row.topk(3)
        torch.testing.assert_close(torch.tensor([top.logprob for top in entry.top_logprobs]), best.values)
        assert [top.token for top in entry.top_logprobs] == [
            service.tokenizer.decode([i]) for i in best.indices.tolist()
        ]
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    chunks = [chunk.choices[0].logprobs for chunk in chat(client, **options, stream=True)]
    streamed = [entry for logprobs in chunks if logprobs for entry in logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    legacy = client.completions.create(model=NAME, prompt=prompt, seed=3, temperature=0.7, max_tokens=12, logprobs=2)
    values = legacy.choices[0].logprobs
    torch.testing.assert_close(torch.tensor(values.token_logprobs), torch.tensor(own))
    assert values.text_offset[0] == 0
    assert values.text_offset == sorted(values.text_offset)
    assert all(
        math.isclose(max(top.values()), max(row.tolist()), abs_tol=1e-4)
        for top, row in zip(values.top_logprobs, logs, strict=True)
    )


@pytest.mark.slow
def test_likelihoods_of_a_sampled_answer_that_ends_at_a_drafted_token(server, prompt):
    """No token was drawn after it: the limit is reached, and the rest of the row was right as well."""
    settings = {"seed": 3, "temperature": 0.7}
    (tokens,) = plain_tokens(server.service, prompt, 9, **settings)
    drafter = ScriptedDrafter([prompt + tokens], 4, server.service.target.vocab_size)
    with running(tiny_service(drafter=drafter)) as scripted:
        for limit in range(2, 8):
            reply = chat(scripted.client(), **settings, max_tokens=limit, logprobs=True, top_logprobs=1)
            entries = reply.choices[0].logprobs.content
            assert [entry.token for entry in entries] == [
                server.service.tokenizer.decode([token]) for token in tokens[:limit]
            ]


def test_many_clients_share_the_batch(server, client, prompt):
    def ask(number):
        if number % 3:
            return chat(client, seed=number, temperature=1.1, max_tokens=10 + number).choices[0].message.content
        return joined(chat(client, stream=True, max_tokens=10 + number))[0][0]

    def expected(number):
        sampled = {"seed": number, "temperature": 1.1} if number % 3 else {}
        return plain_texts(server.service, prompt, 10 + number, **sampled)[0]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(12)))
    assert answers == [expected(number) for number in range(12)]


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError, match="another"):
        chat(client, model="another")
    assert client._client.get(f"{server.url}/health").json()["status"] == "ok"
    chat(client)
    answered = 'ctc_drafter_requests_total{path="/v1/chat/completions",status="200"}'
    wait_until(lambda: answered in client._client.get(f"{server.url}/metrics").text)  # counted behind the answer
    wait_until(lambda: server.service.engine.load().running == 0)  # another test's rows change the figures
    batch = server.service.engine.batches["draft"]
    text = client._client.get(f"{server.url}/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['ctc_drafter_tokens_total{lane="draft"}']) == batch.stats.tokens > 0
    assert float(figures['ctc_drafter_beta{lane="draft"}']) == pytest.approx(batch.stats.beta)
    assert float(figures['ctc_drafter_stage_seconds_total{lane="draft",stage="verify"}']) > 0
    assert float(figures["ctc_drafter_gamma_estimate"]) > 0
    assert float(figures[answered]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "takes no tools"),
        ({"extra_body": {"wings": 2}}, "unknown field wings"),
        ({"extra_body": {"maxTokens": 2}}, "unknown field maxTokens"),
        ({"extra_body": {"body": 2}}, "unknown field body"),
        ({"messages": [{"role": "user", "content": "hi", "toolCalls": []}]}, "unknown field messages.0.toolCalls"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content: "),
        ({"temperature": 3}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "n: "),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "cat " * 600}]}, "shorten it"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_cannot_be_served_is_named(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        chat(client, **options)
    assert caught.value.type == "invalid_request_error"


def test_habits_that_ask_for_nothing_are_let_through(client):
    habits = {"frequency_penalty": 0, "logit_bias": {}, "user": "me", "response_format": {"type": "text"}, "stop": None}
    assert chat(client, **habits, max_tokens=2).usage.completion_tokens == 2


def test_the_key_is_asked_for(server):
    for wrong in ("", "wrong", KEY + "x"):
        with pytest.raises(openai.AuthenticationError):
            chat(server.client(key=wrong or "none"))
    assert server.client()._client.get(f"{server.url}/health").status_code == 200
