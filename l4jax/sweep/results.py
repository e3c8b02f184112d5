"""What came out of a sweep: numbers by variant and seed, as a table, a page and a verdict."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from l4jax import report
from l4jax.config import PRESETS, load_config, preset
from l4jax.sweep.config import BEST_RATE, LEARNING_RATE, SweepConfig, Variant, run_directory
from l4jax.train.config import RunConfig
from l4jax.train.metap import transferred
from l4jax.train.metrics import read_metrics


@dataclass(frozen=True)
class Results:
    """Numbers of every run."""

    values: dict[str, dict[Variant, list[float]]]
    """By metric and variant, one for each seed."""

    def best(self, sweep: SweepConfig, arm: str) -> Variant:
        """Returns the variant of an arm with the best mean of the first metric."""
        values = self.values[next(iter(sweep.metrics))]
        choose = max if sweep.goal == "max" else min
        return choose((v for v in values if v.arm == arm), key=lambda v: statistics.mean(values[v]))

    def of_best(self, sweep: SweepConfig) -> dict[str, dict[str, list[float]]]:
        """Returns values by metric and arm, each arm at its best place in the grid."""
        best = {arm: self.best(sweep, arm) for arm in sweep.arms}
        found = {
            metric: {arm: values[variant] for arm, variant in best.items()} for metric, values in self.values.items()
        }
        rates = {arm: [self.best_rate(sweep, arm)] for arm in sweep.arms} if sweep.is_over_rates else {}
        return {**found, BEST_RATE: rates}

    def best_rate(self, sweep: SweepConfig, arm: str) -> float:
        """Returns the learning rate at which the mean of the first metric would be best, as far as the grid tells."""
        values = self.values[next(iter(sweep.metrics))]
        points = [(float(v.point[0][1]), statistics.mean(found)) for v, found in values.items() if v.arm == arm]
        sign = 1.0 if sweep.goal == "min" else -1.0
        return best_rate([rate for rate, _ in points], [sign * value for _, value in points])

    def plain(self) -> dict[str, Any]:
        return {metric: {v.name: found for v, found in values.items()} for metric, values in self.values.items()}


def is_finished(directory: Path, config: RunConfig) -> bool:
    """Whether a run has written its last line."""
    lines = read_metrics(directory / "metrics.jsonl")
    return bool(lines) and lines[-1]["step"] == config.steps and (directory / "model" / "config.json").exists()


def collect(sweep: SweepConfig, out: Path) -> Results:
    """Reads the last numbers of every run."""
    values: dict[str, dict[Variant, list[float]]] = {metric: {} for metric in sweep.metrics}
    for variant in sweep.variants():
        for seed in sweep.seeds:
            directory = run_directory(out, variant, seed)
            found = {"metrics": read_metrics(directory / "metrics.jsonl")[-1]}
            if evaluations := read_metrics(directory / "evaluations.jsonl"):
                found |= evaluations[-1]
            for metric, path in sweep.metrics.items():
                values[metric].setdefault(variant, []).append(lookup(found, path))
    return Results(values)


def lookup(values: Mapping[str, Any], path: str) -> float:
    """Returns the number at a dotted path.

    Raises:
        ValueError: there is none.
    """
    found: Any = values
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            known = ", ".join(found) if isinstance(found, Mapping) else "nothing"
            raise ValueError(f"metrics: {path} is not among the results; at {name!r} there is {known}")
        found = found[name]
    return float(found)


def show(sweep: SweepConfig, results: Results, console: Console) -> bool:
    """Prints all numbers, and whether what was expected came."""
    for metric, by_variant in results.values.items():
        table = Table("", *(f"seed {seed}" for seed in sweep.seeds), "mean", "spread", title=metric)
        for variant, values in by_variant.items():
            mark = " *" if sweep.grid and variant == results.best(sweep, variant.arm) else ""
            numbers = [*values, statistics.mean(values), max(values) - min(values)]
            table.add_row(variant.name + mark, *(f"{number:.3f}" for number in numbers))
        console.print(table)
    if sweep.is_over_rates:
        rates = {arm: results.best_rate(sweep, arm) for arm in sweep.arms}
        found = ", ".join(f"{arm} {rate:.3g} (2^{np.log2(rate):.2f})" for arm, rate in rates.items())
        console.print(f"best learning rate, by a parabola: {found}")
    met = True
    for expectation in sweep.expectations():
        holds, came, wanted = expectation.check(results.of_best(sweep))
        met &= holds
        console.print(f"{'holds' if holds else 'FAILS'}: {expectation.text} ({came:.3f}, {wanted:.3f})")
    if sweep.transfer:
        show_transfer(sweep, results, console)
    return met


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Returns where a parabola through the best three losses, over the logarithm of the rates, is lowest; at an end of
    the grid, the best rate of the grid."""
    order = np.argsort(rates)
    x, y = np.log2(np.asarray(rates)[order]), np.asarray(losses)[order]
    i = int(y.argmin())
    if not 0 < i < len(x) - 1:
        return float(2 ** x[i])
    a, b, _ = np.polyfit(x[i - 1 : i + 2], y[i - 1 : i + 2], 2)
    return float(2 ** (-b / (2 * a))) if a > 0 else float(2 ** x[i])


