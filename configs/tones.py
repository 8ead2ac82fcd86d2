"""A Conformer that learns to spell in minutes: --config=configs/tones.py:attention=laser

Ten made-up words of two-tone sounds, two to five in a recording (data/speech/tones.py), so that no
data is needed. `attention` takes the same values as in configs/c4.py.

Command   python scripts/prepare_speech.py --train=tones:1000 --validation=tones:100@1
          --vocab_size=12 --output=stores/tones, then train.py
Hardware  two cores of a CPU
"""

from ml_collections import ConfigDict

from configs import conformer
from configs.arguments import parse_arguments


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser"})

    config = conformer.get_config(f"attention={chosen['attention']}")
    model = config.model
    model.vocab_size = 12
    model.num_layers = 2
    model.model_dim = 64
    model.mlp_dim = 256
    model.num_heads = 4
    model.dropout = 0.0
    model.time_masks = 2
    model.batch_norm_momentum = 0.9  # of 0.999, so few steps would be too few
    model.remat = "none"  # memory is no limit at this size
    model.unroll = True

    config.data.store = "stores/tones"

    optimizer = config.optimizer
    optimizer.learning_rate = 3e-3
    optimizer.warmup_steps = 30
    optimizer.b1 = 0.9
    optimizer.b2 = 0.99
    optimizer.weight_decay = 1e-3
    optimizer.clip_grad_norm = 1.0

    config.training.steps = 300
    config.training.batch_size = 16
    config.training.eval_every = 50
    config.evaluation.every = 50
    config.checkpoint.every = 100
    return config
