"""Plans: of the very program that train.py runs, with numbers that can be counted otherwise."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import flags as absl_flags

from configs import c4
from laser.planning import report, search, table
from laser.planning.compile import compile_step, kept_for_backward, trace_step
from laser.planning.plan import make_plan
from laser.planning.topologies import parse_topology
from laser.training import flags, loop, roofline, sharding
from laser.training.config import MeshConfig, load_config, to_dict
from laser.training.hardware import CHIPS
from laser.training.rows import StoreRows
from models.families import abstract_parameters, init_parameters

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(arguments, tmp_path):
    """A run that train.py would start, on eight devices that share everything."""
    own: absl_flags.FlagValues = absl_flags.FlagValues()
    argv = ["train.py", *arguments, "--config.mesh.data=2", "--config.mesh.fsdp=-1"]
    config, _ = flags.parse(argv, lambda values: own)
    return loop.open_run(config, StoreRows(config), str(tmp_path / "run"), False)


def test_the_plan_s_program_is_the_one_that_train_py_runs(run):
    with run.train_batches(0) as batches:
        _, batch = next(iter(batches))
        trained = run.program.train_step.lower(run.program.init_state(), batch)
    _, traced = trace_step(run.config, jax.devices())
    planned = traced.lower()
    assert planned.as_text() == trained.as_text()
    assert "all_gather" in planned.as_text()


def test_numbers_of_a_small_run(run):
    """Collectives of the compiled program are those that are counted by hand."""
    model = dataclasses.replace(run.config.model, unroll=False, remat="full")
    config = dataclasses.replace(run.config, model=model)
    mesh, compiled = compile_step(config, jax.devices())
    rows = config.training.batch_size // config.training.accumulation // 8
    inputs = rows * config.data.seq_len * model.model_dim * 4  # a chip keeps those of each layer
    assert compiled.kept == pytest.approx(model.num_layers * inputs, rel=0.01)
    params = jax.eval_shape(lambda: init_parameters(config.model, 0))
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    whole = sum(sharding.unsharded(mesh, params).values())
    assert compiled.parameters == (total - whole) / 4 + whole
    assert compiled.optimizer == 2 * compiled.parameters + 4  # and Adam's count of steps
    counted = roofline.collective_bytes(config, MeshConfig(data=2, fsdp=4, tensor=1))
    found = {"fsdp": 0.0, "data": 0.0}
    for one in compiled.collectives:
        if one.axes in (("fsdp",), ("data",)):
            found[one.axes[0]] += one.bytes
    assert found["fsdp"] == pytest.approx(counted["fsdp"], rel=0.01)
    assert found["data"] == pytest.approx(counted["data"], rel=0.01)


def test_what_the_backward_pass_finds():
    """A loop of 6 layers keeps its input, and with a product more, that product's result too."""

    def kept(policy, micro_batches=1, **loop):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        def loss(x, w):
            body = jax.checkpoint(layer, policy=policy)
            return jax.lax.scan(body, x, w, **loop)[0].sum()

        def step(xs, w):
            def add(total, x):
                return total + jax.grad(loss, argnums=1)(x, w), None

            return jax.lax.scan(add, jnp.zeros_like(w), xs)[0]

        xs, w = jnp.ones((micro_batches, 32, 128)), jnp.ones((6, 128, 128))
        return kept_for_backward(jax.jit(step).trace(xs, w).jaxpr.jaxpr, 6)

    one = 6 * 32 * 128 * 4
    nothing, everything = (
        jax.checkpoint_policies.nothing_saveable,
        jax.checkpoint_policies.everything_saveable,
    )
    assert kept(nothing) == kept(nothing, unroll=6) == kept(nothing, micro_batches=6) == one
    assert kept(everything) == kept(everything, unroll=6) >= 2 * one


@pytest.mark.parametrize("size", c4.SIZES)
def test_parameters_are_counted_by_hand(size):
    model = load_config(c4.get_config(f"size={size}")).model
    params = abstract_parameters(model)
    exact = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert roofline.parameter_count(model) == pytest.approx(exact, rel=2e-3)


def test_recomputed_flops_grow_with_what_is_not_kept():
    config = load_config(c4.get_config("size=2p2b"))

    def share(remat, implementation):
        variant = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        again = roofline.recomputed_flops(variant, implementation)
        return again / roofline.model_flops(variant)

    assert share("none", "pallas") == share("dots", "pallas") < share("dots", "chunked") < 0.05
    # A forward pass is a third of the whole; the logits and the last product of a block are not
    # computed again.
    assert 0.2 < share("full", "pallas") < 1 / 3


