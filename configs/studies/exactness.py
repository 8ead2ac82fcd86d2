"""What rounding and the paper's own wrapper do to training, on the 1m of attention.py.

    python scripts/study.py --study=configs/studies/exactness.py --output=studies/exactness

Stage `dtype` asks table 11's question at this scale: both attentions in float32, and with
activations in bfloat16. Weights are float32 in both, where the paper's were bfloat16, too: what is
compared is float32 with the mixed precision of configs/c4.py, in which runs are trained here. Stage
`wrapper` trains LASER by this repository's form and by the paper's log-weighted-sum-exp wrapper,
whose maximum runs over the whole row (laser/attention/reference.py), at rates up to where training
breaks down. Text and tokenizer are those of attention.py.
"""

from ml_collections import ConfigDict

from configs.studies import attention
from configs.studies.attention import ARMS, MILLION, RATE, SEED
from configs.study import Comparison, Stage, Study

DTYPE, FORM = "model.dtype", "attention.implementation"
DTYPES, FORMS = ("float32", "bfloat16"), ("chunked", "paper")
SHORT = {"size": "1m", "training.steps": MILLION // 2, "training.eval_every": MILLION // 2}


def get_config(arguments: str = "") -> ConfigDict:
    return attention.get_config(arguments)


def get_study() -> Study:
    stages = [
        Stage(
            "dtype",
            {SEED: range(3), "attention": ARMS, DTYPE: DTYPES},
            {**SHORT, RATE: 8e-3},
            "float32 and bfloat16, 1m, 0.5 M tokens",
        ),
        Stage(
            "wrapper",
            {RATE: (8e-3, 3.2e-2, 1.28e-1), DTYPE: DTYPES, FORM: FORMS},
            {**SHORT, "attention": "laser"},
            "LASER by this repository's form and by the paper's wrapper",
        ),
    ]
    compare = [
        Comparison(
            "dtype", {"attention": arm, DTYPE: DTYPES[1]}, {"attention": arm, DTYPE: DTYPES[0]}
        )
        for arm in ARMS
    ]
    return Study(stages, compare)
