"""Runs over several hosts: real processes on this machine, which talk as hosts of a slice do."""

import http.server
import itertools
import json
import shutil
import threading

import jax
import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster

from configs import quickstart
from data.reading.order import step_places
from data.reading.store import TokenStore
from eval.run import open_model
from laser.training import hosts
from laser.training.metrics import read_metrics
from tests.once import once
from tests.training import runs

STEPS = 12
SILENCE = 12.0  # shorter than in earnest, and longer than a busy machine keeps a host from speaking
SHORT_SILENCE = f"from laser.training import hosts; hosts.SILENCE_SECONDS = {SILENCE}\n"


@pytest.fixture(scope="module")
def over_hosts(store, module_arguments):
    """A run whose parameters are split over all 4 devices, and so over all hosts."""
    fields = {
        "training.steps": STEPS,
        "training.eval_every": STEPS,
        "checkpoint.every": 4,
        "mesh.data": 1,
        "mesh.fsdp": 4,
    }
    return [*module_arguments, *[f"--config.{name}={value}" for name, value in fields.items()]]


@pytest.fixture(scope="module")
def whole(over_hosts, tmp_path_factory):
    """(workdir, record) of a run on 2 hosts with 2 devices each that nothing has disturbed."""

    def make(folder):
        finished = runs.train_on_hosts(
            over_hosts, folder / "run", hosts=2, devices=2, record=folder / "record"
        )
        assert [process.returncode for process in finished] == [0, 0], finished[0].stderr

    folder = once(tmp_path_factory, "whole-run-of-hosts", make)
    return folder / "run", folder / "record"


MORE_ON_HOST_1 = """
from laser.training import hardware, hosts
hosts.BEAT_SECONDS = 0.5
hardware.memory_gib = lambda: 1 + this
"""


def assert_ended_by_the_silence_of(host, survivor):
    assert survivor.returncode == 1, survivor.stderr
    assert f"host {host} (" in survivor.stdout
    assert f"gave no sign of life for {SILENCE:.0f} seconds" in survivor.stdout


@pytest.fixture(scope="module")
def killed(over_hosts, tmp_path_factory):
    """Workdir of a run of the same two hosts, of which one was killed after step 7."""

    def make(folder):
        event = SHORT_SILENCE + runs.KILL_HOST_1_AFTER_7
        survivor, victim = runs.train_on_hosts(
            over_hosts, folder / "run", hosts=2, devices=2, event=event
        )
        assert victim.returncode == -9
        assert_ended_by_the_silence_of(1, survivor)
        assert "start all again" in survivor.stdout
        assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["4"]

    return once(tmp_path_factory, "killed-run-of-hosts", make) / "run"


@pytest.mark.slow
def test_each_host_reads_only_its_own_rows(whole, store, over_hosts):
    num_rows = TokenStore(store).split("train").num_rows(32)
    read = [runs.rows_read(whole[1], host=i) for i in range(2)]
    block_rows = quickstart.get_config().data.block_rows
    for step in range(STEPS):
        ids = step_places(0, step, 8, num_rows, block_rows).rows.tolist()
        assert [read[0][step], read[1][step]] == [ids[:4], ids[4:]]


@pytest.mark.slow
@pytest.mark.parametrize("num_hosts, devices", [(2, 2), (1, 4), (4, 1)])
def test_killed_run_goes_on_on_other_hosts(whole, killed, over_hosts, tmp_path, num_hosts, devices):
    workdir, record = tmp_path / "run", tmp_path / "record"
    shutil.copytree(killed, workdir)
    resumed = runs.train_on_hosts(
        over_hosts, workdir, hosts=num_hosts, devices=devices, record=record
    )
    assert {process.returncode for process in resumed} == {0}, resumed[0].stderr
    assert "after step 4" in resumed[0].stdout
    rows, expected = runs.rows_read(record), runs.rows_read(whole[0].parent / "record")
    assert rows == {step: ids for step, ids in expected.items() if step >= 4}
    assert len(rows) == STEPS - 4
    losses, undisturbed = runs.losses(workdir), runs.losses(whole[0])
    if num_hosts == 2:
        assert losses == undisturbed
        runs.assert_same_parameters(workdir, whole[0])
    assert losses.keys() == undisturbed.keys()
    np.testing.assert_allclose([*losses.values()], [*undisturbed.values()], rtol=1e-5)
    # A host reads its share of the state, the JSON beside it, and little more.
    read = [int((record / f"bytes-{i}").read_text()) for i in range(num_hosts)]
    # Parameters and two moments; of the files some is what Orbax has not tidied up.
    state = 3 * sum(x.nbytes for x in jax.tree.leaves(open_model(workdir, STEPS).params))
    assert state / num_hosts * 0.5 < max(read)
    assert max(read) < state / num_hosts * 1.5 + 100_000


