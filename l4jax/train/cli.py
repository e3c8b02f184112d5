"""`l4jax train CONFIG`: runs what a file of settings describes, or goes on with it."""

import argparse
import signal
from pathlib import Path

from l4jax.host import is_remote, keep_freed_memory, open_path, start_distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of settings, for example configs/demo.yaml")
    add_run_arguments(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where checkpoints and metrics go, a directory or gs://... (default: runs/ and the file's name)",
    )
    parser.add_argument(
        "--profile", metavar="FROM:TO", help="record these steps for XProf in DIR/profile, for example 20:23"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `train` and `demo` share."""
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="over the file's: optimizer.learning_rate=1e-3"
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto: go on if there is a checkpoint; never: delete it and start anew; must: fail without one",
    )


def run(args: argparse.Namespace) -> int:
    keep_freed_memory()
    start_distributed()
    import jax

    from l4jax.train.config import load_run_config
    from l4jax.train.data import RunData
    from l4jax.train.export import export
    from l4jax.train.loop import train

    config = load_run_config(args.config, args.settings)
    local = Path("runs") / args.config.stem
    out = open_path(args.out) if args.out else local
    name = "data" if jax.process_count() == 1 else f"data-{jax.process_index()}"  # no two build the same files
    data = RunData(config, (local if is_remote(out) else out) / name)
    trained = train(config, data, out, resume=args.resume, profile=parse_steps(args.profile))
    if jax.process_index() > 0:
        return 0 if trained.interrupted_by is None else 128 + trained.interrupted_by
    if trained.interrupted_by is not None:
        return interrupted(trained.interrupted_by, trained.steps)
    where = f"{trained.steps:,} steps; checkpoints and metrics are in {out}"
    if jax.process_count() == 1 and not is_remote(out):
        where += f", the model in {export(trained.model(), data.processor.tokenizer, out / 'model')}"
    print(where)
    return 0


def parse_steps(text: str | None) -> range:
    """Returns the steps that `20:23` names, from 0; none for None.

    Raises:
        ValueError: it names no steps.
    """
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ValueError(f"--profile {text}: expected FROM:TO, the first step and the one after the last: 20:23")
    return range(int(first), int(last))


def interrupted(number: int, steps: int) -> int:
    """Says how to go on after an interruption; returns the exit code that belongs to the signal."""
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}.get(number, f"signal {number}")
    print(f"stopped by {name} and saved after step {steps:,}; the same command goes on from there")
    return 128 + number
