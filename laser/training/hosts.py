"""Several hosts as one run: how they meet, what they agree on, and how the end of one ends all.

Every host runs the same program. On a TPU slice of several hosts they find each other; elsewhere
three variables say who is there, as for two processes on one machine:

    JAX_COORDINATOR_ADDRESS=localhost:9876 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 python train.py ...

What hosts tell each other here goes through the key-value store of jax.distributed, which lives in
host 0 and needs no device. Every host writes a sign of life into it and reads those of the others,
so that a run never waits for a host that is gone: it ends with exit code 1 and says which. Where
host 0 itself does not answer, nor does the store, which is the sign that it is gone.
"""

import contextlib
import itertools
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from data.errors import first_line
from laser.training import exits

log = logging.getLogger(__name__)

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ONE_PROCESS = "1,1,1"  # in TPU_PROCESS_BOUNDS, by which libtpu takes the chips of this host alone
MEETING_SECONDS = 300  # hosts of a slice may be this far apart when they start
BEAT_SECONDS = 2.0  # between signs of life
SILENCE_SECONDS = 30.0  # a host without one for so long is gone
HEARTBEAT_SECONDS = 100  # the same of jax, which is less clear about it: it comes second
PATIENCE_SECONDS = 10.0  # a wait that is longer than this is explained in the log
EXPLAIN_SECONDS = 30.0  # and again after each of these


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Meets the other hosts, if there are any, and leaves together with them.

    While it is open an exception on one host ends them all with exit code 1, and a host that exits
    without the others ends them with its own; a ValueError inside `together` is raised on all.

    Raises:
      ValueError: the variables contradict each other.
    """
    global _here
    cluster = _cluster()
    if cluster is None:
        yield
        return
    _here = _Connection(cluster)
    try:
        yield
    except SystemExit as end:
        if not _here.all_were_told:
            code = end.code if isinstance(end.code, int) and end.code else exits.FAILED
            _here.announce(f"it left with exit code {end.code}", code)
            leave(code)
        _here.leave_together()
        raise
    except BaseException as error:
        _here.leave_alone(error)
    _here.leave_together()


def is_first() -> bool:
    """Whether this host writes what is written once."""
    return _here is None or _here.index == 0


def several() -> bool:
    """Whether there are other hosts."""
    return _here is not None


def name(index: int) -> str:
    """A host as people know it: "host 1 (its hostname)"."""
    return "host 0" if _here is None else _here.name(index)


def refuse_several() -> None:
    """For programs of one host: raises ValueError on a slice of several, whose chips would wait for
    the others."""
    if _here is None and os.environ.get("JAX_PLATFORMS") != "cpu" and _cluster() is not None:
        raise ValueError(
            "this runs on one host, and here are several: start it by scripts/launch_tpu.sh exec, "
            "which gives it the chips of one; or take a slice of one host, such as v5litepod-8, or "
            "the processor of this one by JAX_PLATFORMS=cpu"
        )


def exchange(what: str, value: str) -> list[str]:
    """Every host's value, by host; waits until all have come. `what` names the wait in the log."""
    return [value] if _here is None else _here.exchange(what, value)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Waits for all hosts at the end of the block. A ValueError on one of them is raised on all."""
    if _here is None:
        yield
        return
    problem = ""
    try:
        yield
    except ValueError as error:
        problem = str(error)
    problems = _here.exchange(what, problem)
    _here.all_were_told = any(problems)
    if len(set(problems)) == 1 and problem:
        raise ValueError(problem)
    lines = [f"{_here.name(i)}: {text}" for i, text in enumerate(problems) if text]
    if lines:
        raise ValueError("\n".join(lines))


def tell(news: str) -> None:
    """Says this with this host's next signs of life, in place of what it said before."""
    if _here is not None:
        _here.news = news


def told() -> list[str]:
    """What every host said last by `tell`, by host; "" of those that said nothing yet."""
    return [] if _here is None else list(_here.told)


def end_the_others(reason: str, code: int = exits.FAILED) -> None:
    """Tells the other hosts that this one ends with an error; all of them end with this code."""
    if _here is not None:
        _here.announce(reason, code)


