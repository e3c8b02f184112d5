"""Tokens a second that a run's data pipeline makes, alone: from files to packed batches, for some numbers of workers.

    python scripts/bench_data.py configs/demo.yaml                      # scenes of digits; builds them first, once
    python scripts/bench_data.py web.jsonl --workers 0 2 data.row_tokens=8192
    python scripts/bench_data.py web.jsonl -m scout data.tokenizer=DIR   # words and tiles as Scout has them

Processor seconds are those of this process and of its workers together: on a machine that does other things as well,
they say more than the clock.
"""

import argparse
import contextlib
import resource
import tempfile
import time
from pathlib import Path

from l4jax.data.cli import open_settings
from l4jax.data.streams import make_batches

ROWS = 8  # of a batch, where no config says it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="config of a run, or a file of documents")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("-m", "--model", help="whose tiles to cut")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="worker processes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each measurement (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="where scenes are kept for the next time")
    args = parser.parse_intermixed_args()
    args.skip_malformed = False
    is_run = args.source.endswith((".yaml", ".yml"))
    with tempfile.TemporaryDirectory() as temporary:
        for workers in args.workers:
            words = [*args.settings, f"data.num_workers={workers}", *([] if is_run else [f"data.rows={ROWS}"])]
            given = argparse.Namespace(**{**vars(args), "settings": words})
            settings, processor = open_settings(given, is_run=is_run)
            data = make_batches(settings.data, processor, settings.seed, args.directory or Path(temporary))
            measure(data, workers, args.seconds)


def measure(data, workers: int, seconds: float) -> None:
    """Prints one line; processes start before the clock does."""
    with contextlib.closing(iter(data)) as batches:
        next(batches)
        tokens = tiles = room = 0
        began, used = time.perf_counter(), processor_seconds()
        while time.perf_counter() - began < seconds:
            batch = next(batches)
            tokens += int((batch["segment_ids"] > 0).sum())
            room += batch["segment_ids"].size
            tiles += 0 if batch["tiles"] is None else int(batch["tiles"].any(axis=(2, 3, 4)).sum())
        elapsed = time.perf_counter() - began
    # Workers count only once they have ended, so their start is in it too.
    spent = processor_seconds() - used
    print(
        f"{workers} workers: {tokens / elapsed:,.0f} tokens/s ({tokens / spent:,.0f} a processor second), "
        f"{tiles / elapsed:,.0f} tiles/s, rows {tokens / room:.1%} full"
    )


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":  # worker processes import this file
    main()
