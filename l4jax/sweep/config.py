"""What a sweep is: one run and how it is varied, read from a YAML file; and what is expected of the results."""

import dataclasses
import itertools
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4jax.settings import override, read_settings
from l4jax.train.config import RunConfig, run_config_from_dict

STATISTICS = {"min": min, "max": max, "mean": statistics.mean, "median": statistics.median}
LEARNING_RATE = "optimizer.learning_rate"
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


@dataclass(frozen=True)
class SweepConfig:
    """A run, its arms, the grid and the seeds; every combination is trained."""

    run: Mapping[str, Any]
    """As in the file of a run."""
    metrics: Mapping[str, str]
    """Name -> where a number stands: `EVALUATION.exact`, `EVALUATION.by_source.NAME.loss` of the last evaluation, or
    `metrics.load_imbalance` of the last line of metrics. The first decides what is best."""
    goal: str = "max"
    """Whether the best value is the max or the min."""
    arms: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=lambda: {"run": ()})
    """Name -> `key=value` words. `{ARM}` in a word is the directory of an earlier arm's run with the same seed."""
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    """Key -> values."""
    seeds: Sequence[int] = (0,)
    expect: Sequence[Expectation] = ()
    transfer: str | None = None
    """Preset or checkpoint to which MetaP carries the best learning rate; the grid has learning rates alone."""

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
        content = _copied(self.run)
        override(content, [*words, f"seed={seed}"])
        return run_config_from_dict(content)


def run_directory(directory: Path, variant: Variant, seed: int) -> Path:
    return directory / f"{variant.name},seed={seed}"


def _copied(content: Any) -> Any:
    return {key: _copied(value) for key, value in content.items()} if isinstance(content, Mapping) else content


def load_sweep(path: Path, words: Sequence[str] = ()) -> SweepConfig:
    """Returns the sweep that a file describes, with `key=value` words put over it (`seeds=[0]`, `run.steps=10`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: something in it is wrong; every run was looked at.
    """
    content = read_settings(path, words)
    known = {field.name: field for field in dataclasses.fields(SweepConfig)}
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"{path}: unknown key {unknown[0]}; a sweep has {', '.join(known)}")
    if missing := sorted({"run", "metrics"} - set(content)):
        raise ValueError(f"{path}: missing key {', '.join(missing)}; {SweepConfig.__doc__}")
    kinds = {"run": dict, "metrics": dict, "goal": str, "arms": dict, "grid": dict, "seeds": list, "expect": list}
    kinds["transfer"] = str
    for key, value in content.items():
        if not isinstance(value, kinds[key]) or not value:
            raise ValueError(f"{path}: {key}={value!r} must be a {kinds[key].__name__} with something in it")
    if content.get("goal", "max") not in ("max", "min"):
        raise ValueError(f"{path}: goal={content['goal']!r} must be max or min")
    if "transfer" in content and list(content.get("grid", ())) != [LEARNING_RATE]:
        raise ValueError(f"{path}: transfer is for a grid of {LEARNING_RATE} alone")
    arms = {name: words or () for name, words in content.get("arms", {"run": ()}).items()}
    expect = [Expectation.parse(text, list(arms), list(content["metrics"])) for text in content.get("expect", ())]
    sweep = SweepConfig(**{**content, "arms": arms, "expect": expect})
    for variant in sweep.variants():
        sweep.settings(variant, sweep.seeds[0], path.parent)
    return sweep
