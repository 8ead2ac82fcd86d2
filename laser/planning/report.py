"""A plan as text for people."""

from laser.planning.plan import Plan, TooLarge
from laser.planning.schedule import KERNELS, TRANSFERS
from laser.planning.topologies import Topology

RESOURCES = {
    "compute": "matrix units",
    "memory": "HBM",
    "interconnect": "links within the slice",
    "slices": "network between slices",
}

SHOWN_SECONDS = 5e-5  # of transfers


def describe(plan: Plan) -> str:
    """The report of scripts/plan.py."""
    sections = [_head(plan), _memory(plan), _work(plan), _traffic(plan), _time(plan)]
    if plan.schedule:
        sections.append(_schedule(plan))
    sections.append(unknown(plan))
    return "\n\n".join("\n".join(lines) for lines in sections)


def describe_too_large(result: TooLarge, topology: Topology) -> str:
    size = f"{result.needed_gib:.2f} GiB" if result.needed_gib else "more than that"
    return (
        f"does not fit: a chip of {topology.name} has {result.capacity_gib:.2f} GiB for a program, "
        f"and this one needs {size} for its temporaries alone"
    )


def _head(plan: Plan) -> list[str]:
    times = f"{plan.slices} x " if plan.slices > 1 else ""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "1"
    if plan.fits is None:
        verdict = "whether it fits is not known (no libtpu)"
    else:
        spare = plan.capacity_gib - plan.peak_gib
        words = f"fits, {spare:.2f} GiB to spare" if plan.fits else f"too large by {-spare:.2f} GiB"
        verdict = f"{words} of {plan.capacity_gib:.2f} on a chip"
    return [
        f"{times}{plan.topology} (rented as {plan.rented_as}), {plan.chips} chips: {verdict}",
        f"mesh {mesh}; {plan.accumulation} micro-batch{'es' if plan.accumulation > 1 else ''}, "
        f"remat {plan.remat}, layers {'unrolled' if plan.unroll else 'in a loop'}, "
        f"attention {plan.attention}",
    ]


def _memory(plan: Plan) -> list[str]:
    lines = [
        "GiB a chip",
        f"  parameters               {plan.parameters_gib:8.3f}",
        f"  optimizer state          {plan.optimizer_gib:8.3f}",
        f"  temporaries              {plan.temporaries_gib:8.3f}",
        f"    kept for the backward  {plan.kept_gib:8.3f}",
        f"  peak                     {plan.peak_gib:8.3f}",
    ]
    if plan.unsharded:
        lines.append(f"  {100 * plan.unsharded:.3g} % of the parameters are not split by fsdp")
    return lines


def _work(plan: Plan) -> list[str]:
    return [
        "FLOPs a step, all chips, causal attention counted half",
        f"  model       {plan.model_flops:.4g}",
        f"  recomputed  {plan.recomputed_flops:.4g} "
        f"({100 * plan.recomputed_flops / plan.model_flops:.1f} %)",
    ]


def _traffic(plan: Plan) -> list[str]:
    total = sum(row.gib for row in plan.traffic)
    lines = [f"collectives a step, received by a chip: {total:.2f} GiB"]
    for row in plan.traffic:
        lines.append(
            f"  {row.kind:18} {row.axes:24} {row.dtype:5} {row.count:6} times {row.gib:8.3f} GiB"
        )
    return lines


def _time(plan: Plan) -> list[str]:
    """The bound, and beside it what the schedule makes of it, which is the one to count with."""
    lines = ["a step takes at least, in seconds"]
    for name, seconds in plan.bound.items():
        if seconds:
            binds = "  <- binds" if name == plan.binding else ""
            lines.append(f"  {RESOURCES[name]:24} {seconds:8.4f}{binds}")
    steps = "" if plan.hours is None else f"; all steps {plan.hours:.1f} hours"
    steps += "" if plan.chip_hours is None else f", {plan.chip_hours:,.0f} chip-hours"
    lines.append(
        f"  allows at most {100 * plan.mfu:.1f} % MFU, {plan.tokens_per_second:,.0f} tokens/s"
        f"{steps}, if all of them overlapped perfectly"
    )
    if plan.schedule_hours is not None:
        lines.append(
            f"  as scheduled, below: all steps {plan.schedule_hours:.1f} hours, "
            f"{plan.schedule_hours * plan.chips:,.0f} chip-hours; never measured"
        )
    return lines


def _schedule(plan: Plan) -> list[str]:
    """What the compiled program makes of it."""
    schedule, mfu = plan.schedule, plan.schedule_mfu
    assert schedule is not None
    assert mfu is not None
    lines = ["the compiled schedule, in ms of a step, by the compiler's own count of cycles"]
    for kind, seconds in schedule.waited.items():
        by = f" (by {schedule.kernels_by})" if kind == KERNELS and schedule.kernels_by else ""
        waits = ", waited for" if kind == TRANSFERS else ""
        lines.append(f"  {kind + waits + by:28} {1e3 * seconds:8.1f}")
    lines.append(f"  {'estimated step':28} {1e3 * schedule.seconds:8.1f}  {100 * mfu:.1f} % MFU")
    hidden = ", ".join(f"{kind} {1e3 * s:.1f}" for kind, s in schedule.hidden.items())
    lines.append(f"  transfers hidden behind: {hidden or 'nothing'}")
    for one in schedule.transfers:
        if one.seconds >= SHOWN_SECONDS:
            lines.append(
                f"    {one.what:34} {one.count:5} times {1e3 * one.seconds:8.1f} ms, "
                f"{1e3 * one.waited:.1f} of it waited for"
            )
    lines.append("  heaviest beside products")
    for one in schedule.heaviest:
        lines.append(f"    {1e3 * one.waited:6.1f}  {one.kind:10}  {one.what}  {one.source}")
    return lines


def unknown(plan: Plan) -> list[str]:
    """What a plan cannot say."""
    lines = ["not known without the chips"]
    lines.append("  how near to the bounds and to the schedule a step comes; nothing here was run")
    lines.append("  waiting for data, for other hosts, for checkpoints and evaluation")
    if plan.hours is None:
        lines.append("  hours: training.epochs is set, and the data decide how many steps that is")
    if plan.slices > 1 and not plan.bound["slices"]:
        lines.append("  the bandwidth between slices of this chip: only its bytes are given")
    if plan.fits is None:
        lines.append(
            "  memory and collectives on a TPU: libtpu is not installed (pip install libtpu), so "
            "this was compiled for simulated CPU devices, and temporaries are theirs"
        )
    return lines


def ranking(plans: list[tuple[str, Plan]]) -> str:
    """A table of a search: flags and plans, the best one first."""
    lines = ["  MFU bound   seconds  binds         peak GiB  flags"]
    for flags, plan in plans:
        lines.append(
            f"  {100 * plan.mfu:7.1f} %  {plan.seconds:8.4f}  {plan.binding:12}  "
            f"{plan.peak_gib:8.2f}  {flags}"
        )
    return "\n".join(lines)
