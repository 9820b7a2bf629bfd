"""Distillation through an OpenAI-compatible server: vLLM, SGLang or our own."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ctc_drafter.chat import REPLACEMENT, decode, is_unicode
from ctc_drafter.train.distill import GREEDY, Distilled, Sampling, Shards, fitting, known_ids, origin
from ctc_drafter.train.prompts import Prompt
from ctc_drafter.types import UserError, first_line

if TYPE_CHECKING:
    import httpx2 as httpx
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)
ASK_FOR_IDS = {"return_token_ids": True}  # vLLM's name, ours too
KEY, OPENAIS_KEY, OPENAIS_HOST = "CTC_DRAFTER_SERVER_API_KEY", "OPENAI_API_KEY", "api.openai.com"
MOST_REPLY = 8 << 20  # bytes
LONGEST_WAIT = 60.0  # seconds that the client waits at most before it asks again
SENT = (
    "host",
    "accept",
    "accept-encoding",
    "connection",
    "content-type",
    "content-length",
    "user-agent",
    "authorization",
)


@dataclass(frozen=True)
class Server:
    """Server to distil from. concurrency: requests at a time; retries: per request, with exponential backoff."""

    url: str
    model: str
    api_key: str | None = None
    concurrency: int = 32
    retries: int = 8
    timeout: float = 600.0


@dataclass(frozen=True)
class Asked:
    """The settings of every request. gives_ids: whether the server was found to give token ids. vocabulary: of the
    target. longest_token: in characters."""

    server: Server
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    sampling: Sampling
    eos: frozenset[int]
    gives_ids: bool
    vocabulary: int
    longest_token: int


def server_key(url: str, given: str | None) -> str | None:
    """The API key for a server: the one given, else that of `CTC_DRAFTER_SERVER_API_KEY`.

    `OPENAI_API_KEY` is for OpenAI alone, whatever address a command names.
    """
    place = urlsplit(url)
    openai = place.scheme == "https" and place.hostname == OPENAIS_HOST
    return given or os.environ.get(KEY) or (os.environ.get(OPENAIS_KEY) if openai else None) or None


class LeftOut(Exception):
    """An answer that cannot be used; the message says why."""


def distill_remotely(
    server: Server,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    max_new_tokens: int,
    eos: Collection[int],
    shard_size: int = 256,
    name: str = "",
    sampling: Sampling = GREEDY,
    source: dict[str, Any] | None = None,
    progress: bool = True,
) -> Distilled:
    """As `distill`, with the answers of a server that runs the same target. config: the target's.

    Prompts are sent as token ids, so that the template is ours. The server is asked for the ids of its answers
    (`return_token_ids`); one that gives text alone has it encoded again, and the manifest says which
    (`ids`: `written` or `encoded`). Rows whose ids do not decode to the text, and prompts that the server refuses, are
    left out and counted. Raises `UserError` for a server that cannot be reached or does not serve such requests, also
    when it goes away and stays away for all retries: finished answers are kept.
    """
    text = config.get_text_config(decoder=True)
    chosen = fitting(prompts, max_new_tokens, getattr(text, "max_position_embeddings", None) or 1 << 30)
    known = known_ids(out, chosen, shard_size)  # a finished folder needs no server
    gives_ids = known == "written" if known else asyncio.run(_probe(server, chosen[0]))
    longest = 1 + max(map(len, tokenizer.get_vocab()), default=0)
    asked = Asked(server, tokenizer, max_new_tokens, sampling, frozenset(eos), gives_ids, text.vocab_size, longest)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "shard_size": shard_size, "eos": sorted(eos)}
    settings |= {"sampling": asdict(sampling), "served_as": server.model}
    about = {"target": name or server.model, "ids": "written" if gives_ids else "encoded"}
    manifest = about | origin(config, tokenizer, chosen) | {"settings": settings, "source": source or {}}
    with Shards(out, chosen, shard_size, manifest, progress) as shards:
        asyncio.run(_fill(shards, asked))
        return shards.summary(too_long=len(prompts) - len(chosen))


def _client(server: Server) -> AsyncOpenAI:
    """OpenAI's client, which retries, and waits as long as a server asks it to.

    It sends the key of `Server` and nothing else of the environment (`OPENAI_ORG_ID`, ...), and reads no reply that is
    very long, compressed or slow.
    """
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    key = server.api_key or "none"

    async def only_ours(request: httpx.Request) -> None:
        for name in request.headers.keys() - set(SENT):
            del request.headers[name]
        request.headers["Accept-Encoding"] = "identity"
        request.headers["Authorization"] = f"Bearer {key}"

    async def bounded(response: httpx.Response) -> None:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ValueError("the reply is compressed, which was not asked for")
        response.stream = _bounded_stream(response.stream, server.timeout)

    hooks: dict[str, list[Any]] = {"request": [only_ours], "response": [bounded]}
    client = DefaultAsyncHttpxClient(event_hooks=hooks, follow_redirects=False, timeout=server.timeout)
    return AsyncOpenAI(
        base_url=server.url, api_key=key, max_retries=server.retries, timeout=server.timeout, http_client=client
    )


def _bounded_stream(stream: Any, seconds: float) -> httpx.AsyncByteStream:
    """A reply's bytes. Raises `ValueError` where they are too many or take too long."""
    import httpx2 as httpx

    class Bounded(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            size, end = 0, time.monotonic() + seconds
            async for part in stream:
                size += len(part)
                if size > MOST_REPLY:
                    raise ValueError(f"the reply is longer than {MOST_REPLY} bytes")
                if time.monotonic() > end:
                    raise ValueError(f"the reply took longer than {seconds:g} s")
                yield part

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()


async def _complete(client: AsyncOpenAI, server: Server, **request: Any) -> Any:
    """The first choice of a completion. Raises `APIStatusError`, and `UserError` for what is no reply at all."""
    from openai import APIStatusError, OpenAIError

    try:
        async with asyncio.timeout((server.timeout + LONGEST_WAIT) * (server.retries + 1)):
            reply = await client.completions.create(model=server.model, **request)
        choice = reply.choices[0]
        if not isinstance(choice.text, str):
            raise TypeError("the text is none")
        return choice
    except APIStatusError:
        raise
    except OpenAIError as error:
        raise _unusable(server, error.__cause__ if isinstance(error.__cause__, ValueError) else error) from error
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        known = ValueError("what it replied is no completion")
        raise _unusable(server, error if "reply" in str(error) else known) from error
    except TimeoutError as error:
        raise _unusable(server, ValueError("the reply took longer than all retries may")) from error


async def _probe(server: Server, prompt: Prompt) -> bool:
    """Tests whether the server returns token ids."""
    from openai import APIStatusError

    request: dict[str, Any] = {"prompt": prompt.ids, "max_tokens": 1, "temperature": 0}
    async with _client(server) as client:
        try:
            return _ids_of(await _complete(client, server, **request, extra_body=ASK_FOR_IDS)) is not None
        except APIStatusError as error:
            if error.status_code not in (400, 422):
                raise _unusable(server, error) from error
        try:
            await _complete(client, server, **request)
        except APIStatusError as error:
            raise _unusable(server, error) from error
    return False


def _unusable(server: Server, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(
        f"{server.url} did not answer a completion of token ids ({reason}); start the server, or mend --server, "
        "--model or --api-key; finished answers are kept: the same command goes on"
    )


async def _fill(shards: Shards, asked: Asked) -> None:
    """Requests all missing answers concurrently."""
    places = iter(shards.pending)
    async with _client(asked.server) as client:

        async def work() -> None:
            for place in places:  # shared: each worker takes the next one
                await _answer(client, asked, place, shards)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(asked.server.concurrency):
                    group.create_task(work())
        except* UserError as errors:
            raise errors.exceptions[0] from None


async def _answer(client: AsyncOpenAI, asked: Asked, place: int, shards: Shards) -> None:
    """Adds the answer to the prompt at this place; where there is none that can be used, it is left out."""
    from openai import APIStatusError

    prompt = shards.prompts[place]
    options: dict[str, Any] = {"temperature": asked.sampling.temperature, "max_tokens": asked.max_new_tokens}
    if asked.sampling.temperature:
        options |= {"top_p": asked.sampling.top_p, "seed": asked.sampling.seed_of(prompt)}
    try:
        extra = ASK_FOR_IDS if asked.gives_ids else None
        choice = await _complete(client, asked.server, prompt=prompt.ids, extra_body=extra, **options)
    except APIStatusError as error:
        if error.status_code in (400, 413, 422):
            logger.log(
                logging.DEBUG if shards.left_out else logging.WARNING, "refused by the server: %s", first_line(error)
            )
            shards.leave_out(place, "refused by the server")
            return
        raise _unusable(asked.server, error) from error
    try:
        ids = answer_ids(asked, prompt, choice.text, _ids_of(choice), choice.finish_reason)
    except LeftOut as error:
        shards.leave_out(place, str(error))
        return
    shards.add(place, ids, cut=choice.finish_reason == "length")


def _ids_of(choice: Any) -> list[int] | None:
    found = getattr(choice, "token_ids", None)
    return found if isinstance(found, list) else None


def answer_ids(asked: Asked, prompt: Prompt, text: str, ids: list[int] | None, reason: str | None) -> list[int]:
    """The ids of an answer: the server's, or its text's, and the end token where it ended by itself.

    Raises `LeftOut` for ids that do not decode to the text, and for an answer without tokens.
    """
    if not is_unicode(text):
        raise LeftOut("text that is not Unicode")
    if len(text) > asked.max_new_tokens * asked.longest_token:
        raise LeftOut("longer than was asked for")
    if ids is not None and not all(type(token) is int and 0 <= token < asked.vocabulary for token in ids):
        raise LeftOut("ids that the target does not have")
    if ids is None:
        ids = encode_behind(asked.tokenizer, prompt.ids, text)
    elif not any(same_text(shown, text) for shown in texts_of(asked.tokenizer, prompt.ids, ids)):
        raise LeftOut("ids that are not the text")
    if len(ids) > asked.max_new_tokens + 1:  # an end token may stand behind
        raise LeftOut("longer than was asked for")
    end = asked.tokenizer.eos_token_id
    if reason == "stop" and end is not None and not (ids and ids[-1] in asked.eos):
        ids = [*ids, end]
    if not ids:
        raise LeftOut("empty answers")
    return ids


def encode_behind(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], text: str) -> list[int]:
    """Ids of a text as it may stand behind the prompt. Raises `LeftOut` if they do not decode to it."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    if not any(same_text(shown, text) for shown in texts_of(tokenizer, prompt, ids)):
        raise LeftOut("text that its ids do not give back")
    return ids


def texts_of(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: list[int]) -> Iterator[str]:
    """Text of ids alone, and behind the prompt: some tokenizers drop a space at the beginning."""
    yield decode(tokenizer, ids)
    yield decode(tokenizer, [*prompt[-8:], *ids])[len(decode(tokenizer, prompt[-8:])) :]


def same_text(shown: str, text: str) -> bool:
    """Compares texts up to an unfinished character at the end of a truncated answer."""
    return shown.rstrip(REPLACEMENT) == text.rstrip(REPLACEMENT)
