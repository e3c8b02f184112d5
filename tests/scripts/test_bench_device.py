"""scripts/bench_device.py: whole, on a small model and a CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_device.py"


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            "serve --dtype int4 --context 20 --rows 1 2 --steps 3",
            ["prefill of 20: ", "decode 1 rows: ", "decode 2 rows: "],
        ),
        ("train --tokens 16 --rows 1 --steps 1 --vocab 512", ["4 layers of small-scout, 4 experts"]),
    ],
    ids=["serve", "train"],
)
def test_measures(arguments, lines):
    command = [sys.executable, SCRIPT, *arguments.split(), "--preset", "small-scout"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in lines:
        assert line in printed
    assert "nan" not in printed
