"""Names of slices: what they mean, and what is said of a wrong one."""

import pytest

from laser.planning.topologies import parse_topology


@pytest.mark.parametrize(
    ("name", "other_name", "chips", "wrap"),
    [
        ("v5e:16x16", "v5e-256", 256, (True, True)),
        ("v5e:16x16", "v5litepod-256", 256, (True, True)),
        ("v5e:8x16", "v5e-128", 128, (False, True)),
        ("v5e:4x4", "v5e-16", 16, (False, False)),
        ("v5p:4x8x8", "v5p-512", 256, (True, True, True)),
        ("v5p:2x2x4", "v5p-32", 16, (False, False, False)),
        ("v4:4x4x4", "v4-128", 64, (True, True, True)),
        ("v6e:16x16", "v6e-256", 256, (True, True)),
    ],
)
def test_both_names_of_a_slice(name, other_name, chips, wrap):
    topology = parse_topology(name)
    assert topology == parse_topology(other_name)
    assert (topology.name, topology.rented_as) == (name, other_name.replace("litepod", "e"))
    assert (topology.chips, topology.wrap) == (chips, wrap)


def test_several_slices():
    assert parse_topology("v5e:16x16", slices=3).chips == 768


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("v5e:16x17", 1, "did you mean 'v5e:16x16'?"),
        ("v5p-511", 1, "did you mean 'v5p-512'?"),
        ("h100", 1, "Known: v5e:1x1 to 16x16"),
        ("v5e:4x4", 0, "--slices=0: must be at least 1"),
    ],
)
def test_mistakes_name_what_was_meant(name, slices, message):
    with pytest.raises(ValueError) as error:
        parse_topology(name, slices)
    assert message in str(error.value)
