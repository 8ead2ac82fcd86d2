"""Compiles the train step of a config for described chips, and reads what the compiler knows of it.

It is `Program.train_step`, the very function that train.py runs; nothing is executed.
"""

import dataclasses
import re
import resource
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.sharding import Mesh

from laser.planning import bundles
from laser.planning.collectives import Collective, collectives
from laser.planning.hlo import Module
from laser.training import sharding
from laser.training.config import RunConfig
from laser.training.program import Program

GIB = 2**30
# Of laser/attention/kernels; XLA for TPUs has custom calls of its own.
KERNEL = re.compile(r'%(laser|standard)_(forward|backward)[\w.]* = .*"tpu_custom_call"')


class OutOfMemory(Exception):
    """The program needs more memory than a chip has.

    Attributes:
      needed, available: GiB, as far as the compiler says; 0 if it does not.
    """

    def __init__(self, needed: float, available: float):
        super().__init__(f"needs {needed:.2f} of {available:.2f} GiB")
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of a compiled train step; bytes are of one chip.

    Attributes:
      parameters, optimizer: bytes of the state as it is laid out.
      arguments, temporaries, peak: bytes as the compiler counts them.
      kept: of `kept_for_backward`, for a micro-batch.
      collectives: all of them.
      attention: the implementation that is in it, pallas or chunked.
      seconds, gb: that compiling took, and the memory of this process.
      module: the optimized program.
      bundles: of the kernels, by name; {} if they were not requested.
    """

    parameters: int
    optimizer: int
    arguments: int
    temporaries: int
    peak: int
    kept: int
    collectives: list[Collective]
    attention: str
    seconds: float
    gb: float
    module: Module
    bundles: dict[str, int]


def trace_step(config: RunConfig, devices: Sequence) -> tuple[Program, jax.stages.Traced]:
    """The train step before XLA has it. Raises ValueError as `compile_step`."""
    program = Program(_with_steps(config), sharding.make_mesh(config, devices))
    return program, program.train_step.trace(program.abstract_state, program.abstract_batch())


def _with_steps(config: RunConfig) -> RunConfig:
    """The config with a number of steps. One that counts in epochs learns it from its data; here it
    gets any, as the program is the same but for the length of its schedule."""
    if config.training.steps:
        return config
    steps = config.optimizer.warmup_steps + 1
    training = dataclasses.replace(config.training, steps=steps, epochs=0)
    return dataclasses.replace(config, training=training)


def compile_step(config: RunConfig, devices: Sequence) -> tuple[Mesh, Compiled]:
    """Compiles for a mesh of devices that may be described only.

    Raises:
      ValueError: config and devices do not fit together.
      OutOfMemory: the program does not fit a chip.
    """
    start = time.perf_counter()
    program, traced = trace_step(config, devices)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error) from None
    kept = kept_for_backward(traced.jaxpr.jaxpr, config.model.num_layers)
    return program.mesh, _read(program, compiled, kept, time.perf_counter() - start)


def _explained(error: jax.errors.JaxRuntimeError) -> Exception:
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message or "vmem" in message:
        return error
    sizes = re.search(
        r"\(([\d.]+)([GM])\) exceeds available HBM \(([\d.]+)G|Used ([\d.]+)G of ([\d.]+)G hbm",
        message,
    )
    if sizes is None:
        return OutOfMemory(0.0, 0.0)
    if sizes[4]:
        return OutOfMemory(float(sizes[4]), float(sizes[5]))
    return OutOfMemory(float(sizes[1]) / (1 if sizes[2] == "G" else 1024), float(sizes[3]))


def kept_for_backward(jaxpr: Jaxpr, layers: int) -> int:
    """Bytes that the forward pass over the layers hands to the backward pass.

    They are what the first scan with as many rounds as layers stacks up, whether XLA is to unroll
    it or not. As jax has them: those of one device where axes split the batch, but as if the tensor
    axis split nothing, and XLA may keep less. 0 without such a scan.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == layers:
            stacked: Any = equation.outvars[equation.params["num_carry"] :]
            if kept := sum(var.aval.size * var.aval.dtype.itemsize for var in stacked):
                return kept  # as many micro-batches as layers stack nothing
        for inner in jaxprs_in_params(equation.params):
            if kept := kept_for_backward(inner, layers):
                return kept
    return 0


def _read(program: Program, compiled: Any, kept: int, seconds: float) -> Compiled:
    text: str = compiled.as_text() or ""
    module = Module(text)
    memory = compiled.memory_analysis()
    state = program.abstract_state
    return Compiled(
        parameters=_local_bytes(state.params),
        optimizer=_local_bytes(state.opt_state),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        kept=kept,
        collectives=collectives(module, dict(program.mesh.shape)),
        attention="pallas" if KERNEL.search(text) else "chunked",
        seconds=seconds,
        gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        module=module,
        bundles=bundles.take(),
    )


def _local_bytes(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
