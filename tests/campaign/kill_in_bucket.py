"""The quickstart with its store and folder in a bucket, killed: has it the bits of one on a disk?

    python -m tests.campaign.kill_in_bucket --reference=runs/quickstart --store=stores/bible

The reference is a quickstart that ended on a disk, of the same number of cores. The bucket is a
server of this machine (tests/bucket_server.py). Each of five processes is sent SIGKILL a random
time after its first line of progress; the same command is given again, as the launcher does, and
the last one goes on to the end. It takes as long as a quickstart and what the kills lose. pytest
leaves this file out.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from configs import quickstart
from tests import buckets
from tests.campaign.damage import ROOT
from tests.training.runs import losses, tensors

RUN = "runs/killed"
PROGRESS = re.compile(r"step \d+")


def train(kill_after: float | None) -> int:
    """Exit code of one process, which is killed so many seconds after its first step, or never."""
    command = [
        sys.executable, "train.py", "--config=configs/quickstart.py:attention=laser",
        "--config.data.store=gs://bucket/store", f"--workdir=gs://bucket/{RUN}",
        "--config.checkpoint.every=25",  # more often than the reference: a kill costs less
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    armed = False
    for line in process.stdout:
        print("   ", line, end="", flush=True)
        if kill_after is not None and not armed and PROGRESS.match(line):
            threading.Timer(kill_after, process.kill).start()
            armed = True
    return process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--longest", type=float, default=120.0, help="seconds to a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with buckets.running() as bucket, tempfile.TemporaryDirectory() as here:
        os.environ.update(bucket.environment)
        bucket.upload(arguments.store, "store")
        for kill in range(arguments.kills):
            seconds = rng.uniform(0, arguments.longest)
            print(f"kill {kill + 1} of {arguments.kills}, after {seconds:.1f} s", flush=True)
            train(seconds)
        if code := train(None):
            return code
        bucket.files().get(f"bucket/{RUN}", here, recursive=True)
        last = quickstart.get_config().training.steps
        ended = next(Path(here).rglob("metrics.jsonl")).parent
        same_tensors = tensors(ended, last) == tensors(arguments.reference, last)
        same_losses = losses(ended) == losses(arguments.reference)
    print(f"parameters and optimizer {'equal' if same_tensors else 'DIFFER'} to the bit")
    print(f"losses of all steps {'equal' if same_losses else 'DIFFER'} to the bit")
    return not (same_tensors and same_losses)


if __name__ == "__main__":
    sys.exit(main())
