"""Section 4.1, ablation with optimizers: 301M trained by LAMB, which scales updates to the weights.

LASER has larger gradients; with LAMB their size no longer matters. The paper does not say which
LAMB. Here eps and the clip of the update are those of the other runs (1e-24, RMS 1 before the trust
ratio); You et al. (arXiv 1904.00962) have 1e-6 and no such clip:
--config.optimizer.eps=1e-6 --config.optimizer.clip_update_rms=0.

Nor does it say at which rate, or for how long: here for 160,000 steps, as the others. A rate of
LAMB is a share of the weights and means another thing than one of AdamW, so each attention takes
the best of four, on a tenth of the steps with a cosine that ends there. The weight decay is that of
configs/c4.py.

    attention   laser (default) | standard...
    slice       as in configs/c4.py; the study has v5e-64          (default any)

Hours of each run are in docs/studies.md.
"""

from ml_collections import ConfigDict

from configs import c4
from configs.arguments import parse_arguments
from configs.study import Best, Comparison, Stage, Study

RATE, RATES = "optimizer.learning_rate", (1e-3, 3e-3, 1e-2, 3e-2)


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser", "slice": "any"})
    return c4.get_config(
        f"size=301m,optimizer=lamb,attention={chosen['attention']},slice={chosen['slice']}"
    )


def get_study() -> Study:
    arms = {"attention": ("standard", "laser")}
    hold = {"slice": "v5e-64"}
    rates = Stage(
        "rates",
        {RATE: RATES, **arms},
        {**hold, "training.steps": 16_000},
        "the rate of each, a tenth of the steps",
    )
    main = Stage("main", {**arms, RATE: Best(("rates",))}, hold, "both by LAMB")
    compare = [Comparison("main", {"attention": "laser"}, {"attention": "standard"})]
    return Study([rates, main], compare)
