"""Table 6: the 7.7B, trained on 44 B tokens.

    python scripts/study.py --study=configs/studies/short_7p7b.py --output=OUTPUT --data_dir=DATA

    attention   laser (default) | standard...
    slice       as in configs/c4.py; the study has v5e-256         (default any)

The table is of one-shot accuracies: the study measures its tasks at the end of each run, as
`scripts/evaluate.py` does. Learning rate and weight decay are those of configs/studies/paper.py,
POINTS. Whether the paper's cosine ended at 44 B tokens, as it does here, or was that of a longer
run it does not say. Hours of each run are in docs/studies.md.
"""

from ml_collections import ConfigDict

from configs import c4
from configs.arguments import parse_arguments
from configs.studies import paper
from configs.study import Comparison, Stage, Study


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser", "slice": "any"})
    config = c4.get_config(f"size=7p7b,attention={chosen['attention']},slice={chosen['slice']}")
    config.training.steps = 41_962  # 44 B tokens at 1024 x 1024 a step
    paper.set_point(config)
    return config


def get_study() -> Study:
    hold = {"slice": "v5e-256"}
    main = Stage("main", {"attention": paper.ARMS}, hold, "both on 44 B tokens", ("oneshot",))
    compare = [Comparison("main", {"attention": "laser"}, {"attention": "standard"})]
    return Study([main], compare, tasks=paper.TABLE_6)