def show_transfer(sweep: SweepConfig, results: Results, console: Console) -> None:
    """Prints the best learning rate of the first arm, and what it means for the parameters of a larger model."""
    arm = next(iter(sweep.arms))
    rate = results.best_rate(sweep, arm)
    run = sweep.settings(Variant(arm, ((LEARNING_RATE, rate),)), sweep.seeds[0], Path())
    if run.metap is None:
        raise ValueError(f"transfer: {arm} has no metap; add metap.base_width and metap.base_depth to it")
    config = preset(sweep.transfer) if sweep.transfer in PRESETS else load_config(sweep.transfer)
    title = f"{sweep.transfer}, from {arm} at {rate:.3g}"
    table = Table("", "initial values x", "learning rate", "epsilon", title=title)
    for row in transferred(run.metap, config, rate, run.optimizer.eps):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"as settings: optimizer.learning_rate={rate:.3g} metap.base_width={run.metap.base_width} "
        f"metap.base_depth={run.metap.base_depth} metap.base_head_dim={run.metap.base_head_dim}"
    )


def write_page(path: Path, title: str, sweep: SweepConfig, results: Results) -> None:
    """Writes a page with every table and, for a grid of one key, a curve of each arm."""
    sections = []
    for metric, by_variant in results.values.items():
        header = ["", *(f"seed {seed}" for seed in sweep.seeds), "mean"]
        rows = [
            [variant.name, *(f"{value:.4f}" for value in values), f"{statistics.mean(values):.4f}"]
            for variant, values in by_variant.items()
        ]
        figures = []
        if len(sweep.grid) == 1 and len(rows) > len(sweep.arms):
            (key,) = sweep.grid
            for arm in sweep.arms:
                points = [(float(v.point[0][1]), statistics.mean(x)) for v, x in by_variant.items() if v.arm == arm]
                xs, ys = zip(*sorted(points), strict=True)
                if min(xs) > 0:
                    figures.append(report.curve(list(np.log2(xs)), ys, f"{arm}: mean {metric} by log2 of {key}"))
        content = report.charts(*figures), report.table(header, rows)
        sections.append(report.section(metric, sweep.metrics[metric], *content))
    verdicts = [(e.text, e.check(results.of_best(sweep))) for e in sweep.expectations()]
    numbers = [("holds" if holds else "fails", f"{text} ({came:.3f})") for text, (holds, came, _) in verdicts]
    subtitle = f"{len(sweep.arms)} arms, {len(sweep.seeds)} seeds"
    report.write_report(path, title=title, subtitle=subtitle, numbers=numbers, sections=sections)
