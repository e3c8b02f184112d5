"""scripts/bench_kernels.py: reads the compiler's listings, times what runs here, counts for chips that are not."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

# A kernel of ten bundles in the compiler's format: the grid's loop, in it a branch around a product that is repeated.
LISTING = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = inlined_call_operand.hbm [shape: bf16[64,128], index: 0] } /* entry bundle */
   0x1 LB: > { %s2 = sphi %s1, %s3 } /* Start region 7 */
   0x2   : > { %s4 = sst [smem:[#allocation9_spill]] %s2 } /* Start region 1 */
   0x3   : > { %5 = sbr.rel (%p1) target = $region2 } /* End region 1 */
   0x4   : > { %6 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1
base_bounds: (8, 1)
second_minor_factor: 1 */ } /* Start region 3 */
   0x5 LB: >> { %v7 = vld [vmem:[#allocation4_spill] sm:$0xff]  ;;  %v8 = vmatmul.mubr.bf16 %v7 } /* Start region 8 */
   0x6   : >> { %9 = vst [vmem:[#allocation4_spill] sm:$0xff] %v8  ;;  %10 = vst [vmem:[#allocation5_spill]] }
   0x7   : >> { %11 = sbr.rel (!%p2) target = $region8 } /* End region 3 */
   0x8 PF: > { %12 = sbr.rel (!%p3) target = $region7 } /* Start/End empty region 2 */
   0x9   :  { %13 = vsyncpa [#allocation5], 1 }
"""
USES = [0, 0, 0, 0, 0, 1, 2, 0, 0, 0]


@pytest.fixture
def dumps(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("kernels.dumps")


def run(*arguments, timeout=600):
    command = [sys.executable, SCRIPTS / "bench_kernels.py", *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_a_listing_is_read(dumps, tmp_path):
    uses = "\n".join(f"{count} 0" for count in USES)
    (tmp_path / "17-tiny.1-03-final_bundles.txt").write_text(LISTING)
    (tmp_path / "17-tiny.1-01-final_hlo-static-per-bundle-utilization.txt").write_text(
        f"== CAPACITY:\nMXU, XLU\n    2     2\n== UTILIZATION:\n{uses}\n"
    )
    (tmp_path / "17-tiny.1-00-original.txt").write_text(
        "#allocation1 [shape = 'f32[8,128]', space=vmem, size = 0x1000]"
    )

    kernel = dumps.read_kernel(tmp_path / "17-tiny.1-03-final_bundles.txt")

    assert kernel.name == "tiny.1"
    assert [bundle.products for bundle in kernel.bundles] == USES
    assert kernel.loops == [range(1, 9), range(5, 8)]
    assert kernel.skips == [range(3, 8)]
    assert kernel.spills == 2
    assert kernel.vmem_bytes == 3 * 4096
    assert kernel.stretches() == [range(0, 1), range(1, 4), range(4, 5), range(5, 8), range(8, 9), range(9, 10)]


def test_time_runs_what_this_platform_can_run(tmp_path):
    options = "--shape", "nano-scout", "--rounds", 1, "--json", tmp_path / "times"
    result = run("time", "grouped_matmul", "decode_attention", *options)
    assert result.returncode == 0, result.stderr
    rows = {(row["op"], row["implementation"]): row for row in rows_of(tmp_path / "times")}
    for op in ("grouped_matmul", "decode_attention"):
        assert rows[op, "ours, xla"]["seconds"] > 0
        assert rows[op, "ours, xla"]["speed_up"] > 0
        assert "this is a cpu" in rows[op, "ours, pallas"]["error"]
        assert (op, "ours, interpret") not in rows
    assert "| decode_attention | ours, xla |" in result.stdout


def test_an_unknown_case_is_refused_with_the_list():
    result = run("count", "matmul-prefil")
    assert result.returncode == 1
    assert "matmul-prefil; choose from matmul-prefill," in result.stderr


@pytest.mark.tpu_aot
def test_count_compiles_ours_and_the_peer(tmp_path):
    result = run("count", "decode-8k", "--chips", "v6e", "--json", tmp_path / "counts")
    assert result.returncode == 0, result.stderr
    ours, *peers = rows_of(tmp_path / "counts")
    assert ours["kernel"] == "ours"
    assert ours["bytes_moved"] == ours["bytes_ideal"]
    assert 0 < ours["bundles"] < min(peer["bundles"] for peer in peers)
