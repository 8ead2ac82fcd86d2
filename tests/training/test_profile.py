"""Traces of chosen steps are what XProf reads."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from laser.training.profile import Profile
from laser.training.records import Records

READ = """
import sys
from xprof.convert import raw_to_tool_data
content, _ = raw_to_tool_data.xspace_to_tool_data([sys.argv[1]], sys.argv[2], {})
sys.stdout.buffer.write(content if isinstance(content, bytes) else content.encode())
"""


def _read(trace, tool):
    """What XProf's server sends for one of its pages. In a process of its own: it brings as many
    libraries as jax."""
    command = [sys.executable, "-c", READ, str(trace), tool]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def test_xprof_shows_the_steps_that_were_asked_for(tmp_path):
    pytest.importorskip("xprof")
    double = jax.jit(lambda x: x @ x)
    with Profile(Records(tmp_path), "3,4") as profile:
        for step in range(1, 7):
            with profile.step(step):
                result = double(jnp.ones((64, 64)))
            profile.step_dispatched(step, result)
    (trace,) = tmp_path.glob("tensorboard/plugins/profile/*/*.xplane.pb")
    events = _read(trace, "trace_viewer")["traceEvents"]
    assert {event["name"] for event in events if "step_num" in event.get("args", {})} == {
        "train 3", "train 4",
    }  # fmt: skip
    assert _read(trace, "overview_page")[0]["cols"]
