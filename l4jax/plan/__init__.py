"""`l4jax plan`: does it fit, what does it cost, what binds; by the compiler for a named topology, or by arithmetic.

The compiler runs here, for devices that are elsewhere: what it says of memory and collectives is so. Times are these
numbers divided by what the chip's maker publishes; nothing was timed.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4jax.chips import Chip
    from l4jax.plan.arithmetic import Bound, Job, Needs
    from l4jax.plan.program import Compiled

GIB = 1 << 30
SHOWN_MESHES = 12


JOB = {
    "mode": "train",
    "batch": 1,
    "length": 8192,
    "dtype": "bfloat16",
    "piece": 2048,
    "remat": "full",
    "microbatches": 1,
    "first_moment": "float32",
    "offload_optimizer": False,
}
"""What describes a job on the command line, and what it is unless said; the file of a run says it all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, nargs="?", help="YAML file of a training run, in place of --model and a job"
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="over the file's: data.rows=64")
    parser.add_argument("--topology", required=True, help="chip and sides of the slice: v5p:4x4x4, v5e:4x4, v6e:4x4")
    parser.add_argument("--slices", type=int, default=1, help="slices, joined by the data axis (default: 1)")
    parser.add_argument("--mesh", default="", help="sizes of the mesh axes: fsdp=4,expert=16; the rest is 1")
    parser.add_argument("-m", "--model", help="preset or checkpoint directory")
    job = parser.add_argument_group("the job, without a file")
    job.add_argument("--mode", choices=("train", "prefill", "decode"), help=f"default: {JOB['mode']}")
    job.add_argument("--batch", type=int, help=f"rows of a step (default: {JOB['batch']})")
    job.add_argument("--length", type=int, help=f"tokens of a row, or of the context (default: {JOB['length']})")
    job.add_argument("--dtype", choices=("bfloat16", "float32", "int8", "int4", "fp8"), help=f"default: {JOB['dtype']}")
    job.add_argument("--piece", type=int, help=f"tokens that a prefill reads at once (default: {JOB['piece']})")
    job.add_argument("--remat", help="what training keeps: full (default), none, attention, dots")
    job.add_argument("--microbatches", type=int, help=f"parts of a training batch (default: {JOB['microbatches']})")
    job.add_argument("--first-moment", choices=("float32", "bfloat16"), help="dtype of Adam's first moment")
    job.add_argument("--offload-optimizer", action="store_true", default=None, help="moments in the memory of the host")
    parser.add_argument("--sweep", action="store_true", help="all meshes by arithmetic, then the best one compiled")
    parser.add_argument("--no-compile", action="store_true", help="arithmetic alone; needs no libtpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page: memory of keys and values by context")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; 1 when it does not fit."""
    import os

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs here, and a chip may be in use by somebody else
    from l4jax.chips import CHIPS
    from l4jax.sharding import parse_sizes

    (job, mesh), chip_name = make_job(args), args.topology.partition(":")[0]
    if chip_name not in CHIPS:
        raise ValueError(f"unknown chip {chip_name!r} in {args.topology!r}; chips are {', '.join(CHIPS)}")
    chip = CHIPS[chip_name]
    check_topology(args.topology, chip)
    if args.html:
        from l4jax.plan.page import write_page

        write_page(args.html, args.model or args.config.stem, job.config.text_config)
    num_devices = count_devices(args.topology) * args.slices
    sizes = parse_sizes(mesh)
    if args.sweep:
        sizes = show_sweep(job, chip, num_devices, quiet=args.json)
    elif math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"mesh {mesh or 'of one device'} has {math.prod(sizes.values())} devices, {args.topology}"
            f"{f' x {args.slices}' if args.slices > 1 else ''} has {num_devices}; make the axes multiply to that, or "
            "use --sweep"
        )
    plan = Plan(job, chip, sizes, args.topology, args.slices)
    if not args.no_compile:
        plan.compile()
    print(json.dumps(plan.summary(), indent=1) if args.json else plan.text())
    if plan.fits:
        return 0
    if not args.json:
        print(cheapest_that_fits(job, chip, plan))
    return 1


def make_job(args: argparse.Namespace) -> tuple["Job", str]:
    """Returns what the command line asks for, and its mesh.

    Raises:
        ValueError: a number is impossible, the model takes no such length, or a file and flags say the same.
    """
    from l4jax.config import PRESETS, load_config, preset
    from l4jax.plan.arithmetic import Job

    if (args.config is None) == (args.model is None):
        raise ValueError("give either a YAML file of a run or --model")
    given = {name: value for name in JOB if (value := getattr(args, name)) is not None}
    if args.config is not None:
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise ValueError(f"--{flag} is said by {args.config}; change it by a setting: data.rows=64")
        return job_of_run(args.config, args.settings, args.mesh)
    job = JOB | given
    config = preset(args.model) if args.model in PRESETS or not Path(args.model).is_dir() else load_config(args.model)
    for name, value in (("slices", args.slices), *((n, job[n]) for n in ("batch", "length", "piece", "microbatches"))):
        if value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    limit, training = config.text_config.max_position_embeddings, job["mode"] == "train"
    if job["length"] > limit:
        raise ValueError(f"--length {job['length']:,} is beyond the model's {limit:,} positions")
    if training and job["dtype"] not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype {job['dtype']} is for serving; training computes in bfloat16 or float32")
    if not training and job["dtype"] == "float32":
        raise ValueError("--dtype float32 is for training; serving takes bfloat16, int8, int4 or fp8")
    first_moment_dtype = job.pop("first_moment")
    job["piece"] = min(job["piece"], job["length"])
    return Job(config=config, first_moment_dtype=first_moment_dtype, **job), args.mesh


def job_of_run(path: Path, settings: Sequence[str] = (), mesh: str = "") -> tuple["Job", str]:
    """Returns the step of the run that a file describes, and its mesh unless another is given.

    Raises:
        ValueError: it is another step than that of all parameters by AdamW on next tokens, which is what is planned.
    """
    from l4jax.plan.arithmetic import Job
    from l4jax.train.config import load_run_config

    run = load_run_config(path, settings)
    others = {
        "distill": run.distill,
        "contrastive": run.contrastive,
        "trainable": run.trainable,
        "optimizer.ema_decay": run.optimizer.ema_decay,
        "optimizer.name": run.optimizer.name != "adamw",
        "parallel.low_precision": run.parallel.low_precision != "none",
    }
    if asked := [key for key, value in others.items() if value]:
        raise ValueError(f"{path} sets {asked[0]}, which plan does not know; it plans AdamW on next tokens")
    job = Job(
        config=run.model,
        mode="train",
        batch=run.data.rows,
        length=run.data.row_tokens,
        dtype=run.parallel.compute_dtype,
        remat=run.parallel.remat,
        microbatches=run.parallel.microbatches,
        first_moment_dtype=run.parallel.first_moment_dtype,
        offload_optimizer=run.parallel.offload_optimizer,
        row_tiles=run.data.row_tiles,
    )
    return job, mesh or run.parallel.mesh


def count_devices(topology: str) -> int:
    """Returns the devices of one slice; a tpu7x chip is two."""
    chip, _, sides = topology.partition(":")
    try:
        chips = math.prod(int(side) for side in sides.split("x"))
    except ValueError:
        raise ValueError(f"topology {topology!r}: write chip:AxB or chip:AxBxC, for example v5p:4x4x4") from None
    return chips * (2 if chip == "tpu7x" else 1)


def check_topology(topology: str, chip: "Chip") -> None:
    """Checks that a slice has the right number of sides and is no larger than a pod; libtpu itself does not."""
    count_devices(topology)
    sides = sorted(map(int, topology.partition(":")[2].split("x")))
    if len(sides) != len(chip.pod):
        raise ValueError(f"a slice of {chip.name} has {len(chip.pod)} sides, {topology!r} has {len(sides)}")
    if any(side > most for side, most in zip(sides, sorted(chip.pod), strict=True)):
        pod = "x".join(map(str, chip.pod))
        raise ValueError(f"{topology!r} is larger than a pod of {chip.name} ({pod} chips); use --slices")


class Plan:
    """A job on a mesh: what it needs by arithmetic, and what the compiler says once it was asked."""

    def __init__(self, job: "Job", chip: "Chip", sizes: Mapping[str, int], topology: str, slices: int):
        from l4jax.plan.arithmetic import estimated_bound, needs

        self.job, self.chip, self.sizes, self.topology, self.slices = job, chip, dict(sizes), topology, slices
        self.needs: Needs = needs(job, sizes)
        self.bound: Bound = estimated_bound(job, sizes, chip)
        self.compiled: Compiled | None = None

    def compile(self) -> None:
        """Asks the compiler."""
        from rich.console import Console

        from l4jax.plan.program import compile_job, mesh_for

        mesh = mesh_for(self.topology, self.slices, self.sizes)
        with Console(stderr=True).status(f"compiling for {mesh.size} devices"):
            self.compiled = compile_job(self.job, mesh, self.chip)
        if self.compiled.cost is not None:
            self.bound = self.compiled.bound(self.chip)

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def peak_bytes(self) -> int:
        return self.compiled.peak_bytes if self.compiled else self.needs.total

    @property
    def fits(self) -> bool:
        return self.compiled.fits if self.compiled else self.needs.total <= self.chip.hbm_bytes

    @property
    def utilisation(self) -> tuple[float, float]:
        """The model's FLOPs over what devices could do in the bound, if they always or never wait for the network."""
        from l4jax.plan.arithmetic import model_flops

        ideal = model_flops(self.job) / (self.num_devices * self.chip.bf16_flops)
        return ideal / self.bound.serial, ideal / self.bound.overlapped

    def summary(self) -> dict[str, Any]:
        """Returns the plan for machines."""
        from l4jax.plan.arithmetic import model_flops

        kinds = self.compiled.by_kind if self.compiled else {}
        cost = self.compiled.cost if self.compiled else None
        collectives = {}
        for (kind, size, _, crosses), count in (cost.collectives if cost else {}).items():
            name = f"{kind} over {size}{' across slices' if crosses else ''}"
            collectives[name] = collectives.get(name, 0) + round(count)
        return {
            "fits": self.fits,
            "compiled": self.compiled is not None,
            "devices": self.num_devices,
            "topology": self.topology,
            "slices": self.slices,
            "mesh": self.sizes,
            "hbm_bytes": self.chip.hbm_bytes,
            "peak_bytes": self.peak_bytes,
            "weight_bytes": kinds.get("weights", self.needs.weights),
            "optimizer_bytes": kinds.get("optimizer", self.needs.optimizer),
            "cache_bytes": kinds.get("cache", self.needs.cache),
            "flops": cost.flops if cost else model_flops(self.job) / self.num_devices,
            "model_flops": model_flops(self.job),
            "bytes": cost.bytes if cost else None,
            "collectives": collectives,
            "bound_seconds": {
                "compute": self.bound.compute,
                "memory": self.bound.memory,
                "network": self.bound.network,
                "device": self.bound.device,
                "binding": self.bound.binding,
            },
            "tokens_per_second": self.job.tokens / self.bound.overlapped,
            "mfu": self.utilisation,
            "compile_seconds": self.compiled.seconds if self.compiled else None,
            "host_bytes": self.compiled.host_bytes if self.compiled else None,
            "refusal": self.compiled.refusal if self.compiled else None,
        }

    def text(self) -> str:
        """Returns the plan for people."""
        from l4jax.sharding import describe

        job, chip, compiled = self.job, self.chip, self.compiled
        where = f"{self.num_devices} devices ({self.topology}{f' x {self.slices}' if self.slices > 1 else ''})"
        how = "compiled" if compiled else "by arithmetic alone, nothing compiled"
        lines = [
            f"{job.mode}: {job.batch:,} x {job.length:,} tokens, {job.dtype}, on {where}, mesh {describe(self.sizes)}"
        ]
        if job.mode == "train":
            lines.append(
                f"weights and second moment in float32, first moment in {job.first_moment_dtype}, remat {job.remat}"
            )
        lines += ["", f"memory of a device ({how})"]
        kinds = dict(compiled.by_kind) if compiled else {}
        if not compiled:
            kinds = {"weights": self.needs.weights, "optimizer": self.needs.optimizer, "cache": self.needs.cache}
        kinds["temporaries"] = max(self.peak_bytes - sum(kinds.values()), 0)
        lines += [f"  {kind:<12} {size / GIB:9.2f} GiB" for kind, size in kinds.items() if size > 1 << 20]
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines.append(f"  {'peak':<12} {self.peak_bytes / GIB:9.2f} GiB of {chip.hbm_bytes / GIB:.2f}: {verdict}")
        if compiled and compiled.refusal:
            lines.append(f"  {compiled.refusal}")
        if compiled and compiled.cost:
            cost = compiled.cost
            lines += ["", "work of a device in one step (compiled)"]
            lines.append(f"  {cost.flops:.3e} FLOPs, {cost.bytes / GIB:,.1f} GiB through memory")
            for (kind, size, rings, crosses), count in cost.collectives.most_common():
                if count > 1 << 20:
                    across = " across slices" if crosses else f" in {rings} rings" if rings > 1 else ""
                    lines.append(f"  {kind:<20} over {size:>4}{across}: {count / GIB:9.3f} GiB received")
            if cost.unknown_loops:
                lines.append(f"  {cost.unknown_loops} loops turn as often as the data say; they are counted once")
        lines += ["", "least time of a step (arithmetic: the above over published peaks)"]
        for name, seconds in (("compute", self.bound.compute), ("memory", self.bound.memory)):
            lines.append(f"  {name:<12} {seconds * 1e3:12.3f} ms")
        lines.append(
            f"  {'device':<12} {self.bound.device * 1e3:12.3f} ms: every instruction as long as it needs either"
        )
        lines.append(f"  {'network':<12} {self.bound.network * 1e3:12.3f} ms")
        low, high = self.utilisation
        lines.append(f"  {self.bound.binding} binds; at most {job.tokens / self.bound.overlapped:,.0f} tokens/s")
        lines.append(f"  MFU at most {high:.1%} if devices never wait for the network, {low:.1%} if they always do")
        if compiled:
            lines += [
                "",
                f"compiled in {compiled.seconds:.0f} s, {compiled.host_bytes / GIB:.1f} GiB of this machine's memory",
            ]
        return "\n".join(lines)


