"""Which chips each run has where several are trained at a time.

They are counted without jax: a process that asked it would hold them all itself.
"""

import glob
import itertools
import os

from laser.training.hardware import has_accelerator

GPUS = "CUDA_VISIBLE_DEVICES"


def divided(at_once: int) -> list[dict[str, str]]:
    """Environment variables for each of so many processes: equal parts of this machine's GPUs; none
    for one process, which takes all, and on a CPU, which they share.

    Raises:
      ValueError: there are fewer GPUs than processes, or other chips than GPUs.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not has_accelerator()
    if at_once == 1 or on_cpu:
        return [{} for _ in range(at_once)]
    if not glob.glob("/dev/nvidia[0-9]*"):
        raise ValueError(
            f"--at_once={at_once}: each run takes all TPU chips of this machine; start a study for "
            "each part of them, as --share=1/2 and --share=2/2, with the variables of "
            "docs/studies.md, or use its processor by JAX_PLATFORMS=cpu"
        )
    gpus = _gpus()
    each = len(gpus) // at_once
    if not each:
        raise ValueError(
            f"--at_once={at_once}: there are GPUs for {len(gpus)} runs at a time; use that or less,"
            " or JAX_PLATFORMS=cpu"
        )
    return [{GPUS: ",".join(gpus[i * each : (i + 1) * each])} for i in range(at_once)]


def _gpus() -> list[str]:
    """As CUDA names them: those that this process may use, up to the first that is none."""
    if GPUS in os.environ:
        names = map(str.strip, os.environ[GPUS].split(","))
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
