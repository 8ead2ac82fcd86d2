"""Fine-tuning on SuperGLUE: --config=configs/finetune.py:task=rte --config.init_from=RUN

    task   boolq | cb | copa | multirc | record | rte | wic | wsc, several as copa+rte,
           or superglue for all of them                             (default superglue)

What the paper's "on the SuperGLUE dataset for 10 epochs" means is open, for Table 3 has four tasks:
the default trains one mixture of eight and keeps the epoch with the best mean over the eight, on
the split that is reported. Report the last epoch's numbers beside it; docs/finetune-export.md has
the other readings.

Model and length of rows are those of the run in init_from, and so is the tokenizer; the optimizer
starts anew. Give the folder with the data by --config.data.tasks_dir, or prepare them with
TensorFlow Datasets. Lines marked `paper` repeat what the paper states (Table 3).

Command   python train.py --config=configs/finetune.py:task=rte --config.init_from=RUN --workdir=DIR
Hardware  a model is split over all chips that there are, 32 at most with a batch of 32
Hours     not planned: steps follow from the examples
Result    the paper's Table 3; not run here
"""

from ml_collections import ConfigDict

from configs import base
from configs.arguments import choose, parse_arguments

TASKS = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"task": "superglue"})

    config = base.get_config()
    del config.model, config.attention, config.data.seq_len  # those of init_from

    names = TASKS if chosen["task"] == "superglue" else chosen["task"].split("+")
    known = {name: name for name in TASKS}
    config.data.tasks = ",".join(choose("task", name, known) for name in names)

    config.optimizer.learning_rate = 1e-4  # ours, as all below without `paper`
    config.optimizer.warmup_steps = 10

    config.training.steps = 0
    config.training.epochs = 10  # paper
    config.training.batch_size = 32
    config.training.eval_every = 0  # every epoch

    config.checkpoint.every = 0  # every epoch
    config.checkpoint.keep = 1
    config.checkpoint.best = "decoding_accuracy"

    config.mesh.data, config.mesh.fsdp = 1, -1  # a model that was pretrained may not fit on a chip
    return config
