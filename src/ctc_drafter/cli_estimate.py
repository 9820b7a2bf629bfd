"""What `--estimate` prints. As in `cli`, the work is imported when it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctc_drafter.train.estimate import Plan
    from ctc_drafter.train.recipe import Recipe


def show_estimate(plan: Plan, flops: float | None, device: str) -> float:
    """Prints what a run needs; returns the rate, operations per second: the one given, or this machine's."""
    from ctc_drafter.load import chosen_device, keep_quiet
    from ctc_drafter.train.estimate import describe, estimate, measured_rate

    keep_quiet()
    rate, source = flops, "given"
    if rate is None:
        rate, source = measured_rate(plan.dtype, chosen_device(device)), "measured here: matrix products"
    for what, much in describe(estimate(plan), rate, source):
        print(f"{what}: {much}")
    return rate


def show_recipe(recipe: Recipe, flops: float | None, bandwidth: float | None, device: str) -> None:
    """As `show_estimate`, and what the answers cost; bandwidth: bytes per second, measured if not given."""
    from ctc_drafter.load import chosen_device
    from ctc_drafter.train.estimate import measured_bandwidth
    from ctc_drafter.train.recipe import distillation, plan_of

    rate = show_estimate(plan_of(recipe), flops, device)
    speed = bandwidth or measured_bandwidth(chosen_device(device))
    source = "given" if flops and bandwidth else "measured here where not given"
    for what, much in distillation(recipe, rate, speed, source):
        print(f"{what}: {much}")
