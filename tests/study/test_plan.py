"""A study's file becomes its runs, and every mistake in one is found before anything runs."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from scripts.study import main
from study.plan import Plan

RECIPE = """
from configs import quickstart
from configs.study import Best, Comparison, Stage, Study

def get_config(arguments=""):
    return quickstart.get_config(arguments)

RATE, SEED = "optimizer.learning_rate", "training.seed"

def get_study():
    return Study({})
"""
RATES = 'Stage("rates", {RATE: (1e-3, 3e-3), "attention": ("standard", "laser")})'


@pytest.fixture
def plan(tmp_path):
    def make(study, *extra):
        file = tmp_path / "mine.py"
        file.write_text(RECIPE.format(study))
        return Plan(str(file), extra)

    return make


def _cells(plan, losses):
    """Cells of each stage, by what runs that are done ended with."""
    stages = [plan.cells(stage, lambda cell: losses.get(cell.key)) for stage in plan.study.stages]
    return [cells and [cell.name for cell in cells] for cells in stages]


def test_cells_in_order_as_commands_of_train(plan):
    made = plan('[Stage("s", {SEED: range(2), "attention": ("laser", "standard+qk_norm")}, '
                '{"model.mlp_dim": 512})]', "--config.training.steps=60")  # fmt: skip
    (cells,) = [made.cells(stage, lambda cell: None) for stage in made.study.stages]
    assert [cell.name for cell in cells] == [
        "seed=0,attention=laser",
        "seed=0,attention=standard+qk_norm",
        "seed=1,attention=laser",
        "seed=1,attention=standard+qk_norm",
    ]
    assert cells[3].flags() == [
        f"--config={made.file}:attention=standard+qk_norm",
        "--config.model.mlp_dim=512",
        "--config.training.seed=1",
        "--config.training.steps=60",
    ]
    config = cells[3].config()
    assert made.cells(made.study.stages[0], lambda cell: None)[3].config() is config  # made once
    assert (config.training.seed, config.model.mlp_dim, config.training.steps) == (1, 512, 60)
    assert (config.model.attention.kind, config.model.attention.qk_norm) == ("standard", True)


def test_each_attention_chooses_its_best_rate(plan):
    made = plan(f'[{RATES}, Stage("main", {{SEED: (0, 1), "attention": ("standard", "laser"), '
                'RATE: Best(("rates",))})]')  # fmt: skip
    losses = {
        "rates/learning_rate=0.001,attention=standard": 3.0,
        "rates/learning_rate=0.001,attention=laser": 3.2,
        "rates/learning_rate=0.003,attention=standard": float("inf"),
    }
    assert _cells(made, losses)[1] is None
    losses["rates/learning_rate=0.003,attention=laser"] = 3.1
    assert _cells(made, losses)[1] == [
        f"seed={seed},attention={arm},learning_rate={rate}"
        for seed in (0, 1)
        for arm, rate in (("standard", 0.001), ("laser", 0.003))
    ]


def test_what_has_failed_everywhere_is_not_chosen(plan):
    made = plan(f'[{RATES}, Stage("main", {{SEED: (0,), "attention": ("standard", "laser"), '
                'RATE: Best(("rates",), keep=2)})]')  # fmt: skip
    losses = {
        f"rates/learning_rate={rate},attention={arm}": loss
        for rate, arm, loss in (
            (0.001, "standard", float("inf")), (0.003, "standard", float("inf")),
            (0.001, "laser", float("inf")), (0.003, "laser", 3.0),
        )
    }  # fmt: skip
    assert _cells(made, losses)[1] == ["seed=0,attention=laser,learning_rate=0.003"]


def test_what_failed_at_all_rates_has_no_runs_in_later_stages(plan):
    """Also where a stage that chooses among them is asked for the choice."""
    arms = '"attention": ("standard", "laser")'
    again = f'Stage("again", {{SEED: (1,), {arms}, RATE: Best(("rates",))}})'
    main = f'Stage("main", {{SEED: (2,), {arms}, RATE: Best(("rates", "again"))}})'
    made = plan(f"[{RATES}, {again}, {main}]")
    losses = {
        f"rates/learning_rate={rate},attention={arm}": loss
        for rate in (0.001, 0.003)
        for arm, loss in (("standard", 3.0 + rate), ("laser", float("inf")))
    }
    losses["again/seed=1,attention=standard,learning_rate=0.001"] = 3.1
    assert _cells(made, losses)[2] == ["seed=2,attention=standard,learning_rate=0.001"]


def test_a_value_counts_if_all_stages_have_it(plan):
    made = plan(f'[{RATES}, Stage("again", {{SEED: (1,), "attention": ("laser",), '
                'RATE: Best(("rates",))}), Stage("last", {RATE: Best(("rates", "again"))}, '
                '{"attention": "laser"})]')  # fmt: skip
    rate = "rates/learning_rate={},attention=laser".format
    losses = {rate(0.001): 3.0, rate(0.003): 3.5}
    losses["again/seed=1,attention=laser,learning_rate=0.001"] = 9.0  # its mean is 6, yet the only
    assert _cells(made, losses | {"rates/learning_rate=0.001,attention=standard": 1.0,
                                  "rates/learning_rate=0.003,attention=standard": 1.0}
                  )[2] == ["learning_rate=0.001"]  # fmt: skip


def test_fields_that_are_chosen_together(plan):
    grid = '[Stage("grid", {(RATE, "optimizer.weight_decay"): ((1e-3, 1.0), (3e-3, 0.1))}), '
    made = plan(grid + 'Stage("main", {(RATE, "optimizer.weight_decay"): Best(("grid",), by=())})]')
    losses = {"grid/learning_rate=0.001,weight_decay=1.0": 2.0}
    losses["grid/learning_rate=0.003,weight_decay=0.1"] = 1.0
    assert _cells(made, losses)[1] == ["learning_rate=0.003,weight_decay=0.1"]


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ("[]", "no stages"),
        ('[Stage("s", {"training.sed": (0,)})]', "training.seed"),
        ('[Stage("s", {"size": ("1m",)})]', "unknown config argument 'size'"),
        ('[Stage("s", {"attention": ("lasr",)})]', "did you mean 'laser'"),
        ('[Stage("s", {RATE: (1e-3, 0.001)})]', "two runs are called learning_rate=0.001"),
        ('[Stage("s", {SEED: (0,)}), Stage("s", {SEED: (1,)})]', "two of that name"),
        ('[Stage("s", {SEED: ()})]', "no values of training.seed"),
        ('[Stage("s", {SEED: (0,)}, {SEED: 1})]', "both varied and held"),
        ('[Stage("s", {"model.num_heads": (0,)})]', "model.num_heads=0"),
        ('[Stage("s", {SEED: (0,)}, measures=("domain",))]', "did you mean 'domains'"),
        ('[Stage("s", {SEED: (0,)}, measures=("oneshot",))]', "the study has no tasks"),
        ('[Stage("s", {SEED: (0,)})], tasks=("copas",)', "did you mean 'copa'"),
        ('[Stage("s", {RATE: Best(("rates",))})]', "no earlier stage 'rates'"),
        (f'[{RATES}, Stage("s", {{SEED: Best(("rates",))}})]', "stage rates does not vary it"),
        (
            f'[{RATES}, Stage("s", {{RATE: Best(("rates",))}}, {{"attention": "laser+diff"}})]',
            "tried only 0 with {'attention': 'laser+diff'}",
        ),
        (
            f'[{RATES}, Stage("s", {{"attention": ("laser",), RATE: Best(("rates",), '
            'by=("atention",))})]',
            "by atention, which the stage does not set; did you mean 'attention'",
        ),
        (f'[{RATES}, Stage("s", {{RATE: Best(("rates",))}})]', "by attention, which the stage"),
        ('[Stage("s", {(SEED, "data.shuffle_seed"): ((0,), (1,))})]', "give a tuple of 2"),
        ('[Stage("s", {(SEED, "data.shuffle_seed"): (0, 1)})]', "give a tuple of 2"),
        ('[Stage("s", {"attention": "laser"})]', "no values of attention; give a list"),
        ('[Stage("s", {SEED: (0,)}, {"training.steps": 0, "training.epochs": 2})]', "in epochs"),
        ('[Stage("s", {SEED: (0,)})], sizes=("s",)', "sizes: stage s sets no attention"),
        (f'[{RATES}], [Comparison("rate", {{}}, {{}})]', "did you mean 'rates'"),
        (f'[{RATES}], sizes=("rate",)', "sizes: no stage 'rate'; did you mean 'rates'"),
        (
            f'[{RATES}], [Comparison("rates", {{"atention": "laser"}}, {{}})]',
            "atention is not set in stage rates; did you mean 'attention'",
        ),
        (
            f'[{RATES}], [Comparison("rates", {{"attention": "lasre"}}, {{}})]',
            "no run of stage rates has {'attention': 'lasre'}",
        ),
        (
            f'[{RATES}, Stage("s", {{SEED: (0, 1), RATE: Best(("rates",), by=(), keep=2)}})], '
            '[Comparison("s", {}, {})]',
            "stage s has several runs with {} that are paired by training.seed",
        ),
    ],
)
def test_mistakes(plan, study, words):
    with pytest.raises(ValueError) as error:
        plan(study)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["study.json", "notes.txt"])
def test_a_folder_of_something_else_is_left_alone(plan, tmp_path, content, capsys):
    made = plan('[Stage("s", {SEED: (0,)})]')
    output = tmp_path / "output"
    output.mkdir()
    (output / content).write_text(json.dumps({"study": "configs/studies/other.py", "flags": []}))
    assert main([f"--study={made.file}", f"--output={output}"]) == 2
    assert "choose another" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == [content]


def test_no_such_file(tmp_path, capsys):
    assert main(["--study=configs/studies/atention.py", f"--output={tmp_path}"]) == 2
    assert "did you mean 'configs/studies/attention.py'" in capsys.readouterr().err


SHIPPED = sorted((Path(__file__).parents[2] / "configs/studies").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED])
def test_shipped_studies(name):
    made = Plan(f"configs/studies/{name}.py")
    assert all(made.cells(stage, lambda cell: 0.0) for stage in made.study.stages)


def test_the_vit_s_points_fill_the_paper_s_space():
    """Table 8; logarithms fall into each quarter of their range about as often."""
    made = Plan("configs/studies/vit.py")
    search, seeds, *_ = made.study.stages
    points = [cell.config() for cell in made.cells(search, lambda cell: 0.0)]
    assert len(points) == 50
    assert {point.optimizer.b2 for point in points} == {0.9, 0.99, 0.999}
    assert {point.images.label_smoothing for point in points} == {0.1, 0.2}
    assert {point.model.dropout for point in points} == {0.1}
    for value, low, high in (
        (lambda optimizer: optimizer.learning_rate, 1e-4, 1e-2),
        (lambda optimizer: 1 - optimizer.b1, 1e-2, 0.15),
        (lambda optimizer: optimizer.weight_decay, 5e-3, 1.0),
    ):
        logs = [math.log(value(point.optimizer) / low) for point in points]
        quarters = Counter(int(4 * x / math.log(high / low)) for x in logs)
        assert set(quarters) == {0, 1, 2, 3}
        assert min(quarters.values()) >= 10
    runs = [cell.config() for cell in made.cells(seeds, lambda cell: 0.0)]
    assert len({(run.training.seed, run.data.shuffle_seed) for run in runs}) == 5
