"""The fused kernels compiled by the real TPU compiler, which needs no TPU, only libtpu.

In processes of their own: libtpu gives no memory back. One compiles several programs, as half of
the time of a small one is the start.
"""

import importlib.util
import json

import pytest

from configs import c4
from tests import forked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'"
    ),
]
# Prints the names of the kernels in each compiled program.
COMPILE = """
import json, re, sys
from scripts.compile_attention import lower_program
KERNEL = re.compile("(?:laser|standard)_(?:forward|backward)(?:_raw|_wide)?(?![a-z])")
for program in json.loads(sys.argv[1]):
    text = lower_program(**program).compile().as_text()
    print(json.dumps(sorted(set(KERNEL.findall(text)))))
"""


def kernels_of(programs):
    """Names of the kernels of each of these programs, which a child compiles one by one."""
    result = forked.run_for_tpu(COMPILE, [json.dumps(programs)])
    found = list(map(json.loads, result.stdout.splitlines()))
    assert result.returncode == 0, (programs[len(found)], result.stderr[-3000:])
    return found


# Prints the bundles of LASER's two kernels, alone, for 8 and for 2 heads of keys: a line a size.
BUNDLES = """
import functools, pathlib, tempfile
from scripts import compile_attention as attention
with tempfile.TemporaryDirectory() as dump:
    attention._prepare_libtpu(dump)
    import jax, jax.numpy as jnp
    from laser.attention.kernels import backward, common, forward
    options = common.Options(
        laser=True, causal=True, scale=0.1, soft_cap=0.0, block=1024, tile=256, backward_tile=256,
        vmem_bytes=24 * 2**20,
    )
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=attention._one_device("v5e"))
    def run(q, k, v, d_out, log_sum, reference):
        out, _, statistics = forward.forward(q, k, v, None, options)
        more = (None, reference, options)
        return out, statistics, backward.backward(q, k, v, out, d_out, log_sum, *more)
    def bundles(heads, size):
        q, k = (struct((1, count, 1024, size), jnp.bfloat16) for count in (8, heads))
        log_sum = struct((1, 8, 1, 1024), jnp.float32)
        reference = struct((1, heads, 2, size), jnp.float32)
        for earlier in pathlib.Path(dump).iterdir():
            earlier.unlink()
        jax.jit(run).lower(q, k, k, q, log_sum, reference).compile()
        return sum(attention.bundles.read(dump).values())
    for size in (128, 256):
        print(bundles(8, size), bundles(2, size))
"""


def test_grouped_heads_take_no_more_bundles_than_repeated_ones():
    result = forked.run_for_tpu(BUNDLES, optimized=True)  # the number depends on it
    assert result.returncode == 0, result.stderr[-3000:]
    of_128, of_256 = (tuple(map(int, line.split())) for line in result.stdout.splitlines())
    for repeated, grouped in (of_128, of_256):
        assert 0 < grouped <= repeated


# Prints the names of LASER's kernels on a chip of 16 MiB, by the default implementation.
OLDER_CHIP = """
import re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from laser.attention import attention
topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v4:2x2x1", chip_config_name="megacore"
)
mesh = jax.sharding.Mesh(topology.devices[:1], ("data",))
with jax.set_mesh(mesh):
    sharding = jax.NamedSharding(mesh, jax.P())
    x = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16, sharding=sharding)
    def run(q, k, v):
        out, vjp = jax.vjp(lambda *x: attention(*x, kind="laser"), q, k, v)
        return out, *vjp(out)
    text = jax.jit(run).lower(x, x, x).compile().as_text()
print(*sorted(set(re.findall("laser_(?:forward|backward)(?![_a-z])", text))))
"""


def test_compiles_for_a_chip_of_little_memory():
    result = forked.run_for_tpu(OLDER_CHIP)
    assert result.stdout.split() == ["laser_backward", "laser_forward"], result.stderr[-3000:]


def program(chip, heads, size, length, kind="laser", **options):
    return {
        "chip": chip, "heads": heads, "size": size, "length": length, "kind": kind, **options,
    }  # fmt: skip


SMALL, LARGE = c4.SIZES["301m"][-2:], c4.SIZES["7p7b"][-2:]  # heads and head size
EXPECTED = {
    "standard": {"standard_forward", "standard_backward"},
    "laser": {
        "laser_forward", "laser_backward",
        "laser_forward_raw", "laser_backward_raw", "laser_forward_wide",  # where these do not do
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("chip", "shape", "lengths"), [("v5e", SMALL, (1024, 8192)), ("v5p", LARGE, (1024, 4096))]
)
def test_compiles_for_a_tpu(chip, shape, lengths):
    for found in kernels_of([program(chip, *shape, length) for length in lengths]):
        assert set(found) == EXPECTED["laser"]


# One tile each: tiles of a block are unrolled, and the time grows with their square.
OPTIONS = [
    program("v5e", 8, 128, 256, packed=True, soft_cap=50.0),
    program("v5e", 8, 128, 256, "standard", packed=True, soft_cap=50.0),
    program("v5e", 8, 128, 1100, packed=True, full=True),  # two blocks
    program("v5e", 8, 128, 256, dtype="float32"),
    program("v5e", 8, 720, 256, dtype="float32"),
    program("v5e", 8, 64, 256, value_size=128),
    program("v5e", 8, 128, 256, value_size=256),
    program("v5e", 8, 256, 256, value_size=512),
    program("v5e", 16, 360, 256, value_size=720),
]
# The compiler is the same for both: another instruction set, to which no option is of matter, and
# what takes most memory.
OF_V5P = [OPTIONS[i] | {"chip": "v5p"} for i in (0, 2, 4, 8)]


@pytest.mark.parametrize("programs", [OPTIONS, OF_V5P], ids=["v5e", "v5p"])
def test_options_compile_for_a_tpu(programs):
    for one, found in zip(programs, kernels_of(programs), strict=True):
        assert set(found) == EXPECTED[one["kind"]], one
