"""Writes docs/results.md from the results files of bench."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ctc_drafter.evaluate import figures
from ctc_drafter.evaluate.costs import costs
from ctc_drafter.evaluate.figures import save
from ctc_drafter.evaluate.intervals import FEWEST, Bootstrap, Estimate
from ctc_drafter.evaluate.methods import Calibration
from ctc_drafter.evaluate.results import PLAIN_KEY, Results, agreement, engines_of, title_of, weights_of
from ctc_drafter.files import SPACED, markdown_table, number
from ctc_drafter.types import UserError

HEAD = f"""# Results

Written by `ctc-drafter report FILES`. The speedup γ is tokens per second over plain decoding in the same run; β is the
tokens per step, those that one verification emits. All methods of a file ran on the same prompts, taking turns
on each of them; every output was compared with plain decoding's (`identical`; a dash where tokens were counted along
its text). Trees have the number of nodes that is given, or fewer where a drafter has no more to propose; a chain is the
best path. In brackets: 95% intervals by bootstrap over prompts, of ratios by paired bootstrap; none for fewer than
{FEWEST} prompts. "EAGLE-style" is this package's own drafter of EAGLE's kind, trained here like the others, not its
authors' checkpoint."""

PAPER_NOTE = (
    "The paper's own figures, on other models and other hardware, not measured here "
    "(Wen, Gui and Feng, NeurIPS 2024): γ / β, greedy."
)
PAPER_METHOD_NOTE = (
    "`ctc-paper` above is the paper's method, trained here for other targets; docs/reproduce.md says why it is below "
    "these figures."
)
COST_NOTE = "Minutes are those of the clock on the wall, whatever else that machine did: compare steps and tokens."


OWN = ("shipped", "tiny")  # older results call the tiny target so


def page(all_results: Sequence[Results]) -> str:
    """The whole page. It names the figures that `draw` writes."""
    parts = [HEAD]
    for results in all_results:
        parts += parts_of(results)
    parts += scaling_parts([results for results in all_results if of_another_target(results)])
    parts += ["## The paper's", PAPER_NOTE, paper_table(), paper_time()]
    if any("ctc-paper" in results.methods for results in all_results):
        parts.append(PAPER_METHOD_NOTE)
    return "\n\n".join(parts) + "\n"


def parts_of(results: Results) -> Iterator[str]:
    """The sections that suit what the file compares: methods, depths of their drafts, or variants."""
    if of_another_target(results):
        return iter(())
    if results.meta.get("depths"):
        return depth_parts(results)
    return ablation_parts(results) if results.meta.get("ablations") else bench_parts(results)


def bench_parts(results: Results) -> Iterator[str]:
    """The sections of one file."""
    drawn = {name: caption for name, caption, _ in drawings(results)}

    def show(prefix: str) -> Iterator[str]:
        for name, caption in drawn.items():
            if name.startswith(f"{results.name}-{prefix}"):
                yield f"![{caption}](figures/{name}.svg)\n\n*{caption} From {results.place}.*"

    boots = {task: Bootstrap(results, task) for task in results.tasks}
    yield f"## {results.name}"
    yield origin(results)
    yield f"### Speedup and acceptance, {figures.name_of(results.size)}"
    yield main_table(results, boots)
    yield from engines_of(results.meta)
    if results.ours and len(results.methods) > 1:
        yield f"### β of {results.ours} over β of the others"
        yield from (ratio_table(results, task, boots[task]) for task in results.tasks)
    if len(results.sizes) > 1:
        yield "### By tree size"
        yield from show("beta-by-size")
        yield from show("gamma-by-size")
        yield from (size_table(results, task) for task in results.tasks)
    for heading, prefix in (
        ("By category", "categories"),
        ("Time of a step", "time"),
        ("Accepted tokens", "accepted"),
        ("Are the probabilities right?", "calibration"),
    ):
        found = list(show(prefix))
        yield from [f"### {heading}", *found] if found else ()
        if prefix == "calibration" and found:
            yield calibration_table(results)
    if results.meta.get("drafters"):
        yield "### What training cost"
        yield cost_table(results)
        yield COST_NOTE


