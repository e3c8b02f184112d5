"""Reads a compiled program: what it multiplies, moves in memory, and sends between devices, loops counted as often as
they run.

XLA's own cost analysis counts the body of a loop once. This walks the text of the optimised program instead: fusions,
calls, conditionals (the dearer branch) and loops with a constant number of turns. Kernels count with the cost estimate
that they carry.
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

BYTES = {
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("s8", "u8", "pred", "f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz"), 1),
    **dict.fromkeys(("s4", "u4"), 0.5),
}
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"),
    "collective-broadcast",
)
# These move nothing: they name, group or order what is there.
FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"),
    *("optimization-barrier", "iota", "opt-barrier"),
}

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|[\w]+\[[^ ]*) ([\w\-]+)\((.*)$")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^)]*.*\) -> .*)?\{")


@dataclass(frozen=True)
class Shape:
    """One array; where it lies in fast memory it costs no traffic."""

    dtype: str
    dims: tuple[int, ...]
    in_fast_memory: bool

    @property
    def size(self) -> float:
        """Bytes."""
        return math.prod(self.dims) * BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def size(self) -> float:
        return sum(shape.size for shape in self.shapes)

    @property
    def source(self) -> str:
        """Where in the traced function the instruction comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def attribute(self, name: str) -> str | None:
        """Returns the name of a computation that the instruction calls."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


@dataclass
class Cost:
    """Totals of a run on one device."""

    flops: float = 0.0
    """Of products; elementwise work is not counted."""
    bytes: float = 0.0
    """Read and written outside of fast memory, by what each instruction takes and gives."""
    collectives: Counter = field(default_factory=Counter)
    """(kind, devices in the group, rings at once, whether it crosses slices) -> bytes that a device receives."""
    seconds: float = 0.0
    """If one instruction follows the other, each as long as its products take, or its bytes if they take longer."""
    unknown_loops: int = 0
    """Loops whose number of turns depends on data; counted as one turn."""

    def add(self, other: "Cost", times: float = 1.0) -> None:
        self.flops += other.flops * times
        self.bytes += other.bytes * times
        self.seconds += other.seconds * times
        self.unknown_loops += other.unknown_loops
        for key, size in other.collectives.items():
            self.collectives[key] += size * times


class Program:
    """The computations of a program as XLA prints it (`compiled.as_text()`).

    Args:
        text: of the program.
        slice_of: device number -> slice, to tell which groups cross slices.
    """

    def __init__(self, text: str, slice_of: dict[int, int] | None = None):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.slice_of = slice_of or {}
        entry = current = None
        for line in text.splitlines():
            if line and not line[0].isspace() and line.rstrip().endswith("{"):
                if match := _HEADER.match(line):
                    current = self.computations.setdefault(match[1], {})
                    entry = match[1] if line.startswith("ENTRY") else entry
            elif current is not None and (instruction := _parse(line)):
                current[instruction.name] = instruction
        self.entry = entry

    def instructions(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation.values()

    def cost(
        self,
        flops_per_second: float = math.inf,
        bytes_per_second: float = math.inf,
        kernel_share: Callable[[str], float] = lambda name: 1.0,
    ) -> Cost:
        """Returns the cost of one run.

        Args:
            flops_per_second: of the chip, and
            bytes_per_second: of its memory; `seconds` is 0 without them.
            kernel_share: part of the FLOPs of a kernel's own estimate that counts, by its name in the program.
        """
        self._speeds, self._kernel_share = (flops_per_second, bytes_per_second), kernel_share
        self._cost_of.cache_clear()
        return self._cost_of(self.entry)

    def largest_arrays(self, least: float) -> dict[str, float]:
        """Returns arrays that instructions make outside of fusions, as `f32[8,128]` -> bytes, from `least` bytes on."""
        fused = {i.attribute("calls") for i in self.instructions() if i.opcode == "fusion"}
        found = {}
        for name, computation in self.computations.items():
            if name in fused:
                continue
            for instruction in computation.values():
                if instruction.opcode in FREE:
                    continue
                for shape in instruction.shapes:
                    if shape.size >= least:
                        found[f"{shape.dtype}[{','.join(map(str, shape.dims))}]"] = shape.size
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @functools.cache  # noqa: B019, a program lives as long as its totals
    def _cost_of(self, name: str) -> Cost:
        computation, total = self.computations.get(name, {}), Cost()
        for instruction in computation.values():
            total.add(self._cost(instruction, computation))
        return total

    def _cost(self, instruction: Instruction, computation: dict[str, Instruction]) -> Cost:
        opcode, cost = instruction.opcode, Cost()
        if opcode in FREE:
            return cost
        if opcode == "while":
            turns = self._turns(instruction)
            cost.unknown_loops = turns is None
            cost.add(self._cost_of(instruction.attribute("body")), turns or 1)
            return cost
        if opcode == "conditional":
            names = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            branches = (
                re.findall(r"[\w.\-]+", names[1])
                if names
                else [n for key in ("true_computation", "false_computation") if (n := instruction.attribute(key))]
            )
            costs = [self._cost_of(branch) for branch in branches]
            return max(costs, key=lambda c: (c.flops, c.bytes), default=cost)
        if opcode in ("call", "async-start"):
            return self._cost_of(instruction.attribute("to_apply") or instruction.attribute("calls"))
        if opcode.endswith(("-done", "-update")):
            return cost
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            self._count_collective(instruction, computation, kind, cost)
            return cost
        cost.bytes = self._traffic(instruction, computation)
        if opcode == "fusion":
            inner = self.computations.get(instruction.attribute("calls"), {})
            cost.flops = sum(self._flops(i, inner) for i in inner.values())
        elif opcode == "custom-call":
            estimate, share = _cost_estimate(instruction.attributes), self._kernel_share(instruction.source)
            cost.flops = estimate.get("flops", 0) * share
            cost.bytes = estimate.get("bytes_accessed", cost.bytes)
        else:
            cost.flops = self._flops(instruction, computation)
        cost.seconds = max(cost.flops / self._speeds[0], cost.bytes / self._speeds[1])
        return cost

    def _flops(self, instruction: Instruction, computation: dict[str, Instruction]) -> float:
        if instruction.opcode == "fusion":
            inner = self.computations.get(instruction.attribute("calls"), {})
            return sum(self._flops(i, inner) for i in inner.values())
        if instruction.opcode not in ("dot", "convolution"):
            return 0.0
        operands = [self._operand(instruction, computation, index) for index in (0, 1)]
        if None in operands:
            return 0.0
        # [M, K] x [K, N] -> [M, N] has (M K)(K N)(M N) = (M K N)^2 numbers: true of any contraction without batch
        # dimensions, however XLA spells it. TPUs write theirs as convolutions, with heads as windows.
        sizes = [math.prod(shape.dims) for shape in (*operands, *instruction.shapes)]
        return 2.0 * math.sqrt(math.prod(sizes))

    def _operand(self, instruction: Instruction, computation: dict[str, Instruction], index: int) -> Shape | None:
        if index >= len(instruction.operands) or instruction.operands[index] not in computation:
            return None
        return computation[instruction.operands[index]].shapes[0]

    def _traffic(self, instruction: Instruction, computation: dict[str, Instruction]) -> float:
        """Returns the bytes that an instruction reads and writes; of slices in a loop only the slice."""
        called = instruction.attribute("calls") if instruction.opcode == "fusion" else None
        inner = self.computations.get(called, {})
        read = 0.0
        for index, name in enumerate(instruction.operands):
            operand = computation.get(name)
            if operand is None or len(operand.shapes) != 1 or operand.shapes[0].in_fast_memory:
                continue
            size = operand.shapes[0].size
            read += self._read_of_operand(inner, index, size) if inner else size
        written = sum(shape.size for shape in instruction.shapes if not shape.in_fast_memory)
        if instruction.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * written
        root, scope = (list(inner.values())[-1], inner) if inner else (instruction, computation)
        if root.opcode in ("dynamic-update-slice", "scatter"):  # in place: of the array only the update moves
            update = scope.get(root.operands[1 if root.opcode == "dynamic-update-slice" else -1])
            size = update.size if update else written
            return size + max(read - written, size)
        return read + written

    def _read_of_operand(self, fusion: dict[str, Instruction], index: int, size: float) -> float:
        """Returns how much of an operand of so many bytes a fusion reads: where only slices are taken of it, these."""
        found = (i for i in fusion.values() if i.opcode == "parameter" and i.attributes.startswith(f"{index})"))
        parameter = next(found, None)
        return size if parameter is None else min(size, self._read_by_users(fusion, parameter.name, size))

    def _read_by_users(self, fusion: dict[str, Instruction], name: str, size: float) -> float:
        users = [i for i in fusion.values() if name in i.operands]
        read = 0.0 if users else size
        for user in users:
            whole = user.operands[0] == name
            if whole and user.opcode in ("dynamic-slice", "gather", "slice"):
                read += user.size
            elif whole and user.opcode in ("dynamic-update-slice", "scatter"):
                continue  # in place
            elif user.opcode in ("bitcast", "copy"):  # of a copy, too, only what is asked for is made
                read += self._read_by_users(fusion, user.name, size)
            elif user.opcode == "fusion":
                inner = self.computations.get(user.attribute("calls"), {})
                places = [place for place, operand in enumerate(user.operands) if operand == name]
                asked = self._read_by_users(fusion, user.name, size)
                read += sum(min(self._read_of_operand(inner, place, size), asked) for place in places)
            else:
                return size
        return read

    def _turns(self, instruction: Instruction) -> int | None:
        """Returns how often a loop runs: what XLA says, or the constant that its condition compares with."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes):
            return int(match[1])
        condition = self.computations.get(instruction.attribute("condition"), {})
        constants = [i for i in self._reachable(condition) if i.opcode == "constant" and i.shapes[0].dtype == "s32"]
        numbers = {int(n[1]) for i in constants if (n := re.match(r"(-?\d+)\)", i.attributes))}
        compares = [i for i in self._reachable(condition) if i.opcode == "compare"]
        if len(numbers) == 1 and len(compares) == 1:
            return max(next(iter(numbers)), 0)
        return None

    def _reachable(self, computation: dict[str, Instruction]) -> Iterator[Instruction]:
        for instruction in computation.values():
            yield instruction
            if called := instruction.attribute("calls") or instruction.attribute("to_apply"):
                yield from self._reachable(self.computations.get(called, {}))

    def _count_collective(self, instruction, computation, kind: str, cost: Cost) -> None:
        groups = replica_groups(instruction.attributes)
        operands = [computation[name] for name in instruction.operands if name in computation]
        given = sum(operand.size for operand in operands)
        result = instruction.shapes[-1].size if instruction.opcode.endswith("-start") else instruction.size
        size = len(groups[0]) if groups else 2
        crosses = any(len({self.slice_of.get(device, 0) for device in group}) > 1 for group in groups)
        others = (size - 1) / size
        received = {
            "all-gather": max(result, given) * others,
            "all-reduce": 2 * given * others,
            "reduce-scatter": given * others,
            "all-to-all": given * others,
            # Room for more than comes is on one side or the other.
            "ragged-all-to-all": min(operands[0].size, result) * others if operands else 0.0,
        }.get(kind, given)
        if size > 1:
            rings = re.search(r"StrategyND\{colors:(\d+)", instruction.attributes)
            cost.collectives[kind, size, int(rings[1]) if rings else 1, crosses] += received


