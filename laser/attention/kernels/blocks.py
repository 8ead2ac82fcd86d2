"""Block sizes of the fused kernels, and the estimate of on-chip memory that they rest on.

One rule serves every chip and head size that was tried. Instruction bundles (about cycles) of
forward and backward of a head at N = 1024, in one block of 1024 and tiles of 256:

| head size | v5e standard | v5e LASER | v5p standard | v5p LASER |
|---|---|---|---|---|
| 128 | 10,099 | 10,247 | 10,054 | 10,245 |
| 256 | 17,475 | 17,649 | 17,250 | 18,043 |
| 512 | 31,359 | 32,664 | 31,480 | 33,059 |
| 720 | 47,127 | 49,565 | 46,385 | 48,467 |

What the compiler makes of equal work differs by 1 to 2 %, up or down, with details that do not
matter otherwise. To renew: `python scripts/benchmark_attention.py static`, and `search` for other
sizes.
"""

import dataclasses

MEBI = 2**20
VMEM_BYTES = {"v5e": 128 * MEBI, "v5p": 64 * MEBI, "v6e": 128 * MEBI}
SMALLEST_VMEM_BYTES = min(VMEM_BYTES.values())
LANES = 128  # sizes are padded to it on the chip
LARGEST_SIZE = 768


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


def block_sizes(length: int, d_qk: int, d_v: int, itemsize: int) -> BlockSizes:
    """The sizes for a sequence: of the blocks that fit, the largest that pads the length least."""
    tile = 256 if length > 128 else 128
    # Small tiles skip more of the causal square; large ones are read less often.
    backward_tile = 128 if max(d_qk, d_v) > 256 else tile
    whole = -(-length // tile) * tile
    candidates = [block for block in (1024, 768, 512) if block <= whole] or [whole]

    def fits(block: int) -> bool:
        sizes = BlockSizes(block, tile, backward_tile)
        return vmem_estimate(length, d_qk, d_v, sizes, itemsize) <= SMALLEST_VMEM_BYTES

    fitting = [block for block in candidates if fits(block)] or [tile]
    block = min(fitting, key=lambda block: (-(-length // block) * block, -block))
    return BlockSizes(block, tile, backward_tile)


def _lanes(size: int) -> int:
    return -(-size // LANES) * LANES


def vmem_estimate(length: int, d_qk: int, d_v: int, sizes: BlockSizes, itemsize: int) -> int:
    """Bytes of on-chip memory that the backward kernel, the larger of the two, needs.

    Inputs and outputs of a grid step are held twice, so that one step's transfers overlap the work
    of another; sums are float32, those of dQ for the whole sequence; five tiles of logits live.
    """
    rows, d_qk, d_v = sizes.block, _lanes(d_qk), _lanes(d_v)
    transfers = 2 * rows * (4 * d_qk + 5 * d_v) * itemsize
    # The float32 residual of the exact path is wider than the usual one.
    transfers += 2 * rows * d_v * (4 - itemsize)
    sums = 4 * (padded_length(length, sizes) * d_qk + rows * (d_qk + d_v))
    prepared = rows * d_v * (itemsize + 4) + 4 * sizes.tile * (2 * d_v + d_qk)
    logits = 5 * 4 * sizes.tile * sizes.block
    needed = transfers + sums + prepared + logits
    # Products of float32 are made of several of bfloat16, whose operands take space, too.
    return needed * 5 // 4 if itemsize == 4 else needed