@pytest.mark.slow
def test_signal_to_one_host_stops_all_after_the_same_step(over_hosts, tmp_path):
    """Host 1 has more in memory, and host 0 writes that down."""
    event = MORE_ON_HOST_1 + runs.SIGTERM_TO_HOST_1_AFTER_3
    finished = runs.train_on_hosts(over_hosts, tmp_path, hosts=2, devices=2, event=event)
    assert [process.returncode for process in finished] == [75, 75], finished[0].stderr
    steps = sorted(runs.losses(tmp_path))
    assert 3 <= steps[-1] < STEPS
    records = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert records[-1]["memory_gib"] == 2
    for process in finished:
        assert f"SIGTERM on one of the hosts: saved step {steps[-1]};" in process.stdout
    assert (tmp_path / "checkpoints" / str(steps[-1])).is_dir()


@pytest.mark.slow
def test_host_0_that_is_frozen_is_named(over_hosts, tmp_path):
    """The store is in host 0: calls to it neither return nor fail."""
    event = SHORT_SILENCE + runs.FREEZE_HOST_0_AFTER_7
    frozen, other = runs.train_on_hosts(over_hosts, tmp_path, hosts=2, devices=2, event=event)
    assert frozen.returncode == -9
    assert_ended_by_the_silence_of(0, other)


@pytest.mark.slow
def test_checkpoint_that_one_host_cannot_read_is_left_by_all(whole, over_hosts, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    finished = runs.train_on_hosts(
        over_hosts, workdir, hosts=2, devices=2, event=runs.HOST_1_CANNOT_READ_12
    )
    assert [process.returncode for process in finished] == [0, 0], finished[0].stderr
    assert "host 1 (" in finished[0].stdout
    assert "DATA_LOSS: this disk is broken" in finished[0].stdout
    assert "checkpoint 12 moved to 12.unreadable" in finished[0].stdout
    assert "after step 8" in finished[0].stdout
    assert runs.losses(workdir) == runs.losses(whole[0])


@pytest.mark.slow
def test_error_of_one_host_is_told_by_all(over_hosts, tmp_path):
    finished = runs.train_on_hosts(
        over_hosts, tmp_path, hosts=2, devices=2, event=runs.DISK_ERROR_ON_HOST_1
    )
    assert [process.returncode for process in finished] == [1, 1], finished[0].stderr
    assert "ended: no space left on device" in finished[0].stdout


@pytest.mark.slow
def test_a_run_that_diverges_ends_all_hosts_with_the_code_of_that(over_hosts, tmp_path):
    """Also where one of them hears of it before it sees so itself."""
    wild = ["--config.optimizer.learning_rate=1e30", "--config.training.max_skipped_steps=3"]
    finished = runs.train_on_hosts(
        [*over_hosts, *wild], tmp_path, hosts=2, devices=2, event=runs.HOST_0_SEES_NO_DIVERGENCE
    )
    assert [process.returncode for process in finished] == [3, 3], finished[0].stderr
    assert "ended: 3 steps in a row had no update" in finished[0].stdout
    assert "start all again" not in finished[0].stdout


def spoilt_copy(store, folder):
    shutil.copytree(store, folder)
    shard = folder / "train-00000.bin"
    shard.write_bytes(b"xx" + shard.read_bytes()[2:])
    return folder


@pytest.mark.parametrize(
    "what, message",
    [
        ("config", "optimizer.learning_rate: 0.01 -> 0.02"),
        ("store", "train-00000.bin is corrupt"),
        ("missing", "data.store='/nowhere': no such folder"),
    ],
)
def test_one_host_that_differs_is_named_by_all(over_hosts, store, tmp_path, what, message):
    override = {
        "config": lambda: "--config.optimizer.learning_rate=0.02",
        "store": lambda: f"--config.data.store={spoilt_copy(store, tmp_path / 'spoilt')}",
        "missing": lambda: "--config.data.store=/nowhere",
    }[what]()
    workdir = tmp_path / "run"
    refused = runs.train_on_hosts(over_hosts, workdir, [], [override], hosts=2, devices=2)
    for process in refused:
        assert process.returncode == 2, process.stdout
        assert "host 1 (" in process.stderr
        assert message in process.stderr
        assert "Traceback" not in process.stderr
    assert not workdir.exists()


def test_workdir_of_another_config_is_refused_by_all(over_hosts, tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"a": 1}, "data": {"fingerprint": "x"}}')
    refused = runs.train_on_hosts(over_hosts, tmp_path, hosts=2, devices=2)
    for process in refused:
        assert process.returncode == 2, process.stdout
        assert "config.json is damaged, or not written by train.py" in process.stderr
    assert json.loads((tmp_path / "config.json").read_text())["config"] == {"a": 1}


