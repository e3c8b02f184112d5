"""Every file in configs/ says what is true: it loads, and pods have the memory that it asks for."""

import re
from pathlib import Path

import pytest

from l4jax.chips import CHIPS
from l4jax.plan import count_devices, job_of_run
from l4jax.plan.arithmetic import needs
from l4jax.sharding import parse_sizes
from l4jax.sweep.config import load_sweep
from l4jax.train.config import load_run_config

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_loads_and_names_its_command(path):
    load = load_sweep if path.parent.name == "experiments" else load_run_config
    load(path)
    text = path.read_text()
    assert f"{'sweep' if path.parent.name == 'experiments' else 'train'} {path.relative_to(ROOT)}" in text
    assert "Hardware:" in text


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "tpu"], ids=lambda path: path.stem)
def test_a_pod_has_the_memory_by_arithmetic(path):
    """`python -m pytest -m pod tests/plan/test_pod.py` compiles them."""
    (topology,) = set(re.findall(r"--topology (\S+)", path.read_text()))
    job, mesh = job_of_run(path)
    sizes = parse_sizes(mesh)
    devices = 1
    for size in sizes.values():
        devices *= size
    assert devices == count_devices(topology)
    assert needs(job, sizes).total < CHIPS[topology.partition(":")[0]].hbm_bytes
