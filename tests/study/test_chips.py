"""Runs that are trained at a time have chips of their own, or are refused; no chip is touched."""

import fnmatch
import glob
import os

import pytest

from study import run
from study.chips import divided


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one with these device files."""

    def make(*files, **variables):
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        matching = {
            pattern: [file for file in files if fnmatch.fnmatch(file, pattern)]
            for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*")
        }
        monkeypatch.setattr(glob, "glob", matching.__getitem__)

    return make


GPUS = [f"/dev/nvidia{i}" for i in range(8)]
TPUS = [f"/dev/vfio/{i}" for i in range(4)]


def visible(parts):
    return [part["CUDA_VISIBLE_DEVICES"] for part in parts]


def test_gpus_are_divided(machine):
    machine(*GPUS)
    assert visible(divided(2)) == ["0,1,2,3", "4,5,6,7"]
    assert visible(divided(3)) == ["0,1", "2,3", "4,5"]
    assert visible(divided(8)) == list("01234567")
    machine(*GPUS, CUDA_VISIBLE_DEVICES="2,GPU-8932")
    assert visible(divided(2)) == ["2", "GPU-8932"]
    machine(*GPUS, CUDA_VISIBLE_DEVICES="0, 1,-1,2")
    assert visible(divided(2)) == ["0", "1"]


def test_one_process_and_a_cpu_need_no_division(machine):
    machine(*GPUS)
    assert divided(1) == [{}]
    machine(*TPUS)
    assert divided(1) == [{}]
    machine()
    assert divided(3) == [{}, {}, {}]
    machine(*TPUS, *GPUS, JAX_PLATFORMS="cpu")
    assert divided(2) == [{}, {}]


@pytest.mark.parametrize(
    "files, variables, words",
    [
        (TPUS, {}, "--at_once=2: each run takes all TPU chips of this machine; start a study for"),
        (["/dev/accel0"], {}, "--share=1/2"),
        (GPUS[:1], {}, "there are GPUs for 1 runs at a time"),
        (GPUS, {"CUDA_VISIBLE_DEVICES": "5"}, "there are GPUs for 1 runs at a time"),
    ],
)
def test_what_cannot_be_divided_is_refused(machine, files, variables, words):
    machine(*files, **variables)
    with pytest.raises(ValueError, match=words) as error:
        divided(2)
    assert "\n" not in str(error.value)


def test_a_process_has_its_chips_and_the_variables_of_this_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OF_THIS_ONE", "here")
    monkeypatch.setattr(run.subprocess, "Popen", lambda arguments, **named: named["env"])
    given = run._launch(["train.py"], tmp_path / "log", {"CUDA_VISIBLE_DEVICES": "2,3"})
    assert (given["CUDA_VISIBLE_DEVICES"], given["OF_THIS_ONE"]) == ("2,3", "here")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
