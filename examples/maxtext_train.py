"""In the place of `python3 -m maxtext.trainers.pre_train.train`, with the same arguments."""

import sys

from absl import app
from maxtext.layers.attention_op import AttentionOp
from maxtext.trainers.pre_train import train

from laser.dropins.maxtext import apply_attention

AttentionOp.apply_attention = apply_attention

if __name__ == "__main__":
    app.run(train.main, sys.argv)
