"""Answers by a schema: each is what plain decoding writes when a fresh matcher is asked about every text."""

import json
import random

import openai
import pytest
import torch
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor, TemperatureLogitsWarper

from ctc_drafter.chat import eos_ids
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.decode.sampling import Greedy, Sampled
from ctc_drafter.evaluate.exactness import ScriptedDrafter
from ctc_drafter.serve.structured import Vocabulary
from ctc_drafter.types import UserError
from serve_helpers import NAME, running, text_of, tiny_service, wait_until
from tiny_models import tiny_tokenizer

llguidance = pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "hat", "caterpillar"]},
        "tags": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "minItems": 1,
            "maxItems": 3,
        },
        "good": {"type": "boolean"},
    },
    "required": ["kind", "tags", "good"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
ASK = [{"role": "user", "content": "the cat"}]
NEW = 200


def fits(value):
    """The schema, by hand."""
    return (
        isinstance(value, dict)
        and list(value) == ["kind", "tags", "good"]
        and value["kind"] in ("cat", "hat", "caterpillar")
        and 1 <= len(value["tags"]) <= 3
        and all(type(tag) is int and 0 <= tag <= 99 for tag in value["tags"])
        and type(value["good"]) is bool
    )


def oracle(service, prompt, sampler_of, schema=SCHEMA, new=NEW):
    """Plain decoding with stock's processor for allowed tokens, which asks a fresh matcher about each text."""
    grammar = Vocabulary.of(service.tokenizer, 280, [1]).grammar(schema)

    def allowed(_row, text):
        matcher = grammar.matcher.deep_copy()
        for token in text[len(prompt) :].tolist():
            assert matcher.consume_token(token)
        mask = matcher.compute_bitmask()
        return [token for token in range(280) if mask[token // 8] >> (token % 8) & 1]

    eos = eos_ids(service.target.model, service.tokenizer)
    sampler = sampler_of([PrefixConstrainedLogitsProcessor(allowed, 1)])
    return plain_generate(service.target, [prompt], max_new_tokens=new, eos=eos, sampler=sampler).tokens[0]


def greedy(stock):
    return Greedy(LogitsProcessorList(stock))


def warm(seed):
    return lambda stock: Sampled(seed, LogitsProcessorList([*stock, TemperatureLogitsWarper(1.4)]))


def prompt_of(service):
    return list(service.tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False))


def ask(server, **options):
    options = {"model": NAME, "messages": ASK, "max_tokens": NEW, "response_format": FORMAT, **options}
    return server.client().chat.completions.create(**options)


@pytest.fixture(scope="module")
def server():
    """Its drafter knows some of the answers, is spoilt after two tokens, none, three, one, and adds decoys."""
    service = tiny_service()
    prompt = prompt_of(service)
    scripts = [prompt + oracle(service, prompt, greedy)]
    with running(tiny_service(drafter=ScriptedDrafter(scripts, [2, 0, 3, 1], 280))) as at:
        yield at


def test_a_greedy_answer(server):
    tokens = oracle(server.service, prompt_of(server.service), greedy)
    assert fits(json.loads(text_of(server.service, tokens)))
    wait_until(lambda: server.service.engine.load().running == 0)  # another test's rows take steps, too
    before = server.service.engine.batches["draft"].stats.steps
    reply = ask(server, temperature=0)
    assert reply.choices[0].message.content == text_of(server.service, tokens)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("stop", len(tokens))
    assert server.service.engine.batches["draft"].stats.steps - before < len(tokens) - 1, "drafts were accepted"
    chunks = list(ask(server, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(server.service, tokens)


@pytest.mark.slow
def test_sampled_answers(server):
    service = server.service
    with running(tiny_service()) as untrained:
        tokens = oracle(service, prompt_of(service), warm(1))
        for at in (server, untrained):
            reply = ask(at, seed=1, temperature=1.4)
            assert reply.choices[0].message.content == text_of(service, tokens)
        texts = [choice.message.content for choice in ask(untrained, temperature=1.4, n=3, seed=5).choices]
    assert len(set(texts)) == 3
    assert all(fits(json.loads(text)) for text in texts)


def test_any_object(server):
    reply = ask(server, temperature=0, response_format={"type": "json_object"}, max_tokens=30)
    tokens = oracle(server.service, prompt_of(server.service), greedy, {"type": "object"}, 30)
    assert reply.choices[0].message.content == text_of(server.service, tokens)
    assert reply.choices[0].message.content.startswith("{")


def test_completions(server):
    prompt = list(server.service.tokenizer("the hat").input_ids)
    tokens = oracle(server.service, prompt, greedy)
    extra = {"response_format": FORMAT, "return_token_ids": True}
    reply = server.client().completions.create(
        model=NAME, prompt=prompt, max_tokens=NEW, temperature=0, extra_body=extra
    )
    assert reply.choices[0].token_ids == tokens


@pytest.mark.slow
def test_with_other_settings(server):
    """Penalties and biases act on what the schema leaves; the answer fits all the same."""
    reply = ask(server, seed=2, temperature=1.2, frequency_penalty=1, logit_bias={"40": 50, "1": 100}, top_p=0.9)
    assert fits(json.loads(reply.choices[0].message.content))


def test_the_state_is_that_of_the_text_alone():
    """Asked about nodes of trees in any order, it says what a fresh one would."""
    tokenizer = tiny_tokenizer()
    grammar = Vocabulary.of(tokenizer, 280, [1]).grammar(SCHEMA)
    texts = [
        '{"kind": "cat", "tags": [1, 22], "good": true}',
        '{"kind":"caterpillar","tags":[3],"good":false}',
        '{\n  "kind": "hat", "tags": [1',
    ]
    kept, rng, scores = grammar.processor(3), random.Random(0), torch.zeros(1, 300)
    paths = [[7, 7, 7, *tokenizer(text).input_ids] for text in texts]
    for _ in range(60):
        path = rng.choice(paths)
        text = torch.tensor([path[: rng.randint(3, len(path))]])
        fresh = grammar.processor(3)(text, scores)
        assert torch.equal(kept(text, scores), fresh)
        assert (fresh > float("-inf")).any()
        assert not (fresh[:, 280:] > float("-inf")).any(), "logits that belong to no token"


def schema_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.sparing(3)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format: json_schema goes with the type"),
        ({"response_format": {"type": "grammar"}}, "response_format.type: "),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "cat"}}}},
            "response_format: the schema cannot be followed",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format: the schema cannot be followed: .*not",
        ),
        ({"response_format": schema_of({"$ref": "#"})}, "response_format: the schema cannot be followed"),
        (
            {"response_format": schema_of({"$ref": "file:///etc/passwd"})},
            "response_format: the schema cannot be followed",
        ),
        ({"response_format": schema_of(nested(400))}, "response_format: the schema cannot be followed: recursion"),
        ({"extra_body": {"min_tokens": 5}}, "min_tokens would write beyond the JSON"),
        ({"extra_body": {"ignore_eos": True}}, "ignore_eos would write beyond the JSON"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools and response_format do not go together",
        ),
    ],
    ids=str,
)
def test_refusals(server, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(server, **options)


def test_a_model_without_an_end_is_refused():
    with pytest.raises(UserError, match="no end token"):
        Vocabulary.of(tiny_tokenizer(), 280, [])


def test_the_clients_own_types(server):
    """`parse` of OpenAI's client, from a pydantic model."""
    from pydantic import BaseModel

    class Hat(BaseModel):
        good: bool
        size: int | None

    reply = server.client().chat.completions.parse(
        model=NAME, messages=ASK, response_format=Hat, max_tokens=400, seed=1, logit_bias={"1": 50}
    )
    assert isinstance(reply.choices[0].message.parsed, Hat)
