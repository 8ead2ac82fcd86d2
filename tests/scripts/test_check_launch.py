"""What is said of the arguments of train.py before anybody asks for a slice."""

import json
import sys
from pathlib import Path

import pytest

from scripts import check_launch
from scripts.check_launch import chips_of, plan_of

ROOT = Path(__file__).resolve().parents[2]
C4 = ["--config=configs/c4.py:size=301m,attention=laser"]


def check(*arguments, type_name="v5e-64", slices=1, bucket="", extras=""):
    """What scripts/check_launch.py says, with its exit code."""
    with pytest.raises(SystemExit) as left:
        sys.exit(check_launch.main(["check", type_name, str(slices), bucket, extras, *arguments]))
    return left.value.code


@pytest.fixture(autouse=True)
def with_loggers(monkeypatch):
    monkeypatch.setattr("logging.disable", lambda: None)


@pytest.mark.parametrize(
    ("workdir", "store", "where", "refused"),
    [
        ("gs://a/runs", "/mnt/c4", {}, ""),
        ("gs://a/runs", "/mnt/a:0.5,/mnt/b:0.5", {}, ""),
        ("/mnt/runs", "bucket/c4", {"bucket": "a"}, ""),
        ("bucket/runs", "/mnt/c4", {"bucket": "a"}, ""),
        ("runs/a", "/mnt/c4", {"type_name": "v5litepod-8"}, ""),
        ("runs/a", "/mnt/c4", {"type_name": "v5p-8"}, ""),
        ("runs/a", "/mnt/c4", {}, "--workdir=runs/a"),
        ("runs/a", "/mnt/c4", {"type_name": "v5e-8", "slices": 2}, "--workdir=runs/a"),
        ("runs/a", "/mnt/c4", {"type_name": "v5e-8", "bucket": "a"}, "--workdir=runs/a"),
        ("bucket/runs", "/mnt/c4", {}, "--workdir=bucket/runs"),
        ("bucket/../runs", "/mnt/c4", {"bucket": "a"}, "--workdir=bucket/../runs"),
        ("s3://a/runs", "/mnt/c4", {}, "--workdir=s3://a/runs"),
        ("gs://a/runs", "stores/c4", {}, "--config.data.store=stores/c4"),
        ("gs://a/runs", "bucket/c4", {}, "--config.data.store=bucket/c4"),
        ("gs://a/runs", "stores/c4", {"type_name": "v5e-8"}, "--config.data.store=stores/c4"),
        ("gs://a/runs", "/mnt/a:0.5,b:0.5", {}, "--config.data.store=b"),
    ],
)
def test_folders_that_workers_do_not_see_are_refused(capsys, workdir, store, where, refused):
    mesh = ["--config.mesh.fsdp=1", "--config.mesh.data=-1"]
    code = check(*C4, *mesh, f"--workdir={workdir}", f"--config.data.store={store}", **where)
    said = capsys.readouterr()
    assert code == (2 if refused else 0), said.err
    assert (f"error: {refused}: workers do not see this folder" in said.err) == bool(refused)
    assert (" was not looked at" in said.out) != bool(refused)


@pytest.mark.parametrize("there", ["whole", "missing", "out of reach"])
def test_a_store_behind_an_address_is_looked_for(capsys, monkeypatch, tmp_path, there):
    def folder_of(place):
        if there == "out of reach":
            raise OSError("no network")
        assert place == "gs://a/c4"
        return tmp_path

    monkeypatch.setattr(check_launch, "folder_of", folder_of)
    if there == "whole":
        (tmp_path / "manifest.json").write_text("{}")
    code = check(*C4, "--workdir=gs://a/runs", "--config.data.store=gs://a/c4")
    said = capsys.readouterr()
    assert code == (2 if there == "missing" else 0)
    assert ("store=gs://a/c4: no finished store is there" in said.err) == (there == "missing")
    assert ("gs://a/c4 was not looked at" in said.out) == (there == "out of reach")


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ([*C4, "--config.data.store=/c4", "--config.training.wandb_project=mine"], "wandb"),
        (["--config=configs/vit.py:size=s16"], "images"),
    ],
)
def test_extras_that_a_config_needs_are_asked_for(capsys, arguments, extra):
    assert check(*arguments, "--workdir=/a") == 2
    assert f"needs --extras={extra} before the --" in capsys.readouterr().err
    assert check(*arguments, "--workdir=/a", extras="images,wandb") == 0


@pytest.mark.parametrize(
    ("recipe", "known"),
    [
        ("configs/c4.py:attention=laser,slice=v5e-256,size=2p2b", True),
        ("configs/c4.py:size=2p2b,slice=v5e-256", True),  # laser is the default
        ("configs/llama.py:slice=v5e-64,attention=laser", True),
        ("configs/c4.py:attention=laser+qk_norm,slice=v5e-256,size=2p2b", False),
    ],
)
def test_a_plan_is_of_what_a_recipe_means(recipe, known):
    plans = json.loads((ROOT / "docs/plans.json").read_text())
    slice_type = "v5e-64" if "v5e-64" in recipe else "v5e-256"
    for arguments in ([f"--config={recipe}"], ["--config", recipe]):
        said = plan_of(plans, ["--workdir=a", *arguments], slice_type)
        assert said.startswith("by docs/plans.md the recipe fits" if known else "no plan of it")


def test_a_file_of_ones_own_has_the_plan_of_what_it_means(tmp_path):
    plans = json.loads((ROOT / "docs/plans.json").read_text())
    mine = tmp_path / "mine.py"
    same = 'from configs import c4\nget_config = lambda: c4.get_config("size=2p2b,slice=v5e-256")\n'
    for content, found in (
        (same, True),
        (same.replace("2p2b", "2p2b,attention=laser+qk_norm"), False),
    ):
        mine.write_text(content)
        said = plan_of(plans, [f"--config={mine}"], "v5e-256")
        assert said.startswith("by docs/plans.md the recipe fits" if found else "no plan of it")


def test_a_plan_is_of_one_kind_and_number_of_chips():
    """Recipes without an argument for the slice have a plan for each of several."""
    plans = json.loads((ROOT / "docs/plans.json").read_text())
    for key, plan in plans.items():
        if not key.startswith("model=bert"):
            continue
        recipe = "configs/bert.py:" + key.removeprefix("model=bert,").rpartition(",slice=")[0]
        of_slice = key.rpartition("slice=")[2]
        arguments = [f"--config={recipe}"]
        said = plan_of(plans, arguments, of_slice.replace("v5e", "v5litepod"))
        assert f"fits: {plan['peak_gib']:.1f} of {plan['capacity_gib']:.1f} GiB" in said
        assert plan_of(plans, arguments, of_slice, slices=2).startswith("no plan of it")
        for other in ("v5litepod-16", "v5litepod-1", "v6e-256"):
            assert plan_of(plans, arguments, other).startswith("no plan of it")


def test_chips_are_counted_as_jax_counts_its_devices():
    types = {"v5litepod-16": 16, "v5e-16": 16, "v6e-16": 16, "v5p-16": 8, "v4-8": 4, "v3-8": 8}
    assert {name: chips_of(name) for name in types} == types
