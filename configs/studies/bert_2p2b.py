"""Section 4.2: BERT of 2.2B parameters on Wikipedia, by the share of masked tokens it gets wrong.

    python scripts/prepare_data.py --source=tfds:wikipedia/20230601.en:1.0.0 --vocab_size=32000 \\
        --validation_fraction=0.01 --output=stores/wikipedia
    python scripts/study.py --study=configs/studies/bert_2p2b.py --output=studies/bert_2p2b

The paper trains on MLPerf's Wikipedia, of January 2020, with MLPerf's WordPiece, and states neither
optimizer nor length; configs/bert.py lists what else differs. So the two arms stand beside each
other, and their gap beside the paper's, but not their errors. One seed, as there. Arguments as in
configs/bert.py, but for the size.
"""

from ml_collections import ConfigDict

from configs import bert
from configs.arguments import parse_arguments
from configs.study import Comparison, Stage, Study


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser"})
    config = bert.get_config(f"size=2p2b,attention={chosen['attention']}")
    config.data.store = "stores/wikipedia"
    return config


def get_study() -> Study:
    main = Stage("main", {"attention": ("standard", "laser")}, why="section 4.2: both, one seed")
    compare = [Comparison("main", {"attention": "laser"}, {"attention": "standard"})]
    return Study([main], compare, measure="eval/error")
