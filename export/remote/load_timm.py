"""The vision transformer of this folder, as one of timm's.

    from load_timm import load

    model = load()  # logits of images (batch, 3, side, side), of timm's usual mean and deviation

timm's own loaders know no head of two layers.
"""

import json
from pathlib import Path

import timm
from safetensors.torch import load_file
from torch import nn


def load(folder=Path(__file__).parent):
    """In evaluation mode, with dropout off."""
    arguments = json.loads((Path(folder) / "config.json").read_text())["arguments"]
    model = timm.models.VisionTransformer(**arguments)
    dim = arguments["embed_dim"]
    head = nn.Linear(dim, arguments["num_classes"])
    model.head = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), head)
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()
