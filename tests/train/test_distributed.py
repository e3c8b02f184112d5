"""Two real processes, joined by `jax.distributed`, train as one process with all their devices does."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from l4jax.host import PROCESS, open_path, start_distributed
from l4jax.sharding import batch_part, make_mesh
from l4jax.topology import topology_devices
from l4jax.train import loop
from l4jax.train.config import load_run_config
from l4jax.train.data import RunData
from l4jax.train.metrics import read_metrics

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
STEPS = 8
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # compiled in half the time
SETTINGS = [
    *(f"steps={STEPS}", "log_every=1", "save_every=1000", "parallel.mesh=fsdp=2,expert=2"),
    *(
        *(f"data.sources.scenes.digits.{name}" for name in ("train_scenes=24", "eval_scenes=4", "warm_up_scenes=6")),
        "data.rows=4",
    ),
    *("optimizer.warmup_steps=2", "model.text_config.hidden_size=64", "model.text_config.num_hidden_layers=1"),
    *("model.text_config.no_rope_layers=[1]", "model.text_config.num_local_experts=2"),
    *("model.vision_config.num_hidden_layers=1", "model.vision_config.hidden_size=48"),
    "evaluate={held_out: {max_batches: 2, sources: {captions: {captions: {part: held_out}}}}}",
]


class BothShards:
    """The batches of two processes as one process sees them: the rows of the first, then those of the second."""

    def __init__(self, data: RunData):
        self._shards = [iter(data.training_batches((index, 2))) for index in range(2)]

    def __iter__(self):
        return self

    def __next__(self):
        one, other = map(next, self._shards)
        return {name: np.concatenate([one[name], other[name]]) for name in one}

    def close(self):
        pass

    def get_state(self) -> bytes:
        return b""


class DataOfBoth(RunData):
    def training_batches(self, shard):
        return BothShards(RunData(self._config, self._directory))


def start(command: list[str], cache: Path) -> list[subprocess.Popen]:
    """Starts the same command twice, on two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        **dict(zip(PROCESS[:2], (address, "2"), strict=True)),
    }
    return [
        subprocess.Popen(
            command, env=shared | {PROCESS[2]: str(index)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]


def finish(processes: list[subprocess.Popen], code: int) -> list[str]:
    """Waits, and returns what each printed."""
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, results, strict=True):
        assert process.returncode == code, out + err
    return [out for out, _ in results]


@pytest.mark.slow
def test_two_processes_train_stop_and_go_on_as_one(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "l4jax", "train", str(DEMO), *SETTINGS, "--out", str(out), "--debug"]
    processes = start(command, tmp_path / "compiled")
    while not (out / "config.yaml").exists() and all(process.poll() is None for process in processes):
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)  # while the step compiles; one is told, both stop at the same step
    first, second = finish(processes, 128 + signal.SIGTERM)
    (step,) = (int(path.name) for path in (out / "checkpoints").iterdir())
    assert f"saved after step {step}" in first
    assert 0 < step < STEPS
    assert "step" not in second

    first, second = finish(start(command, tmp_path / "compiled"), 0)
    assert f"going on from step {step}" in first
    assert "step" not in second

    config = load_run_config(DEMO, SETTINGS)
    data = DataOfBoth(config, tmp_path / "data")
    loop.train(config, data, tmp_path / "one", console=Console(quiet=True))
    together, alone = (read_metrics(path / "metrics.jsonl") for path in (out, tmp_path / "one"))
    assert [line["step"] for line in together] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([line["loss"] for line in together], [line["loss"] for line in alone], rtol=2e-4)
    evaluated, expected = (read_metrics(path / "evaluations.jsonl")[-1] for path in (out, tmp_path / "one"))
    assert evaluated["held_out"]["documents"] == expected["held_out"]["documents"] > 0
    assert evaluated["held_out"]["loss"] == pytest.approx(expected["held_out"]["loss"], rel=1e-3)
    assert [line["router_load"] for line in together[:5]] == [line["router_load"] for line in alone[:5]]