def replica_groups(attributes: str) -> list[list[int]]:
    """Returns the groups of devices that a collective works in, from any of the ways in which XLA writes them."""
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        pairs = [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1])]
        return [pair for pair in pairs if pair[0] != pair[1]]
    if match := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes):
        return [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims = ([int(d) for d in text.split(",")] for text in match.group(1, 2))
        order = [int(d) for d in match[3].split(",")] if match[3] else range(len(dims))
        return _fold(_transposed(dims, list(order)), shape)
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([\w]+)'=(\d+)", match[1])}
        inside = re.findall(r"'([\w]+)'", match[2])
        outside = [name for name in axes if name not in inside]
        order = [list(axes).index(name) for name in [*outside, *inside]]
        count = math.prod(axes[name] for name in outside)
        total = math.prod(axes.values())
        return _fold(_transposed(list(axes.values()), order), [count, total // count])
    return []


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    numbers = [0]
    for axis in order:
        numbers = [n + i * strides[axis] for n in numbers for i in range(dims[axis])]
    return numbers


def _fold(numbers: list[int], shape: list[int]) -> list[list[int]]:
    width = shape[-1]
    return [numbers[i : i + width] for i in range(0, len(numbers), width)]


def _parse(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    name, result, opcode, rest = match.groups()
    shapes = tuple(
        Shape(dtype, tuple(int(d) for d in dims.split(",") if d), "S(1)" in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(result)
    )
    depth, end = 1, len(rest)
    for index, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            end = index
            break
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    # What stands in the brackets of these is no operand: a value, a number.
    return Instruction(name, opcode, shapes, operands, rest if opcode in ("constant", "parameter") else rest[end:])


def _cost_estimate(attributes: str) -> dict[str, float]:
    if match := re.search(r'"cost_estimate":(\{[^}]*\})', attributes):
        return {key: float(value) for key, value in json.loads(match[1]).items()}
    return {}
