"""A block of today at about 300M on C4: --config=configs/llama.py:attention=laser

Grouped-query attention (8 heads, 2 of keys and values), a SwiGLU, RMSNorm and rotary positions, as
in Llama (arXiv 2307.09288, 2407.21783), in the depth, width and heads of the paper's 301M, with the
same tokens and optimizer. 305.4 M parameters: so that LASER can be compared in this block with what
it does in the paper's.

    attention   as in configs/c4.py                                  (default laser)
    optimizer   as in configs/c4.py                                  (default adamw)
    slice       v5e-64 | v5p-128                                     (default any)

Command   python train.py --config=configs/llama.py:attention=laser,slice=v5e-64 --workdir=DIR
Hardware  64 chips of v5e or of v5p; docs/plans.md
Hours     never measured; as scheduled 16.1 on v5e-64 (bound 7.6), 6.5 on v5p-128 (bound 3.3)
Result    the paper has none; not run
"""

from ml_collections import ConfigDict

from configs import c4, slices
from configs.arguments import parse_arguments

SIZE = "llama"  # in configs/slices.py


def get_config(arguments: str = "") -> ConfigDict:
    defaults = {"attention": "laser", "optimizer": "adamw", "slice": "any"}
    chosen = parse_arguments(arguments, defaults)

    config = c4.get_config(f"attention={chosen['attention']},optimizer={chosen['optimizer']}")
    config.model.num_kv_heads = 2  # a quarter of the heads, as in Llama 3 8B
    config.model.mlp = "swiglu"
    config.model.mlp_dim = 1920  # with which a layer has 2 % more weights than the paper's
    config.model.norm = "rmsnorm"
    config.model.positions = "rotary"
    if chosen["slice"] != "any":
        slices.set_layout(config, SIZE, chosen["slice"])
    return config
