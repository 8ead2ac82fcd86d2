"""Trains a model, or goes on with a run that is there already.

    python train.py --config=configs/c4.py:size=301m,attention=laser --workdir=runs/laser
    python train.py --config=... --workdir=... --config.optimizer.learning_rate=3e-3
    python train.py --config=configs/finetune.py:task=rte --config.init_from=RUN --workdir=...

Starting it again with the same --workdir resumes from the newest checkpoint. On several hosts start
it on each: see laser/training/hosts.py.
Exit codes: 0 done, 2 mistake in the command line or the config, 75 saved on preemption (start it
again), 130 stopped by Ctrl-C at once, as before the first step, 1 anything else.
"""

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from absl import flags

from laser.training.config import RunConfig
from laser.training.console import end_on_ctrl_c, start_logging
from laser.training.flags import exit_with, parse_or_exit
from laser.training.folders import folder_of
from laser.training.hardware import tune_cpu

if TYPE_CHECKING:
    from laser.training.loop import Evaluation, Run


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

    from laser.training import hosts, loop  # jax: only after the config was found to be right

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hosts.joined())
            run, evaluations = _open(config, values)
        except ValueError as error:
            exit_with(argv[0], str(error))
        code = loop.train(run, evaluations, began)
    if code == loop.EXIT_FAILED:
        hosts.leave(code)
    return code


def _open(config: RunConfig, values: flags.FlagValues) -> "tuple[Run, list[Evaluation]]":
    """The run, and what is evaluated besides its loss. Raises ValueError before it writes."""
    from data.tokenizer import Tokenizer
    from eval.generation import finetuning
    from eval.likelihood import during_training
    from laser.training import hosts
    from laser.training.loop import Evaluation, open_run
    from laser.training.open_rows import open_rows
    from laser.training.rows import ExampleRows, Rows

    with hosts.together("open the data"):
        texts = finetuning.load_tasks(config.data.tasks, config.data.tasks_dir)
        rows: Rows
        if texts:
            pairs = [finetuning.pairs(texts, split) for split in finetuning.SPLITS]
            rows = ExampleRows(config, folder_of(config.init_from) / "tokenizer.model", *pairs)
        else:
            rows = open_rows(config)
        tasks = []
        if config.evaluation.tasks:
            tasks = during_training.load_tasks(config, Tokenizer(rows.tokenizer_path))
    run = open_run(config, rows, values.workdir, values.allow_config_change)
    evaluations = []
    if tasks:
        tokenizer = Tokenizer(rows.tokenizer_path)
        score = during_training.make_evaluation(config, run.program.mesh, tokenizer, tasks)
        every = run.config.evaluation.every
        evaluations.append(Evaluation(every, lambda state: score(state.params)))
    if isinstance(rows, ExampleRows):
        tokenizer = Tokenizer(rows.tokenizer_path)
        decode = finetuning.make_evaluation(
            run.config, run.program.mesh, tokenizer, texts, rows.validation, run.workdir
        )
        every = rows.steps_per_epoch(run.config)
        evaluations.append(Evaluation(every, lambda state: decode(state.params, int(state.step))))
    if config.model.kind == "conformer":
        from eval import speech
        from laser.training.speech_rows import SpeechRows

        assert isinstance(rows, SpeechRows)
        transcribe = speech.make_evaluation(run.config, run.program.mesh, rows.store.validation)
        every = run.config.evaluation.every
        evaluations.append(Evaluation(every, lambda state: transcribe(state.params)))
    return run, evaluations


if __name__ == "__main__":
    end_on_ctrl_c("stopped; the same command goes on from the newest checkpoint, if there is one")
    sys.exit(main(sys.argv))
