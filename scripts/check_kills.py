"""Kills a training run at random moments, over and over, and compares what it becomes with a run that nobody disturbed.

    python scripts/check_kills.py --kills 10

Every kill is SIGKILL: no process gets to save. The run mixes shuffled sources, packs rows, and saves in the background;
`--workers 2` reads in two more processes. What must hold: no kill loses more than the steps since the last save, no
checkpoint is lost, and at the end all weights and the last losses are the same, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY = 25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=800, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes that read (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        return check(Path(directory), args.kills, args.steps, args.workers, random.Random(args.seed))


def check(directory: Path, kills: int, steps: int, workers: int, rng: random.Random) -> int:
    """Returns 0 if everything holds, and prints what does not."""
    config = write_config(directory, steps, workers)
    whole, killed = directory / "whole", directory / "killed"
    if start(config, whole, directory).wait():
        raise RuntimeError("the undisturbed run failed")
    done, failures = 0, 0
    for number in range(kills):
        before = changed(killed)
        process = start(config, killed, directory)
        last = finished_step(killed)
        # Not while jax is still being imported: at any moment after the run has gone on. What an earlier process wrote
        # after its last save is still there until then.
        while process.poll() is None and (changed(killed) == before or step_of(killed) <= last):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached, saved = step_of(killed), finished_step(killed)
        lost = reached - saved
        print(f"kill {number + 1}: at step {reached}, saved {saved}", flush=True)
        if saved < done or lost > 2 * SAVE_EVERY:  # one save may be on its way while steps go on
            print(f"  FAILS: {done} was saved before, {lost} steps are lost")
            failures += 1
        done = saved
        if done == steps:
            break
    if start(config, killed, directory).wait():
        raise RuntimeError("the run did not go on")
    same = np.array_equal(*(weights(path) for path in (whole, killed)))
    losses = [[line["loss"] for line in lines_of(path)][-3:] for path in (whole, killed)]
    print(f"weights {'are' if same else 'are NOT'} the same; last losses {losses[0]} and {losses[1]}")
    return int(failures > 0 or not same or losses[0] != losses[1])


def write_config(directory: Path, steps: int, workers: int) -> Path:
    """Writes a small run: a mixture of a file and of captions, packed, shuffled."""
    texts = [json.dumps({"text": f"number {i} is followed by {i + 1}"}) for i in range(50)]
    (directory / "texts.jsonl").write_text("\n".join(texts))
    run = yaml.safe_load((ROOT / "configs" / "experiments" / "captioning.yaml").read_text())["run"]
    run |= {"steps": steps, "log_every": 1, "save_every": SAVE_EVERY, "evaluate": {}}
    run["data"]["sources"]["texts"] = {"path": str(directory / "texts.jsonl"), "weight": 0.5}
    run["data"] |= {"rows": 2, "num_workers": workers}
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def start(config: Path, out: Path, directory: Path) -> subprocess.Popen:
    """Starts the run, or goes on with it; programs are compiled once."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "l4jax", "train", str(config), "--out", str(out)]
    with (directory / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def lines_of(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def changed(run: Path) -> int | None:
    """Returns when the metrics of a run were last written."""
    path = run / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else None


def step_of(run: Path) -> int:
    """Returns the last step that a run has written down."""
    lines = lines_of(run)
    return lines[-1]["step"] if lines else 0


def finished_step(run: Path) -> int:
    """Returns the newest checkpoint that is whole."""
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def weights(run: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    subprocess.run(
        [sys.executable, "-m", "l4jax", "convert", "--to", "hf", str(run / "model"), str(run / "hf")],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    files = sorted((run / "hf").glob("*.safetensors"))
    return np.concatenate([x.ravel() for file in files for _, x in sorted(load_file(file).items())])


if __name__ == "__main__":
    sys.exit(main())
