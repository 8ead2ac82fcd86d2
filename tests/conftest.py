"""Eight CPU devices, the root of the repository on the path, and a small store, for every test.

XLA reads the number of devices when jax starts, so this file must run before anything imports jax;
if something was faster, it says so in place of letting the sharding tests fail oddly.

Most of the time goes into compiling small programs. So XLA does that in its quickest way, and what
is compiled is kept for as long as the session lasts, for all of its processes: pytest's workers and
the programs that tests start. Two sessions share nothing.
"""

import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

if "jax" in sys.modules:
    raise RuntimeError(
        "jax was imported before tests/conftest.py could ask for 8 CPU devices: find the pytest "
        "plugin or the -p option that imports it"
    )
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.once import once
from tests.quick import QUICK_TO_COMPILE, collect_seldom

# gcsfs would look for its other protocol, which the server of the tests doesn't speak.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count=8 {QUICK_TO_COMPILE}"
).strip()

from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare
from data.sources import corpus
from data.tokenizer import train_tokenizer

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Makes the folder of compiled programs, in the process that starts the workers."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="laser-tests-compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def pytest_collection_modifyitems(items):
    """A test that starts train.py is slow: it is given the arguments of a run, or a finetuned one.

    So are those of scripts/, which start programs. Others are marked by hand; `trained_run`, which
    many share, is worth its seconds.
    """
    for item in items:
        starts_train = {"module_arguments", "finetuned"} & set(item.fixturenames)
        if starts_train or SCRIPTS in item.path.parents:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    collect_seldom()


@pytest.fixture(autouse=True)
def _flags_of_xla():
    """As they were, after programs that a test calls by their main: `tune_cpu` adds one for good.

    It comes too late to matter here, but the flags are a part of the name of what is compiled.
    """
    flags = os.environ["XLA_FLAGS"]
    yield
    os.environ["XLA_FLAGS"] = flags


_modules = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_some_modules():
    """Drops them from memory now and then; a whole run would gather gigabytes.

    Not after each module: what all of them use would be traced again, a second or two of each.
    """
    yield
    if next(_modules) % 4 == 0 and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="module")
def own_programs():
    """For a module that patches what is traced: it finds no program of others, and leaves none."""
    sys.modules["jax"].clear_caches()
    yield
    sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    """A tokenizer of 512 pieces."""

    def make(folder):
        train_tokenizer(corpus.documents("validation"), folder / "tiny.model", 512)

    return once(tmp_path_factory, "tokenizer-of-tests", make) / "tiny.model"


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Folder of a small store of real text: 60 chapters, 400 pieces."""

    def make(folder):
        text = folder / "text"
        text.mkdir()
        chapters = itertools.islice(corpus.documents("train"), 60)
        for i, chapter in enumerate(chapters):
            (text / f"{i:02}.txt").write_text(chapter)
        prepare(StoreConfig(str(text), vocab_size=400, validation_fraction=0.1), folder / "small")

    return once(tmp_path_factory, "stores-of-tests", make) / "small"


@pytest.fixture
def arguments(module_arguments):
    """Command line for a run of 20 steps on it, without --workdir."""
    return list(module_arguments)


@pytest.fixture(scope="session")
def module_arguments(store):
    """The same for fixtures that outlive a test; don't change it."""
    fields = {
        "model.vocab_size": 400,
        "model.num_layers": 2,
        "model.model_dim": 32,
        "model.mlp_dim": 64,
        "model.num_heads": 2,
        "model.head_dim": 16,
        "data.store": store,
        "data.seq_len": 32,
        "training.steps": 20,
        "training.batch_size": 8,
        "training.log_every": 1,
        "training.eval_every": 20,
        "optimizer.warmup_steps": 3,
        "optimizer.learning_rate": 0.01,
        "checkpoint.every": 20,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config=configs/quickstart.py", *overrides]