def origin(results: Results) -> str:
    meta = results.meta
    parts = [f"From {results.place}; at most {meta['max_new_tokens']} new tokens."]
    parts += [f"Target: {meta['target']}."] if meta.get("target", "tiny") not in OWN else []
    parts += [f"Prompts: {results.prompts}."]
    if meta.get("tokens_only"):
        parts += ["Tokens were counted along plain decoding's answers, and nothing was timed."]
    return " ".join(parts)


def ablation_parts(results: Results) -> Iterator[str]:
    """A table of variants."""
    boots = {task: Bootstrap(results, task) for task in results.tasks}
    yield f"## {results.name}"
    yield (
        f"{origin(results)} Every variant was trained by the "
        "same short run, so β is below that of a finished drafter: compare, do not quote. Typical acceptance changes "
        "the output; all else must not."
    )
    yield size_and_identity_table(results, boots)
    yield cost_table(results)
    yield COST_NOTE


def depth_parts(results: Results) -> Iterator[str]:
    """Tables of each drafter at its best depth, and at every depth."""
    yield f"## {results.name}"
    yield (
        f"{origin(results)} Every drafter with drafts of at "
        "most so many tokens, on the same weights. The best depth is the one with the largest γ of the task, among "
        "those that were tried and on these very prompts, so that its γ is a little flattered."
    )
    yield f"### Each at its best depth, {figures.name_of(results.size)}"
    yield best_depth_table(results, {task: Bootstrap(results, task) for task in results.tasks})
    yield "### At every depth"
    yield from (size_table(results, task) for task in results.tasks)


def of_another_target(results: Results) -> bool:
    """Variants for a target that was named: what they show is how β changes with the target."""
    meta = results.meta
    return bool(meta.get("ablations") and meta.get("target_parameters")) and meta.get("target", "tiny") not in OWN


def scaling_parts(found: Sequence[Results]) -> Iterator[str]:
    """β of the same variants for targets of several sizes, a table for each task.

    Raises `UserError` when they were measured on other tasks, or with other settings.
    """
    if not found:
        return
    targets = sorted(found, key=lambda results: results.meta["target_parameters"])
    first = targets[0]
    for each in targets:
        alike = [(one.tasks, one.meta["max_new_tokens"], one.meta["limit"]) for one in (first, each)]
        if alike[0] != alike[1]:
            raise UserError(
                f"{first.name} and {each.name} differ in tasks, --limit or --max-new-tokens; measure them alike"
            )
    yield "## Targets of several sizes"
    yield (
        "The same variants for targets of several sizes, each trained on what its target answered, and as wide as its "
        f"target: what they cost stands below. At most {first.meta['max_new_tokens']} new tokens."
    )
    yield from (scaling_table(targets, task) for task in first.tasks)
    for each in targets:
        yield f"### Drafters for {each.meta['target_parameters'] / 1e6:.1f} M"
        yield f"From {each.place}. Prompts: {each.prompts}."
        yield cost_table(each)
    yield COST_NOTE


def scaling_table(targets: Sequence[Results], task: str) -> str:
    columns = [(results, size) for results in targets for size in results.sizes]
    head = [f"{task}: β", *(f"{each.meta['target_parameters'] / 1e6:.1f} M, {size}" for each, size in columns)]
    boots = {results.name: Bootstrap(results, task) for results in targets}
    lines = []
    for method in dict.fromkeys(method for results in targets for method in results.methods):
        rows = [row for each in targets for row in each.rows if row["task"] == task and row["method"] == method]
        same, compared = (sum(row[name] for row in rows) for name in ("identical", "compared"))
        cells = [shown(boots[each.name].beta((method, size))) for each, size in columns]
        lines.append([title_of(method), *cells, agreement(same, compared)])
    return table([*head, "identical"], lines)


