import math

import fsspec
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from l4jax.train.metrics import MetricsFile, load_imbalance, read_metrics


def test_lines_come_back(tmp_path):
    with MetricsFile(tmp_path / "run" / "metrics.jsonl") as metrics:
        metrics.write(10, loss=2.5, router_load=[[1, 2]])
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"step": 10, "loss": 2.5, "router_load": [[1, 2]]}]


def test_a_run_that_goes_on_drops_lines_from_beyond_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for step in (10, 20, 30):
            metrics.write(step, loss=0.0)
    with MetricsFile(path, from_step=20) as metrics:
        metrics.write(30, loss=1.0)
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(10, 0.0), (20, 0.0), (30, 1.0)]


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_imbalance_is_that_of_the_worst_layer():
    assert load_imbalance([[5, 5], [9, 1]]) == 1.8
    assert math.isnan(load_imbalance([]))


def test_a_bucket_has_the_lines_up_to_the_last_checkpoint():
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, MemoryFileSystem, clobber=True)
    path = epath.Path("gs://bucket/run/metrics.jsonl")
    with MetricsFile(path) as metrics:
        metrics.write(10, loss=2.0)
        assert read_metrics(path) == []
        metrics.publish()
        metrics.write(20, loss=1.0)
        assert read_metrics(path) == [{"step": 10, "loss": 2.0}]
    with MetricsFile(path, from_step=10) as metrics:
        metrics.write(20, loss=1.5)
    assert read_metrics(path) == [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.5}]