def test_links_of_the_torus_are_shared():
    links = {0: 2, 1: 2}
    one, other, both = frozenset({0}), frozenset({1}), frozenset({0, 1})
    assert roofline.torus_seconds({one: 200.0}, links, 50.0) == 2
    assert roofline.torus_seconds({one: 200.0, other: 200.0}, links, 50.0) == 2
    assert roofline.torus_seconds({both: 200.0}, links, 50.0) == 1
    assert roofline.torus_seconds({one: 100.0, both: 300.0}, links, 50.0) == 2


def test_the_bound_is_the_scarcest_resource():
    config = load_config(c4.get_config("size=2p2b"))
    mesh = MeshConfig(data=1, fsdp=256, tensor=1)
    bound = roofline.analytic_bound(config, mesh, CHIPS["TPU v5 lite"])
    assert bound.binding == "compute"
    assert bound.seconds == bound.compute > bound.interconnect > bound.memory > 0
    again = roofline.recomputed_flops(config, "pallas") / roofline.model_flops(config)
    mfu = roofline.mfu(config, 256, CHIPS["TPU v5 lite"], bound.seconds)
    assert mfu == pytest.approx(1 / (1 + again))


def test_candidates_divide_and_are_ranked():
    config = load_config(c4.get_config("size=7p7b"))
    topology = parse_topology("v5e:4x4")
    found = search.candidates(config, topology, "pallas")
    assert found
    chip = CHIPS[topology.device_kind]
    bounds = [roofline.analytic_bound(*one, chip, "pallas").seconds for one in found]
    assert bounds[0] == min(bounds)
    for variant, mesh in found:
        assert mesh.data * mesh.fsdp * mesh.tensor == 16
        assert variant.training.batch_size % (variant.training.accumulation * mesh.data) == 0
        changed = to_dict(variant)
        for section, name in (("mesh", None), ("training", "accumulation"), ("model", "remat")):
            original = to_dict(config)[section]
            changed[section] = (
                original if name is None else {**changed[section], name: original[name]}
            )
        assert changed == to_dict(config)
    # A second or third copy of the state of 7.7B does not fit 16 chips.
    assert all(mesh.data <= 2 for _, mesh in found)


