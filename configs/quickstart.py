"""A first run on a laptop CPU: --config=configs/quickstart.py:attention=laser

Trains a 4-layer model of 4 M parameters on the embedded corpus (two English Bibles in the public
domain), which scripts/quickstart.py prepares. Blocks, optimizer and schedule are the paper's; its
own are corpus, vocabulary, sizes, the length of rows, learning rate, warm-up, batch, steps, and
float32 throughout. `attention` takes the same values as in configs/c4.py.

Command   python scripts/quickstart.py, or make quickstart, which installs first
Hardware  two cores of a CPU
Hours     0.1, three to four minutes of them training
Result    near 1.38 bits per byte of held-out chapters, by LASER; the paper has none
"""

from ml_collections import ConfigDict

from configs import base
from configs.arguments import parse_arguments, set_attention


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser"})

    config = base.get_config()
    config.model.vocab_size = 4096
    config.model.num_layers = 4
    config.model.model_dim = 256
    config.model.mlp_dim = 1024
    config.model.num_heads = 4
    config.model.head_dim = 64
    config.model.remat = "none"  # memory is no limit at this size
    config.model.unroll = True
    set_attention(config.attention, chosen["attention"])

    config.data.store = "stores/bible"
    config.data.seq_len = 256
    config.data.block_rows = 16  # a small store on a disk: an epoch has 30 rounds of blocks

    config.optimizer.learning_rate = 3e-3  # a small model bears more
    config.optimizer.warmup_steps = 50

    config.training.steps = 500  # 2 M tokens, one epoch
    config.training.batch_size = 16
    config.training.eval_every = 100

    config.checkpoint.every = 100
    return config