def _cluster() -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize, or None where this host is alone."""
    # Neither this nor the store has a public name in jax, which requirements.txt bounds.
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster

    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given:
        return _from_variables(given)
    if os.environ.get("TPU_PROCESS_BOUNDS") == ONE_PROCESS:
        return None
    try:
        for cluster in (GkeTpuCluster, GceTpuCluster):
            if cluster.is_env_present():  # only where this machine has TPU chips
                several = cluster.get_process_count() > 1
                return {"cluster_detection_method": cluster.name} if several else None
    except OSError as error:  # a TPU in a container that cannot see the metadata server
        log.warning("taking this host as alone: no metadata of a TPU slice (%s)", error)
    return None


def _from_variables(given: Mapping[str, str]) -> dict[str, Any]:
    for name in VARIABLES:
        if name not in given:
            raise ValueError(f"{name} is not set, but {' and '.join(given)}: set all or none")
    address, numbers = given[VARIABLES[0]], [given[name] for name in VARIABLES[1:]]
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(f"{VARIABLES[0]}={address}: must be HOST:PORT of process 0")
    if not all(number.isdigit() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
        raise ValueError(
            f"{VARIABLES[1]}={numbers[0]}, {VARIABLES[2]}={numbers[1]}: processes are counted from "
            "0 to their number - 1"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(numbers[0]),
        "process_id": int(numbers[1]),
        "cluster_detection_method": "deactivate",
    }


class _Connection:
    """This host among the others, with the thread that gives and watches for signs of life."""

    def __init__(self, cluster: Mapping[str, Any]):
        import jax
        from jax._src.distributed import global_state

        where = cluster.get("coordinator_address", "the first host of the slice")
        log.info("waiting up to %d seconds for all hosts: start, at %s", MEETING_SECONDS, where)
        jax.distributed.initialize(
            **cluster,
            initialization_timeout=MEETING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
        self.index, self.count = global_state.process_id, global_state.num_processes
        self._store: Any = global_state.client
        self._numbers = itertools.count()
        self._names: list[str] = []
        self._names = self.exchange("names", socket.gethostname())
        self.all_were_told = False  # of a mistake that ends them all
        self.news = ""
        self.told = [""] * self.count
        self._code: int | None = None  # to leave with, once an error was announced
        self._left = threading.Event()
        self._looked = time.monotonic()  # when the store last answered
        self._watch = threading.Thread(target=self._watch_others, name="hosts", daemon=True)
        self._watch.start()
        threading.Thread(target=self._watch_store, name="store", daemon=True).start()
        if self.index:
            logging.getLogger().setLevel(logging.WARNING)  # host 0 speaks for all
        log.info("%d hosts: %s", self.count, ", ".join(self._names))

    def name(self, index: int) -> str:
        return f"host {index} ({self._names[index]})" if self._names else f"host {index}"

    def exchange(self, what: str, value: str) -> list[str]:
        key = f"laser/{next(self._numbers)}-{what}/"
        self._store.key_value_set(f"{key}{self.index}", value)
        began = time.monotonic()
        explain_after, pause = PATIENCE_SECONDS, 0.01
        while len(found := self._read(key)) < self.count:
            if time.monotonic() - began > explain_after:
                missing = [self.name(i) for i in range(self.count) if i not in found]
                log.warning("waiting for all hosts: %s; missing %s", what, ", ".join(missing))
                explain_after += EXPLAIN_SECONDS
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        return [found[i] for i in range(self.count)]

    def announce(self, reason: str, code: int) -> None:
        if self._code is not None:  # the first reason stands
            return
        self._code = code
        self._store.key_value_set(f"laser/ended/{self.index}", f"{code} {reason}")
        self._left.set()  # after the call, which waits for ever where host 0 is frozen
        if self.index == 0:
            time.sleep(3 * BEAT_SECONDS)  # the store goes with host 0: let the others read it

    def leave_together(self) -> None:
        if self._code is not None:
            leave(self._code)
        self.exchange("end", "")
        self._left.set()
        self._watch.join()
        import jax

        jax.distributed.shutdown()

    def leave_alone(self, error: BaseException) -> NoReturn:
        from jax.errors import JaxRuntimeError

        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in reason:
            # Most often another host is gone. Then the other thread finds out, and ends this one.
            log.error("%s; waiting for news of the other hosts", reason)
            time.sleep(SILENCE_SECONDS + 2 * BEAT_SECONDS)
        traceback.print_exception(error)
        with contextlib.suppress(JaxRuntimeError):  # host 0 may be gone
            self.announce(reason, exits.FAILED)
        leave()

    def _read(self, key: str) -> dict[int, str]:
        """Host → what it has written under this key."""
        pairs = self._store.key_value_dir_get(key)
        return {int(path.rpartition("/")[2]): value for path, value in pairs}

    def _watch_others(self) -> None:
        from jax.errors import JaxRuntimeError

        heard: dict[int, tuple[str, float]] = {}  # host → its last sign of life, and when it came
        for number in itertools.count():
            try:
                alive, sign = f"laser/alive/{self.index}", f"{number} {self.news}"
                self._store.key_value_set(alive, sign, allow_overwrite=True)
                beats, ended = self._read("laser/alive/"), self._read("laser/ended/")
            except JaxRuntimeError as error:
                if not self._left.is_set():
                    self._follow(0, f"cannot be reached ({first_line(error)})")
                return
            self._looked = time.monotonic()
            self.told = [beats.get(i, "").partition(" ")[2] for i in range(self.count)]
            for i, end in ended.items():
                if i != self.index and not self._left.is_set():
                    code, _, reason = end.partition(" ")
                    self._follow(i, f"ended: {reason}", int(code))
            now = time.monotonic()
            for i in range(self.count):
                beat = beats.get(i, "")
                if i not in heard or heard[i][0] != beat:
                    heard[i] = (beat, now)
                elif now - heard[i][1] > SILENCE_SECONDS and not self._left.is_set():
                    self._follow(i, f"gave no sign of life for {SILENCE_SECONDS:.0f} seconds")
            if self._left.wait(BEAT_SECONDS):
                return

    def _watch_store(self) -> None:
        """The other thread waits for ever where host 0 is frozen: its calls have no time limit."""
        while not self._left.wait(BEAT_SECONDS):
            if time.monotonic() - self._looked > SILENCE_SECONDS:
                self._follow(0, f"gave no sign of life for {SILENCE_SECONDS:.0f} seconds")

    def _follow(self, index: int, what: str, code: int = exits.FAILED) -> NoReturn:
        """Leaves from the watching thread, whatever the main thread is waiting for."""
        again = "; start all again to go on from the newest checkpoint"
        log.error(
            "%s %s. This host ends with it%s",
            self.name(index), what, again if code == exits.FAILED else "",
        )  # fmt: skip
        leave(code)


def leave(code: int = exits.FAILED) -> NoReturn:
    """Ends at once, where threads may wait for what does not come: jax's leave-taking for hosts
    that are gone, a failed save for its own parts."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_here: _Connection | None = None
