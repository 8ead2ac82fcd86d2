"""Trains a model, or goes on with a run that is there already.

    python train.py --config=configs/c4.py:size=301m,attention=laser --workdir=runs/laser
    python train.py --config=... --workdir=... --config.optimizer.learning_rate=3e-3
    python train.py --config=configs/finetune.py:task=rte --config.init_from=RUN --workdir=...

Starting it again with the same --workdir resumes from the newest checkpoint. On several hosts start
it on each: see laser/training/hosts.py.
Exit codes: 0 done, 2 mistake in the command line or the config, 3 diverged, 4 no memory for the
first step, 75 saved on preemption (start it again), 130 stopped by Ctrl-C at once, as before the
first step, 1 anything else.
"""

import contextlib
import sys
import time

from absl import flags

from laser.training.console import end_on_ctrl_c, exit_with, start_logging
from laser.training.flags import parse_or_exit
from laser.training.hardware import tune_cpu


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "workdir",
        None,
        "folder of the run: checkpoints, metrics, config; resumed if it is there",
        flag_values=values,
        required=True,
    )
    flags.DEFINE_bool(
        "allow_config_change",
        False,
        "resume although the config or the data differ from those that the run was started with",
        flag_values=values,
    )


def main(argv: list[str]) -> int:
    began = time.time()
    config, values = parse_or_exit(argv, define_flags, __doc__)
    start_logging()
    tune_cpu(config.model.dtype)

    from eval.opening import open_run  # jax: only after the config was found to be right
    from laser.training import exits, hosts, loop

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hosts.joined())
            run, evaluations = open_run(config, values.workdir, values.allow_config_change)
        except ValueError as error:
            exit_with(argv[0], str(error))
        code = loop.train(run, evaluations, began)
    if code not in (exits.DONE, exits.PREEMPTED):
        hosts.leave(code)
    return code


if __name__ == "__main__":
    end_on_ctrl_c("stopped; the same command goes on from the newest checkpoint, if there is one")
    sys.exit(main(sys.argv))
