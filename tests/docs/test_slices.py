"""Layouts that were not compiled, and what docs/plans.md says of them."""

import dataclasses

import pytest

from configs import c4
from configs.slices import ESTIMATED, LAYOUTS
from laser.planning import search
from laser.planning.plan import estimated_peak_gib
from laser.planning.topologies import parse_topology
from laser.training import roofline
from laser.training.config import load_config
from laser.training.hardware import CHIPS
from tests.docs.pages import ROOT

COMPILED_ADDS = 1.15  # at most, of the rows of docs/plans.md with these sizes: 9.09 GiB of 8.49


def rows():
    """{(size, slice): the other cells} of the table."""
    text = (ROOT / "docs/plans.md").read_text()
    section = text.partition("## Smaller slices, estimated")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if "GiB" not in line]
    return {(line[0], line[1]): line[2:] for line in lines if len(line) > 1}


def test_the_page_has_all_of_them_and_none_is_compiled():
    assert set(rows()) == set(ESTIMATED)
    assert not set(ESTIMATED) & set(LAYOUTS)


@pytest.mark.parametrize(("size", "name"), ESTIMATED)
def test_an_estimated_layout_has_the_best_bound_and_fits(size, name):
    topology = parse_topology(name, 1)
    chip = CHIPS[topology.device_kind]
    config = load_config(c4.get_config(f"size={size},slice={name}"))
    mesh = dataclasses.replace(config.mesh, fsdp=topology.chips)
    bound = roofline.analytic_bound(config, mesh, chip, "pallas")
    gib = estimated_peak_gib(config, mesh)
    micro_batches, by_hand, seconds, hours = rows()[size, name]
    assert config.training.accumulation == int(micro_batches)
    assert by_hand == f"{gib:.1f} of {chip.hbm_gib:.2f}"
    assert (seconds, hours) == (
        f"{bound.seconds:.3f}",
        f"{bound.seconds * config.training.steps / 3600:.1f}",
    )
    best, _ = min(
        (roofline.analytic_bound(*candidate, chip, "pallas").seconds, i)
        for i, candidate in enumerate(search.candidates(config, topology, "pallas"))
    )
    assert bound.seconds == pytest.approx(best, rel=0.001)
    assert gib * COMPILED_ADDS < chip.hbm_gib
