"""Long work in small pieces: in parallel, with bounded memory, a journal of what is done, and a progress bar.

A piece is written by one thread and then entered into the journal with its checksum. After a kill the same call
compares what the journal says with what is there, and does the rest.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

JOURNAL = ".conversion.jsonl"
WORKERS = min(max(2, os.cpu_count() or 1), 6)
"""Pieces in flight. Each takes about three times its size in memory, so there is an upper bound."""


@dataclass(frozen=True)
class Piece:
    """One unit of work."""

    name: str
    """Unique within the job."""
    size: int
    """Bytes written."""
    write: Callable[[], str]
    """Writes the piece and returns its checksum."""
    checksum: Callable[[], str | None]
    """Returns the checksum of what is on disk, None if nothing is."""


class Journal:
    """What is done, one JSON line each, behind a first line that says what the work is."""

    def __init__(self, directory: Path, job: Mapping[str, object]):
        """Opens the journal in `directory`, which is made if needed.

        Raises:
            FileExistsError: the directory holds other unfinished work.
        """
        self.path = directory / JOURNAL
        self.done: dict[str, str] = {}
        self._lock = threading.Lock()
        first = json.dumps(job, sort_keys=True)
        if self.path.is_file():
            lines = self.path.read_text().split("\n")
            if lines[0] != first:
                raise FileExistsError(
                    f"{directory} is what is left of another conversion (other source, options or version); "
                    "remove it, or choose another destination"
                )
            for line in lines[1:-1]:  # what follows the last line break was cut off by a kill
                entry = json.loads(line)
                self.done[entry["piece"]] = entry["checksum"]
            kept = "\n".join(lines[:-1]) + "\n"
        elif directory.is_dir() and {path.name for path in directory.iterdir()} - {f"{JOURNAL}.new"}:
            raise FileExistsError(f"{directory} is in the way; remove it, or choose another destination")
        else:
            directory.mkdir(parents=True, exist_ok=True)
            kept = first + "\n"
        temporary = directory / f"{JOURNAL}.new"
        temporary.write_text(kept)
        temporary.rename(self.path)
        self._file = open(self.path, "a")  # noqa: SIM115, closed in close()

    def add(self, piece: str, checksum: str) -> None:
        line = json.dumps({"piece": piece, "checksum": checksum}) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            self.done[piece] = checksum

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def work(
    pieces: list[Piece], journal: Journal, title: str, finished: Callable[[Piece], object] = lambda piece: None
) -> None:
    """Does the pieces that the journal lacks, or whose checksum is not the journal's.

    The first error stops the work and is raised.

    Args:
        finished: called, by one thread, with every piece as soon as it stands, whether written now or before.
    """
    total = sum(piece.size for piece in pieces)
    with progress(title, total) as advance, ThreadPoolExecutor(WORKERS) as pool:

        def finish(piece: Piece, checksum: str) -> None:
            journal.add(piece.name, checksum)
            advance(piece.size)
            finished(piece)

        # Nothing was synced to disk before the kill, if it was the machine that died.
        kept = [piece for piece in pieces if piece.name in journal.done]
        todo = [piece for piece in pieces if piece.name not in journal.done]
        for piece, checksum in zip(kept, pool.map(lambda piece: piece.checksum(), kept), strict=True):
            if checksum == journal.done[piece.name]:
                advance(piece.size)
                finished(piece)
            else:
                todo.append(piece)
        _in_parallel(pool, todo, finish)


def _in_parallel(pool: ThreadPoolExecutor, todo: list[Piece], finish: Callable[[Piece, str], None]) -> None:
    waiting, running = iter(todo), {}
    try:
        while True:
            while len(running) < WORKERS and (piece := next(waiting, None)) is not None:
                running[pool.submit(piece.write)] = piece
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finish(running.pop(future), future.result())
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar with rate and time left on a terminal; yields the function that advances it by bytes."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)


def check_space(directory: Path, needed: int) -> None:
    """Raises OSError when the disk of `directory` cannot take `needed` bytes more."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"{directory} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed; make room or use another disk"
        )
