"""Compiled steps for real topologies: what no device may hold, and what may not grow with devices or depth."""

import dataclasses
import math
import re

import pytest

from l4jax.chips import CHIPS
from l4jax.config import preset
from l4jax.plan.arithmetic import Job
from l4jax.plan.program import compile_job, lower_job, mesh_for

LENGTH, ROWS_PER_DEVICE = 640, 1


def job(num_devices: int, **changes) -> Job:
    """Scout's structure with a width, a vocabulary and experts whose sizes tell arrays apart."""
    small = preset("small-scout")
    text = dataclasses.replace(
        small.text_config, hidden_size=256, intermediate_size=384, vocab_size=2048, num_local_experts=16, head_dim=128
    )
    config = dataclasses.replace(small, text_config=dataclasses.replace(text, **changes), vision_config=None)
    return Job(config=config, mode="train", batch=num_devices * ROWS_PER_DEVICE, length=LENGTH)


@pytest.fixture(scope="module")
def compiled():
    """The same step with the same rows a device, on 16 devices and on 256."""
    sizes = {"v6e:4x4": {"fsdp": 4, "expert": 4}, "v6e:16x16": {"fsdp": 64, "expert": 4}}
    return [
        compile_job(job(math.prod(mesh.values())), mesh_for(topology, 1, mesh), CHIPS["v6e"])
        for topology, mesh in sizes.items()
    ]


@pytest.mark.tpu_aot
def test_memory_of_a_device_does_not_grow_with_their_number(compiled):
    few, many = compiled
    state = [sum(found.by_kind[kind] for kind in ("weights", "optimizer")) for found in compiled]
    assert state[1] <= state[0] / 8  # shared out over 16 times as many; what does not divide is whole
    assert many.peak_bytes <= few.peak_bytes


@pytest.mark.tpu_aot
def test_no_device_holds_what_would_grow_with_everything(compiled):
    """Of the arrays of a step on 256 devices none has as many numbers as all tokens have router logits."""
    text, num_devices = job(1).config.text_config, 256
    experts = {text.num_local_experts, text.hidden_size, text.intermediate_size}
    arrays = compiled[1].program.largest_arrays(1 << 16)
    assert arrays
    for name in arrays:
        dims = [int(n) for n in re.findall(r"\d+", name.partition("[")[2])]
        assert math.prod(dims) < num_devices * LENGTH * text.num_local_experts, f"{name}: of all tokens"
        assert dims.count(LENGTH) < 2, f"{name}: as large as length squared"
        assert not experts <= set(dims), f"{name}: the experts of a layer on one device"


def test_the_program_does_not_grow_with_depth():
    def size(num_layers: int) -> int:
        pattern = dict(moe_layers=tuple(range(num_layers)), no_rope_layers=(1, 1, 1, 0) * (num_layers // 4))
        deep = job(8, num_hidden_layers=num_layers, **pattern)
        lowered, _ = lower_job(deep, mesh_for("v5e:2x4", 1, {"fsdp": 2, "expert": 4}))
        return len(lowered.as_text().splitlines())

    assert size(24) <= 1.01 * size(8)  # a few scalars of each layer's load
