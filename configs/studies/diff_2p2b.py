"""Table 7: differential attention, with and without LASER, at 2.2B on 24 B tokens.

    python scripts/study.py --study=configs/studies/diff_2p2b.py --output=OUTPUT --data_dir=DATA

    attention   laser+diff (default) | standard+diff, or +diff=scalar for the paper's formula as
                written, with a trained scalar alone in place of the published design of
                differential attention
    slice       as in configs/c4.py; the study has v5e-256         (default any)

The table is of one-shot accuracies: the study measures its tasks at the end of each run, as
`scripts/evaluate.py` does. Learning rate and weight decay are those of configs/studies/paper.py,
POINTS. Whether the paper's cosine ended at 24 B tokens, as it does here, or was that of a longer
run it does not say. Hours of each run are in docs/studies.md.
"""

from ml_collections import ConfigDict

from configs import c4
from configs.arguments import parse_arguments
from configs.studies import paper
from configs.study import Comparison, Stage, Study

TASKS = tuple(name for name in paper.TABLE_6 if name != "boolq")


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser+diff", "slice": "any"})
    config = c4.get_config(f"size=2p2b,attention={chosen['attention']},slice={chosen['slice']}")
    config.training.steps = 22_888  # 24 B tokens at 1024 x 1024 a step
    paper.set_point(config)
    return config


def get_study() -> Study:
    arms = ("standard", "laser", "standard+diff", "laser+diff")
    hold = {"slice": "v5e-256"}
    why = "with and without two maps of attention"
    main = Stage("main", {"attention": arms}, hold, why, ("oneshot",))
    pairs = [("laser", "standard"), ("laser+diff", "standard+diff"), ("laser+diff", "standard")]
    compare = [Comparison("main", {"attention": a}, {"attention": b}) for a, b in pairs]
    return Study([main], compare, tasks=TASKS)