def show_sweep(job: "Job", chip: "Chip", num_devices: int, *, quiet: bool) -> dict[str, int]:
    """Prints the meshes of so many devices, best first, and returns the best one that fits.

    Raises:
        ValueError: no mesh can carry the job.
    """
    from l4jax.plan.arithmetic import estimated_bound, meshes, needs
    from l4jax.sharding import describe

    found = []
    for sizes in meshes(job, num_devices):
        need, bound = needs(job, sizes), estimated_bound(job, sizes, chip)
        found.append((need.total > chip.hbm_bytes, bound.overlapped, need.total, sizes, bound))
    if not found:
        raise ValueError(f"no mesh of {num_devices} devices carries this; try another batch, or other devices")
    found.sort(key=lambda item: item[:3])
    if not quiet:
        print(f"{len(found)} meshes of {num_devices} devices, by arithmetic")
        for over, seconds, total, sizes, bound in found[:SHOWN_MESHES]:
            fits, time = "does not fit" if over else "fits", f"{seconds * 1e3:10.2f} ms, {bound.binding} binds"
            print(f"  {describe(sizes):<40} {total / GIB:8.1f} GiB {fits:<13} {time}")
        print()
    return found[0][3]


def cheapest_that_fits(job: "Job", chip: "Chip", plan: Plan) -> str:
    """Returns a line that names the smallest mesh of the same chip that would do, by arithmetic."""
    from l4jax.plan.arithmetic import meshes, needs
    from l4jax.sharding import describe

    # Where the compiler was asked, what it needed above the estimate is needed elsewhere too.
    margin = max(plan.peak_bytes - plan.needs.total, 0) if plan.compiled else 0
    num_devices, most = 1, math.prod(chip.pod) * (2 if chip.name == "tpu7x" else 1)
    while num_devices <= most:
        fitting = [s for s in meshes(job, num_devices) if needs(job, s).total + margin <= chip.hbm_bytes]
        if fitting:
            best = min(fitting, key=lambda sizes: needs(job, sizes).total)
            return f"the smallest mesh that fits, by arithmetic: {num_devices} devices, --mesh {describe(best)}"
        num_devices *= 2
    return f"by arithmetic nothing up to a pod of {chip.name} fits; try a smaller batch or length, or --dtype int8"
