"""`l4jax sweep FILE`: one run in several variants and with several seeds, side by side; an experiment is one file.

Each run is an ordinary `l4jax train` in a directory of its own, so that a sweep that was stopped goes on, and any of
its runs can be looked at. On a machine with several cores, `--jobs` runs at a time have cores of their own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from l4jax.sweep.config import SweepConfig, Variant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, help="YAML file of a sweep, for example configs/experiments/captioning.yaml"
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="over the file's: seeds=[0] run.steps=100")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on cores of their own (default: 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where runs go (default: runs/ and the file's name)")


def run(args: argparse.Namespace) -> int:
    """Trains what is not trained yet, prints a table and writes a page; 1 if something expected did not come."""
    from rich.console import Console

    from l4jax.sweep.config import load_sweep
    from l4jax.sweep.results import collect, show, write_page

    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} must be at least 1")
    sweep, console = load_sweep(args.config, args.settings), Console(highlight=False)
    out = args.out or Path("runs") / args.config.stem
    for arm in sweep.arms:  # a later arm may need what an earlier one leaves
        train_all(sweep, [v for v in sweep.variants() if v.arm == arm], out, args.jobs, console)
    results = collect(sweep, out)
    (out / "sweep.json").write_text(json.dumps(results.plain(), indent=1) + "\n")
    met = show(sweep, results, console)
    write_page(out / "sweep.html", args.config.stem, sweep, results)
    console.print(f"page: {out / 'sweep.html'}")
    return 0 if met else 1


def train_all(sweep: "SweepConfig", variants: list["Variant"], out: Path, jobs: int, console: "Console") -> None:
    """Trains variants with every seed, `jobs` at a time.

    Raises:
        ValueError: a run failed; its own message is in it.
    """
    import yaml

    from l4jax.sweep.config import run_directory
    from l4jax.sweep.results import is_finished
    from l4jax.train.config import run_config_to_dict

    waiting = []
    for seed in sweep.seeds:
        for variant in variants:
            directory = run_directory(out, variant, seed)
            config = sweep.settings(variant, seed, out)
            if is_finished(directory, config):
                continue
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "run.yaml").write_text(yaml.safe_dump(run_config_to_dict(config), sort_keys=False))
            waiting.append(directory)
    cores = sorted(os.sched_getaffinity(0))
    slots = [set(cores[i::jobs]) or set(cores) for i in range(jobs)]
    running: dict[int, tuple[Path, float, subprocess.Popen]] = {}
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    directory = waiting.pop(0)
                    running[slot] = directory, time.monotonic(), start(directory, slots[slot])
            for slot, (directory, started, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if process.returncode:
                    raise ValueError(f"{directory.name} failed: {last_words(directory / 'log.txt')}")
                console.print(f"  {directory.name}: {time.monotonic() - started:.0f} s, {len(waiting)} to go")
            time.sleep(0.2)
    finally:
        for _, _, process in running.values():  # they save and end
            process.terminate()
        for _, _, process in running.values():
            process.wait()


def last_words(log: Path) -> str:
    """Returns the error that a run ended with; libraries may have said something after it."""
    lines = log.read_text().strip().splitlines() or ["it said nothing"]
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), lines[-1])


def start(directory: Path, cores: set[int]) -> subprocess.Popen:
    """Starts one run on some cores; what it says goes to `log.txt`."""
    command = [sys.executable, "-m", "l4jax", "train", str(directory / "run.yaml"), "--out", str(directory)]
    with (directory / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    os.sched_setaffinity(process.pid, cores)  # before it counts them
    return process
