"""Trains the runs of a study and reports what they say.

    python scripts/study.py --study=configs/studies/attention.py --output=studies/attention
    python scripts/study.py --study=... --output=... --report
    python scripts/study.py --study=... --output=... -- --config.data.store=/data/packages

It ends with the report, in OUTPUT/report.md; --report alone writes it from what is there. What
stands after `--` goes on to train.py, for every run. A study that measures one-shot tasks reads
them from --data_dir, as scripts/evaluate.py does. The same command goes on where it was, however
it ended; delete a run's folder to train it again. Several machines may work on one output
folder, as --share=1/3, --share=2/3 and --share=3/3. Runs that were started by hand, by the lines of
--commands, count as soon as they have ended.
Exit codes: 0 done, 2 mistake in the study or the command line, 75 stopped by a signal (start it
again), 1 anything else, as a disk that is full.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.reading.files import folder_to_write
from laser.training.console import start_logging
from study.chips import divided
from study.estimate import estimate
from study.measure import load_tasks
from study.plan import Plan, held_out_files
from study.report import read_numbers, write_report
from study.run import Folder, Runner, commands, recorded_flags


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    arguments = _parser().parse_args(given[:cut])
    start_logging(to_stderr=arguments.commands)
    try:
        output = folder_to_write(arguments.output)
        extra = given[cut + 1 :] or recorded_flags(output, arguments.study)
        folder = Folder(output, Plan(arguments.study, extra))
        if arguments.adopt:
            numbers = read_numbers(arguments.adopt)
            adopted, known = folder.adopt(numbers), len(numbers["runs"])
            print(f"{adopted} of {known} runs adopted from {arguments.adopt}", file=sys.stderr)
        if arguments.estimate:
            print(estimate(folder))
            return 0
        chips = divided(arguments.at_once)
        train = not (arguments.report or arguments.commands)
        if train:
            _check_what_is_measured(folder, arguments.data_dir)
        if not arguments.report or arguments.adopt:
            folder.begin()
        if train:
            print(estimate(folder), flush=True)
        share, data_dir = arguments.share, arguments.data_dir
        code = Runner(folder, share=share, chips=chips, train=train, data_dir=data_dir).run()
        if code == 0 and arguments.commands:
            print("\n".join(commands(folder, share)))
        elif code == 0 and train and not folder.has_results():
            print(f"output={output}: this share has no runs, and no other one has a result yet")
        elif code == 0:
            print(write_report(folder))
    except ValueError as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"study.py: {error}; when it is mended the same command goes on", file=sys.stderr)
        return 1
    return code


def _check_what_is_measured(folder: Folder, data_dir: str) -> None:
    """Raises ValueError if something is not there of which runs without a result are measured."""
    study = folder.plan.study
    open_measures = {
        measure
        for stage, cells in folder.stages()
        if cells is None or any(folder.result(cell) is None for cell in cells)
        for measure in stage.measures
    }
    if "domains" in open_measures:
        held_out_files(study.held_out)
    if "oneshot" in open_measures:
        load_tasks(study.tasks, data_dir)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", required=True, help="a file with get_study()")
    parser.add_argument("--output", required=True, help="folder of all its runs")
    parser.add_argument("--estimate", action="store_true", help="only say what is left, and go")
    parser.add_argument(
        "--commands",
        action="store_true",
        help="only print train.py's flags for what can be trained",
    )
    parser.add_argument("--report", action="store_true", help="only report on what was trained")
    parser.add_argument("--data_dir", default="", help="where the data of one-shot tasks are")
    parser.add_argument(
        "--adopt", type=Path, metavar="NUMBERS", help="runs of a numbers.json need no training"
    )
    parser.add_argument("--at_once", type=_positive, default=1, help="runs at a time (default 1)")
    parser.add_argument("--share", type=_share, default=(0, 1), metavar="I/N", help="of the runs")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at least 1")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    index, slash, of = text.partition("/")
    if not (slash and index.isdigit() and of.isdigit() and 1 <= int(index) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as 1/3, 2/3 or 3/3")
    return int(index) - 1, int(of)


if __name__ == "__main__":
    sys.exit(main())
