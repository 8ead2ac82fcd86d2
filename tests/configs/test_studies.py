"""What the studies of the paper's experiments train; tests/study/test_plan.py builds all."""

import itertools

import pytest

from configs import c4
from configs.studies import paper
from eval.likelihood.paper import figures
from eval.tasks.catalogue import choose_tasks
from laser.training.config import load_config
from study.plan import Plan


def cells(plan, stage, final_of=lambda cell: 0.0):
    (found,) = [s for s in plan.study.stages if s.name == stage]
    return plan.cells(found, final_of)


def configs(plan, stage, final_of=lambda cell: 0.0):
    return [cell.config() for cell in cells(plan, stage, final_of)]


@pytest.mark.parametrize("name", ["diff_2p2b", "float32_2p2b", "short_7p7b"])
def test_each_attention_has_the_point_that_stands_in_paper(name, monkeypatch):
    """Table 9's best point is reused for larger models, and each attention may have its own."""
    monkeypatch.setitem(paper.POINTS, "laser", (1e-2, 1.0))
    for run in configs(Plan(f"configs/studies/{name}.py"), "main"):
        point = (run.optimizer.learning_rate, run.optimizer.weight_decay)
        assert point == ((1e-2, 1.0) if run.model.attention.kind == "laser" else (1e-3, 0.1))


@pytest.mark.parametrize(
    ("name", "attention"),
    [("paper", "laser"), ("short_7p7b", "laser"), ("diff_2p2b", "laser+diff")],
)
def test_one_shot_tasks_are_those_of_the_paper_s_table(name, attention):
    study = Plan(f"configs/studies/{name}.py").study
    size = "7p7b" if name == "short_7p7b" else "2p2b"
    model = load_config(c4.get_config(f"size={size},attention={attention}")).model
    names = [task.paper for task in choose_tasks(",".join(study.tasks))]
    assert sorted(names) == sorted(figures(model))
    assert any("oneshot" in stage.measures for stage in study.stages)


def test_the_columns_of_table_2_at_the_best_points_of_each_attention():
    """Standard attention is best at the first point of the grid, LASER at the last; the third
    temperature is the best."""

    def final_of(cell):
        attention, rate = cell.settings["attention"], cell.settings["optimizer.learning_rate"]
        warmth = cell.settings.get("attention.temperature", 1.4)
        return abs(rate - (1e-1 if attention == "standard" else 1e-5)) + abs(warmth - 1.4)

    plan = Plan("configs/studies/paper.py")
    assert {run.training.steps for run in configs(plan, "temperatures", final_of)} == {16_000}
    runs = configs(plan, "modifiers", final_of) + configs(plan, "tempered", final_of)
    found = [
        (run.model.attention.kind, run.model.attention.per_dim_temp,
         run.model.attention.temperature, run.optimizer.learning_rate)
        for run in runs
    ]  # fmt: skip
    assert found == [
        ("standard", True, 1.0, 1e-1), ("laser", True, 1.0, 1e-5), ("standard", False, 1.4, 1e-1)
    ]  # fmt: skip
    assert {(run.model.head_dim, run.training.steps) for run in runs} == {(512, 160_000)}


@pytest.mark.parametrize(
    ("name", "modifiers"),
    [("vit", ("", "qk_norm", "per_dim_temp", "temp")), ("conformer", ("", "qk_norm", "temp"))],
)
def test_rows_of_tables_4_and_5_on_five_seeds(name, modifiers):
    def final_of(cell):
        return abs(cell.settings.get("attention.temperature", 2.0) - 2.0)

    plan = Plan(f"configs/studies/{name}.py")
    runs = cells(plan, "seeds", final_of) + cells(plan, "tempered", final_of)
    rows = {
        (cell.settings["attention"], cell.settings.get("attention.temperature"),
         cell.settings["training.seed"])
        for cell in runs
    }  # fmt: skip
    expected = {
        (kind, 2.0, seed) if modifier == "temp"
        else (f"{kind}+{modifier}".rstrip("+"), None, seed)
        for kind, modifier, seed in itertools.product(paper.ARMS, modifiers, range(1, 6))
    }  # fmt: skip
    assert rows == expected
    assert len(runs) == len(expected)
    assert len(plan.study.compare) == len(modifiers)


def test_the_conformer_has_table_8_s_warm_up():
    plan = Plan("configs/studies/conformer.py")
    assert plan.study.measure == "eval/wer"
    for run in configs(plan, "search"):
        assert run.optimizer.warmup_steps == 0.05 * run.training.steps
        assert run.optimizer.b2 in (0.9, 0.99, 0.999)
        assert run.model.attention.per_dim_temp


def test_bert_is_compared_by_its_error_on_wikipedia():
    plan = Plan("configs/studies/bert_2p2b.py")
    runs = configs(plan, "main")
    assert plan.study.measure == "eval/error"
    assert [run.model.attention.kind for run in runs] == ["standard", "laser"]
    assert {(run.model.kind, run.model.model_dim, run.data.store) for run in runs} == {
        ("bert", 2048, "stores/wikipedia")
    }


def test_lamb_searches_its_rate_for_each_attention():
    def final_of(cell):
        wanted = {"standard": 1e-3, "laser": 1e-2}[cell.settings["attention"]]
        return abs(cell.settings["optimizer.learning_rate"] - wanted)

    plan = Plan("configs/studies/lamb_301m.py")
    assert {run.training.steps for run in configs(plan, "rates")} == {16_000}
    main = configs(plan, "main", final_of)
    found = [(run.optimizer.learning_rate, run.training.steps) for run in main]
    assert found == [(1e-3, 160_000), (1e-2, 160_000)]
    assert {run.optimizer.name for run in main} == {"lamb"}
