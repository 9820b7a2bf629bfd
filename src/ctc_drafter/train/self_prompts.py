"""Prompts that a chat model writes itself (Magpie): its template up to the user's text, then sampling."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ctc_drafter.chat import REPLACEMENT, Messages, decode, encode_messages, eos_ids
from ctc_drafter.decode.generate import plain_generate_many
from ctc_drafter.decode.sampling import Sampled, row_seeds, warpers
from ctc_drafter.files import disk_errors, write_atomic
from ctc_drafter.provenance import claim, digest, weights_hash
from ctc_drafter.target.model import Target
from ctc_drafter.train.data import shard_rows
from ctc_drafter.train.distill import GREEDY, Distilled, Sampling, batch_errors, distill, origin, read_journal
from ctc_drafter.train.progress import Progress
from ctc_drafter.train.prompts import Prompt, PromptSet, check_template, encode_text
from ctc_drafter.types import UserError

logger = logging.getLogger(__name__)

# A user's turn in the target's template, found on token ids (Xu et al., "Magpie", 2024).

# Different from the first character to the last, so that what two renderings share is the template's.
SENTINELS = ("Which river is the longest", "how do 7 birds find home")


@dataclass(frozen=True)
class UserTurn:
    """opening: ids up to where the user's text begins; closing: those that follow it, of which the first one ends the
    turn if it is a special token, and all of them together otherwise."""

    opening: list[int]
    closing: list[int]


def user_turn(tokenizer: PreTrainedTokenizerBase, before: Messages | None = None) -> UserTurn | None:
    """The next user turn behind the messages `before`; None where the template gives the text no place of its own.

    Two texts are rendered. What both have in common around them is the template's, and between it must stand the ids of
    each text as it is: a template that changes the text, or repeats it, does not pass.
    """
    rendered = [encode_messages(tokenizer, [*(before or []), {"role": "user", "content": text}]) for text in SENTINELS]
    texts = [encode_text(tokenizer, text) for text in SENTINELS]
    opening = shared(*rendered)
    closing = shared(*(ids[: len(opening) - 1 : -1] if opening else [] for ids in rendered))[::-1]
    for ids, text in zip(rendered, texts, strict=True):
        if not text or not opening or not closing or ids != [*opening, *text, *closing]:
            return None
    return UserTurn(opening, closing)


def shared(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """What both begin with."""
    count = next((n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    return list(first[: min(len(first), len(second)) if count is None else count])


def opening_turn(tokenizer: PreTrainedTokenizerBase) -> UserTurn:
    """The first user turn. Raises `UserError` for a base model, and for a template that opens none."""
    if not tokenizer.chat_template:
        raise UserError(
            "the target has no chat template, so it cannot write prompts of its own: a base model has no user's turn; "
            "give --prompts FILE, or --chat-template FILE if it is a chat model after all"
        )
    check_template(tokenizer)
    found = user_turn(tokenizer)
    if found is None:
        raise UserError(
            "the chat template opens no user turn that the target could write (it changes the user's text, or has no "
            "fixed tokens before and behind it); give --prompts FILE, or another template: --chat-template FILE"
        )
    return found


class EndsWith(StoppingCriteria):
    """Stops behind these tokens: for templates whose user turn ends with plain text."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens = torch.tensor(list(tokens))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tail = input_ids[:, -len(self.tokens) :].cpu()
        ended = tail.shape[1] == len(self.tokens) and torch.equal(tail[0], self.tokens)
        return torch.tensor([ended], device=input_ids.device)


# Prompts: sampled turns, of which those that are text are kept.


@dataclass(frozen=True)
class SelfPrompts:
    """limit: prompts to write. max_tokens: of a user's turn; turns: of a conversation. Each prompt has a seed made of
    `seed` and its number. Raises `UserError` for a temperature of 0: all prompts would be the same."""

    limit: int
    temperature: float = 1.0
    max_tokens: int = 256
    turns: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(
                f"--prompt-temperature is {self.temperature}; give more than 0, or all prompts are the same"
            )


@dataclass(frozen=True)
class Written:
    """A prompt with its conversation, of which the last message is the user's."""

    prompt: Prompt
    messages: Messages


@dataclass(frozen=True)
class Begun:
    """A conversation in which a user turn is to be written. source: its first prompt's id; empty in first turns."""

    turn: UserTurn
    before: Messages
    source: str = ""


Openings = Mapping[int, Begun]  # by number of the attempt


PROMPTS = "self-prompts.jsonl"
CLAIM = "self-prompts.json"
UNPRINTED = {"Cc", "Cn", "Co", "Cs"}  # control characters, unassigned, private and half ones
MOST = 4  # attempts for each prompt, at most
AT_LEAST = 64  # more attempts, where few are wanted


