"""Section 4.1, ablation with optimizers: 301M trained by LAMB, which scales updates to the weights.

LASER has larger gradients; with LAMB their size no longer matters.
Argument: attention=laser|standard...
"""

from ml_collections import ConfigDict

from configs import c4
from configs.arguments import parse_arguments


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser"})
    return c4.get_config(f"size=301m,optimizer=lamb,attention={chosen['attention']}")
