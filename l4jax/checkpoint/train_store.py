"""Checkpoints of a training run: parameters, optimiser, data iterator, step and run facts, in one Orbax step.

Saves run in the background and appear whole or not at all; a save that was killed leaves a temporary directory that
the next run removes. `Interruption` turns SIGTERM and Ctrl-C into "finish the step, save, leave".
"""

import signal
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from l4jax.checkpoint.manifest import MANIFEST, check_sizes, read_manifest, write_manifest
from l4jax.host import is_remote


class TrainStore:
    """Numbered checkpoints in a directory, the newest `keep` and the best of them.

    Several processes save together, each its own part; all of them must see the directory, and make the same calls.

    Args:
        directory: on disk, or in a bucket (`open_path("gs://...")`), where there is no manifest: what was stored is
            guarded by the checksums of the bucket.
        keep: how many of the newest to keep; None keeps all.
        best_metric: name of a number in the `metrics` of `save`; the checkpoint with the smallest is never deleted.
    """

    def __init__(self, directory: str | Path, *, keep: int | None = 2, best_metric: str | None = None):
        self.directory = directory if is_remote(directory) else Path(directory).absolute()
        self._seals = jax.process_index() == 0 and not is_remote(directory)
        policies = [] if keep is None else [ocp.checkpoint_managers.LatestN(keep)]
        if best_metric and policies:
            best = ocp.checkpoint_managers.BestN(
                n=1, get_metric_fn=lambda metrics: -metrics[best_metric], keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies) if policies else None,
            best_fn=(lambda metrics: metrics[best_metric]) if best_metric else None,
            best_mode="min",
            cleanup_tmp_directories=True,
            create=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._sealer = ThreadPoolExecutor(1)
        self._pending: tuple[threading.Event, Future] | None = None

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: Any = None,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save; the arrays may be donated or changed as soon as this returns.

        Args:
            state: tree of arrays: parameters, optimiser state, random keys as data.
            data_iterator: grain iterator whose position is saved.
            extra: JSON facts: the run's config, counters.
            metrics: numbers by which checkpoints are compared.
        """
        items = {"state": ocp.args.StandardSave(state), "extra": ocp.args.JsonSave(dict(extra or {}))}
        if data_iterator is not None:
            items["data"] = grain.checkpoint.CheckpointSave(data_iterator)
        self.wait()
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
        if self._seals:
            finished = threading.Event()
            self._pending = finished, self._sealer.submit(_seal, self.directory / str(step), finished)

    def restore(
        self, abstract_state: Any, data_iterator: Any = None, step: int | None = None
    ) -> tuple[Any, int, dict[str, Any]]:
        """Returns state, step and extra facts; the data iterator is set to its saved position.

        Args:
            abstract_state: the same tree of `jax.ShapeDtypeStruct`, with the shardings wanted.
            step: None takes the newest.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: its files are missing or cut, the message names the steps that are left; or it was saved by
                another number of processes, so that none has the place of this one in the data.
        """
        step = self.latest_step() if step is None else step
        steps = self._manager.all_steps()
        if step is None or step not in steps:
            found = f"there are {sorted(steps)}" if steps else "there is none"
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; {found}")
        self.wait()
        folder = self.directory / str(step)
        if not is_remote(folder) and (folder / MANIFEST).is_file():  # a kill can come between the save and its manifest
            check_sizes(folder, read_manifest(folder))
        items = {"state": ocp.args.StandardRestore(abstract_state), "extra": ocp.args.JsonRestore()}
        if data_iterator is not None:
            _check_processes(folder / "data")
            items["data"] = grain.checkpoint.CheckpointRestore(data_iterator)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return restored["state"], step, restored["extra"]

    def latest_step(self) -> int | None:
        """Returns the newest finished step, None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the kept step with the smallest `best_metric`."""
        return self._manager.best_step()

    def all_steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when every save is on disk with its manifest; raises what went wrong in the background."""
        try:
            self._manager.wait_until_finished()
        finally:
            if self._pending:
                finished, sealed = self._pending
                self._pending = None
                finished.set()
                sealed.result()

    def close(self) -> None:
        self.wait()
        self._sealer.shutdown()
        self._manager.close()

    def __enter__(self) -> "TrainStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _seal(folder: Path, finished: threading.Event) -> None:
    """Writes the checksums of a step as soon as it is there.

    Orbax has none: it would restore a flipped bit as a number. The next save waits for this, so no step is deleted
    meanwhile.
    """
    while not folder.is_dir() and not finished.wait(0.1):
        pass
    if folder.is_dir():  # else the save failed, and `wait` says so
        write_manifest(folder, {})


def _check_processes(folder: Path) -> None:
    """Checks that this process finds its own place in the data."""
    saved = {int(file.stem.rpartition("-of-")[2]) for file in folder.glob("process_*-of-*.json")}
    if saved and jax.process_count() not in saved:
        (count,) = saved
        raise ValueError(
            f"{folder} was saved by {count} processes, here there are {jax.process_count()}; each has read its "
            f"own part of the data, so go on with {count}, or start anew from the weights"
        )


class Interruption:
    """Notes SIGTERM and Ctrl-C instead of dying of them. A second signal ends the program as usual.

    Of several processes any one may get the signal, and all must stop at the same step. jax agrees on it: its own
    handler of SIGTERM, set by `jax.distributed.initialize`, stays, and Ctrl-C is passed on to it.

    with Interruption() as stop:
        for step in ...:
            ...
            if stop.requested(store, step):
                store.save(step, ...); break
    """

    def __init__(self):
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if jax.process_count() > 1:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self.signal = number

    def requested(self, store: TrainStore, step: int) -> bool:
        """Whether to save and leave now. On many hosts all of them get the same answer at the same step."""
        if jax.process_count() > 1 and store._manager.reached_preemption(step):
            self.signal = signal.SIGTERM
        return self.signal is not None
