"""Exported vision transformers in timm, where it is installed."""

import dataclasses
import sys

import numpy as np
import pytest

from export import timm
from tests.export.test_export import MODELS, VIT, exported
from tests.models.test_vit import images, run


def test_timm_makes_an_mlp_of_the_same_size():
    """It is told the ratio alone, multiplies, and rounds down."""
    for dim, mlp_dim in [(32, 48), (88, 240), (448, 3904), (704, 960), (704, 1920), (832, 960)]:
        config = dataclasses.replace(VIT, model_dim=dim, mlp_dim=mlp_dim)
        assert int(dim * timm.arguments(config)["mlp_ratio"]) == mlp_dim


@pytest.mark.parametrize("name", ["timm", "timm_qk_norm"])
def test_timm_computes_the_same(name, store, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    config, pixels = MODELS[name], images(3)
    params = exported(tmp_path / "out", store, config)
    monkeypatch.syspath_prepend(tmp_path / "out")
    monkeypatch.delitem(sys.modules, "load_timm", raising=False)
    from load_timm import load

    with torch.no_grad():
        theirs = load()(torch.tensor(pixels.transpose(0, 3, 1, 2))).numpy()
    logits, _ = run(config, params, pixels)
    np.testing.assert_allclose(theirs, logits, rtol=1e-5, atol=1e-5)