def test_the_flags_of_a_candidate_give_the_layout_that_was_planned():
    """Also where layers were planned in a loop, and the recipe unrolls them."""
    recipe = ["plan.py", "--config=configs/c4.py:size=301m,slice=v5e-64"]

    def read(*more):
        own: absl_flags.FlagValues = absl_flags.FlagValues()
        return flags.parse([*recipe, *more], lambda values: own)[0]

    planned = read("--config.model.unroll=False")
    found = search.candidates(planned, parse_topology("v5e:8x8"), "pallas")
    assert {variant.model.remat for variant, _ in found} == {"none", "dots", "full"}
    for variant, _ in found[:: len(found) // 3]:
        assert read(*search.flags(variant)) == variant


def test_a_mesh_that_cannot_be_made_is_tried_and_told_once(monkeypatch):
    config = load_config(c4.get_config("size=7p7b"))
    topology = parse_topology("v5e:4x4")
    asked, told = [], []

    def refuse(candidate, *_):
        asked.append(candidate.mesh)
        raise ValueError("no such mesh")

    monkeypatch.setattr(search, "make_plan", refuse)
    assert search.search(config, topology, (), "pallas", 1, told.append) == []
    meshes = {mesh for _, mesh in search.candidates(config, topology, "pallas")}
    assert len(asked) == len(set(asked)) == len(meshes) > 1
    said = [line.removeprefix("no such mesh: ") for line in told]
    assert len(set(said)) == len(meshes)
    for mesh, line in zip(asked, said, strict=True):
        sizes = (
            f"--config.mesh.{name}={getattr(mesh, name)}" for name in ("data", "fsdp", "tensor")
        )
        assert line == " ".join(sizes)


def test_hours_of_epochs_are_not_known(run):
    """How many steps they are depends on data that are not there."""
    training = dataclasses.replace(run.config.training, steps=0, epochs=2)
    config = dataclasses.replace(run.config, training=training)
    plan = make_plan(config, parse_topology("v5e:2x4"), jax.devices())
    assert plan.hours is plan.chip_hours is None
    text = report.describe(plan)
    assert "all steps" not in text
    assert "hours: training.epochs is set" in text


def test_a_plan_of_simulated_devices_says_what_it_is(run, monkeypatch):
    monkeypatch.setattr("laser.planning.plan.has_libtpu", lambda: False)
    plan = make_plan(run.config, parse_topology("v5e:2x4"), jax.devices())
    assert plan.fits is None
    assert plan.chips == 8
    row = table.row(plan.to_dict())
    assert row["traffic_gib"] > 0
    assert row["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}


def test_a_table_is_put_between_its_marks(tmp_path):
    path = tmp_path / "plans.json"
    for page in ("plans.md", table.NOTES):
        (tmp_path / page).write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    names = [f"size={size},attention=laser,slice=v5e-64" for size in ("301m", "435m")]
    plan = {
        **dict.fromkeys(table.FIELDS, 1.23456789), "traffic": [{"kind": "all-gather", "gib": 2.0}],
        "schedule": {"seconds": 2.0}, "schedule_mfu": 0.5,
        "binding": "compute",
        "mesh": {"fsdp": 64, "tensor": 1}, "remat": "dots", "unroll": True, "attention": "pallas",
        "bound": {"compute": 1.0, "memory": 0.5, "interconnect": 0.25},
    }  # fmt: skip
    made: list[str] = []

    def make(name):
        made.append(name)
        return plan

    table.renew(path, names[1:], make)
    table.renew(path, names, make)
    assert made == [names[1], names[0]]  # what is there is kept
    text = (tmp_path / "plans.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")  # noqa: PT018
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| 301m", "| 435m"]
    # Hours at the bound of 1 s a step, and of the schedule's 2 s.
    assert rows[0].endswith("| 1.2 | 2.5 | 2000 | 50.0 % |")
    assert all(" | dots, unrolled | " in row for row in rows)
    assert "\nold\n" not in text
    notes = (tmp_path / table.NOTES).read_text()
    assert notes == f"before\n{table.START}\n\n{table.END}\nafter\n"  # no row lacks a schedule


def test_rows_without_a_schedule_are_a_table_of_their_own():
    rows = json.loads((ROOT / "docs/plans.json").read_text())
    name = "size=2p2b,attention=laser,slice=v5e-256"
    assert table.hours_as_scheduled(rows[name]) == pytest.approx(19.5, abs=0.05)
    older = {**rows[name], "schedule_seconds": None, "schedule_mfu": None}
    both = {name: rows[name], "x=1," + name: older}
    current = table.render(both)
    nothing, _, rest = table.render_older(both).partition(table.OLDER)
    assert not nothing
    for part, columns in ((current, (*table.COLUMNS, *table.SCHEDULED)), (rest, table.COLUMNS)):
        lines = part.strip().splitlines()
        assert [line.count(" | ") + 1 for line in lines[::2]] == 2 * [len(columns)]
    assert " | 13.1 | 19.5 | 439 | 66.7 % |" in current
    assert rest.endswith(" | 13.1 |")


def test_the_report_puts_the_hours_as_scheduled_beside_the_bound(run):
    """Of a plan that was made with libtpu; the CPU's has no schedule."""
    plan = make_plan(run.config, parse_topology("v5e:2x4"), jax.devices())
    assert "as scheduled" not in report.describe(dataclasses.replace(plan, schedule_hours=None))
    told = report.describe(dataclasses.replace(plan, schedule_hours=3.0)).splitlines()
    (at,) = (i for i, line in enumerate(told) if line.startswith("  as scheduled"))
    assert told[at] == "  as scheduled, below: all steps 3.0 hours, 24 chip-hours; never measured"
    assert "allows at most" in told[at - 1]


def test_shipped_layouts_are_of_the_config():
    config = load_config(c4.get_config("size=7p7b,slice=v5e-256"))
    assert (config.training.accumulation, config.model.remat) == (2, "dots")
    assert not config.model.unroll
    assert load_config(c4.get_config("size=2p2b,slice=v5e-256")).model.unroll
    assert config.mesh == MeshConfig(data=1, fsdp=-1, tensor=1)
    with pytest.raises(
        ValueError,
        match=r"no layout of size 301m on slice 'v5e-256'.*v5e-64.*leave slice out and run "
        r"scripts/plan.py --search --topology=",
    ):
        c4.get_config("size=301m,slice=v5e-256")
