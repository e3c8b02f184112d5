"""How a run shows itself: a bar with loss, tokens a second and time left, or plain lines where there is no terminal."""

import math

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 10  # lines that a whole run prints without a terminal


class TrainingProgress:
    """Use as a context; `advance` after every step."""

    def __init__(self, total_steps: int, done_steps: int, console: Console | None = None):
        self._console = console or Console()
        self._total = total_steps
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=done_steps, loss="", speed=0.0)
        if done_steps:
            self._console.print(f"going on from step {done_steps:,} of {total_steps:,}")

    def advance(self, step: int, loss: float, tokens_per_second: float) -> None:
        shown = "" if math.isnan(loss) else f"loss {loss:.3f}"  # none is known yet; a loss that is nan stops the run
        self._bar.update(self._task, completed=step, loss=shown, speed=tokens_per_second)
        if not self._console.is_terminal and step % max(1, self._total // LINES) == 0:
            self._console.print(f"step {step:,} of {self._total:,}  {shown}  {tokens_per_second:,.0f} tokens/s")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
