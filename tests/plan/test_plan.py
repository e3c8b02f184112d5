"""The verb `plan`: what it counts against published numbers, its answers, its exit codes, its errors."""

import json

import pytest

from l4jax.chips import CHIPS
from l4jax.cli import main
from l4jax.config import preset
from l4jax.model.flops import attention_flops
from l4jax.plan.arithmetic import Job, model_flops, needs

GIB = 1 << 30
KEYS = {"fits", "hbm_bytes", "peak_bytes", "weight_bytes", "cache_bytes", "flops", "collectives", "compiled"}


def run(arguments: str) -> int:
    return main(["plan", *arguments.split()])


def plan(capsys, arguments: str) -> tuple[int, dict]:
    code = run(f"{arguments} --json")
    return code, json.loads(capsys.readouterr().out)


def test_weights_and_cache_of_scout_by_arithmetic(capsys):
    """Two bytes a number; a cache of 12 global layers and 36 of one chunk."""
    decode = "-m scout --mode decode --length 65536 --no-compile --topology v5p:2x2x2 --mesh expert=8"
    code, found = plan(capsys, decode)
    assert found.keys() >= KEYS
    assert not found["compiled"]
    assert code == 0
    assert found["fits"]
    assert found["cache_bytes"] == (12 * 65536 + 36 * 8192) * 2 * 8 * 128 * 2
    # Routed experts over 8 devices; of the rest what the rules do not split is whole on each.
    assert 107_000_000_000 * 2 / 8 < found["weight_bytes"] < 40 * GIB


def test_training_needs_four_bytes_for_each_of_three_numbers():
    job = Job(config=preset("scout"), mode="train", batch=16, length=8192)
    found = needs(job, {"fsdp": 4, "expert": 4})
    assert found.optimizer == 2 * found.weights
    total = found.weights * 16
    assert total == pytest.approx(108.6e9 * 4, rel=0.02)  # every parameter once, but for a few that do not divide
    assert needs(Job(**{**vars(job), "first_moment_dtype": "bfloat16"}), {"fsdp": 4, "expert": 4}).optimizer == (
        found.weights // 4 * 6
    )


def test_flops_of_a_token_are_six_times_the_active_parameters():
    """Scout has 17.2B active parameters with its embedding of 1.03B; a token is multiplied with the rest."""
    job = Job(config=preset("scout"), mode="train", batch=1, length=1)
    assert model_flops(job) == pytest.approx(6 * 16.1e9, rel=0.01)


def test_chunked_layers_cost_no_more_than_a_chunk():
    scout = preset("scout")
    last = attention_flops(scout, 65535, 65536) / (4 * 40 * 128)
    assert last == 12 * 65536 + 36 * 8192


def test_what_does_not_fit_names_a_mesh_that_does(capsys):
    code = run("-m scout --topology v5e:2x4 --mesh expert=8 --mode decode --length 8192 --no-compile")
    out = capsys.readouterr().out
    assert code == 1
    assert "DOES NOT FIT" in out
    assert "the smallest mesh that fits, by arithmetic: 16 devices, --mesh" in out
    assert "by arithmetic alone, nothing compiled" in out


def test_a_sweep_shows_meshes_best_first(capsys):
    code = run("-m scout --topology v5p:4x4x4 --batch 64 --length 4096 --sweep --no-compile")
    out = capsys.readouterr().out
    assert code == 0
    assert "meshes of 64 devices, by arithmetic" in out
    assert "MFU at most" in out


def test_the_page_shows_both_kinds_of_caches(capsys, tmp_path):
    page = tmp_path / "kv.html"
    assert run(f"-m scout --topology v5p:2x2x2 --mesh expert=8 --mode decode --no-compile --html {page}") == 0
    text = page.read_text()
    assert "<svg" in text
    assert "http" not in text.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--topology v9:2x2", "unknown chip 'v9'"),
        ("--topology v5p:2xtwo", "write chip:AxB or chip:AxBxC"),
        ("--topology v5p:4x4", "a slice of v5p has 3 sides"),
        ("--topology v6e:32x32", "is larger than a pod of v6e"),
        ("--topology v5p:2x2x2 --mesh fsdp=4", "has 4 devices, v5p:2x2x2 has 8; make the axes multiply to that"),
        ("--topology v5p:2x2x2 --mesh model=8", "'model=8' is not axis=size"),
        ("--topology v5p:2x2x2 --mesh tensor=8 --dtype int8", "--dtype int8 is for serving"),
        (
            "--topology v5p:2x2x3 --mesh expert=12 --batch 12",
            "num_local_experts=16 is not divisible by the expert axis",
        ),
        ("--topology v5p:2x2x2 --mesh fsdp=8 --batch 4", "rows=4 is not divisible by the axes data x fsdp x expert"),
        ("--topology v5p:2x2x2 --mesh expert=8 --mode decode --length 20000000", "beyond the model's 10,485,760"),
        ("--topology v5p:2x2x2 --mesh expert=8 --batch 0", "--batch 0 must be at least 1"),
    ],
)
def test_one_clear_line_for_what_cannot_be(arguments, message, capsys):
    assert run(f"-m scout --no-compile {arguments}") in (1, 2)
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error


@pytest.mark.tpu_aot
def test_a_small_model_compiled_for_a_slice(capsys):
    """The compiler's own count of a training step on 8 chips; what it holds is what the arithmetic said."""
    arguments = "-m small-scout --topology v5e:2x4 --mesh fsdp=2,expert=4 --batch 8 --length 256"
    code, found = plan(capsys, arguments)
    assert code == 0
    assert found["compiled"]
    assert found["flops"] > found["model_flops"] / 8
    assert 0 < found["weight_bytes"] < found["peak_bytes"] < CHIPS["v5e"].hbm_bytes
    assert any("all-gather" in kind for kind in found["collectives"])
    _, counted = plan(capsys, f"{arguments} --no-compile")
    assert counted["weight_bytes"] == found["weight_bytes"]
