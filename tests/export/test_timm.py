"""Vision transformers in timm, and back."""

import dataclasses

import jax
import numpy as np
import pytest

from export.timm import arguments, from_timm, to_timm
from models.config import AttentionConfig
from tests.models.test_vit import SMALL, images, parameters, run

CONFIGS = {
    "standard": dataclasses.replace(SMALL, attention=AttentionConfig(kind="standard")),
    "qk_norm": dataclasses.replace(SMALL, attention=AttentionConfig(kind="standard", qk_norm=True)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_there_and_back_is_bit_equal(config):
    params = parameters(config)
    there = to_timm(config, params)
    jax.tree.map(np.testing.assert_array_equal, from_timm(config, there), params)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_timm_computes_the_same(config):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    params, pixels = parameters(config), images(3)
    theirs = timm.models.VisionTransformer(**arguments(config)).eval()
    dim = config.model_dim
    theirs.head = torch.nn.Sequential(
        torch.nn.Linear(dim, dim), torch.nn.Tanh(), torch.nn.Linear(dim, config.num_classes)
    )
    theirs.load_state_dict({k: torch.tensor(x) for k, x in to_timm(config, params).items()})
    with torch.no_grad():
        expected = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2))).numpy()
    logits, _ = run(config, params, pixels)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{"kind": "laser"}, {"per_dim_temp": True}, {"soft_cap": 50.0}])
def test_what_timm_has_not_is_refused(change):
    attention = AttentionConfig(**{"kind": "standard", **change})
    with pytest.raises(ValueError, match="timm has"):
        arguments(dataclasses.replace(SMALL, attention=attention))
