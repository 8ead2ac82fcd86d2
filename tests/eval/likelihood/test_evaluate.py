"""scripts/evaluate.py from a run's folder to table, JSON and records, and its error messages."""

import json
import shutil

import pytest

from configs import vit
from data.sealed import file_sha256, seal
from eval.likelihood import paper, results
from eval.likelihood.oneshot import Settings
from eval.run import fingerprint, offline_score, open_model, saved_steps
from eval.tasks.catalogue import TASKS
from laser.training.checkpoint import CheckpointError
from laser.training.config import load_config
from laser.training.run_folder import write_run
from scripts import evaluate
from tests.eval.tasks.test_prompts import RAW

pytestmark = pytest.mark.slow

FOLDER = "eval/4/gpt3-1shot-2seeds-limit2"


@pytest.fixture
def workdir(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """COPA and CB, three rows each; no TFDS."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    folder = tmp_path / "data"
    for name, archive in (("copa", "COPA"), ("cb", "CB")):
        (folder / archive).mkdir(parents=True)
        for split in ("train", "val"):
            rows = [{**RAW[name], "premise": f"{split} {i}."} for i in range(3)]
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / archive / f"{split}.jsonl").write_text("".join(lines))
    return folder


def run(capsys, workdir, data_dir, *flags):
    """Exit code, stdout, stderr."""
    code = evaluate.main([f"--workdir={workdir}", f"--data_dir={data_dir}", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_of_images_is_refused_by_its_kind(tmp_path, data_dir, capsys):
    record = {"config": vit.get_config("size=digits").to_dict(), "data": {"fingerprint": ""}}
    write_run(tmp_path, seal(record | {"tokenizer": ""}), "")
    (tmp_path / "checkpoints/2").mkdir(parents=True)
    code, _, err = run(capsys, tmp_path, data_dir, "--tasks=copa")
    assert code == 2
    assert "model.kind=vit, and only a decoder goes on with text" in err


def test_tasks_are_evaluated_and_missing_ones_reported(workdir, data_dir, capsys):
    flags = ("--tasks=copa,cb,piqa,held_out", "--seeds=2", "--limit=2", "--records")
    code, out, _ = run(capsys, workdir, data_dir, *flags)
    assert code == 0
    assert "piqa: no data of piqa" in out
    assert "physicaliqa-train-dev.zip" in out
    written = json.loads((workdir / FOLDER / "results.json").read_text())
    assert written["tasks"].keys() == {"copa", "cb", "held_out"}
    assert written["missing"].keys() == {"piqa"}
    copa = written["tasks"]["copa"]
    assert copa == json.loads((workdir / FOLDER / "copa.json").read_text())
    assert (copa["n"], len(copa["metrics"]["accuracy"]["values"])) == (2, 2)
    row = next(line.split() for line in out.splitlines() if line.startswith("copa "))
    mean, deviation = copa["metrics"]["accuracy"]["mean"], copa["metrics"]["accuracy"]["std"]
    error = (mean * (1 - mean) / 2) ** 0.5
    percent = [f"{100 * x:.2f}" for x in (mean, deviation, error)]
    assert row == ["copa", "2", "accuracy", *percent, "50.00", f"{data_dir}/COPA/val.jsonl"]
    assert "step 4, gpt3, 1 shot, 2 seeds, the first 2 of each task alone, in percent" in out
    lines = (workdir / FOLDER / "copa.records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(record["index"], record["seed"]) for record in records] == [
        (0, 1234), (1, 1234), (0, 1235), (1, 1235),
    ]  # fmt: skip
    scores = [candidate["logprob"] for candidate in records[0]["candidates"]]
    assert records[0]["choice"] == scores.index(max(scores))
    assert records[0]["context"].endswith("\n\nval 0 therefore")


def test_finished_tasks_are_not_repeated(workdir, data_dir, capsys, monkeypatch):
    evaluated = []
    original = evaluate.oneshot.evaluate_task

    def interrupted_after_one(data, *rest):
        if evaluated:
            raise KeyboardInterrupt
        evaluated.append(data.task.name)
        return original(data, *rest)

    def counted(data, *rest):
        evaluated.append(data.task.name)
        return original(data, *rest)

    flags = ("--tasks=copa,cb", "--seeds=1")
    monkeypatch.setattr(evaluate.oneshot, "evaluate_task", interrupted_after_one)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, workdir, data_dir, *flags)
    monkeypatch.setattr(evaluate.oneshot, "evaluate_task", counted)
    assert run(capsys, workdir, data_dir, *flags)[0] == 0
    assert evaluated == ["copa", "cb"]
    run(capsys, workdir, data_dir, *flags, "--records")  # finished, but without records
    assert evaluated == ["copa", "cb"] * 2
    run(capsys, workdir, data_dir, *flags, "--limit=2")  # other settings
    assert evaluated == ["copa", "cb"] * 3
    monkeypatch.setattr(evaluate, "open_model", None)  # nothing left to do, so no model is loaded
    assert run(capsys, workdir, data_dir, *flags, "--limit=2")[0] == 0


def scores(workdir, name="copa"):
    """Mean of what is on disk, in both places."""
    folder = workdir / "eval/4/gpt3-0shot"
    result = json.loads((folder / f"{name}.json").read_text())
    assert json.loads((folder / "results.json").read_text())["tasks"][name] == result
    return result["metrics"]["accuracy"]["mean"], result["origin"]


def test_other_rows_or_another_checkpoint_are_scored_anew(workdir, data_dir, capsys, monkeypatch):
    """In another folder, or corrected in place; equal rows elsewhere are not scored again."""
    flags = ("--tasks=copa", "--shots=0", "--records")
    assert run(capsys, workdir, data_dir, *flags)[0] == 0
    before, origin = scores(workdir)
    other = shutil.copytree(data_dir, data_dir.with_name("other"))
    _, out, _ = run(capsys, workdir, other, *flags)
    assert "of 3, reused: the same rows and checkpoint, scored before" in out
    assert f"  {origin}" in out  # in the table
    rows = [json.loads(line) for line in (other / "COPA/val.jsonl").open()]
    turned = [json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in rows]
    (other / "COPA/val.jsonl").write_text("".join(turned))
    _, out, _ = run(capsys, workdir, other, "--tasks=copa", "--shots=0")
    assert f"copa: the result that was there is of other rows ({origin}): scored anew" in out
    assert f"  {other}/COPA/val.jsonl" in out
    assert scores(workdir) == (pytest.approx(1 - before), f"{other}/COPA/val.jsonl")
    assert not list((workdir / "eval/4/gpt3-0shot").glob("*.records.*"))  # those were of the others
    (data_dir / "COPA/val.jsonl").write_text("".join(turned[:2]))
    assert "scored anew" in run(capsys, workdir, data_dir, *flags)[1]
    monkeypatch.setattr(evaluate, "fingerprint", lambda workdir, step: "of a run that began anew")
    assert "is of another checkpoint (" in run(capsys, workdir, data_dir, *flags)[1]
    assert "reused" in run(capsys, workdir, data_dir, *flags)[1]


def test_results_of_another_checkpoint_are_not_told_as_this_ones(tmp_path):
    folder = results.ResultsFolder(tmp_path, 4, Settings())
    for task, checkpoint in (("cb", "earlier"), ("copa", "this")):
        fingerprints = {"rows": "", "checkpoint": checkpoint}
        folder.save({"task": task, "fingerprints": fingerprints}, records=False)
    (folder.path / "rte.json").write_text('{"task": "rte"}')  # from before there were fingerprints
    path = folder.save_all("this", {"cb": "no data", "copa": "no data"}, {})
    written = json.loads(path.read_text())
    assert written["tasks"].keys() == {"copa"}
    assert written["missing"] == {"cb": "no data"}


def test_a_checkpoint_is_known_by_its_tensors_and_its_tokenizer(workdir):
    before = fingerprint(workdir, 4)
    assert before == fingerprint(workdir, 4) != fingerprint(workdir, 2)
    record = json.loads((workdir / "config.json").read_text())
    other = workdir / "other.model"
    other.write_bytes(b"another")
    write_run(workdir, seal(record | {"tokenizer": file_sha256(other)}), other)
    assert fingerprint(workdir, 4) != before
    shutil.rmtree(workdir / "checkpoints/4/record")
    with pytest.raises(CheckpointError, match="record"):
        fingerprint(workdir, 4)


def test_other_demonstrations_are_other_rows(data_dir):
    def prints(**settings):
        data = evaluate.oneshot.load_task(TASKS["copa"], Settings(**settings), data_dir)
        return data.fingerprint

    before = prints(shots=0), prints(shots=1), prints(protocol="lm_eval", shots=0)
    assert len(set(before)) == 3
    path = data_dir / "COPA/train.jsonl"
    path.write_text(path.read_text().replace("train 1.", "train one."))
    assert prints(shots=0) == before[0]
    assert prints(shots=1) != before[1]


def test_a_quick_look_leaves_a_fuller_result_alone(workdir, data_dir, capsys):
    assert run(capsys, workdir, data_dir, "--tasks=copa", "--seeds=2")[0] == 0
    path = workdir / "eval/4/gpt3-1shot-2seeds/results.json"
    full = json.loads(path.read_text())["tasks"]
    for less in (["--seeds=1"], ["--seeds=2", "--limit=1"]):
        assert run(capsys, workdir, data_dir, "--tasks=copa", *less)[0] == 0
    assert json.loads(path.read_text())["tasks"] == full
    names = sorted(folder.name for folder in (workdir / "eval/4").iterdir())
    assert names == ["gpt3-1shot-1seed", "gpt3-1shot-2seeds", "gpt3-1shot-2seeds-limit1"]
    assert run(capsys, workdir, data_dir, "--tasks=cb", "--seeds=2")[0] == 0  # another task joins
    assert json.loads(path.read_text())["tasks"].keys() == {"cb", "copa"}

    # Its data are gone, and its result is there: it is not missing.
    shutil.rmtree(data_dir / "COPA")
    assert run(capsys, workdir, data_dir, "--tasks=copa,cb", "--seeds=2")[0] == 0
    written = json.loads(path.read_text())
    assert (written["tasks"].keys(), written["missing"]) == ({"cb", "copa"}, {})


def test_without_any_data_nothing_is_written(workdir, data_dir, capsys):
    code, out, _ = run(capsys, workdir, data_dir, "--tasks=piqa")
    assert code == 2
    assert out.startswith("piqa: no data of piqa")
    assert "written" not in out
    assert not (workdir / "eval").exists()


def test_a_run_that_is_not_to_be_written_has_its_results_elsewhere(
    workdir, data_dir, tmp_path, capsys
):
    (workdir / "eval").write_text("")  # in the way of the folder
    flags = ("--tasks=copa", "--shots=0", "--step=all")
    code, _, err = run(capsys, workdir, data_dir, *flags)
    assert code == 2
    assert err.splitlines()[-1].startswith("evaluate.py: error: ")
    assert f"'{workdir}/eval/2" in err
    assert "Traceback" not in err
    other = tmp_path / "other"
    code, out, _ = run(capsys, workdir, data_dir, *flags, f"--output={other}")
    assert code == 0
    for step in ("2", "4", "checkpoints"):
        assert f"written: {other}/{step}/gpt3-0shot/results.json" in out
        written = json.loads((other / step / "gpt3-0shot/results.json").read_text())
        assert written["tasks"].keys() == {"copa"}


@pytest.mark.parametrize("content", ["[]", "{", "", '{"tasks": []}', '{"tasks": {"copa": 1}}'])
def test_damaged_results_are_named(content, tmp_path):
    folder = results.ResultsFolder(tmp_path, 4, Settings())
    path = folder.path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"^{path}: damaged \(.*evaluate again"):
        results.of_checkpoint(tmp_path / "4", "this")
    if "tasks" not in content:
        path = path.rename(folder.path / "copa.json")
        with pytest.raises(ValueError, match=rf"^{path}: damaged \(.*evaluate again"):
            folder.finished("copa")


def test_several_checkpoints_give_mean_and_deviation(workdir, data_dir, capsys):
    code, out, _ = run(capsys, workdir, data_dir, "--tasks=copa", "--step=all", "--shots=0")
    assert code == 0
    both = [
        json.loads((workdir / f"eval/{step}/gpt3-0shot/copa.json").read_text()) for step in (2, 4)
    ]
    values = [result["metrics"]["accuracy"]["mean"] for result in both]
    merged = results.over_checkpoints(both)["metrics"]["accuracy"]
    assert merged["values"] == values
    assert "over the checkpoints 2, 4: mean and deviation" in out
    written = json.loads((workdir / "eval/checkpoints/gpt3-0shot/results.json").read_text())
    assert written["steps"] == [2, 4]
    assert written["tasks"]["copa"]["metrics"]["accuracy"] == merged
    for name in ("fingerprints", "seconds", "shots_dropped", "truncated"):
        assert written["tasks"]["copa"][name] == [result[name] for result in both]
    assert [x["fingerprints"]["checkpoint"] for x in both] == [
        fingerprint(workdir, s) for s in (2, 4)
    ]
    row = next(line.split() for line in out.splitlines()[::-1] if line.startswith("copa "))
    assert row[3:5] == [f"{100 * merged[name]:.2f}" for name in ("mean", "std")]
    one = {"metrics": {"accuracy": {"mean": 0.2}}}
    other = {"metrics": {"accuracy": {"mean": 0.6}}}
    spread = results.over_checkpoints([one, other])["metrics"]["accuracy"]
    assert spread["mean"] == pytest.approx(0.4)
    assert spread["std"] == pytest.approx(0.08**0.5)


def test_the_newest_checkpoints_are_taken_and_finished_ones_not_repeated(
    workdir, data_dir, capsys, monkeypatch
):
    flags = ("--tasks=copa", "--shots=0")
    assert run(capsys, workdir, data_dir, *flags, "--step=2")[0] == 0
    loaded = []
    original = evaluate.open_model

    def counted(folder, step):
        loaded.append(step)
        return original(folder, step)

    monkeypatch.setattr(evaluate, "open_model", counted)
    code, out, _ = run(capsys, workdir, data_dir, *flags, "--last=2")
    assert code == 0
    assert loaded == [4]
    assert "over the checkpoints 2, 4" in out


def test_show_prints_prompts_and_needs_no_model(workdir, data_dir, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "open_model", None)
    code, out, _ = run(capsys, workdir, data_dir, "--tasks=copa", "--show=1", "--shots=0")
    assert code == 0
    assert "val 0 therefore\n    ' the Grass dried.'\n  * ' the road was wet.'" in out
    assert not (workdir / "eval").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks=hellaswg"], "tasks=hellaswg: unknown task 'hellaswg'; did you mean 'hellaswag'"),
        (["--tasks=copa", "--step=3"], "there is no checkpoint 3, only [2, 4]"),
        (["--tasks=copa", "--step=new"], "step=new: must be a number"),
        (["--tasks=copa", "--last=3"], "last=3: there are 2 checkpoints: [2, 4]"),
        (["--tasks=copa", "--last=1", "--step=2"], "step=2, last=1: give one of the two"),
        (["--tasks=copa", "--shots=-1"], "shots=-1: must be at least 0"),
        (["--tasks=copa", "--shots=3"], "copa: shots=3: copa has only 3 to draw from"),
        (["--data_dir=/nowhere"], "data_dir=/nowhere: no such folder"),
        (["--workdir=/nowhere"], "/nowhere: no run here"),
    ],
)
def test_mistakes_are_explained(flags, message, workdir, data_dir, capsys):
    code, _, err = run(capsys, workdir, data_dir, *flags)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_run_without_a_checkpoint_is_explained(workdir, data_dir, capsys):
    shutil.rmtree(workdir / "checkpoints")
    code, _, err = run(capsys, workdir, data_dir)
    assert code == 2
    assert "the run has no checkpoint yet" in err
    with pytest.raises(CheckpointError):
        saved_steps(workdir)


@pytest.mark.parametrize("flags", [[], ["--records", "--step=all"]])
def test_a_candidate_that_is_too_long_stops_its_task_alone(flags, workdir, data_dir, capsys):
    path = data_dir / "CB/val.jsonl"
    long = {**RAW["copa"], "choice1": "a b " * 80}
    (data_dir / "COPA/val.jsonl").open("a").write(json.dumps(long) + "\n")
    code, out, err = run(capsys, workdir, data_dir, "--tasks=copa,cb", "--shots=0", *flags)
    assert code == 1
    assert f"error: copa: {data_dir}/COPA/val.jsonl:4: the candidate ' a b a b" in err
    assert "tokens, more than the model's 128" in err
    assert "Traceback" not in err
    assert "cb: accuracy" in out
    assert any(line.startswith("cb ") and str(path) in line for line in out.splitlines())
    assert not list(workdir.glob("eval/**/*.tmp"))
    written = json.loads((workdir / "eval/4/gpt3-0shot/results.json").read_text())
    assert written["tasks"].keys() == {"cb"}
    assert "COPA/val.jsonl:4" in written["missing"]["copa"]


def test_a_score_that_cannot_be_stops_its_task_alone(workdir, data_dir, capsys, monkeypatch):
    original = evaluate.oneshot.evaluate_task

    def broken(data, *rest):
        if data.task.name == "copa":
            rest[-1]({"index": 0})  # a record
            raise ValueError("a score is not finite")
        return original(data, *rest)

    monkeypatch.setattr(evaluate.oneshot, "evaluate_task", broken)
    code, out, err = run(capsys, workdir, data_dir, "--tasks=copa,cb", "--shots=0", "--records")
    assert code == 1
    assert "error: copa: step 4: a score is not finite" in err
    assert "cb: accuracy" in out
    names = sorted(path.name for path in (workdir / "eval/4/gpt3-0shot").iterdir())
    assert names == ["cb.json", "cb.records.jsonl", "results.json"]


def test_the_harness_draws_once_and_names_its_metrics(workdir, data_dir, capsys):
    (data_dir / "piqa").mkdir()
    row = json.dumps(RAW["piqa"]) + "\n"
    for split in ("train", "val"):
        (data_dir / f"piqa/{split}.jsonl").write_text(row * 3)
    code, out, _ = run(capsys, workdir, data_dir, "--tasks=piqa", "--protocol=lm_eval")
    assert code == 0
    assert "lm_eval, 1 shot, 1 seed, in percent" in out
    assert [line.split()[0] for line in out.splitlines() if "acc_norm" in line] == ["acc_norm"]
    code, out, _ = run(capsys, workdir, data_dir, "--tasks=piqa", "--protocol=lm_eval", "--seeds=2")
    assert "lm_eval, 1 shot, 2 seeds, in percent" in out


def test_help_says_which_files_are_read():
    table = evaluate.files_table()
    for task in TASKS.values():
        assert task.source.where in table
        assert task.source.files[task.protocols["gpt3"].split][0] in table


def test_a_broken_file_stops_its_task_alone(workdir, data_dir, capsys):
    path = data_dir / "CB/val.jsonl"
    path.write_text(path.read_text() + "{\n")
    code, out, err = run(capsys, workdir, data_dir, "--tasks=copa,cb", "--shots=0")
    assert code == 2
    assert f"cb: {path}:4: not valid JSON" in err
    assert "copa: accuracy" in out


def test_the_offline_score_is_that_of_the_task(workdir, data_dir, capsys):
    accuracy, count = offline_score(open_model(workdir))
    assert count == 300
    assert run(capsys, workdir, data_dir, "--tasks=held_out", "--shots=0")[0] == 0
    written = json.loads((workdir / "eval/4/gpt3-0shot/held_out.json").read_text())
    assert written["metrics"]["accuracy"]["mean"] == accuracy != written["chance"]
    assert open_model(workdir).step == 4
    assert open_model(workdir, 2).step == 2


@pytest.fixture
def of_the_paper(trained_run):
    """The small run's config with the 2.2B model and the paper's batch."""
    saved = json.loads((trained_run / "config.json").read_text())["config"]
    saved["model"] |= {
        "num_layers": 32,
        "model_dim": 2048,
        "mlp_dim": 8192,
        "num_heads": 8,
        "head_dim": 512,
        "vocab_size": 32_000,
    }
    saved["training"]["batch_size"] = saved["data"]["seq_len"] = 1024
    return saved


def test_the_paper_stands_beside_models_of_its_size_and_attention_alone(of_the_paper):
    saved = of_the_paper
    figures = paper.figures(load_config(saved).model)
    assert (figures["COPA"], figures["BoolQ"], len(figures)) == (87, 64.43, 16)
    assert sum(figures.values()) / 16 == pytest.approx(63.51, abs=0.005)
    saved["attention"]["per_dim_temp"] = True
    assert paper.figures(load_config(saved).model)["COPA"] == 82
    saved["attention"]["qk_norm"] = True
    assert paper.figures(load_config(saved).model) == {}
    saved["attention"] |= {"qk_norm": False, "per_dim_temp": False, "diff": "official"}
    assert paper.figures(load_config(saved).model)["CB"] == 42.85
    saved["model"] |= {"model_dim": 1024}
    assert paper.figures(load_config(saved).model) == {}


@pytest.mark.parametrize(
    ("section", "other"),
    [
        ("model", {"norm": "rmsnorm"}), ("model", {"positions": "rotary"}),
        ("model", {"logits_soft_cap": 30.0}), ("model", {"vocab_size": 50_000}),
        ("model", {"mlp": "swiglu"}), ("model", {"num_kv_heads": 2}),
        ("attention", {"soft_cap": 50.0}),
    ],
)  # fmt: skip
def test_the_paper_does_not_stand_beside_another_model(of_the_paper, section, other):
    assert paper.figures(load_config(of_the_paper).model)
    of_the_paper[section] |= other
    assert paper.figures(load_config(of_the_paper).model) == {}


def test_the_paper_stands_beside_checkpoints_of_as_many_tokens_alone(of_the_paper):
    def shown(step):
        return sorted({*paper.figures_beside(load_config(of_the_paper), step)})

    assert len(shown(160_000)) == len(shown(158_500)) == 16  # 168 B tokens: Table 2
    assert shown(158_000) == shown(162_000) == shown(22_888) == []
    of_the_paper["data"]["seq_len"] = 2048
    assert shown(160_000) == []
    assert len(shown(80_000)) == 16
    of_the_paper["data"]["seq_len"] = 1024
    of_the_paper["attention"]["diff"] = "official"  # 24 B tokens: Table 7
    assert (len(shown(22_888)), shown(41_962), shown(160_000)) == (10, [], [])
    of_the_paper["attention"]["diff"] = "none"
    of_the_paper["model"] |= {  # 44 B tokens: Table 6
        "model_dim": 3440, "mlp_dim": 11_584, "num_heads": 16, "head_dim": 720,
    }  # fmt: skip
    assert (len(shown(41_962)), shown(22_888), shown(160_000)) == (11, [], [])


def test_a_temperature_that_the_paper_does_not_state_has_no_figure(of_the_paper):
    of_the_paper["attention"] |= {"kind": "standard", "temperature": 0.9}
    config = load_config(of_the_paper)
    assert paper.figures(config.model)["OpenBookQA"] == 48.48
    assert paper.figures_beside(config, 160_000) == {}


def test_the_papers_figure_stands_beside_its_own_metric_alone():
    values = {"mean": 0.5, "std": None, "values": [0.5]}
    result = {
        "task": "multirc", "protocol": "lm_eval", "n": 4, "metric": "accuracy", "chance": 0.5,
        "origin": "here", "metrics": {"accuracy": values, "f1a": values, "question_exact": values},
    }  # fmt: skip
    rows = results.table([result], {"MultiRC": 57.78}).splitlines()[1:]
    assert [line.split()[0] for line in rows if "57.78" in line] == ["f1a"]
    gpt3 = {**result, "protocol": "gpt3", "metric": "f1a"}
    gpt3["metrics"] = {"f1a": values, "accuracy": values}
    rows = results.table([gpt3], {"MultiRC": 57.78}).splitlines()[1:]
    assert ["57.78" in line for line in rows] == [True, False]


def test_the_table_has_the_papers_column_and_remarks(trained_run):
    result = {
        "task": "copa", "protocol": "gpt3", "n": 4, "metric": "accuracy", "chance": 0.5,
        "split": "train", "origin": "here", "unusable_rows": 2, "shots_dropped": 3, "truncated": 0,
        "metrics": {"accuracy": {"mean": 0.5, "std": None, "values": [0.5]}},
    }  # fmt: skip
    lines = results.table([result], {"COPA": 87.0}).splitlines()
    assert lines[0].split() == [
        "task",
        "n",
        "metric",
        "score",
        "±",
        "seeds",
        "±",
        "sample",
        "chance",
        "paper",
        "data",
    ]
    assert lines[1].split() == ["copa", "4", "accuracy", "50.00", "25.00", "50.00", "87.00", "here"]
    assert "± checkpoints" in results.table([result], {}, "checkpoints")
    assert "paper" not in results.table([result], {})
    assert results.remarks([result]) == [
        "copa: the train split, as there is no validation split here; 2 rows left out, as "
        "their labels are hidden; 3 of 4 prompts lost demonstrations"
    ]
    assert Settings().protocol == "gpt3"
