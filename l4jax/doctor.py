"""`l4jax doctor`: what this machine has, what is missing, and the line that installs it."""

import argparse
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

WIDTH = 12
"""Columns of the labels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 if something is missing without which l4jax cannot work."""
    core = list(requirements("l4jax"))
    absent = [name for name in core if installed(name) is None]
    print_line("l4jax", f"{metadata.version('l4jax')} · Python {platform.python_version()} · {platform.platform()}")
    print_line("packages", ", ".join(f"{name} {installed(name)}" for name in core if name not in absent))
    if absent:
        print_line("missing", f"{', '.join(absent)}: {pip_line()}")
    print_line("devices", devices() if "jax" not in absent else "unknown without jax")
    print_line("memory", memory())
    print_line("disk", disk(Path.cwd()))
    for extra in metadata.metadata("l4jax").get_all("Provides-Extra") or ():
        missing = [name for name in requirements("l4jax", extra) if installed(name) is None]
        print_line(f"[{extra}]", f"missing {', '.join(missing)}: {pip_line(extra)}" if missing else "complete")
    return 1 if absent else 0


def print_line(label: str, text: str) -> None:
    print(f"{label:{WIDTH}} {text}")


def requirements(distribution: str, extra: str | None = None) -> Iterator[str]:
    """Yields the names of the packages that a distribution, or one of its extras, needs directly."""
    for line in metadata.requires(distribution) or ():
        requirement, _, marker = line.partition(";")
        wanted = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        if (wanted.group(1) if wanted else None) != extra:
            continue
        name, extras = re.match(r"([\w.-]+)\s*(?:\[([^\]]*)\])?", requirement).groups()
        if not extras or installed(name) is None:
            yield name
            continue
        # "jax[tpu]": jax is here anyway, what matters is what its extra adds.
        for inner in extras.split(","):
            yield from requirements(name, inner.strip())


def installed(name: str) -> str | None:
    """Returns the version of a distribution, None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def pip_line(extra: str | None = None) -> str:
    """Returns the command that installs l4jax with an extra: from a checkout if it runs from one."""
    suffix = f"[{extra}]" if extra else ""
    root = Path(__file__).parents[1]
    target = f"-e '{root}{suffix}'" if (root / "pyproject.toml").is_file() else f"'l4jax{suffix}'"
    return f"{sys.executable} -m pip install {target}"


def devices() -> str:
    import jax

    described = []
    for device in jax.devices():
        stats = device.memory_stats() or {}
        size = f", {stats['bytes_limit'] / 2**30:.1f} GiB" if "bytes_limit" in stats else ""
        described.append(f"{device.device_kind}{size}")
    kinds = {kind: described.count(kind) for kind in dict.fromkeys(described)}
    return f"{jax.default_backend()}: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def memory() -> str:
    cores = f"{os.cpu_count()} cores"
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return cores
    sizes = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in meminfo.read_text().splitlines()}
    return f"{sizes['MemAvailable']:.1f} of {sizes['MemTotal']:.1f} GiB free, {cores}"


def disk(directory: Path) -> str:
    usage = shutil.disk_usage(directory)
    return f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in {directory}"
