"""From a study's file to its runs: which there are, what they are called, what starts them.

Everything that can be wrong in a file is found here, before anything runs: an unknown field or
argument, a config that does not fit together, two runs of one name, a choice among runs that do
not exist.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.study import Best, Comparison, Stage, Study
from eval.tasks.catalogue import choose_tasks
from laser.training.config import RunConfig
from laser.training.fields import nearest
from laser.training.flags import call_in_file, parse

MEASURES = ("domains", "continuations", "oneshot")
NAME = re.compile(r"[a-z0-9_]+")
Names = str | tuple[str, ...]  # of one argument or field, or of several that change together
FinalOf = Callable[["Cell"], float | None]  # of a run that is done: infinite if it failed


def any_end(cell: "Cell") -> float:
    """A `FinalOf` by which every choice can be made, before anything runs."""
    del cell
    return 0.0


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      stage: its stage's name.
      name: of its folder in the stage's: what it varies.
      settings: argument or field → value, held ones included.
      file: the recipe.
      extra: further flags of train.py, the same for all runs.
      configs: of all runs of a plan, by their flags: making one takes 27 ms.
    """

    stage: str
    name: str
    settings: Mapping[str, Any]
    file: str
    extra: tuple[str, ...] = ()
    configs: dict[tuple[str, ...], RunConfig] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.name}"

    def flags(self) -> list[str]:
        """The flags of train.py, but for --workdir."""
        arguments = ",".join(f"{k}={v}" for k, v in self.settings.items() if "." not in k)
        recipe = f"{self.file}:{arguments}" if arguments else self.file
        fields = [f"--config.{k}={v}" for k, v in self.settings.items() if "." in k]
        return [f"--config={recipe}", *fields, *self.extra]

    def config(self) -> RunConfig:
        """Raises ValueError if the run could not start."""
        flags = tuple(self.flags())
        if flags not in self.configs:
            try:
                self.configs[flags] = parse(["train.py", *flags], lambda values: None)[0]
            except ValueError as error:
                raise ValueError(f"{self.key}: {error}") from None
        return self.configs[flags]


def load_study(file: str) -> Study:
    """Runs get_study() of a file. Raises ValueError with one line."""
    return call_in_file(file, "get_study", [], Study)


