"""Eight CPU devices and the root of the repository on the path, for every test.

XLA reads the number of devices when jax starts, so this file must run before anything imports jax;
if something was faster, it says so in place of letting the sharding tests fail oddly.
"""

import os
import sys
from pathlib import Path

if "jax" in sys.modules:
    raise RuntimeError(
        "jax was imported before tests/conftest.py could ask for 8 CPU devices: find the pytest "
        "plugin or the -p option that imports it"
    )
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
