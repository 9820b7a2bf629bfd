"""Distillation through an OpenAI-compatible server: vLLM, SGLang or our own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ctc_drafter.chat import REPLACEMENT, decode
from ctc_drafter.train.distill import GREEDY, Distilled, Sampling, Shards, fitting, known_ids, origin
from ctc_drafter.train.prompts import Prompt
from ctc_drafter.types import UserError, first_line

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)
ASK_FOR_IDS = {"return_token_ids": True}  # vLLM's name, ours too


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
    """The settings of every request. gives_ids: whether the server was found to give token ids."""

    server: Server
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    sampling: Sampling
    eos: frozenset[int]
    gives_ids: bool


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
    source: dict[str, str] | None = None,
    progress: bool = True,
) -> Distilled:
    """As `distill`, with the answers of a server that runs the same target. config: the target's.

    Prompts are sent as token ids, so that the template is ours. The server is asked for the ids of its answers
    (`return_token_ids`); one that gives text alone has it encoded again, and the manifest says which
    (`ids`: `written` or `encoded`). Rows whose ids do not decode to the text, and prompts that the server refuses, are
    left out and counted. Raises `UserError` for a server that cannot be reached or does not serve such requests, also
    when it goes away and stays away for all retries: finished shards are kept.
    """
    text = config.get_text_config(decoder=True)
    chosen = fitting(prompts, max_new_tokens, getattr(text, "max_position_embeddings", None) or 1 << 30)
    known = known_ids(out, chosen, shard_size)  # a finished folder needs no server
    gives_ids = known == "written" if known else asyncio.run(_probe(server, chosen[0]))
    asked = Asked(server, tokenizer, max_new_tokens, sampling, frozenset(eos), gives_ids)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "shard_size": shard_size, "eos": sorted(eos)}
    settings |= {"sampling": asdict(sampling), "served_as": server.model}
    about = {"target": name or server.model, "ids": "written" if gives_ids else "encoded"}
    manifest = about | origin(config, tokenizer, chosen) | {"settings": settings, "source": source or {}}
    with Shards(out, chosen, shard_size, manifest, progress) as shards:
        asyncio.run(_fill(shards, asked))
        return shards.summary(too_long=len(prompts) - len(chosen))


def _client(server: Server) -> AsyncOpenAI:
    from openai import AsyncOpenAI

    # The client retries, and waits as long as a server asks it to.
    return AsyncOpenAI(
        base_url=server.url, api_key=server.api_key or "none", max_retries=server.retries, timeout=server.timeout
    )


async def _probe(server: Server, prompt: Prompt) -> bool:
    """Tests whether the server returns token ids."""
    from openai import APIStatusError, OpenAIError

    request: dict[str, Any] = {"model": server.model, "prompt": prompt.ids, "max_tokens": 1, "temperature": 0}
    async with _client(server) as client:
        try:
            reply = await client.completions.create(**request, extra_body=ASK_FOR_IDS)
            return _ids_of(reply) is not None
        except APIStatusError as error:
            if error.status_code not in (400, 422):
                raise _unusable(server, error) from error
        except OpenAIError as error:
            raise _unusable(server, error) from error
        try:
            await client.completions.create(**request)
        except OpenAIError as error:
            raise _unusable(server, error) from error
    return False


def _unusable(server: Server, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(
        f"{server.url} did not answer a completion of token ids ({reason}); start the server, or mend --server, "
        "--model or --api-key; finished shards are kept: the same command goes on"
    )


async def _fill(shards: Shards, asked: Asked) -> None:
    """Requests all missing answers concurrently, and writes a shard when it is complete."""
    places = ((index, place) for index in shards.missing for place in range(len(shards.of(index))))
    answers: dict[int, list[list[int] | None]] = {}
    left: dict[int, int] = {}
    async with _client(asked.server) as client:

        async def work() -> None:
            for index, place in places:  # shared: each worker takes the next one
                prompts = shards.of(index)
                kept = answers.setdefault(index, [None] * len(prompts))
                kept[place] = await _answer(client, asked, prompts[place], shards)
                left[index] = left.get(index, len(prompts)) - 1
                if not left[index]:
                    shards.write(index, answers.pop(index))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(asked.server.concurrency):
                    group.create_task(work())
        except* UserError as errors:
            raise errors.exceptions[0] from None


async def _answer(client: AsyncOpenAI, asked: Asked, prompt: Prompt, shards: Shards) -> list[int] | None:
    """The ids of an answer; None, counted, where there is none that can be used."""
    from openai import APIStatusError, OpenAIError

    options: dict[str, Any] = {"temperature": asked.sampling.temperature, "max_tokens": asked.max_new_tokens}
    if asked.sampling.temperature:
        options |= {"top_p": asked.sampling.top_p, "seed": asked.sampling.seed_of(prompt)}
    try:
        reply = await client.completions.create(
            model=asked.server.model,
            prompt=prompt.ids,
            extra_body=ASK_FOR_IDS if asked.gives_ids else None,
            **options,
        )
    except APIStatusError as error:
        if error.status_code in (400, 413, 422):
            logger.log(logging.DEBUG if shards.left_out else logging.WARNING, "refused by the server: %s", error)
            shards.leave_out("refused by the server")
            return None
        raise _unusable(asked.server, error) from error
    except OpenAIError as error:
        raise _unusable(asked.server, error) from error
    choice = reply.choices[0]
    try:
        ids = answer_ids(asked, prompt, choice.text, _ids_of(reply), choice.finish_reason)
    except LeftOut as error:
        shards.leave_out(str(error))
        return None
    shards.count(ids, cut=choice.finish_reason == "length")
    return ids


def _ids_of(reply: Any) -> list[int] | None:
    found = getattr(reply.choices[0], "token_ids", None)
    return [int(token) for token in found] if isinstance(found, list) else None


def answer_ids(asked: Asked, prompt: Prompt, text: str, ids: list[int] | None, reason: str | None) -> list[int]:
    """The ids of an answer: the server's, or its text's, and the end token where it ended by itself.

    Raises `LeftOut` for ids that do not decode to the text, and for an answer without tokens.
    """
    if ids is None:
        ids = encode_behind(asked.tokenizer, prompt.ids, text)
    elif not any(same_text(shown, text) for shown in texts_of(asked.tokenizer, prompt.ids, ids)):
        raise LeftOut("ids that are not the text")
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
