"""A checkpoint as parameters: whatever the format, `arrays` maps stacked parameter paths to lazy arrays."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from l4jax.checkpoint import names
from l4jax.checkpoint.lazy import Joined, LazyArray, Stacked
from l4jax.checkpoint.names import Row
from l4jax.config import Llama4Config


@dataclass
class Source:
    """An opened checkpoint. Nothing but headers has been read."""

    directory: Path
    kind: str
    """"hf", "meta" or "l4jax"."""
    config: Llama4Config
    arrays: dict[str, LazyArray]
    weight_files: list[Path]
    ignored: dict[str, str] = field(default_factory=dict)
    """Tensors that are left out on purpose, with the reason."""
    release: Callable[[], None] = lambda: None
    """Hands mapped pages back, so that resident memory stays small."""
    quantize: str | None = None
    """Scheme of an l4jax checkpoint in few bits, whose quantised parameters are two arrays, `.values` and `.scales`."""

    def identity(self) -> list:
        """Returns what tells one checkpoint, and one state of it, from another, without reading weights."""
        directory = self.directory
        files = [*self.weight_files, *directory.glob("config.json"), *directory.glob("params.json")]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def choose_rows(rows: Iterable[Row], available: Iterable[str]) -> list[Row]:
    """Returns the rows of the table whose tensor is there; the first one of several forms of a parameter."""
    available, taken, chosen = set(available), set(), []
    for row in rows:
        paths = {(part.path, part.expert) for part in row.parts}
        if row.key in available and not paths & taken:
            chosen.append(row)
            taken |= paths
    return chosen


def account(
    directory: Path, rows: Sequence[Row], chosen: Sequence[Row], available: Iterable[str], ignored: Mapping[str, str]
) -> None:
    """Checks that every tensor is used or ignored with a reason, and that every parameter has its tensor.

    Raises:
        ValueError: names all missing and all unexpected tensors.
    """
    used = {row.key for row in chosen}
    covered = {(part.path, part.expert) for row in chosen for part in row.parts}
    wanted: dict[tuple, str] = {}
    for row in rows:
        for part in row.parts:
            wanted.setdefault((part.path, part.expert), row.key)
    missing = sorted({key for place, key in wanted.items() if place not in covered})
    unexpected = sorted(set(available) - used - set(ignored))
    problems = sorted((("missing", missing), ("unexpected", unexpected)), key=lambda item: len(item[1]))
    lines = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems if keys]
    if lines:
        raise ValueError(
            f"{directory}: the tensors do not fit its config; {'; '.join(lines)}. "
            "Check that config.json belongs to these weights and that every file is there"
        )


def _some(keys: Sequence[str], limit: int = 12) -> str:
    more = len(keys) - limit
    return ", ".join(keys[:limit]) + (f" and {more} more" if more > 0 else "")


def stack_layers(config: Llama4Config, layers: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Returns the stacked form of parameters given by layer (`layers.7.x`), nothing read."""
    stacks: dict[str, dict[int, LazyArray]] = {}
    arrays: dict[str, LazyArray] = {}
    for path, array in layers.items():
        place, position = names.locate(config, path)
        if position is None:
            arrays[place] = array
        else:
            stacks.setdefault(place, {})[position] = array
    for place, members in stacks.items():
        arrays[place] = Stacked(tuple(members[position] for position in sorted(members)))
    return arrays


def check_shape(where: str, key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ValueError when a tensor has not the shape that the config asks for."""
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{where}: {key} has shape {list(shape)}, the config asks for {list(expected)}; "
            "the config belongs to other weights, or the file is damaged"
        )


def gather_parts(pieces: Mapping[tuple[str, int | None], LazyArray]) -> dict[str, LazyArray]:
    """Returns path -> array of pieces keyed (path, expert); single experts are put on one axis, in order."""
    arrays: dict[str, LazyArray] = {}
    experts: dict[str, dict[int, LazyArray]] = {}
    for (path, expert), array in pieces.items():
        if expert is None:
            arrays[path] = array
        else:
            experts.setdefault(path, {})[expert] = array
    for path, members in experts.items():
        arrays[path] = Stacked(tuple(members[e] for e in sorted(members)))
    return arrays


def join(arrays: Sequence[LazyArray], axis: int) -> LazyArray:
    return arrays[0] if len(arrays) == 1 else Joined(tuple(arrays), axis)
