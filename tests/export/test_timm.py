"""Exported vision transformers in timm, where it is installed."""

import sys

import numpy as np
import pytest

from tests.export.test_export import MODELS, exported
from tests.models.test_vit import images, run


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