class Plan:
    """A study's runs.

    Attributes:
      study, file: and the recipe that it stands in.
      extra: further flags of train.py, the same for all runs.
    """

    def __init__(self, file: str, extra: Sequence[str] = ()):
        """Raises ValueError for the first thing that is wrong with the study or its flags."""
        self.file = file
        self.extra = tuple(extra)
        self.study = load_study(file)
        self._stages: dict[str, Stage] = {}
        self._configs: dict[tuple[str, ...], RunConfig] = {}
        if not self.study.stages:
            raise ValueError(f"{file}: the study has no stages")
        for stage in self.study.stages:
            self._check_names(stage)
            self._stages[stage.name] = stage
            for cell in self.cells(stage, any_end) or ():
                if not cell.config().training.steps:
                    raise ValueError(
                        f"{cell.key}: training.steps=0: a study counts in steps, not in epochs; "
                        "give their number"
                    )
        if not self.study.measure.startswith("eval/"):
            raise ValueError(
                f"{file}: measure={self.study.measure}: give a name of metrics.jsonl, as eval/loss"
            )
        if self.study.tasks:
            choose_tasks(",".join(self.study.tasks))
        for name in self.study.sizes:
            self._check_stage("sizes", name)
            if "attention" not in {*listed(self._stages[name]), *self._stages[name].hold}:
                raise ValueError(f"sizes: stage {name} sets no attention, by which it is told")
        for comparison in self.study.compare:
            self._check_comparison(comparison)

    def cells(self, stage: Stage, final_of: FinalOf) -> list[Cell] | None:
        """The runs of a stage, in order; None while a choice waits for others.

        Raises ValueError if two have one name, or if there is nothing to choose among.
        """
        found: dict[str, Cell] = {}
        plain = {k: tuple(v) for k, v in stage.vary.items() if not isinstance(v, Best)}
        choices = {k: v for k, v in stage.vary.items() if isinstance(v, Best)}
        for values in itertools.product(*plain.values()):
            fixed = dict(zip(plain, values))
            options = [
                self.choose(stage, key, best, {**stage.hold, **flat(fixed)}, final_of)
                for key, best in choices.items()
            ]
            if None in options:
                return None
            for choice in itertools.product(*(option or () for option in options)):
                drawn = {**fixed, **dict(zip(choices, choice))}
                varied = flat({key: drawn[key] for key in stage.vary})
                name = _name(varied)
                if name in found:
                    raise ValueError(f"stage {stage.name}: two runs are called {name}")
                settings = {**stage.hold, **varied}
                found[name] = Cell(stage.name, name, settings, self.file, self.extra, self._configs)
        return list(found.values())

    def choose(
        self, stage: Stage, key: Names, best: Best, settings: Mapping[str, Any], final_of: FinalOf
    ) -> list[Any] | None:
        """The values that a `Best` stands for, none of which failed everywhere; None while runs
        that it depends on are missing."""
        by = {name: settings[name] for name in best.by if name in settings}
        wanted = {**by, **best.where}
        finals: dict[Any, list[float]] = {}
        tried: set[Any] | None = None
        for name in best.of:
            cells = self.cells(self._stages[name], final_of)
            if cells is None:
                return None
            chosen = [cell for cell in cells if has(cell.settings, wanted)]
            if not chosen and final_of is not any_end:
                continue  # its own choice was among runs that failed
            for cell in chosen:
                value = final_of(cell)
                if value is None:
                    return None
                finals.setdefault(value_of(cell.settings, key), []).append(value)
            values = {value_of(cell.settings, key) for cell in chosen}
            tried = values if tried is None else tried & values
        means = {
            value: sum(finals[value]) / len(finals[value])
            for value in finals
            if value in (tried or ())
        }
        if len(means) < best.keep and final_of is any_end:
            of = ", ".join(best.of)
            raise ValueError(
                f"stage {stage.name}: the best {best.keep} of {key}: {of} tried only "
                f"{len(means)} with {wanted}"
            )
        ranked = sorted(means, key=lambda value: means[value])[: best.keep]
        return [value for value in ranked if math.isfinite(means[value])]

    def _check_stage(self, where: str, name: str) -> None:
        if name not in self._stages:
            raise ValueError(f"{where}: no stage {name!r}{nearest(name, self._stages)}")

    def _check_comparison(self, comparison: Comparison) -> None:
        """Both sides have runs, and one for each value of what they are paired by."""
        names = comparison.stage, comparison.other_stage or comparison.stage
        for name in names:
            self._check_stage("compare", name)
        keys = pair_keys(comparison, [listed(self._stages[name]) for name in names])
        for name, wanted in zip(names, (comparison.one, comparison.other)):
            stage = self._stages[name]
            cells = self.cells(stage, any_end) or []
            known = {key for cell in cells for key in cell.settings}
            for key in wanted:
                if key not in known:
                    near = nearest(key, known)
                    raise ValueError(f"compare: {key} is not set in stage {name}{near}")
            if not {*wanted} <= {*listed(stage), *stage.hold}:
                continue  # what is chosen is not known yet
            chosen = [cell for cell in cells if has(cell.settings, wanted)]
            if not chosen:
                raise ValueError(f"compare: no run of stage {name} has {dict(wanted)}")
            if len({tuple(cell.settings[key] for key in keys) for cell in chosen}) < len(chosen):
                by = ", ".join(keys) or "nothing"
                raise ValueError(
                    f"compare: stage {name} has several runs with {dict(wanted)} that are paired "
                    f"by {by}; say which"
                )

    def _check_names(self, stage: Stage) -> None:
        if not NAME.fullmatch(stage.name):
            raise ValueError(f"stage {stage.name!r}: use small letters, digits and _")
        if stage.name in self._stages:
            raise ValueError(f"stage {stage.name!r}: there are two of that name")
        where = f"stage {stage.name}"
        for measure in stage.measures:
            if measure not in MEASURES:
                near = nearest(measure, MEASURES)
                raise ValueError(f"{where}: unknown measure {measure!r}{near}")
        if "domains" in stage.measures and not self.study.held_out:
            raise ValueError(f"{where}: measures domains, but the study has no held_out")
        if "oneshot" in stage.measures and not self.study.tasks:
            raise ValueError(f"{where}: measures oneshot, but the study has no tasks")
        for key, values in stage.vary.items():
            for name in names_of(key):
                if name in stage.hold:
                    raise ValueError(f"{where}: {name} is both varied and held")
            if not isinstance(values, Best):
                self._check_values(where, key, values)
                continue
            if not values.of or values.keep < 1:
                raise ValueError(f"{where}: the best {key} of {values.of}, keep {values.keep}")
            for name in values.of:
                if name not in self._stages:
                    near = nearest(name, self._stages)
                    raise ValueError(f"{where}: the best {key}: no earlier stage {name!r}{near}")
                varied = [n for k in self._stages[name].vary for n in names_of(k)]
                for missing in set(names_of(key)) - {*varied}:
                    raise ValueError(f"{where}: the best {missing}: stage {name} does not vary it")
            self._check_by(where, stage, key, values)

    def _check_values(self, where: str, key: Names, values: Sequence[Any]) -> None:
        if isinstance(values, str) or not list(values):
            raise ValueError(f"{where}: no values of {key}; give a list of them")
        if isinstance(key, str):
            return
        for value in values:
            if not isinstance(value, tuple | list) or len(value) != len(key):
                raise ValueError(
                    f"{where}: a value of {key} is {value!r}; give a tuple of {len(key)}"
                )

    def _check_by(self, where: str, stage: Stage, key: Names, best: Best) -> None:
        """What a choice is made by is settled before it, or no stage knows it."""
        settled = {*listed(stage), *stage.hold, *best.where}
        of_stages = [self._stages[name] for name in best.of]
        known = {name for one in of_stages for name in (*listed(one), *one.hold)}
        for name in best.by:
            if name not in settled and (name in known or name != "attention"):
                raise ValueError(
                    f"{where}: the best {key} by {name}, which the stage does not set"
                    f"{nearest(name, settled)}; set it, or leave it out of `by`"
                )


