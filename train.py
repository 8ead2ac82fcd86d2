"""Trains a model, or goes on with a run that is there already.

    python train.py --config=configs/c4.py:size=301m,attention=laser --workdir=runs/laser
    python train.py --config=... --workdir=... --config.optimizer.learning_rate=3e-3

Starting it again with the same --workdir resumes from the newest checkpoint. On several hosts start
it on each: see laser/training/hosts.py.
Exit codes: 0 done, 2 mistake in the command line or the config, 75 saved on preemption (start it
again), 1 anything else.
"""

import contextlib
import sys

from absl import flags

from laser.training.console import start_logging
from laser.training.flags import exit_with, parse_or_exit
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
    config, values = parse_or_exit(argv, define_flags, __doc__)
    start_logging()
    tune_cpu()

    # These import jax: only after the config was found to be right.
    from data.tokenizer import Tokenizer
    from eval.during_training import load_tasks, make_evaluation
    from laser.training import hosts, loop

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hosts.joined())
            with hosts.together("open the data"):
                store = loop.open_store(config)
                tokenizer = Tokenizer(store.tokenizer_path)
                tasks = load_tasks(config, tokenizer)
            run = loop.open_run(config, store, values.workdir, values.allow_config_change)
        except ValueError as error:
            exit_with(argv[0], str(error))
        evaluations = []
        if tasks:
            score = make_evaluation(config, run.program.mesh, tokenizer, tasks)
            every = config.evaluation.every
            evaluations = [loop.Evaluation(every, lambda state: score(state.params))]
        return loop.train(run, evaluations)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