def drawings(results: Results) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of everything that can be drawn of a file."""
    if results.meta.get("ablations") or results.meta.get("depths"):  # figures of so many would not be readable
        return
    at, largest = figures.name_of(results.size), figures.name_of(results.sizes[-1])
    wanted: list[tuple[str, str, Figure | None]] = [
        (
            "beta-by-size",
            "Tokens per step (β) against the size of the tree.",
            figures.by_size(results, "beta", "tokens per step (β)"),
        ),
        (
            "gamma-by-size",
            "Speedup (γ) against the size of the tree; at the line of 1 drafting costs what it saves.",
            None if results.meta.get("tokens_only") else figures.by_size(results, "gamma", "speedup (γ)", even=1.0),
        ),
        ("time", f"Milliseconds of a step by stage, {at}.", figures.time_by_stage(results)),
    ]
    for task in results.tasks:
        categories = f"Tokens per step (β) by category of {task}, {at}; 95% intervals from {FEWEST} prompts on."
        accepted = f"Drafted tokens that a step accepted, {task}, {at}."
        promised = (
            f"Probability that a node promised against the share that was accepted, {task}, {largest}; "
            f"bins of at least {figures.ENOUGH} nodes."
        )
        wanted += [
            (f"categories-{task}", categories, figures.by_category(results, task)),
            (f"accepted-{task}", accepted, figures.accepted(results, task)),
            (f"calibration-{task}", promised, figures.calibration(results, task)),
        ]
    yield from ((f"{results.name}-{name}", caption, figure) for name, caption, figure in wanted if figure is not None)


def draw(all_results: Sequence[Results], folder: Path) -> list[str]:
    """Writes every figure as SVG and PNG; returns the SVGs' names."""
    return [save(figure, folder, name) for results in all_results for name, _, figure in drawings(results)]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return markdown_table(head, rows, SPACED)


def shown(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)


def calibration_table(results: Results) -> str:
    """The calibration error of each method's nodes by the size of its trees; see `Calibration.error`."""
    columns = [(task, size) for task in results.tasks for size in results.sizes]
    head = ["expected calibration error", *(f"{task}, {size}" for task, size in columns)]
    lines = []
    for method in results.methods:
        rows = [results.row(task, (method, size)) for task, size in columns]
        errors = [Calibration(**row["calibration"]).error if row and "calibration" in row else None for row in rows]
        if any(error is not None for error in errors):
            lines.append([title_of(method), *("-" if error is None else f"{error:.3f}" for error in errors)])
    return table(head, lines)


def identical(row: dict[str, Any] | None) -> str:
    return "-" if row is None else agreement(row["identical"], row["compared"])


def main_table(results: Results, boots: dict[str, Bootstrap]) -> str:
    """The layout of the paper's Table 1."""
    named = ["weights"] if results.meta.get("peers") else []
    head = ["method", *named, *(f"{task} {figure}" for task in results.tasks for figure in ("γ", "β", "identical"))]
    lines = []
    stock = ((name, None) for name in results.stock)
    for key in [PLAIN_KEY, *stock, *((method, results.size) for method in results.methods)]:
        cells = [title_of(key[0]), *filter(None, [weights_of(results.meta, key[0])])]
        for task in results.tasks:
            cells += [shown(boots[task].gamma(key)), shown(boots[task].beta(key)), identical(results.row(task, key))]
        lines.append(cells)
    lines[0][1:] = [cell.partition(" (")[0] if "(" in cell else cell for cell in lines[0][1:]]  # plain is the unit
    return table(head, lines)


def ratio_table(results: Results, task: str, boot: Bootstrap) -> str:
    others = [method for method in results.methods if method != results.ours]
    ours = results.ours or ""
    head = [f"{task}: {ours} over", *map(str, results.sizes)]
    return table(
        head,
        (
            [title_of(other), *(shown(boot.beta_ratio((ours, size), (other, size))) for size in results.sizes)]
            for other in others
        ),
    )


def size_table(results: Results, task: str) -> str:
    """β and γ of every size; with it, whether outputs are plain decoding's."""
    head = [f"{task}: β / γ", *map(str, results.sizes), "identical"]
    lines = []
    for method in results.methods:
        rows = [results.row(task, (method, size)) for size in results.sizes]
        cells = [f"{number(row['beta'])} / {number(row['gamma'])}" if row else "-" for row in rows]
        same, compared = (sum(row[name] for row in rows if row) for name in ("identical", "compared"))
        lines.append([title_of(method), *cells, agreement(same, compared)])
    return table(head, lines)


