"""Section 4.1, ablation with optimizers: 301M trained by LAMB, which scales updates to the weights.

LASER has larger gradients; with LAMB their size no longer matters. The paper does not say which
LAMB. Here eps and the clip of the update are those of the other runs (1e-24, RMS 1 before the trust
ratio); You et al. (arXiv 1904.00962) have 1e-6 and no such clip:
--config.optimizer.eps=1e-6 --config.optimizer.clip_update_rms=0.

    attention   laser (default) | standard...
    slice       as in configs/c4.py; the study has v5e-64          (default any)

Hours of each run are in docs/studies.md.
"""

from ml_collections import ConfigDict

from configs import c4
from configs.arguments import parse_arguments
from configs.study import Comparison, Stage, Study


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser", "slice": "any"})
    return c4.get_config(
        f"size=301m,optimizer=lamb,attention={chosen['attention']},slice={chosen['slice']}"
    )


def get_study() -> Study:
    hold = {"slice": "v5e-64"}
    main = Stage("main", {"attention": ("standard", "laser")}, hold, "both by LAMB")
    return Study([main], [Comparison("main", {"attention": "laser"}, {"attention": "standard"})])