KEPT = """
import sys
from types import SimpleNamespace
from l4jax.host import start_distributed
start_distributed()
import jax, jax.numpy as jnp, numpy as np
from l4jax.sharding import batch_part, make_mesh, place
from l4jax.train.distill import SoftTargets
from l4jax.train.soft_targets import CachedTargets
from l4jax.train.step import BATCH_AXES
mesh, loads = make_mesh(fsdp=2, tensor=2), []
part, parts = batch_part(mesh, 4)
numbers = np.arange(4 * 8, dtype=np.int32).reshape(4, 8)
local = {name: numbers[part * 2 : part * 2 + 2] for name in ("ids", "positions", "segment_ids")} | {"tiles": None}
def speak(weights, rows):
    ids = rows["ids"][..., None] + weights * jnp.arange(3)
    return SoftTargets(ids, -ids.astype(jnp.float32), ids[..., 0] / 2)
def teach(only):
    cached = CachedTargets(sys.argv[1], SimpleNamespace(identity=list), top_k=3, precision="float32", speak=speak,
        load=lambda: loads.append(1) or jnp.int32(100), mesh=mesh, parts=parts)
    rows = {name: None if value is None else value[:, only] for name, value in local.items()}
    with jax.set_mesh(mesh):
        found = cached(rows, place(rows, mesh, BATCH_AXES, parts))["teacher"]
        whole = numbers[:, only]
        wrong = [(found.ids != whole[..., None] + 100 * np.arange(3)).sum(), (found.target != whole / 2).sum()]
        return sum(map(int, jax.jit(lambda *x: x)(*wrong)))
everything, half = slice(0, 8), slice(0, 4)
print(teach(everything), teach(everything), teach(half), teach(half), len(loads), part, parts)
"""


@pytest.mark.slow
def test_two_processes_keep_the_targets_of_their_rows(tmp_path):
    command = [sys.executable, "-c", KEPT, str(tmp_path / "kept")]
    words = [out.splitlines()[-1].split() for out in finish(start(command, tmp_path / "compiled"), 0)]
    assert [line[:5] for line in words] == [["0", "0", "0", "0", "2"]] * 2  # nothing wrong, the teacher loaded twice
    assert [line[5:] for line in words] == [["0", "2"], ["1", "2"]]
    assert len(list((tmp_path / "kept").rglob("*.npy"))) == 8


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({PROCESS[0]: "host:1"}, "JAX_COORDINATOR_ADDRESS without JAX_NUM_PROCESSES, JAX_PROCESS_ID; set all of"),
        (dict(zip(PROCESS, ("host:1", "two", "0"), strict=True)), "JAX_NUM_PROCESSES=two and JAX_PROCESS_ID=0 must be"),
        ({"L4JAX_DISTRIBUTED": "yes"}, "L4JAX_DISTRIBUTED=yes must be auto"),
    ],
)
def test_incomplete_variables_are_named(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start_distributed()


def test_a_process_alone_is_not_distributed():
    start_distributed()
    assert not jax.distributed.is_initialized()


def test_a_bucket_needs_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"gs://bucket/run needs gcsfs, .* 'l4jax\[gcs\]'"):
        open_path("gs://bucket/run")


def test_one_process_feeds_all_rows():
    assert batch_part(make_mesh(fsdp=2, expert=2), rows=8) == (0, 1)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("topology", "slices", "sizes", "rows", "parts"),
    [
        ("v5e:4x4", 1, {"fsdp": 16}, 16, 4),  # four hosts of four chips
        ("v5e:4x4", 1, {"fsdp": 4, "tensor": 4}, 8, 2),  # the tensor axis lies on two hosts, which feed the same rows
        ("v5e:4x4", 1, {"tensor": 16}, 8, 1),
        ("v5p:4x4x4", 1, {"fsdp": 2, "expert": 16, "context": 2}, 32, 16),
        ("v5p:4x4x4", 4, {"data": 4, "fsdp": 4, "expert": 16}, 256, 64),
    ],
)
def test_hosts_of_a_slice_feed_the_rows_that_their_chips_hold(topology, slices, sizes, rows, parts):
    mesh = make_mesh(topology_devices(topology, slices), **sizes)
    assert batch_part(mesh, rows) == (0, parts)