def size_and_identity_table(results: Results, boots: dict[str, Bootstrap]) -> str:
    columns = [(task, size) for task in results.tasks for size in results.sizes]
    head = ["variant", *(f"{task} β, {size}" for task, size in columns), "identical"]
    lines = []
    for method in results.methods:
        rows = [row for row in results.rows if row["method"] == method]
        same, compared = (sum(row[name] for row in rows) for name in ("identical", "compared"))
        cells = [shown(boots[task].beta((method, size))) for task, size in columns]
        lines.append([title_of(method), *cells, agreement(same, compared)])
    return table(head, lines)


def best_depth_table(results: Results, boots: dict[str, Bootstrap]) -> str:
    """A line for each drafter, with its depth, γ and β in each task."""
    known = results.meta["drafters"]
    head = ["method", *(f"{task} {figure}" for task in results.tasks for figure in ("depth", "γ", "β"))]
    lines = []
    for name in dict.fromkeys(known[method]["of"] for method in results.methods):
        cells = [title_of(name)]
        for task in results.tasks:
            rows = (results.row(task, (each, results.size)) for each in results.methods if known[each]["of"] == name)
            best = max((row for row in rows if row), key=lambda row: row["gamma"], default=None)
            if best is None:
                cells += ["-"] * 3
                continue
            key = (best["method"], best["nodes"])
            cells += [str(known[key[0]]["draft_length"]), shown(boots[task].gamma(key)), shown(boots[task].beta(key))]
        lines.append(cells)
    return table(head, lines)


def cost_table(results: Results) -> str:
    """What drafters are, what they cost a step, and what their training took; old files know less."""
    known = results.meta["drafters"]
    counted = any(facts.get("draft_flops") for facts in known.values())
    head = ["drafter", "method", "parameters", "longest draft"]
    head += ["FLOPs of a draft", "ms of a draft", "learning rate"] if counted else []
    head += ["steps", "tokens read", "minutes"]
    of_a_draft = {name: line for name, _, *line in costs({"meta": results.meta, "rows": results.rows})}
    lines = []
    for name, facts in known.items():
        spent = facts.get("training") or {}
        seconds = spent.get("seconds")
        lines.append(
            [
                title_of(name),
                facts.get("method", "-"),
                f"{facts['parameters'] / 1e6:.2f} M" if facts.get("parameters") else "none",
                str(facts.get("draft_length") or "-"),
                *(of_a_draft[name] if counted else ()),
                *(f"{spent[key]:,.0f}" if spent.get(key) else "-" for key in ("steps", "tokens")),
                f"{seconds / 60:.1f}" if seconds else "-",
            ]
        )
    return table(head, lines)


def paper_table() -> str:
    lines = [
        [task, method, *(f"{gamma:.2f} / {beta:.2f}" for gamma, beta in zip(*figures_, strict=True))]
        for (task, method), figures_ in TABLE.items()
    ]
    return table(["task", "method", *MODELS], lines)


def paper_time() -> str:
    shares = ", ".join(f"{name} {share:.1%}" for name, share in TIME.items())
    return f"The paper's time of a step on Vicuna 7B: {shares}."


# Figures of the paper, shown next to ours and marked as the paper's.
#
# Source: Wen, Gui and Feng, "Speculative Decoding with CTC-based Draft Model for LLM Inference Acceleration" (NeurIPS
# 2024), Table 1 and the time breakdown; Vicuna 7B, 13B and 33B, greedy.

MODELS = ("Vicuna 7B", "Vicuna 13B", "Vicuna 33B")

# (task, method) -> γ and β of each model
TABLE: dict[tuple[str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {
    ("MT-bench", "Medusa"): ((2.13, 1.97, 1.93), (2.58, 2.60, 2.55)),
    ("MT-bench", "Hydra"): ((2.36, 2.17, 2.15), (3.04, 3.06, 2.85)),
    ("MT-bench", "CTC-drafter"): ((2.78, 2.52, 2.20), (3.56, 3.51, 3.53)),
    ("GSM8K", "Medusa"): ((2.33, 2.21, 2.10), (2.78, 2.68, 2.46)),
    ("GSM8K", "CTC-drafter"): ((2.43, 2.66, 2.16), (3.53, 3.53, 3.40)),
}

# Shares of a step on Vicuna 7B
TIME = {"base model": 0.636, "draft": 0.149, "transform": 0.054, "others": 0.161}
