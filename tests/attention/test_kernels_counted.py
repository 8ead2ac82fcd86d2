"""What scripts/compile_attention.py reads out of a compiled program, and the times beside it."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from laser.attention import attention
from scripts import benchmark_attention
from scripts import compile_attention as compiled

PROGRAM = """
%cheap (p: (f32[8,128])) -> f32[8,128] {
  %p = (f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0} get-tuple-element(%p), index=0
  ROOT %copy.1 = f32[8,128]{1,0} copy(%x)
}

%dear (p: (f32[8,128])) -> f32[8,128] {
  %p = (f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0} get-tuple-element(%p), index=0
  %copy.2 = f32[8,128]{1,0} copy(%x)
  ROOT %copy.3 = f32[8,128]{1,0} copy(%copy.2)
}

ENTRY %main (a: bf16[16,128]) -> f32[8,128] {
  %a = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %kernel = (f32[8,128]{1,0:T(8,128)}, f32[1,16]{1,0}) custom-call(%a, %a), custom_call_target="k"
  %y = f32[8,128]{1,0} get-tuple-element(%kernel), index=0
  %flag = pred[] fusion(%y), kind=kLoop, calls=%any
  ROOT %out = f32[8,128]{1,0} conditional(%flag, %t, %t), branch_computations={%dear, %cheap}
}
"""


def test_hbm_bytes_are_those_of_the_usual_path():
    a, y = 16 * 128 * 2, 8 * 128 * 4
    kernel, flag, branch = 2 * a + y + 16 * 4, y + 1, 2 * y
    assert compiled.hbm_bytes(PROGRAM) == kernel + flag + branch


def test_bundles_leave_the_exact_path_out_and_count_the_steps_of_splash():
    ours = {"bundles": {"laser_forward": 3, "laser_backward": 5, "laser_forward_raw": 100}}
    assert compiled.total_bundles("laser", ours) == 8
    splash = {"bundles": {"splash_mha_fwd": 3, "splash_mha_dq": 5}}
    assert compiled.total_bundles("splash", splash) == 3 * 8  # 3 of 2 x 2 blocks are not masked


def test_bundles_of_several_blocks_are_those_that_are_executed():
    diagonal, other = 4, 6
    assert compiled.executed_bundles(1, diagonal, 0) == diagonal
    assert compiled.executed_bundles(3, diagonal + other, other) == 3 * diagonal + 3 * other


def test_splash_is_wrapped_as_the_paper_says():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 16, 3, 8)).astype(np.float32)

    def mean(*heads):  # (B, H, N, D), as splash takes them
        rows = (x.transpose(0, 2, 1, 3) for x in heads)
        return jax.nn.dot_product_attention(*rows, is_causal=True).transpose(0, 2, 1, 3)

    found = compiled._wrapped(mean)(*(x.transpose(0, 2, 1, 3) for x in (q, k, v)))
    expected = attention(q, k, v, kind="laser", implementation="paper")
    np.testing.assert_allclose(found.transpose(0, 2, 1, 3), expected, rtol=1e-5, atol=1e-5)


def test_times_are_ratios_of_one_run(capsys):
    medians = benchmark_attention.times(length=16, heads=1, size=8, rounds=1)
    printed = capsys.readouterr().out
    assert {"ours, standard", "ours, LASER", "jax.nn, XLA"} <= set(medians)
    assert min(medians.values()) > 0
    assert f"{medians['ours, LASER'] / medians['ours, standard']:6.3f}" in printed


def test_xla_s_path_stands_beside_the_kernel_in_bfloat16(monkeypatch, capsys):
    """As on a TPU: whether the kernel is faster is one command."""
    asked = []

    def noted(query, key, value, **options):
        asked.append((options["kind"], options["implementation"], query.dtype.name))
        return attention(query, key, value, **{**options, "implementation": "chunked"})

    monkeypatch.setattr("laser.attention.attention", noted)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    medians = benchmark_attention.times(length=16, heads=1, size=8, rounds=1)
    assert {"ours, LASER", "chunked, standard", "chunked, LASER", "jax.nn, XLA"} <= set(medians)
    assert "PyTorch SDPA" not in medians
    assert {*asked} == {
        (kind, implementation, "bfloat16")
        for kind in ("standard", "laser")
        for implementation in ("auto", "chunked")
    }
    assert "chunked, LASER" in capsys.readouterr().out


def test_every_kind_is_the_attention_that_it_is_called():
    heads = jax.ShapeDtypeStruct((1, 2, 512, 128), jnp.bfloat16)
    texts = {}
    for kind in compiled.KINDS:
        jaxpr = jax.make_jaxpr(compiled._attention(kind, 128))(heads, heads, heads)
        assert [x.shape for x in jaxpr.out_avals] == [heads.shape]
        texts[kind] = str(jaxpr)
    for word, kinds in {
        "standard_forward": {"standard"},
        "laser_forward": {"laser"},
        "splash": {"splash", "splash_laser"},
    }.items():
        assert {kind for kind, text in texts.items() if word in text} == kinds
    assert texts["splash_laser"].count(" exp ") > texts["splash"].count(" exp ")


def test_it_starts_from_anywhere(tmp_path):
    """As a path it finds the repository, whatever folder it is called from."""
    program = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); import laser.attention.kernels.blocks"
    )
    path = Path(compiled.__file__).resolve()
    done = subprocess.run([sys.executable, "-c", program, path], cwd=tmp_path, check=False)
    assert done.returncode == 0