def held_out_files(folder: str | Path | None) -> list[Path]:
    """The held-out text of a study, a file for each domain. Raises ValueError if there is none."""
    files = sorted(Path(folder).glob("*.jsonl")) if folder else []
    if not files:
        raise ValueError(f"held_out={folder}: no .jsonl files there, of which domains are measured")
    return files


def listed(stage: Stage) -> list[str]:
    """The arguments and fields that a stage gives values of, choices left out."""
    return [
        name
        for key, values in stage.vary.items()
        if not isinstance(values, Best)
        for name in names_of(key)
    ]


def pair_keys(comparison: Comparison, listed_in: Sequence[Sequence[str]]) -> list[str]:
    """What both sides of a comparison are paired by: what the stages of both list besides."""
    one, other = (set(names) - {*comparison.one, *comparison.other} for names in listed_in)
    return sorted(one & other)


def of_share(stage: Stage, cells: Sequence[Cell], share: tuple[int, int]) -> list[Cell]:
    """The runs of one machine: (0, 2) and (1, 2) are those of two. Runs that differ in attention
    alone, or in what is chosen for it, are on one, so that a pair is of one kind of machine."""
    index, of = share
    names = [name for name in listed(stage) if name != "attention"]
    kinds: dict[tuple, int] = {}
    places = [
        kinds.setdefault(tuple(cell.settings[name] for name in names), len(kinds)) for cell in cells
    ]
    return [cell for cell, place in zip(cells, places) if place % of == index]


def number_of_runs(stage: Stage) -> int:
    """Of a stage, choices open or not."""
    count = 1
    for values in stage.vary.values():
        count *= values.keep if isinstance(values, Best) else len(list(values))
    return count


def names_of(key: Names) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def value_of(settings: Mapping[str, Any], key: Names) -> Any:
    """Of an argument or field; of several, a tuple."""
    return settings[key] if isinstance(key, str) else tuple(settings[name] for name in key)


def flat(varied: Mapping[Names, Any]) -> dict[str, Any]:
    """By single names."""
    return {
        name: value
        for key, values in varied.items()
        for name, value in zip(
            names_of(key), [values] if isinstance(key, str) else values, strict=True
        )
    }


def has(settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a run has these settings."""
    return all(key in settings and settings[key] == value for key, value in wanted.items())


def _name(varied: Mapping[str, Any]) -> str:
    """`seed=0,attention=laser`. Raises ValueError for a value that no folder can be called by."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in varied.items()]
    name = ",".join(parts) or "run"
    if not re.fullmatch(r"[\w=,.+-]+", name):
        raise ValueError(f"{name!r}: values of a study may have letters, digits and _ . + - alone")
    return name
