"""The paper's Conformer on LibriSpeech: --config=configs/conformer.py:size=32m,attention=laser

AlgoPerf's workload librispeech_conformer: 960 hours, transcripts by CTC, word error rates of
dev-clean and dev-other. Sizes are 32m, AlgoPerf's 4 blocks, and 105m, the 16 of init2winit; the
paper does not say which it trained, and its rates fit AlgoPerf's targets. `attention` takes the
same values as in configs/c4.py; per-dim temperature, which both codebases have, is always on.

Hardware  not run yet
Result    none yet; the paper's word error rates: LASER 0.0829, standard 0.0832; with QK-norm 0.0808
          and 0.0829. AlgoPerf's target: 0.0859
"""

from ml_collections import ConfigDict

from configs import base
from configs.arguments import choose, parse_arguments, set_attention

LAYERS = {"32m": 4, "105m": 16}


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"size": "32m", "attention": "laser"})

    config = base.get_config()
    config.model = ConfigDict()
    model = config.model
    model.kind = "conformer"
    model.vocab_size = 1024
    model.num_layers = choose("size", chosen["size"], LAYERS)
    model.model_dim = 512
    model.mlp_dim = 2048  # of each of a block's two feed-forwards
    model.num_heads = 8
    model.mel_bins = 80
    model.kernel_size = 5  # positions of the depthwise convolution, of 40 ms each
    model.dropout = 0.1
    model.bin_masks = 2  # SpecAugment: blocks of neighbouring mel bins at 0 ...
    model.max_masked_bins = 27  # ... of which each has fewer
    model.time_masks = 10  # blocks of neighbouring frames at 0 ...
    model.max_masked_time = 0.05  # ... of which each has a smaller share of the recording
    model.batch_norm_momentum = 0.999  # of the moments that evaluation uses
    model.dtype = "float32"  # as in configs/base.py, and so are the next three
    model.matmul_precision = "highest"
    model.remat = "full"
    model.unroll = False
    set_attention(config.attention, chosen["attention"])
    config.attention.per_dim_temp = True

    config.data.store = "stores/librispeech"  # of scripts/prepare_speech.py
    config.data.seq_len = 2000  # frames of 10 ms, at most; AlgoPerf cuts the last two
    config.data.block_rows, config.data.read_ahead = 1, 0  # recordings are read one by one

    # One of the five points that AlgoPerf has published of NAdamW. The paper's space (table 8) has
    # a warm-up of 5 % of the steps and b2 of 0.9, 0.99 or 0.999 instead, and is searched by
    # configs/studies/conformer.py.
    optimizer = config.optimizer
    optimizer.name = "nadamw"
    optimizer.learning_rate = 1.7486e-3
    optimizer.warmup_steps = 1520
    optimizer.b1 = 0.93266
    optimizer.b2 = 0.99552
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.08122
    optimizer.clip_grad_norm = 0.0
    optimizer.clip_update_rms = 0.0

    config.training.steps = 76_000
    config.training.batch_size = 256
    config.evaluation.every = 1000  # the word error rate
    return config
