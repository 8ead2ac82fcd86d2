"""Says what a run would be like on a slice of TPUs, without having one.

    python scripts/plan.py --config=configs/c4.py:size=2p2b,slice=v5e-256 --topology=v5e:16x16
    python scripts/plan.py --config=... --topology=v5p-512 --slices=2 --config.mesh.data=2 --json
    python scripts/plan.py --config=... --topology=v5e-64 --search

Compiles the train step that train.py runs for the described slice (pip install libtpu) and prints
whether it fits, where memory goes, what moves between chips, how fast a step can be at best, and
what the compiled schedule makes of it.
--search tries meshes, micro-batches and remat policies. Exit codes: 0 it fits, 1 it does not (with
a suggestion that was compiled), 2 mistake in the command line or the config.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from laser.planning import bundles, topologies
from laser.training.config import RunConfig
from laser.training.console import end_on_ctrl_c, exit_with, interruptible
from laser.training.devices import check_devices
from laser.training.flags import parse_or_exit

SEARCH_WANTED = 3  # programs that fit, to rank


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "topology",
        None,
        "slice, as v5e:16x16 (chips of each axis) or v5e-256 (Google's name)",
        flag_values=values,
        required=True,
    )
    flags.DEFINE_integer("slices", 1, "number of such slices", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    flags.DEFINE_bool("search", False, "look for the fastest layout that fits", flag_values=values)


def main(argv: list[str]) -> int:
    config, values = parse_or_exit(argv, define_flags, __doc__)
    try:
        topology = topologies.parse_topology(values.topology, values.slices)
        check_devices(config, topology.chips, topology.slices)
    except ValueError as error:
        exit_with(argv[0], str(error))
    topologies.prepare_environment(topology)
    if config.model.unroll and config.model.num_layers > 8 and topologies.has_libtpu():
        _log(
            f"compiling each of {config.model.num_layers} layers: minutes, and up to 12 GB of "
            "memory; --config.model.unroll=False compiles one, with another schedule"
        )
    try:
        run = _search if values.search else _plan
        return run(config, topology, values)
    except ValueError as error:
        exit_with(argv[0], str(error))


def _plan(config: RunConfig, topology: topologies.Topology, values: flags.FlagValues) -> int:
    from laser.planning import report
    from laser.planning.plan import TooLarge, make_plan

    devices = topologies.devices(topology)
    result = make_plan(config, topology, devices)
    if isinstance(result, TooLarge):
        return _refuse(config, topology, devices, result, values.json)
    print(json.dumps(result.to_dict()) if values.json else report.describe(result))
    return 1 if result.fits is False else 0


def _refuse(config, topology, devices, result, as_json: bool) -> int:
    """Says at once that it does not fit, and then what would, which takes the compiler minutes."""
    from laser.planning import report, search

    words = report.describe_too_large(result, topology)
    print(words, file=sys.stderr if as_json else sys.stdout, flush=True)
    _log("looking for a layout that fits")
    found = search.search(config, topology, devices, _attention(config), 1, _log)
    suggestion = search.flags(found[0][0]) if found else []
    if as_json:
        print(json.dumps({"fits": False, **dataclasses.asdict(result), "suggestion": suggestion}))
        return 1
    if found:
        print(f"this fits, with {found[0][1].peak_gib:.2f} GiB:\n  {' '.join(suggestion)}")
    else:
        print("nothing that was tried fits: take more chips")
    return 1


def _search(config: RunConfig, topology: topologies.Topology, values: flags.FlagValues) -> int:
    from laser.planning import report, search

    devices = topologies.devices(topology)
    found = search.search(config, topology, devices, _attention(config), SEARCH_WANTED, _log)
    if values.json:
        rows = [{"flags": search.flags(variant), **plan.to_dict()} for variant, plan in found]
        print(json.dumps(rows))
    elif found:
        print(report.ranking([(" ".join(search.flags(c)), plan) for c, plan in found]))
    else:
        print("nothing that was tried fits: take more chips")
    return 0 if found else 1


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _attention(config: RunConfig) -> str:
    chosen = config.model.attention.implementation
    return chosen if chosen != "auto" else "pallas"


if __name__ == "__main__":
    end_on_ctrl_c("stopped", bundles.remove)
    sys.exit(interruptible(main, sys.argv))
