"""Section 4.3: the Conformer on LibriSpeech, searched for standard attention, then table 5's rows.

The space, its 50 points and the stages are those of vit.py, but for label smoothing, which CTC has
not. The warm-up is table 8's 5 % of the steps. What decides is the word error rate of the
validation split. Per-dim temperature is on in all six rows, as in AlgoPerf's model.

The paper reports the median of five runs. The report here has mean and deviation over five seeds,
and differences by pairs of seeds with their interval; the rate of each run is in numbers.json. Test
rates are those of `--test` of scripts/prepare_speech.py (docs/conformer.md). The temperature of the
rows `+ temp` is not in the paper; each attention takes the best of four here, as in vit.py.
Arguments as in configs/conformer.py.
"""

from ml_collections import ConfigDict

from configs import conformer
from configs.studies import vit
from configs.study import Stage, Study

POINT = vit.POINT[:4]  # rate, b1, b2, weight decay
ARMS = (*vit.KINDS, *(f"{kind}+qk_norm" for kind in vit.KINDS))


def get_config(arguments: str = "") -> ConfigDict:
    config = conformer.get_config(arguments)
    config.optimizer.warmup_steps = 3_800  # paper: 5 % of the steps
    return config


def get_study() -> Study:
    search = Stage(
        "search",
        {POINT: [vit.point(i)[:4] for i in range(1, vit.POINTS + 1)]},
        {"attention": "standard"},
        why="table 8: one seed of standard attention at each point",
    )
    stages = [search, *vit.rows(POINT, ARMS, "table 5")]
    return Study(stages, vit.pairs(ARMS), measure="eval/wer")