def test_hosts_of_slices_find_each_other_without_flags(over_hosts, tmp_path):
    """Two slices of one host, as Google Kubernetes Engine tells them what they are."""
    common = {
        "JAX_FORCE_TPU_INIT": "1",
        "JAX_COORDINATOR_PORT": str(runs.free_port()),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "2",
    }
    slices = [common | {"MEGASCALE_SLICE_ID": str(i)} for i in range(2)]
    different = ["--config.training.seed=1"]  # ends before any device is needed
    refused = runs.train_on_hosts(
        over_hosts, tmp_path / "run", [], different, hosts=2, devices=2, command=["env"], env=slices
    )
    for process in refused:
        assert process.returncode == 2, process.stderr
        assert "training.seed: 0 -> 1" in process.stderr


@pytest.fixture
def metadata(monkeypatch):
    """Sets what a stand-in for the metadata server of a TPU VM answers, by attribute."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path.rpartition("/")[2])
            self.send_response(200 if answer is not None else 404)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    yield answers
    server.shutdown()
    server.server_close()


def test_pod_is_told_from_a_single_tpu_vm(metadata):
    metadata |= {"agent-worker-number": "0", "tpu-env": "", "worker-network-endpoints": "a:b:c"}
    assert hosts._cluster() is None
    metadata["worker-network-endpoints"] = "a:b:c,d:e:f"
    assert hosts._cluster() == {"cluster_detection_method": "gcetpu"}
    metadata |= {"worker-network-endpoints": "a:b:c", "tpu-env": "MEGASCALE_NUM_SLICES: '2'\n"}
    assert hosts._cluster() == {"cluster_detection_method": "gcetpu"}


def test_a_host_whose_chips_are_a_slice_of_their_own_is_alone(metadata, monkeypatch):
    """As scripts/launch_tpu.sh exec makes one of a pod's hosts."""
    metadata |= {"agent-worker-number": "1", "worker-network-endpoints": "a:b:c,d:e:f"}
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(ValueError, match=r"start it by scripts/launch_tpu\.sh exec"):
        hosts.refuse_several()
    monkeypatch.setenv("TPU_PROCESS_BOUNDS", "1,1,1")
    hosts.refuse_several()
    assert hosts._cluster() is None


def test_tpu_without_metadata_is_taken_as_alone(metadata, monkeypatch, caplog):
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{runs.free_port()}")
    assert hosts._cluster() is None
    assert "taking this host as alone" in caplog.text


class Store:
    """The part of jax.distributed's key-value store that hosts use."""

    def __init__(self):
        self.pairs = {}

    def key_value_set(self, key, value):
        self.pairs[key] = value

    def key_value_dir_get(self, key):
        return [pair for pair in self.pairs.items() if pair[0].startswith(key)]


def test_wait_says_for_what_and_for_whom(monkeypatch, caplog):
    monkeypatch.setattr(hosts, "PATIENCE_SECONDS", 0.1)
    here = object.__new__(hosts._Connection)
    here.index, here.count, here._names = 0, 3, ["a", "b", "c"]
    here._store, here._numbers = Store(), itertools.count()
    here._store.key_value_set("laser/0-read checkpoint 4/2", "two")
    late = threading.Timer(0.6, here._store.key_value_set, ("laser/0-read checkpoint 4/1", "one"))
    late.start()
    assert here.exchange("read checkpoint 4", "zero") == ["zero", "one", "two"]
    assert "waiting for all hosts: read checkpoint 4; missing host 1 (b)" in caplog.text
    assert "host 2" not in caplog.text


def test_the_end_is_announced_once(monkeypatch):
    monkeypatch.setattr(hosts, "BEAT_SECONDS", 0.01)
    here = object.__new__(hosts._Connection)
    here.index, here._code, here._store, here._left = 0, None, Store(), threading.Event()
    here.announce("it was stopped by Ctrl-C", 1)
    here.announce("it was stopped by Ctrl-C again", 1)  # which jax's store refuses
    assert here._store.pairs == {"laser/ended/0": "1 it was stopped by Ctrl-C"}


def test_machine_without_tpu_is_alone():
    assert hosts._cluster() is None
    assert hosts.is_first()
    assert not hosts.several()


@pytest.mark.parametrize(
    "values, message",
    [
        (["localhost:1", "2", None], "JAX_PROCESS_ID is not set"),
        ([None, None, "0"], "JAX_COORDINATOR_ADDRESS is not set"),
        (["localhost", "2", "0"], "JAX_COORDINATOR_ADDRESS=localhost: must be HOST:PORT"),
        (["localhost:1", "2", "2"], "JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=2"),
        (["localhost:1", "two", "0"], "JAX_NUM_PROCESSES=two"),
    ],
)
def test_variables_that_contradict_each_other_are_named(monkeypatch, values, message):
    for name, value in zip(hosts.VARIABLES, values):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        hosts._cluster()
    assert message in str(error.value)
