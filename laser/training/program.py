"""What a run computes, without its data and its folder: steps, state and their layout.

train.py runs this program, and planning and benchmarks compile or time the same one.
"""

import functools

import jax
from jax.sharding import Mesh

from laser.training import compiler, sharding
from laser.training.config import RunConfig
from laser.training.objectives.registry import objective
from laser.training.step import TrainState, init_state, make_eval_step, make_train_step


class Program:
    """The jitted steps of a config on a mesh, with the shardings of all that enters them.

    Attributes:
      config, mesh: what it was made of; the mesh may be one of devices that are only described.
      batch_sharding: of every array of a batch.
      abstract_state: the TrainState as ShapeDtypeStructs with their shardings.
      train_step: (state, batch) -> (state, metrics), see `make_train_step`; donates the state.
      eval_step: (parameters, batch) -> Sums.
    """

    def __init__(self, config: RunConfig, mesh: Mesh):
        self.config = config
        self.mesh = mesh
        self.batch_sharding = sharding.batch_sharding(mesh)
        abstract = jax.eval_shape(functools.partial(init_state, config))
        shardings: TrainState = sharding.state_shardings(mesh, abstract)
        self.abstract_state: TrainState = sharding.described(abstract, shardings)
        options = compiler.options(mesh.devices.flat[0].device_kind, config.mesh.compiler_options)
        self.train_step = jax.jit(
            sharding.on_mesh(mesh, make_train_step(config)),
            in_shardings=(shardings, self.batch_sharding),
            out_shardings=(shardings, None),
            donate_argnums=0,
            compiler_options=options,
        )
        self.eval_step = jax.jit(
            sharding.on_mesh(mesh, make_eval_step(config)),
            in_shardings=(shardings.params, self.batch_sharding),
            compiler_options=options,
        )
        self._init = jax.jit(functools.partial(init_state, config), out_shardings=shardings)

    def init_state(self) -> TrainState:
        """The state before the first step, made where it belongs."""
        return self._init()

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch as ShapeDtypeStructs with their shardings."""
        size = self.config.training.batch_size
        return {
            name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=self.batch_sharding)
            for name, x in objective(self.config).rows(self.config).items()
        }
