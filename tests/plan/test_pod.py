"""The released models on pods that nobody here has: does it fit, by the compiler. Minutes each: `pytest -m pod`.

Each runs in a process of its own, as the README's commands do.
"""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.pod

PODS = {
    "Scout trains on v5p-128, 1M tokens a step": "-m scout --topology v5p:4x4x4 --mesh fsdp=8,expert=8 --batch 128",
    "Maverick trains on v5p-256": "-m maverick --topology v5p:4x4x8 --mesh fsdp=8,expert=16 --batch 256",
    "Behemoth trains on 1,024 chips": (
        "-m behemoth-estimate-96 --topology v5p:8x8x16 --mesh fsdp=64,expert=16 --batch 1024"
    ),
    "Scout decodes on v6e-16": (
        "-m scout --mode decode --topology v6e:4x4 --mesh tensor=8,expert=2 --batch 64 --length 8192"
    ),
    "Scout decodes in int8 on v5e-16": (
        "-m scout --mode decode --dtype int8 --topology v5e:4x4 --mesh tensor=8,expert=2 --batch 32 --length 8192"
    ),
    "Scout decodes after 10,485,760 tokens": (
        "-m scout --mode decode --topology v5p:2x2x4 --mesh tensor=4,context=4 --length 10485760"
    ),
    "the same in int8, on half of it": (
        "-m scout --mode decode --dtype int8 --topology v5p:2x2x2 --mesh tensor=4,context=2 --length 10485760"
    ),
    "Scout reads a million tokens": (
        "-m scout --mode prefill --topology v5p:2x2x4 --mesh tensor=4,context=4 --length 1048576 --piece 8192"
    ),
}


def plan(arguments: str) -> dict:
    command = [sys.executable, "-m", "l4jax", "plan", *arguments.split(), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arguments", PODS.values(), ids=PODS)
def test_fits(arguments):
    found = plan(arguments)
    assert found["compiled"]
    assert found["fits"]
    assert found["peak_bytes"] <= found["hbm_bytes"]