def write_prompts(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    wanted: SelfPrompts,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> tuple[list[Written], PromptSet]:
    """The first user turns, and what became of all attempts: empty, repeated, cut off (no end within `max_tokens`) and
    those that are no text are dropped and counted.

    Attempts are in `out/self-prompts.jsonl`, a line each as soon as they end, so that a killed call goes on. Raises
    `UserError` for a template that opens no user turn, for a folder of other prompts, and if none can be used.
    """
    turn = opening_turn(tokenizer)
    file = _claimed(target, tokenizer, out, wanted, 1)
    attempts, most = wanted.limit, max(MOST * wanted.limit, wanted.limit + AT_LEAST)
    while True:
        openings = dict.fromkeys(range(attempts), Begun(turn, []))
        records = _written(target, tokenizer, file, openings, wanted, 1, batch_size, progress)
        kept, counts = select(tokenizer, records, openings, wanted.limit)
        found = PromptSet([each.prompt for each in kept.values()], dict(counts))
        if len(kept) == wanted.limit or attempts >= most:
            break
        share = max(len(kept) / attempts, 1 / MOST)
        attempts = min(most, attempts + int((wanted.limit - len(kept)) / share) + 1)
    if not kept:
        raise UserError(
            f"the target wrote no prompt that can be used in {attempts} attempts ({found}); give --prompts FILE, more "
            "--max-prompt-tokens or another --prompt-temperature, and check the chat template"
        )
    level = logging.INFO if len(kept) == wanted.limit else logging.WARNING
    logger.log(level, "%s: %s", file, found)
    return list(kept.values()), found


def _claimed(target: Target, tokenizer: PreTrainedTokenizerBase, out: Path, wanted: SelfPrompts, number: int) -> Path:
    """The file of attempts in a folder that is of these prompts, or new."""
    about = origin(target.model.config, tokenizer, [])
    about = {key: about[key] for key in ("revision", "config", "tokenizer", "template", "versions")}
    about |= {"weights": weights_hash(target.model), "dtype": str(target.dtype).removeprefix("torch.")}
    settings = {key: value for key, value in asdict(wanted).items() if key not in ("limit", "turns")}
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        claim(out / CLAIM, about | settings | {"turn": number})
    return out / PROMPTS


def _written(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    openings: Openings,
    wanted: SelfPrompts,
    number: int,
    batch_size: int,
    progress: bool,
) -> dict[int, dict[str, Any]]:
    """The attempts by number: those of the file, and the missing ones, which are added to it."""
    lines = _mended(file)
    records: dict[int, dict[str, Any]] = {row["place"]: row for row in lines if "place" in row and "ids" in row}
    missing = [place for place in openings if place not in records]
    if not missing:
        return records
    closings = {place: openings[place].turn.closing for place in missing}
    special = special_ids(tokenizer)
    closing = closings[missing[0]]
    ends = {*eos_ids(target.model, tokenizer), *(ids[0] for ids in closings.values() if ids[0] in special)}
    criteria = StoppingCriteriaList([] if closing[0] in special else [EndsWith(closing)])
    # 31 bits that depend on seed, turn and number alone.
    base = int(digest(f"{wanted.seed}:self:{number}"), 16) & 0x7FFFFFFF
    written = plain_generate_many(
        target,
        [openings[place].turn.opening for place in missing],
        in_flight=batch_size,
        max_new_tokens=wanted.max_tokens,
        eos=ends,
        criteria=criteria,
        sampler=Sampled(row_seeds(base, missing), warpers(temperature=wanted.temperature)),
    )
    shown = Progress("write prompts", len(openings), len(openings) - len(missing), unit="attempts", show=progress)
    tokens, done = 0, shown.done
    with disk_errors(file.parent), batch_errors(batch_size), shown, file.open("a", encoding="utf-8") as journal:
        for index, ids in written:
            place = missing[index]
            tokens, done = tokens + len(ids), done + 1
            ended = _without_end(ids, ends, closings[place])
            own = ids if ended is None else ended
            record = {"place": place, "ended": ended is not None, "ids": own}
            text = decode(tokenizer, own).strip()
            # Under this name the file can be read as prompts, such as for a server.
            name = "text" if fault(tokenizer, record, text, special) else "prompt"
            records[place] = record | {name: text}
            journal.write(json.dumps(records[place]) + "\n")
            journal.flush()
            shown.update(done, tokens)
    return records


def _mended(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of attempts, which is left without a line that a kill cut off."""
    rows = read_journal(file)
    if file.exists() and not file.read_bytes().endswith(b"\n"):
        with disk_errors(file.parent):
            write_atomic(file, map(json.dumps, rows))
    return rows


def _without_end(ids: list[int], ends: Collection[int], closing: list[int]) -> list[int] | None:
    """The text's ids; None if it did not come to its end."""
    if ids[-1] in ends:
        return ids[:-1]
    return ids[: -len(closing)] if ids[-len(closing) :] == closing else None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def select(
    tokenizer: PreTrainedTokenizerBase, records: Mapping[int, Mapping[str, Any]], openings: Openings, limit: int
) -> tuple[dict[int, Written], Counter[str]]:
    """The first `limit` usable turns in the order of their numbers, and reason -> attempts up to the last of them."""
    special = special_ids(tokenizer)
    kept: dict[int, Written] = {}
    counts: Counter[str] = Counter()
    known: set[str] = set()
    for place in sorted(openings):
        if len(kept) == limit:
            break
        record = records[place]
        text = str(record["prompt"] if "prompt" in record else record["text"]).strip()
        reason = fault(tokenizer, record, text, special)
        messages = [*openings[place].before, {"role": "user", "content": text}]
        said = json.dumps([*openings[place].before, re.sub(r"\W+", " ", text.casefold()).strip()])
        ids = [] if reason else encode_messages(tokenizer, messages)
        if not reason and said in known:
            reason = "repeated"
        elif not reason and not ids:
            reason = "refused by the template"
        counts[reason or "used"] += 1
        if reason:
            continue
        known.add(said)
        kept[place] = Written(Prompt(digest(json.dumps(ids)), ids, openings[place].source), messages)
    return kept, counts


def fault(tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any], text: str, special: Collection[int]) -> str:
    """Why an attempt cannot be used; empty if it can."""
    if not record["ended"]:
        return "cut off"
    if any(token in special for token in record["ids"]):
        return "no text"
    if not text:
        return "empty"
    odd = any(unicodedata.category(character) in UNPRINTED and character not in "\n\t\r" for character in text)
    letters = any(character.isalpha() for character in text)
    hidden = any(token in special for token in encode_text(tokenizer, text))
    return "no text" if REPLACEMENT in text or odd or hidden or not letters else ""


# Distillation of such prompts, of one turn or more.


def distill_self(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    wanted: SelfPrompts,
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    shard_size: int = 256,
    name: str = "",
    sampling: Sampling = GREEDY,
    progress: bool = True,
) -> Iterator[tuple[Path, PromptSet, Distilled]]:
    """Writes prompts and answers to `out`, and those of further turns to `out/turn-2` and on.

    Yields each turn's folder, prompts and result.

    A conversation goes on while its answers end by themselves and the target writes a usable turn. The same call may be
    killed and repeated at any time, and with a larger limit or more turns.
    """
    if wanted.max_tokens + max_new_tokens > target.context:
        raise UserError(
            f"prompts of {wanted.max_tokens} tokens and answers of {max_new_tokens} do not fit the target's "
            f"{target.context}; give less --max-prompt-tokens or --max-new-tokens"
        )
    previous = out
    written, found = write_prompts(target, tokenizer, out, wanted, batch_size=batch_size, progress=progress)
    for number in range(1, wanted.turns + 1):
        folder = out if number == 1 else out / f"turn-{number}"
        if number > 1:
            openings = continued(tokenizer, previous, written)
            if not openings:
                return
            file = _claimed(target, tokenizer, folder, wanted, number)
            records = _written(target, tokenizer, file, openings, wanted, number, batch_size, progress)
            kept, counts = select(tokenizer, records, openings, len(openings))
            written, found = list(kept.values()), PromptSet([each.prompt for each in kept.values()], dict(counts))
            if not any(len(prompt.ids) + max_new_tokens <= target.context for prompt in found.prompts):
                return
        source = {"name": "self", "temperature": wanted.temperature, "turn": number, "counts": found.counts}
        yield (
            folder,
            found,
            distill(
                target,
                tokenizer,
                found.prompts,
                folder,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                shard_size=shard_size,
                name=name,
                sampling=sampling,
                source=source,
                progress=progress,
            ),
        )
        previous = folder


def continued(tokenizer: PreTrainedTokenizerBase, folder: Path, written: Sequence[Written]) -> Openings:
    """The conversations of a folder whose answers came to their end, each with its next user turn."""
    answers = {row["id"]: row["answer_ids"] for row in shard_rows(folder)}
    ends = special_ids(tokenizer)
    openings: dict[int, Begun] = {}
    for place, each in enumerate(written):
        ids = answers.get(each.prompt.id, [])
        text = decode(tokenizer, ids).strip()
        if not text or ids[-1] not in ends or REPLACEMENT in text:
            continue
        before = [*each.messages, {"role": "assistant", "content": text}]
        turn = user_turn(tokenizer, before)
        if turn is not None:
            openings[place] = Begun(turn, before, each.prompt.source or each.prompt.id)
    return openings
