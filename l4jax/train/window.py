"""The numbers of the steps since the last line of metrics, always one step behind the device."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from l4jax.train.metrics import load_imbalance, means, router_entropy
from l4jax.train.objective import Numbers


class NotFinite(Exception):
    """A step whose loss or gradient is not a finite number; it changed nothing."""

    def __init__(self, step: int, loss: float, batch: dict[str, Any]):
        super().__init__(step, loss)
        self.step, self.loss, self.batch = step, loss, batch


class Window:
    """Collects what steps return. Reading a number waits for its step, so that of the step before is read.

    Args:
        source_names: of the mixture, in the order of their numbers.
        skip_not_finite: leave such steps out, and count them, instead of raising.
        flops_per_step: that the model asks for.
        peak_flops: of all devices, a second; None: not known, and so is MFU.
    """

    def __init__(
        self,
        source_names: Sequence[str],
        *,
        skip_not_finite: bool = False,
        flops_per_step: float = 0.0,
        peak_flops: float | None = None,
    ):
        self.last_loss, self.tokens_per_second = math.nan, 0.0
        self._source_names, self._skip = source_names, skip_not_finite
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._running: tuple[int, Numbers, dict[str, Any]] | None = None
        self._skipped = 0
        self._start_new()

    def _start_new(self) -> None:
        self._read: list[Numbers] = []
        self._steps, self._tokens, self._started = 0, 0, time.perf_counter()

    def add(self, step: int, numbers: Numbers, batch: dict[str, Any]) -> None:
        """Takes over what a step will have returned, and reads what the step before returned.

        Raises:
            NotFinite: the step before was not, and such steps are not to be skipped.
        """
        self._read_running()
        self._running = step, numbers, batch

    def _read_running(self) -> None:
        if self._running is None:
            return
        step, numbers, batch = self._running
        numbers, self._running = jax.device_get(numbers), None
        self._steps += 1
        self._tokens += int(numbers["all_tokens"])
        self.tokens_per_second = self._tokens / (time.perf_counter() - self._started)
        if numbers["finite"]:
            self._read.append(numbers)
            self.last_loss = float(numbers["loss_now"])
        elif self._skip:
            self._skipped += 1
        else:
            raise NotFinite(step, float(numbers["loss_now"]), batch)

    def restart_clock(self) -> None:
        """Leaves out of the speed what took time beside the steps: an evaluation."""
        self._tokens, self._steps, self._started = 0, 0, time.perf_counter()

    def close(self) -> dict[str, Any]:
        """Waits for the step that runs, and returns the numbers of the window as plain values."""
        self._read_running()
        seconds = time.perf_counter() - self._started
        steps, speed, num_steps = self._read, self.tokens_per_second, self._steps
        self._start_new()
        values: dict[str, Any] = {"tokens_per_second": round(speed, 1), "skipped_steps": self._skipped}
        if self._peak_flops:
            values["mfu"] = round(self._flops_per_step * num_steps / seconds / self._peak_flops, 4)
        if not steps:  # all were skipped
            return {"loss": None, **values}
        buckets = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *(numbers["buckets"] for numbers in steps))
        values = means(buckets, self._source_names) | values
        for name in ("grad_norm", "grad_norms", "update_ratios"):
            found = jax.tree.map(lambda *parts: float(np.mean(parts)), *(numbers[name] for numbers in steps))
            values[name] = found
        if "router_load" in steps[0]:
            load = np.sum([numbers["router_load"] for numbers in steps], axis=0).tolist()
            values |= {
                "router_load": load,
                "load_imbalance": round(load_imbalance(load), 3),
                "router_entropy": round(router_entropy(load), 4),
            }
        return values
