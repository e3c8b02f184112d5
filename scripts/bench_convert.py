"""Rate and memory of `l4jax convert`, beside a plain copy of the same files and beside transformers.

Makes a synthetic checkpoint with the tensor shapes of Scout (fewer layers) or with one expert tensor of 5 GB (--wide),
converts it in a process of its own, and prints one line for each way: seconds, GB/s, peak resident memory. What a
machine reads and writes in a second swings with what its memory held before, so beside each way its own input is
copied, before it and after it in turn, and the ratio is the median of the rounds.

    python scripts/bench_convert.py --directory /big/disk                           # 13 GB in, 13 GB out, 5-10 minutes
    python scripts/bench_convert.py --directory /big/disk --wide
    python scripts/bench_convert.py --directory /big/disk --layers 1 --vocab 32768 --transformers    # 5 GB
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from l4jax.checkpoint import convert, names
from l4jax.checkpoint.safetensors import DTYPES, encode_header
from l4jax.config import Llama4Config, layer_pattern, preset

TRANSFORMERS = """
import sys, torch, transformers
kind = transformers.Llama4ForCausalLM
kind.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""
# transformers imports torchvision wherever it is installed, and a build for another torch must not stop the comparison.
SHIM = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
"""


def synthetic_config(num_layers: int, num_experts: int, vocab: int) -> Llama4Config:
    text = dataclasses.replace(
        preset("scout").text_config,
        num_hidden_layers=num_layers,
        num_local_experts=num_experts,
        vocab_size=vocab,
        bos_token_id=1,
        eos_token_id=(2,),
        pad_token_id=0,
        **layer_pattern(num_layers),
    )
    return Llama4Config(text_config=text)


def write_synthetic(directory: Path, config: Llama4Config) -> int:
    """Writes random bfloat16 weights, finite and incompressible; returns their bytes."""
    directory.mkdir()
    block = np.random.default_rng(0).integers(0, 1 << 16, 32 << 20, dtype=np.uint16) & 0xBFFF  # below 2: no NaN
    infos = {}
    for row in names.hf_rows(config, text_prefix=""):
        sizes = [names.part_sizes(config, part.path) for part in row.parts]
        infos[row.key] = (DTYPES["BF16"], names.row_shape(row, sizes))
    groups = convert.group_in_files({key: (dtype, shape, ()) for key, (dtype, shape) in infos.items()})
    total = 0
    for name, keys in groups.items():
        head, _ = encode_header({key: infos[key] for key in keys})
        with open(directory / name, "wb") as file:
            file.write(head)
            for key in keys:
                left = int(np.prod(infos[key][1]))
                while left:
                    count = min(left, block.size)
                    file.write(np.roll(block[:count], left % 1000).data)
                    left -= count
            total += file.tell()
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: name for name, keys in groups.items() for key in keys},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    os.sync()
    return total


def copy(source: Path, target: Path) -> float:
    """Copies file by file through memory, as `cp` does, and syncs, as the converter does; returns the seconds taken."""
    start = time.monotonic()
    for path in filter(Path.is_file, source.rglob("*")):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb") as reader, open(copied, "wb") as writer:
            shutil.copyfileobj(reader, writer, 16 << 20)
            os.fsync(writer.fileno())
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def measure(title: str, size: int, command: list[str]) -> tuple[float, float]:
    """Runs a command; prints and returns seconds and peak resident GB of its process."""
    report = subprocess.run(
        [sys.executable, __file__, "--measure", *command], stdout=subprocess.PIPE, check=True, text=True
    )
    seconds, peak = map(float, report.stdout.splitlines()[-1].split())
    print(f"{title:<24} {seconds:8.1f} s {size / 1e9 / seconds:8.2f} GB/s   peak memory {peak:6.2f} GB", flush=True)
    return seconds, peak


def measured_run(command: list[str]) -> None:
    """Prints seconds and peak resident GB of the child; a process of its own, as the peak is that of all children."""
    import resource

    start = time.monotonic()
    subprocess.run(command, check=True, stdout=sys.stderr)
    seconds = time.monotonic() - start
    print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to work; needs three times the size")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=202048)
    parser.add_argument("--wide", action="store_true", help="one layer whose gate_up_proj alone has 5.4 GB")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--transformers", action="store_true", help="also load and save with transformers (in memory)")
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measured_run(args.measure)
        return

    config = synthetic_config(1, 32, 32768) if args.wide else synthetic_config(args.layers, 16, args.vocab)
    if args.directory:
        args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        work = Path(folder)
        size = write_synthetic(work / "source", config)
        print(
            f"{size / 1e9:.2f} GB, {len(list((work / 'source').glob('*.safetensors')))} files, {os.cpu_count()} cores"
        )
        source, l4jax, hf, saved = (work / name for name in ("source", "l4jax", "hf", "saved"))
        verb = [sys.executable, "-m", "l4jax", "convert"]
        ways = {"to l4jax": (source, verb, l4jax, []), "to hf": (l4jax, verb, hf, ["--to", "hf"])}
        if args.transformers:
            ways["transformers load+save"] = (source, [sys.executable, "-c", SHIM + TRANSFORMERS], saved, [])
        ratios, times, peaks = ({way: [] for way in ways} for _ in range(3))
        for nth in range(args.rounds):
            for way, (start, command, end, options) in ways.items():
                copied = copy(start, work / "copy") if nth % 2 == 0 else None
                seconds, peak = measure(way, size, [*command, str(start), str(end), *options])
                copied = copied or copy(start, work / "copy")
                print(f"{'plain copy of its input':<24} {copied:8.1f} s {size / 1e9 / copied:8.2f} GB/s", flush=True)
                ratios[way].append(copied / seconds)
                times[way].append(seconds)
                peaks[way].append(peak)
            for written in (l4jax, hf, saved):
                shutil.rmtree(written, ignore_errors=True)
        for way in ways:
            low, high = min(ratios[way]), max(ratios[way])
            middle, seconds = statistics.median(ratios[way]), statistics.median(times[way])
            print(
                f"{way}: {middle:.2f} of the copy's rate ({low:.2f} to {high:.2f}), {seconds:.1f} s, "
                f"peak memory {max(peaks[way]):.2f} GB"
            )


if __name__ == "__main__":
    main()
