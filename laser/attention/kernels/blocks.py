"""Block sizes of the fused kernels, and the estimate of on-chip memory that they rest on.

One table, `TILES`, serves every chip that was tried. Instruction bundles (about cycles) of forward
and backward of a head at N = 1024, where a sequence is one block, and the estimate of on-chip
memory:

| head size | tiles | MiB | v5e standard | v5e LASER | v5p standard | v5p LASER |
|---|---|---|---|---|---|---|
| 128 | 256, 256 | 13 | 9,922 | 10,188 | 10,270 | 10,373 |
| 256 | 256, 256 | 20 | 17,381 | 17,592 | 17,609 | 17,757 |
| 512 | 256, 128 | 36 | 31,097 | 32,431 | 31,347 | 32,631 |
| 720 | 256, 128 | 52 | 45,583 | 47,753 | 45,947 | 48,202 |

LASER at N = 8192 on v5e, in thousands, forward / backward, by rows of a tile (MiB with 512):

| head size | block | MiB | 128 | 256 | 512 |
|---|---|---|---|---|---|
| 128 | 1024 | 22 | 287 / 492 | 269 / 387 | 235 / 392 |
| 256 | 1024 | 33 | 429 / 827 | 384 / 711 | 369 / 736 |
| 512 | 1024 | 56 | 701 / 1440 | 652 / 1332 | 623 / 1415 |
| 720 | 512 | 55 | 1265 / 2879 | 1116 / 2819 | 1068 / 2903 |

A group of 4 heads of queries to one of keys takes 10,172 (LASER at size 128, N = 1024, v5e; 10,445
in the same program with repeated keys), of size 256 17,938 (17,957), and a causal window of 256 at
N = 4096 and size 128 at most 54 thousand, where all keys before a query take 159.

What the compiler makes of equal work differs by 1 to 2 %, up or down, with details that do not
matter otherwise. To renew: `python scripts/compile_attention.py static` for the first table, and
`search CHIP SIZE LENGTH`, which tries all sizes, for the second.
"""

import dataclasses
import math

MEBI = 2**20
# On-chip memory of a core, as jax says (pallas/mosaic/tpu_info.py), of the chips before v5.
OLDER_VMEM_BYTES = dict.fromkeys(("TPU v2", "TPU v3", "TPU v4 lite", "TPU v4"), 16 * MEBI)
SMALLEST_VMEM_BYTES = 64 * MEBI  # of all others, which one table serves
LANES = 128  # sizes are padded to it on the chip
LARGEST_SIZE = 768
SAMPLED_ROWS = 16  # of each step, in the backward kernel: the smallest tile of bfloat16

# Sequence length and head size up to which a row holds, and the tiles of the forward and of the
# backward kernel. Small tiles skip more of the causal square, most of which lies in the blocks on
# the diagonal; large tiles are loaded less often.
TILES = (
    (128, LARGEST_SIZE, 128, 128),
    (1024, 256, 256, 256),
    (1024, LARGEST_SIZE, 256, 128),
    (2048, LARGEST_SIZE, 256, 256),
    (math.inf, LARGEST_SIZE, 512, 256),
)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows of a block (a grid step) and of a tile (a matrix product) of it.

    Attributes:
      block: of the forward and of the backward kernel.
      tile: of the forward kernel; divides `block`.
      backward_tile: of the backward kernel; divides `block`.
    """

    block: int
    tile: int
    backward_tile: int


def padded_length(length: int, sizes: BlockSizes) -> int:
    """`length` rounded up to whole blocks."""
    return -(-length // sizes.block) * sizes.block


def vmem_limit(device_kind: str) -> int:
    """Bytes of on-chip memory that a kernel may use on a device of this kind, as jax names it."""
    return OLDER_VMEM_BYTES.get(device_kind, SMALLEST_VMEM_BYTES)


def block_sizes(
    length: int,
    d_qk: int,
    d_v: int,
    itemsize: int,
    grouped: bool = False,
    limit: int = SMALLEST_VMEM_BYTES,
) -> BlockSizes:
    """The tiles of the table, in the block that pads the sequence least, the largest of them.

    Blocks below 512 are for short sequences, and for when no other fits the on-chip memory, of
    which there are `limit` bytes. Where none does it is the smallest.
    """
    size = max(d_qk, d_v)
    tiles = next(row[2:] for row in TILES if length <= row[0] and size <= row[1])
    whole = -(-length // tiles[0]) * tiles[0]
    candidates = [
        BlockSizes(block, *(min(tile, block) for tile in tiles))
        for block in (1024, 768, 512, 256, 128)
        if block <= whole and block % min(tiles[0], block) == 0
    ]
    fitting = [
        sizes
        for sizes in candidates
        if vmem_estimate(length, d_qk, d_v, sizes, itemsize, grouped) <= limit
    ]
    large = [sizes for sizes in fitting if sizes.block >= 512]
    if not large:
        return (fitting or candidates[-1:])[0]
    return min(large, key=lambda sizes: (padded_length(length, sizes), -sizes.block))


def in_window(sizes: BlockSizes, window: tuple[int, int]) -> BlockSizes:
    """Tiles no longer than a window, as far as they are as good: shorter ones skip more of it."""
    tile = min(sizes.tile, 256) if max(window) < 512 else sizes.tile
    return dataclasses.replace(sizes, tile=tile)


def _lanes(size: int) -> int:
    return -(-size // LANES) * LANES


def sampled_step(length: int, block: int) -> int:
    """Rows of a padded sequence of which the first are sampled: a block, or 128 of a single one."""
    return LANES if length == block and length % LANES == 0 else block


def vmem_estimate(
    length: int, d_qk: int, d_v: int, sizes: BlockSizes, itemsize: int, grouped: bool = False
) -> int:
    """Bytes of on-chip memory that the backward kernel, the larger of the two, needs.

    Inputs and outputs of a grid step are held twice, so that one step's transfers overlap the work
    of another; sums are float32, those of dQ for the whole sequence, and where heads are grouped
    those of dK and dV, too; five tiles of logits live.
    """
    rows, d_qk, d_v = sizes.block, _lanes(d_qk), _lanes(d_v)
    transfers = 2 * rows * (4 * d_qk + 5 * d_v) * itemsize
    # The float32 residual of the exact path is wider than the usual one.
    transfers += 2 * rows * d_v * (4 - itemsize)
    padded = padded_length(length, sizes)
    sampled = SAMPLED_ROWS * padded // sampled_step(padded, rows)
    transfers += 2 * sampled * (d_qk + d_v) * itemsize
    sums = 4 * (padded * d_qk + (padded if grouped else rows) * (d_qk + d_v))
    prepared = rows * d_v * (itemsize + 4) + 4 * sizes.tile * (2 * d_v + d_qk)
    logits = 5 * 4 * sizes.tile * sizes.block
    needed = transfers + sums + prepared + logits
    # Products of float32 are made of several of bfloat16, whose operands take space, too.
    return needed * 5 // 4 if itemsize == 4 else needed
