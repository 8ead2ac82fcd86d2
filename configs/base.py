"""Every field of a run, once, with its unit and the reason for its default.

The other files in this folder start from `get_config()` here and state only what differs. Fields
are overridden on the command line as `--config.section.field=value`. Types, ranges and divisibility
are checked by `laser.training.config` before any device is touched.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.init_from = ""  # folder of a run whose newest parameters this one starts from; "" = none

    config.model = ConfigDict()
    model = config.model
    model.kind = "decoder"  # decoder | bert | vit | conformer: configs/NAME.py
    model.vocab_size = 32000  # entries of the embedding; at least the tokenizer's size
    model.num_layers = 16
    model.model_dim = 1024  # width of the residual stream
    model.mlp = "gelu"  # gelu | relu (two matrices) | geglu | swiglu (three: one gates another)
    model.mlp_dim = 4096  # hidden width of the MLP
    model.num_heads = 8
    model.num_kv_heads = 0  # of keys and values, each for a group of heads; 0 = as many, 1: MQA
    model.head_dim = 128  # of the values; need not be model_dim / num_heads
    model.norm = "layernorm"  # layernorm | rmsnorm, before attention, before the MLP and at the end
    model.positions = "sinusoidal"  # sinusoidal (on the embedding) | rotary (on queries and keys)
    model.logits_soft_cap = 0.0  # c * tanh(logits / c) on the output logits; 0 = off (PAX: 30)
    model.dtype = "float32"  # float32 | bfloat16, of activations and what fsdp moves; else float32
    model.matmul_precision = "highest"  # default | high | highest, of products of float32
    model.remat = "full"  # none | dots | full: what the backward pass keeps (see models/stack.py)
    model.unroll = False  # unroll the scan over layers: faster, but slower to compile

    config.attention = ConfigDict()
    attention = config.attention
    attention.kind = "laser"  # standard | laser
    attention.temperature = 1.0  # logits are divided by it
    attention.per_dim_temp = False  # a trained temperature for every query dimension
    attention.qk_norm = False  # LayerNorm on queries and keys, per head
    attention.diff = "none"  # none | official (norm, factor, lambda vectors) | scalar (lambda only)
    attention.soft_cap = 0.0  # c * tanh(logits / c) on the attention logits; 0 = off (PAX: 50)
    # auto | pallas | cudnn | chunked | reference | paper (see laser/attention/interface.py)
    attention.implementation = "auto"

    config.data = ConfigDict()
    data = config.data
    # folder written by scripts/prepare_data.py, or its address, as gs://bucket/store
    # (docs/buckets.md); or several with weights, as a:0.7,b:0.3
    data.store = ""
    data.tasks = ""  # in its place: text-to-text tasks to fine-tune on, as copa,rte
    data.tasks_dir = ""  # folder with their data as downloaded; "" = TFDS's
    data.seq_len = 1024  # tokens of a row; of tasks: at most, longer prompts lose their left
    data.segment_ids = False  # True: tokens attend within their own document only
    data.shuffle_seed = 0  # of the order of rows, see data/reading/order.py
    # rows that are read in one piece; a batch takes one of each piece, so 1 is the most random
    # order. 256 are 0.5 MB of 1,024 tokens: for a bucket 50 ms away a request of a few ms' work
    data.block_rows = 256
    data.prefetch = 2  # batches made ready ahead of the step
    data.read_ahead = 32  # steps whose pieces are asked for ahead: the seconds a bucket may take
    data.requests = 64  # reads of a host under way at once
    data.cache_dir = ""  # folder on this host's disk for what is read from an address; "" = none
    data.cache_gb = 20.0  # that it may take, in 10**9 bytes; a full one keeps what it has

    config.optimizer = ConfigDict()
    optimizer = config.optimizer
    # adamw | nadamw (Nesterov; decays all parameters) | lamb | muon (the layers' matrices; the rest
    # by adamw)
    optimizer.name = "adamw"
    optimizer.learning_rate = 1e-3  # peak
    optimizer.schedule = "cosine"  # to 0 | wsd: the peak, held up to the last decay_steps
    optimizer.warmup_steps = 1000  # linear from 0
    optimizer.decay_steps = 0  # of wsd, linear to 0 at training.steps; else 0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.99
    optimizer.muon_momentum = 0.95  # of muon, in place of b1 and b2
    optimizer.eps = 1e-24  # the paper's; where squares underflow, see laser/training/optimizer.py
    optimizer.weight_decay = 0.1  # decoupled, times the learning rate; matrices only
    optimizer.clip_grad_norm = 1.0  # of all gradients together; 0 = off
    optimizer.clip_update_rms = 1.0  # of each tensor's Adam update, per layer; 0 = off

    config.training = ConfigDict()
    training = config.training
    training.seed = 0  # of the initial parameters
    training.steps = 160_000  # or 0, and then epochs
    training.epochs = 0  # passes over the data, in place of steps
    training.batch_size = 1024  # rows of a step, over all hosts
    training.accumulation = 1  # micro-batches a step is split into; changes memory, not the result
    training.z_loss = 0.0  # weight of (log of the softmax's normaliser)^2; PaLM: 1e-4
    # skip steps whose gradient norm is above so many times the median of the last 128; 0 = off
    training.skip_gradient_norm = 0.0
    training.max_skipped_steps = 10  # in a row, the last for numbers not finite: then give up
    training.log_every = 10  # steps
    training.eval_every = 1000  # steps, 0 = an epoch; the last step is always evaluated
    training.eval_batches = 0  # batches of the validation split; 0 = all of it
    # project of Weights & Biases for the numbers, too; "" = none (requirements-wandb.txt)
    training.wandb_project = ""
    training.profile_steps = ""  # trace of the steps FIRST,LAST, as 100,105 (docs/watching.md)
    # without the end of a step: then the process says where it hangs and ends; 0 = any. Compiling,
    # evaluation and saves do not count, so it is far above any step
    training.step_timeout_seconds = 1800.0

    config.evaluation = ConfigDict()
    evaluation = config.evaluation
    evaluation.tasks = ""  # one-shot tasks scored while training, as copa,boolq; "" = none
    evaluation.data_dir = ""  # folder with their data as downloaded; "" = TFDS's
    evaluation.protocol = "gpt3"  # gpt3 | lm_eval, of the prompts
    evaluation.shots = 1  # demonstrations in each prompt, the same ones every time
    evaluation.limit = 0  # examples of each task, the first ones; 0 = all
    evaluation.every = 1000  # steps, 0 = an epoch; the last step is always evaluated

    config.checkpoint = ConfigDict()
    checkpoint = config.checkpoint
    checkpoint.every = 1000  # steps, 0 = an epoch; the last step is always saved
    checkpoint.keep = 3  # newest ones kept
    # none | loss | error | wer | decoding_accuracy: also keep the best by it of those evaluated at
    # their step
    checkpoint.best = "none"
    checkpoint.keep_period = 0  # also keep every step that is a multiple of it; 0 = none

    config.mesh = ConfigDict()
    mesh = config.mesh
    mesh.data = -1  # devices that hold copies of the parameters; -1 = all that the other axes leave
    mesh.fsdp = 1  # devices that share parameters and optimizer state, and split the batch
    mesh.tensor = 1  # devices that share heads and MLP columns
    mesh.max_unsharded = 0.02  # share of the parameters' bytes that fsdp may leave unsplit
    mesh.compiler_options = "chip"  # chip | none: those of laser/training/compiler.py, or XLA's own

    return config
