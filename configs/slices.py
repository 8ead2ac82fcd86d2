"""How the paper's models are laid out on slices of TPUs.

    --config=configs/c4.py:size=2p2b,slice=v5e-256

The first in the ranking of `scripts/plan.py --search`, or with the same bound as the first, in
bfloat16 by AdamW. Those of `LAYOUTS` are proven by compiling: docs/plans.md has what came of it,
and the hours that a run takes, docs/compiler-notes.md what was tried. Those of `ESTIMATED` are not.
Slices have Google's names, in which a number counts chips of v5e and cores, two a chip, of v5p. The
paper trained the 300M on 64 chips, the 1.1B on 128 and the 2.2B on 256; the other sizes take what
their nearest has.
"""

from ml_collections import ConfigDict

# Size and slice → copies of parameters and optimizer state (mesh.data), micro-batches of a step,
# what the backward pass keeps, and whether layers are unrolled. All chips share a copy (mesh.fsdp),
# which costs the same traffic as anything less. The 7.7B has four on v5p: 64 chips can split all
# its weights between whole rows, 256 cannot, and to put parts of rows together takes longer. A loop
# over layers copies what the backward pass keeps into one array of all layers and out of it again:
# unrolled, a step is 8 to 21 % shorter and compiles up to ten times as long. The 7.7B's step on v5p
# is no shorter, as the gathers are hidden less.
LAYOUTS = {
    ("234m", "v5e-64"): (1, 1, "dots", True),
    ("301m", "v5e-64"): (1, 1, "dots", True),
    ("435m", "v5e-64"): (1, 1, "dots", True),
    ("1p1b", "v5e-128"): (1, 1, "dots", True),
    ("2p2b", "v5e-256"): (1, 1, "dots", True),
    ("7p7b", "v5e-256"): (1, 2, "dots", False),
    ("234m", "v5p-128"): (1, 1, "dots", True),
    ("301m", "v5p-128"): (1, 1, "dots", True),
    ("435m", "v5p-128"): (1, 1, "dots", True),
    ("1p1b", "v5p-256"): (1, 1, "dots", True),
    ("2p2b", "v5p-512"): (1, 1, "dots", True),
    ("7p7b", "v5p-512"): (4, 1, "dots", False),
    ("llama", "v5e-64"): (1, 1, "dots", True),
    ("llama", "v5p-128"): (1, 1, "dots", True),
}

# Smaller slices, whose chips take in a micro-batch as many rows as those of LAYOUTS in a step (of
# the 234M twice as many). Bound and memory are counted by hand, nothing is compiled.
ESTIMATED = {
    ("234m", "v5e-8"): (1, 4, "dots", True),
    ("234m", "v5e-16"): (1, 2, "dots", True),
    ("234m", "v5e-32"): (1, 1, "dots", True),
    ("301m", "v5e-8"): (1, 8, "dots", True),
    ("301m", "v5e-16"): (1, 4, "dots", True),
    ("301m", "v5e-32"): (1, 2, "dots", True),
}


def set_layout(config: ConfigDict, size: str, name: str) -> None:
    """Sets mesh, micro-batches, remat policy and unrolling. Raises ValueError without a layout."""
    layouts = ESTIMATED | LAYOUTS
    if (size, name) not in layouts:
        known = ", ".join(known for of, known in layouts if of == size)
        raise ValueError(
            f"no layout of size {size} on slice {name!r}: there is one for {known}; for another "
            "slice leave slice out and run scripts/plan.py --search --topology=SLICE, which prints "
            "the flags of one"
        )
    layout = layouts[size, name]
    config.mesh.data, config.training.accumulation, config.model.remat, config.model.unroll = layout
    config.mesh.fsdp, config.mesh.tensor = -1, 1
