"""Checks the arguments of train.py for a slice before anybody asks for it, without jax.

    python scripts/check_launch.py TYPE SLICES BUCKET EXTRAS --config=... --workdir=...

The first four are those of scripts/launch_tpu.sh, '' if not given. Exit code 2 and one line if the
config is wrong, does not fit the slice's chips, or needs what workers do not have: a folder of this
machine, or an extra. Else a line on whether a plan of docs/plans.md says that it fits in memory. A
config that starts from a run that is not here, but in the bucket, is not checked.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.addresses import told_as_os_errors
from data.reading import mixture
from data.reading.manifest import MANIFEST
from laser.planning.topologies import CORES_PER_CHIP, parse_topology
from laser.training.config import RunConfig
from laser.training.console import exit_with
from laser.training.devices import check_devices
from laser.training.flags import parse, read_config_file
from laser.training.folders import ADDRESS, folder_of
from scripts import plan_table
from train import define_flags

LARGEST_HOST = 8  # the number in the type of a slice that is one host


def main(argv: Sequence[str]) -> int:
    logging.disable()  # libraries behind addresses tell of every try
    type_name, slices, bucket, extras = argv[1], int(argv[2]), argv[3], argv[4].split(",")
    arguments = argv[5:]
    for argument in arguments:
        name, _, folder = argument.partition("=")
        if name.lstrip("-") == "config.init_from" and folder and not _is_here(folder):
            print(f"the config was not checked: {folder} is not in reach from here")
            return 0
    try:
        config, flags = parse(["train.py", *arguments], define_flags)
        chips = chips_of(type_name)
        check_devices(config, chips * slices, slices)
        several = slices > 1 or int(type_name.rpartition("-")[2]) > LARGEST_HOST
        if several or bucket:
            check_in_sight("--workdir", flags.workdir, bucket)
        unseen = check_stores(config.data.store, bucket)
        check_extras(config, extras)
    except ValueError as error:
        exit_with("train.py", str(error))
    plans = json.loads((ROOT / "docs" / "plans.json").read_text())
    said = plan_of(plans, arguments, type_name, slices)
    print("; ".join([f"the config is right for {chips * slices} chips", said, *unseen]))
    return 0


def _is_here(folder: str) -> bool:
    try:
        return folder_of(folder).is_dir()
    except (ValueError, OSError):  # no library for such an address here, or no network
        return False


def check_in_sight(name: str, place: str, bucket: str) -> None:
    """That workers see a folder; what git ignores here is on none. Raises ValueError."""
    mounted = bucket and os.path.normpath(place).startswith("bucket/")
    if not (place.startswith((ADDRESS, "/")) or mounted):
        raise ValueError(
            f"{name}={place}: workers do not see this folder; name it by {ADDRESS}, or below "
            "bucket/ with --bucket=NAME, or by an absolute path that all of them have"
        )


def check_stores(stores: str, bucket: str) -> list[str]:
    """That workers see them, and what they hold, as far as this machine sees it. Returns what is to
    be said of those that it does not see. Raises ValueError."""
    places = [part.path for part in mixture.parse(stores)] if stores else []
    for place in places:
        check_in_sight("--config.data.store", place, bucket)
    return [f"{place} was not looked at" for place in places if not _holds_store(place)]


def _holds_store(place: str) -> bool:
    """False where it cannot be read from here. Raises ValueError if it can, and there is none."""
    if not place.startswith(ADDRESS):
        return False
    try:
        with told_as_os_errors(place):
            (folder_of(place) / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"--config.data.store={place}: no finished store is there ({MANIFEST} is missing)"
        ) from None
    except (ValueError, OSError):  # no library, no network, no rights
        return False
    return True


def check_extras(config: RunConfig, extras: Sequence[str]) -> None:
    """That what the config imports is installed on workers. Raises ValueError."""
    needs = {
        "wandb": config.training.wandb_project and "--config.training.wandb_project",
        "images": config.images and "a config of images",
    }
    for extra, what in needs.items():
        if what and extra not in extras:
            raise ValueError(f"{what} needs --extras={extra} before the --")


def chips_of(type_name: str) -> int:
    """Of an accelerator's type, such as v5litepod-256 or v5p-512, as jax counts its devices. Raises
    ValueError."""
    found = re.fullmatch(r"(v\d+[a-z]*)-(\d+)", type_name)
    if not found:
        raise ValueError(f"--type={type_name}: no type with a number, such as v5litepod-256")
    return int(found[2]) // CORES_PER_CHIP.get(found[1], 1)


def plan_of(
    plans: Mapping[str, Any], arguments: Sequence[str], type_name: str, slices: int = 1
) -> str:
    """What a plan says of the recipe among the arguments; fields set besides are not in it. Plans
    are of one slice each. Raises ValueError if the recipe cannot be read."""
    pairs = zip(arguments, [*arguments[1:], ""])
    recipe = [x.partition("=")[2] or y for x, y in pairs if re.match("--?config(=|$)", x)][-1]
    chosen = read_config_file(recipe).to_dict()
    rented = type_name.replace("litepod", "e")
    planned = re.search(r"[:,](slice=v\d[^,]*)", recipe)
    if planned and planned[1] != f"slice={rented}":
        return f"{planned[1]} is the layout of other slices: scripts/plan.py tells whether it fits"
    of_slice = (
        plan
        for key, plan in plans.items()
        if parse_topology(plan["topology"]).rented_as == rented
        and read_config_file(plan_table.config(key)).to_dict() == chosen
    )
    plan = next(of_slice, None)
    if plan is None or slices > 1:
        return "no plan of it in docs/plans.md: scripts/plan.py makes one"
    layers = "" if plan["unroll"] else ", with layers in a loop"
    return (
        f"by docs/plans.md the recipe fits: {plan['peak_gib']:.1f} of {plan['capacity_gib']:.1f} "
        f"GiB of a chip{layers}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
