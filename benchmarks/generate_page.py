"""docs/generate.md from the settings tables: `python -m benchmarks.generate_page > docs/generate.md`."""

from __future__ import annotations

from collections.abc import Sequence

from ctc_drafter.decode.generate_settings import FIELDS, INPUTS, PARAMETERS, SPECULATOR, Setting, Status
from ctc_drafter.files import markdown_table

HEAD = """# What `generate` takes

Made by `python -m benchmarks.generate_page` from `decode/generate_settings.py`; do not edit it.

There are two ways to call it: `Speculator(model, drafter).generate(...)`, and the model's own
`generate(..., custom_generate=speculate(drafter))`. The first takes more: the first table has what it does otherwise
than the tables after it, which are of both.

- **honoured**: the output is that of stock `generate` (of `do_sample=True`: of its distribution).
- **refused**: an error of one line before anything is decoded. It is the text in the last column.
- **without effect**: it changes no output of greedy decoding or sampling, in stock `generate` neither.
- **not handed over**: transformers keeps it from every callable in `custom_generate`, so it can be neither honoured nor
  refused there; a `Speculator` does one of them. Also `cache_implementation="paged"` turns to continuous batching
  before `custom_generate` is looked at.
"""


def table(title: str, settings: Sequence[Setting]) -> str:
    rows = []
    for setting in settings:
        note = f"{setting.note} ({setting.but})" if setting.but else setting.note
        mark = f"**{setting.status}**" if setting.status in (Status.REFUSED, Status.UNSEEN) else str(setting.status)
        rows.append([f"`{setting.name}`", mark, note])
    return f"## {title}\n\n{markdown_table(['Name', '', ''], rows)}\n"


def page() -> str:
    """The page as Markdown."""
    tables = (
        ("`Speculator(model, drafter).generate`", SPECULATOR),
        ("Parameters of `generate`", PARAMETERS),
        ("Inputs of the model", INPUTS),
        ("Fields of `GenerationConfig`", FIELDS),
    )
    return "\n".join([HEAD, *(table(title, settings) for title, settings in tables)])


if __name__ == "__main__":
    print(page(), end="")
