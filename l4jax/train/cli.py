"""`l4jax train CONFIG`: runs what a file of settings describes, or goes on with it."""

import argparse
import signal
from pathlib import Path

from l4jax.host import keep_freed_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of settings, for example configs/demo.yaml")
    add_run_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where checkpoints and metrics go (default: runs/ and the file's name)"
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
    import jax

    from l4jax.train.config import load_run_config
    from l4jax.train.data import RunData
    from l4jax.train.loop import train

    config = load_run_config(args.config, args.settings)
    out = args.out or Path("runs") / args.config.stem
    data = RunData(config, out / "data")
    batches = data.training_batches((jax.process_index(), jax.process_count()))
    trained = train(config, batches, out, resume=args.resume)
    if trained.interrupted_by is not None:
        return interrupted(trained.interrupted_by, trained.steps)
    print(f"{trained.steps:,} steps; checkpoints and metrics are in {out}")
    return 0


def interrupted(number: int, steps: int) -> int:
    """Says how to go on after an interruption; returns the exit code that belongs to the signal."""
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}.get(number, f"signal {number}")
    print(f"stopped by {name} and saved after step {steps:,}; the same command goes on from there")
    return 128 + number
