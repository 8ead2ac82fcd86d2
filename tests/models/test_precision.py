"""`model.matmul_precision`: products of float32 keep it, programs of bfloat16 do not change."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from absl import flags as absl_flags

from configs import tones
from laser.attention import products
from laser.training import flags
from laser.training.config import load_config
from laser.training.objectives.speech import TRANSCRIPTS, greedy_paths
from laser.training.program import Program
from laser.training.sharding import make_mesh
from laser.training.share import Share
from models import families, stack
from models import products as model_products
from models.decoding import append, empty_cache, next_logits, unstack
from models.families import init_parameters
from tests import forked

pytestmark = pytest.mark.usefixtures("own_programs")
OF_BFLOAT16 = re.compile(r"dot_general .* -> tensor<[\dx]+xbf16>")
PRODUCT = re.compile(r"stablehlo.dot_general .*")


@pytest.fixture(scope="module")
def config(module_arguments):
    fields = {"attention.implementation": "chunked", "model.num_layers": 1}
    argv = ["train.py", *module_arguments, *(f"--config.{x}={y}" for x, y in fields.items())]
    own: absl_flags.FlagValues = absl_flags.FlagValues()
    return flags.parse(argv, lambda values: own)[0]


@pytest.fixture
def as_for_tpus(monkeypatch):
    """The text of a program for TPUs, as far as precision goes."""
    monkeypatch.setattr(stack, "platform_of_program", lambda: "tpu")


def lowered(config, **fields):
    """The text of the train and of the evaluation step."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
    program = Program(config, make_mesh(config, jax.devices()[:1]))
    train = program.train_step.lower(program.abstract_state, program.abstract_batch())
    evaluate = program.eval_step.lower(program.abstract_state.params, program.abstract_batch())
    return train.as_text() + evaluate.as_text()


def test_all_products_of_float32_have_the_precision(config, as_for_tpus):
    assert config.model.matmul_precision == "highest"
    found = PRODUCT.findall(lowered(config))
    assert len(found) > 20
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in found)
    found = PRODUCT.findall(lowered(config, matmul_precision="high"))
    assert all("precision = [HIGH, HIGH]" in product for product in found)


def test_programs_of_bfloat16_are_the_same_with_any(config, as_for_tpus):
    texts = {
        lowered(config, dtype="bfloat16", matmul_precision=precision)
        for precision in ("default", "high", "highest")
    }
    assert len(texts) == 1
    assert len(PRODUCT.findall(texts.pop())) > 20


def test_programs_for_cpus_are_the_same_with_any(config):
    """Their float32 is float32, and the attribute would cost them time."""
    texts = {lowered(config, matmul_precision=precision) for precision in ("default", "highest")}
    assert len(texts) == 1
    found = PRODUCT.findall(texts.pop())
    assert len(found) > 20
    # Those of the attention alone ask for it by themselves, or none does.
    assert not any("HIGHEST" in product for product in found)


@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_cpus_are_asked_for_products_of_bfloat16_in_float32(config, monkeypatch, kind):
    """They have no fast ones with a result of bfloat16; accelerators round by themselves."""
    attention = dataclasses.replace(config.model.attention, kind=kind)
    fields = {"dtype": "bfloat16", "attention": attention}
    assert not OF_BFLOAT16.search(lowered(config, **fields))
    monkeypatch.setattr(model_products, "platform_of_program", lambda: "tpu")
    assert OF_BFLOAT16.search(lowered(config, **fields))


def test_decoding_has_it_too(config, as_for_tpus):
    model = config.model
    params = jax.eval_shape(lambda: unstack(model, init_parameters(model, 0)))
    cache = jax.eval_shape(lambda: empty_cache(model, 1, 128))

    def run(params, tokens, real, cache):
        hidden, cache = append(model, params, tokens, real, cache)
        return next_logits(model, params, hidden[:, -1])

    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    real = jax.ShapeDtypeStruct((1, 4), bool)
    found = PRODUCT.findall(jax.jit(run).lower(params, tokens, real, cache).as_text())
    assert len(found) > 4
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in found)


def test_transcripts_have_it_too(as_for_tpus):
    """As the loss that is evaluated beside them: convolutions, and the products before and after
    the blocks."""
    config = tones.get_config("attention=laser")
    config.attention.implementation = "chunked"
    config = load_config(config)
    params = jax.eval_shape(lambda: families.init_parameters(config.model, 0))
    rows = TRANSCRIPTS.rows(config)
    batch = {name: jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for name, x in rows.items()}
    del batch["noise"]

    def paths(params, batch):
        return greedy_paths(config, params, batch, Share())

    text = jax.jit(paths).lower(params, batch).as_text()
    found = re.findall(r"stablehlo\.(dot_general|convolution)(.*)", text)
    assert {"dot_general", "convolution"} == {name for name, _ in found}
    assert all(line.count("HIGHEST") == 2 for _, line in found)


# Prints the products of the step for TPUs, those of kernels left out.
COMPILED = """
import sys
sys.path.insert(0, ".")
from laser.planning import topologies
topology = topologies.parse_topology("v5e:1x1")
topologies.prepare_environment(topology)
from absl import flags as absl_flags
from laser.planning.compile import compile_step
from laser.attention import products
from laser.training import flags

config, _ = flags.parse(["x", *sys.argv[1:]], lambda values: absl_flags.FlagValues())
module = compile_step(config, topologies.devices(topology))[1].module
for ops in module.computations.values():
    for op in ops:
        if op.opcode in ("convolution", "dot"):
            print(op.rest)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu"
)
def test_the_compiler_for_tpus_takes_it(module_arguments):
    arguments = [*module_arguments, "--config.attention.implementation=chunked"]
    result = forked.run_for_tpu(COMPILED, arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    products = result.stdout.splitlines()
    assert len(products) > 10
    assert all("operand_precision={highest,highest}" in product for product in products)


SINGLE = re.compile(r": \(tensor<[\dx]+xf32>, tensor<[\dx]+xf32>\)")


def test_exponentials_are_not_rounded_in_products_of_bfloat16_models(config, monkeypatch):
    """exp(V), near 1 for small values, times probabilities: both are float32."""
    assert config.model.attention.kind == "laser"
    for kind, expected in (("laser", True), ("standard", False)):
        attention = dataclasses.replace(config.model.attention, kind=kind)
        found = {}
        for platform in ("tpu", "cpu"):
            monkeypatch.setattr(products, "platform_of_program", lambda name=platform: name)
            text = lowered(config, dtype="bfloat16", attention=attention)
            found[platform] = [line for line in PRODUCT.findall(text) if "HIGHEST" in line]
        assert bool(found["tpu"]) == expected
        assert found["cpu"] == []
        assert all(SINGLE.search(line) for line in found["tpu"])
