"""What came out of a sweep: numbers by variant and seed, as a table, a page and a verdict."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from l4jax import report
from l4jax.sweep import lookup
from l4jax.sweep.config import SweepConfig, Variant, run_directory
from l4jax.train.config import RunConfig
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
        return {
            metric: {arm: values[variant] for arm, variant in best.items()} for metric, values in self.values.items()
        }

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


def show(sweep: SweepConfig, results: Results, console: Console) -> bool:
    """Prints all numbers, and whether what was expected came."""
    for metric, by_variant in results.values.items():
        table = Table("", *(f"seed {seed}" for seed in sweep.seeds), "mean", "spread", title=metric)
        for variant, values in by_variant.items():
            mark = " *" if sweep.grid and variant == results.best(sweep, variant.arm) else ""
            numbers = [*values, statistics.mean(values), max(values) - min(values)]
            table.add_row(variant.name + mark, *(f"{number:.3f}" for number in numbers))
        console.print(table)
    met = True
    for expectation in sweep.expect:
        holds, came, wanted = expectation.check(results.of_best(sweep))
        met &= holds
        console.print(f"{'holds' if holds else 'FAILS'}: {expectation.text} ({came:.3f}, {wanted:.3f})")
    return met


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
    verdicts = [(e.text, e.check(results.of_best(sweep))) for e in sweep.expect]
    numbers = [("holds" if holds else "fails", f"{text} ({came:.3f})") for text, (holds, came, _) in verdicts]
    subtitle = f"{len(sweep.arms)} arms, {len(sweep.seeds)} seeds"
    report.write_report(path, title=title, subtitle=subtitle, numbers=numbers, sections=sections)
