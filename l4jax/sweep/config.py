"""What a sweep is: one run and how it is varied, read from a YAML file; and what is expected of the results."""

import copy
import itertools
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from l4jax.settings import build, override, read_settings
from l4jax.train.config import RunConfig, run_config_from_dict

STATISTICS = {"min": min, "max": max, "mean": statistics.mean, "median": statistics.median}
LEARNING_RATE = "optimizer.learning_rate"
BEST_RATE = "best_rate"
"""What expectations call the learning rate at which an arm would be best, between the points of the grid."""
_TERM = r"(?P<{0}statistic>min|max|mean|median) (?P<{0}metric>\w+) of (?P<{0}arm>\w+)"
_EXPECTATION = re.compile(
    _TERM.format("") + r" (?P<sign>>=|<=) (?P<factor>[\d.]+)(?: \* " + _TERM.format("other_") + r")?"
)


@dataclass(frozen=True)
class Variant:
    """One run of a sweep, apart from its seed."""

    arm: str
    point: tuple[tuple[str, Any], ...]
    """Keys of the grid and their values."""

    @property
    def name(self) -> str:
        return ",".join([self.arm, *(f"{key.rpartition('.')[2]}={value}" for key, value in self.point)])


@dataclass(frozen=True)
class Expectation:
    """A line such as `min exact of sees >= 0.85`, or `mean exact of soft >= 1.3 * mean exact of hard`."""

    text: str
    parts: Mapping[str, str | None]

    @classmethod
    def parse(cls, text: str, arms: Sequence[str], metrics: Sequence[str]) -> "Expectation":
        """Reads a line.

        Raises:
            ValueError: it is none, or names an arm or metric that there is not.
        """
        found = _EXPECTATION.fullmatch(text)
        if found is None:
            raise ValueError(f"expect: {text!r} does not read like `min exact of sees >= 0.85`")
        for kind, known in (("arm", arms), ("metric", metrics)):
            for name in (found[kind], found[f"other_{kind}"]):
                if name is not None and name not in known:
                    raise ValueError(f"expect: {text!r} names {name!r}, there is {', '.join(known)}")
        return cls(text, found.groupdict())

    def check(self, results: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[bool, float, float]:
        """Returns whether it holds, what came and what was expected; `results` are values by metric and arm."""
        parts = self.parts

        def value(prefix: str) -> float:
            values = results[parts[f"{prefix}metric"]][parts[f"{prefix}arm"]]
            return STATISTICS[parts[f"{prefix}statistic"]](values)

        came = value("")
        wanted = float(parts["factor"]) * (value("other_") if parts["other_arm"] else 1.0)
        return (came >= wanted) if parts["sign"] == ">=" else (came <= wanted), came, wanted


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A run, its arms, the grid and the seeds; every combination is trained."""

    run: dict[str, Any]
    """As in the file of a run."""
    metrics: dict[str, str]
    """Name -> where a number stands: `EVALUATION.exact`, `EVALUATION.by_source.NAME.loss` of the last evaluation, or
    `metrics.load_imbalance` of the last line of metrics. The first decides what is best."""
    goal: Literal["max", "min"] = "max"
    """Which value is the best."""
    arms: dict[str, list[str]] = field(default_factory=lambda: {"run": []})
    """Name -> `key=value` words. `{ARM}` in a word is the directory of an earlier arm's run with the same seed."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Key -> values."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Of the runs."""
    expect: list[str] = field(default_factory=list)
    """What the results must show, each arm at its best place in the grid: `Expectation`. With a grid of learning rates
    alone there is one metric more, `best_rate`."""
    transfer: str | None = None
    """Preset or checkpoint to which MetaP carries the best learning rate; the grid has learning rates alone."""

    def __post_init__(self):
        for name in ("metrics", "arms", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} names nothing; a sweep has at least one of them")
        if self.transfer is not None and not self.is_over_rates:
            raise ValueError(f"transfer is for a grid of {LEARNING_RATE} alone")
        self.expectations()

    @property
    def is_over_rates(self) -> bool:
        """Whether the grid has learning rates alone."""
        return list(self.grid) == [LEARNING_RATE]

    def expectations(self) -> list[Expectation]:
        """Returns what is expected, read.

        Raises:
            ValueError: a line does not read like one.
        """
        metrics = [*self.metrics, BEST_RATE] if self.is_over_rates else list(self.metrics)
        return [Expectation.parse(text, list(self.arms), metrics) for text in self.expect]

    def variants(self) -> Iterator[Variant]:
        """Yields what is trained with each seed, in order."""
        for arm in self.arms:
            for values in itertools.product(*self.grid.values()):
                yield Variant(arm, tuple(zip(self.grid, values, strict=True)))

    def settings(self, variant: Variant, seed: int, directory: Path) -> RunConfig:
        """Returns the run of a variant.

        Args:
            directory: of all runs.
        """
        words = list(self.arms[variant.arm])
        for arm in self.arms:
            place = str(run_directory(directory, Variant(arm, ()), seed))
            words = [word.replace(f"{{{arm}}}", place) for word in words]
        words += [f"{key}={value}" for key, value in variant.point]
        content = copy.deepcopy(self.run)
        override(content, [*words, f"seed={seed}"])
        return run_config_from_dict(content)


def run_directory(directory: Path, variant: Variant, seed: int) -> Path:
    return directory / f"{variant.name},seed={seed}"


def load_sweep(path: Path, words: Sequence[str] = ()) -> SweepConfig:
    """Returns the sweep that a file describes, with `key=value` words put over it (`seeds=[0]`, `run.steps=10`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: something in it is wrong; every run was looked at.
    """
    sweep = build(SweepConfig, read_settings(path, words))
    for variant in sweep.variants():
        sweep.settings(variant, sweep.seeds[0], path.parent)
    return sweep
