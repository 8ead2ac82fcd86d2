"""What a study is: runs of one recipe that differ in what is compared, in stages.

A file in configs/studies/ is a recipe as any other, with arguments and fields, and may be trained
by itself. Its `get_study()` says which runs of it make the study:

    def get_study():
        seeds = {"training.seed": [0, 1]}
        return Study([Stage("main", {**seeds, "attention": ["standard", "laser"]})])

Runs are trained by `train.py --config=FILE:ARGUMENTS --config.FIELD=VALUE`. A name without a dot is
an argument of the file's `get_config`, one with a dot a field of its
config. scripts/study.py trains the runs and reports.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Best:
    """In place of a list of values: those whose runs ended lowest in the study's measure before.

    Attributes:
      of: names of earlier stages that varied this argument or field. A value counts that all of
        them tried; it counts with the mean over its runs, which a failed one makes infinite. What
        has failed everywhere is not chosen, and has no runs.
      by: arguments or fields for each value of which the choice is made by itself.
      where: settings of the runs to choose among, in place of those of the run that asks.
      keep: how many values, the best first.
    """

    of: Sequence[str]
    by: Sequence[str] = ("attention",)
    where: Mapping[str, Any] = field(default_factory=dict)
    keep: int = 1


@dataclass(frozen=True)
class Stage:
    """Runs with every combination of some values.

    Attributes:
      name: of its folder in the output.
      vary: argument or field → its values, or a `Best`; the first one changes slowest. A tuple of
        names stands for several that change together, and its values are tuples.
      hold: argument or field → its value, where it is not that of the recipe.
      why: what the stage is for, in a line for the report.
      measures: what is measured of every run at the end beside its loss: "domains", bits per byte
        of each file of held-out text, "continuations", the task of eval/tasks/offline.py, and
        "oneshot", the accuracy on the study's tasks as scripts/evaluate.py has it.
    """

    name: str
    vary: Mapping[Any, Sequence[Any] | Best]
    hold: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    measures: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """Two groups of runs that are compared in the study's measure, paired by what else they vary.

    Attributes:
      stage: that has the runs.
      one, other: settings that a run has; the difference reported is `one` minus `other`.
      other_stage: that has the runs of `other`, where it is another one.
    """

    stage: str
    one: Mapping[str, Any]
    other: Mapping[str, Any]
    other_stage: str = ""


@dataclass(frozen=True)
class Study:
    """Stages in the order in which they run, and what is asked of them.

    Attributes:
      stages: the ones that decide most come first.
      compare: pairs of groups, for the table of differences.
      sizes: stages whose runs differ in size, for the power law of loss and size.
      held_out: folder of text in .jsonl files, one for each domain; "" = none.
      tasks: names of eval/tasks/catalogue.py, for "oneshot". Where their data are is said to
        scripts/study.py.
      measure: what decides, the lower the better: a name in the runs' metrics.jsonl.
    """

    stages: Sequence[Stage]
    compare: Sequence[Comparison] = ()
    sizes: Sequence[str] = ()
    held_out: str = ""
    tasks: Sequence[str] = ()
    measure: str = "eval/loss"
