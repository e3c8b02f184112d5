"""The TPU compiler's listing of a kernel: its VLIW bundles, loops and branches, fast memory and spilled registers.

libtpu writes listings when LIBTPU_INIT_ARGS asks for them, and reads that once, when it is loaded: `listings_to` comes
before the first compilation of a process. A bundle is one cycle, unless the core waits: for memory, or for a matrix
unit that is still busy.
"""

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Only what `read_kernel` reads: all listings are thirty times as many files, and take four times as long.
_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=original|final_bundles|final_hlo-static-per-bundle-utilization"
)

_REGISTER_BYTES = 8 * 128 * 4


class Bundle(NamedTuple):
    label: str
    """"LB" where the body of a loop begins, other letters where a branch may lead to, mostly empty."""
    text: str
    products: int
    """Uses of the matrix units."""


class Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
        name: what the program calls it.
        vmem_bytes: fast memory of its operands' windows, of its scratch and of spilled registers.
        spills: vector registers that were spilled to fast memory; scalar ones, which go elsewhere, are not counted.
        bundles: in the order of the program.
        loops: bundles from the label of each loop to its branch back.
        skips: bundles that each forward branch may leave out, where it can be told.
    """

    name: str
    vmem_bytes: int
    spills: int
    bundles: list[Bundle]
    loops: list[range]
    skips: list[range]

    def products(self, stretch: range) -> int:
        return sum(self.bundles[at].products for at in stretch)

    def stretches(self) -> list[range]:
        """Returns the bundles, cut at labels and behind branches."""
        cuts = [at for at, bundle in enumerate(self.bundles) if bundle.label]
        cuts += [at + 1 for at, bundle in enumerate(self.bundles) if "sbr.rel" in bundle.text]
        cuts = sorted({0, *cuts, len(self.bundles)})
        return [range(start, stop) for start, stop in itertools.pairwise(cuts)]


def listings_to(folder: str) -> None:
    """Makes libtpu write its listings to a folder; to be called before it is loaded."""
    os.environ["LIBTPU_INIT_ARGS"] = _FLAGS.format(folder=folder)


def compile_kernels(folder: str, compile_program: Callable[[], Any]) -> list[Kernel]:
    """Returns the kernels of a program, in the order of compilation; empties the folder."""
    compile_program()
    listings = sorted(path for path in Path(folder).glob("*-final_bundles.txt") if "schedule-analysis" not in path.name)
    kernels = [read_kernel(path) for path in listings if _is_kernel(path)]
    for path in Path(folder).iterdir():
        path.unlink()
    if not kernels:
        raise RuntimeError("no listing of a kernel: libtpu was loaded before listings_to, or the program has none")
    return kernels


def _is_kernel(listing: Path) -> bool:
    return re.search(r"entry bundle: \S+ = custom-call", listing.read_text()) is not None


def read_kernel(listing: Path) -> Kernel:
    """Returns the kernel of a listing `*-final_bundles.txt`, which has its companions beside it."""
    stem, name = re.fullmatch(r"(\d+-(.*))-\d+-final_bundles.txt", listing.name).groups()
    (utilization,) = listing.parent.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt")
    (original,) = listing.parent.glob(f"{stem}-*-original.txt")
    products = [int(line.split()[0]) for line in utilization.read_text().splitlines()[4:] if line.strip()]
    sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", original.read_text())
    text = listing.read_text()
    found = re.findall(r"^ *(?:0x[0-9a-f]+|0) *(\w\w)? *: *>* *(\{.*(?:\n(?! *0x).*)*)", text, re.MULTILINE)
    bundles = [Bundle(label, body, uses) for (label, body), uses in zip(found, products, strict=True)]
    spills = len(set(re.findall(r"vmem:\[(#allocation\d+_spill)\]", text)))
    vmem_bytes = sum(int(size, 16) for size in sizes) + spills * _REGISTER_BYTES
    return Kernel(name, vmem_bytes, spills, bundles, *_loops_and_skips(bundles))


def _loops_and_skips(bundles: list[Bundle]) -> tuple[list[range], list[range]]:
    """Follows the regions that the compiler's comments name: where they start and end, and which a branch leads to."""
    heads: dict[str, int] = {}
    waiting: list[tuple[int, str]] = []
    loops, skips = [], []
    for at, (label, text, _) in enumerate(bundles):
        if label == "LB":
            heads.update((region, at) for region in re.findall(r"Start region (\d+)", text))
        for region in re.findall(r"[Ee](?:nd|mpty) region (\d+)", text):
            skips += [range(branch, at) for branch, target in waiting if target == region]
        for region in re.findall(r"target = \$region(\d+)", text):
            if region in heads:
                loops.append(range(heads[region], at + 1))
            else:
                waiting.append((at, region))
    return sorted(loops, key=lambda loop: loop.start), skips
