"""Times the kernels of pallas_kernels on this machine, and counts what the TPU compiler makes of them for four chips.

    python scripts/bench_kernels.py time                                   every implementation that runs here
    python scripts/bench_kernels.py time attention --shape mini-scout
    python scripts/bench_kernels.py count                                  all cases, v5e, v5p, v6e and tpu7x
    python scripts/bench_kernels.py count matmul-prefill decode-8k --chips v6e --json counts.json
    python scripts/bench_kernels.py count matmul-prefill attention-8k --tokamax

`count` compiles ahead of time: no TPU is needed (libtpu is), nothing runs and nothing is timed. Beside ours are the
kernels that jax ships and, with --tokamax, those of tokamax, which gets an environment of its own. Its columns: fast
memory; spilled vector registers; bundles times steps, in millions: VLIW instructions of one core, a lower bound on its
cycles; the cycles, in millions, that memory needs for the bytes at its published bandwidth; bytes and multiplications
over the ideal. The larger of the two cycle counts bounds a kernel. No column is a time.

`time` runs in interleaved rounds: medians, TFLOP/s, the fraction of a plain matmul of the same dtype, and the ratio to
the first row, which is what jax offers. A CPU is measured in CPU seconds of all threads, because other work does not
change those, with a small shape; a GPU or TPU in seconds, with Scout's. Where libtpu is installed but no TPU, set
JAX_PLATFORMS=cpu, or jax looks for one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKAMAX = ROOT / ".venv-tokamax"
CHIPS = ("v5e", "v5p", "v6e", "tpu7x")

Row = dict[str, Any]


def count(options: argparse.Namespace) -> list[Row]:
    from kernels import attention, decode, dumps, matmul

    cases = matmul.CASES | attention.CASES | decode.CASES
    _refuse_unknown(options.names, cases)
    rows = _count_tokamax(options) if options.tokamax else []
    with tempfile.TemporaryDirectory() as folder:
        dumps.listings_to(folder)
        for name in options.names or cases:
            for chip in options.chips:
                for who, make in cases[name].programs.items():
                    if (who == "tokamax") == options.only_tokamax:
                        _progress(f"{name}, {who}, {chip}")
                        rows.append({"case": name, "chip": chip, "kernel": who} | _count_one(folder, chip, make))
            of_case = [row for row in rows if row["case"] == name]
            if of_case:
                order = options.chips, list(cases[name].programs)
                of_case.sort(key=lambda row: (order[0].index(row["chip"]), order[1].index(row["kernel"])))
                _print_counts(f"{name}: {cases[name].op}, {cases[name].shape}", of_case)
    return rows


def _count_one(folder: str, chip: str, make) -> Row:
    import jax

    from kernels import cases, dumps
    from l4jax.topology import compile_ahead, one_chip

    mesh = one_chip(chip)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tiles depend on the chip
            program = make(chip)
        kernels = dumps.compile_kernels(folder, lambda: compile_ahead(program.function, mesh, *program.arguments))
        kernels = cases.select(kernels, program.kernels)
        counted = program.count(*kernels)
    except Exception as error:  # of a peer, for a chip or shape that it does not serve: the table says so
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    return {
        "vmem_bytes": max(kernel.vmem_bytes for kernel in kernels),
        "spills": sum(kernel.spills for kernel in kernels),
        **counted._asdict(),
        "memory_cycles": round(counted.bytes_moved / cases.BYTES_PER_US[chip] * cases.CYCLES_PER_US[chip]),
    }


def _count_tokamax(options: argparse.Namespace) -> list[Row]:
    """Returns the rows of tokamax, counted by this file under the interpreter of its environment."""
    python = TOKAMAX / "bin" / "python"
    if not (TOKAMAX / "installed").exists():
        _progress(f"making {TOKAMAX.name}")
        venv.create(TOKAMAX, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "tokamax", "jax[tpu]"], check=True)
        (TOKAMAX / "installed").touch()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [python, __file__, "count", *options.names, "--chips", *options.chips, "--json", file.name]
        subprocess.run([*command, "--only-tokamax"], check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(file.name).read_text())["rows"]


def _print_counts(title: str, rows: list[Row]) -> None:
    header = (
        "| chip | kernel | VMEM MiB | spills | bundles x steps, M | memory cycles, M | bytes / ideal | FLOPs / ideal |"
    )
    print(f"\n{title}\n\n{header}\n|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["chip"], row["kernel"]]
        if "error" in row:
            cells += [row["error"].replace("|", "/"), "", "", "", "", ""]
        else:
            cells += [
                f"{row['vmem_bytes'] / 2**20:.1f}",
                f"{row['spills']}",
                f"{row['bundles'] / 1e6:.3f}",
                f"{row['memory_cycles'] / 1e6:.3f}",
                f"{row['bytes_moved'] / row['bytes_ideal']:.2f}",
                f"{row['flops'] / row['flops_ideal']:.2f}",
            ]
        print("| " + " | ".join(cells) + " |", flush=True)


def time(options: argparse.Namespace) -> list[Row]:
    from kernels import timing

    _refuse_unknown(options.names, timing.OPS)
    print(f"\n{timing.describe()}\n")
    print(
        "| op | implementation | ms | spread | TFLOP/s | of a matmul | over the first |\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for row in timing.run(options.names or list(timing.OPS), options.shape, options.rounds, _progress):
        rows.append(row)
        if "error" not in row:
            cells = [
                row["op"],
                row["implementation"],
                f"{row['seconds'] * 1e3:.3g}",
                f"{row['spread']:.0%}",
                f"{row['flops'] / row['seconds'] / 1e12:.3g}",
                f"{row['of_matmul']:.0%}",
                f"{row['speed_up']:.2f}x" if "speed_up" in row else "",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)
    print("\nNot timed:")
    for row in rows:
        if "error" in row:
            print(f"- {row['op']}, {row['implementation']}: {row['error']}")
    return rows


def _refuse_unknown(names: list[str], known) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"error: unknown {', '.join(unknown)}; choose from {', '.join(known)}")


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    counting = verbs.add_parser("count", help="compile for TPUs that are not here, and count")
    counting.add_argument("names", nargs="*", metavar="CASE", help="default: all; an unknown one lists them")
    counting.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    counting.add_argument("--tokamax", action="store_true", help=f"count tokamax too; installs it into {TOKAMAX.name}")
    counting.add_argument("--only-tokamax", action="store_true", help=argparse.SUPPRESS)  # set for its own process
    timing = verbs.add_parser("time", help="run on this machine")
    timing.add_argument("names", nargs="*", metavar="OP", help="default: all; an unknown one lists them")
    timing.add_argument("--shape", help="of pallas_kernels.shapes; default: mini-scout on a CPU, else scout")
    timing.add_argument("--rounds", type=int, default=7)
    for verb in (counting, timing):
        verb.add_argument("--json", type=Path, help="where to write the rows as well")
    options = parser.parse_args()
    sys.path.insert(1, str(ROOT))
    if options.verb == "count":
        os.environ["JAX_PLATFORMS"] = "cpu"
    rows = {"count": count, "time": time}[options.verb](options)
    if options.json:
        options.json.write_text(json.dumps({"command": sys.argv[1:], "rows": rows}, indent=1))
    if any("error" in row and row.get("kernel") == "ours" for row in rows):
        sys.exit("error: a kernel of ours could not be compiled or counted; the table says why")


if __name__ == "__main__":
    main()
