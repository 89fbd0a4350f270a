"""Counts the collectives of a compiled program from its HLO text.

XLA's cost analysis counts the body of a loop once and does not distinguish collectives. So the text is parsed: the
collectives of each computation, times the number of its calls.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_DTYPE_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*[a-z])\(")  # name, shape, operation
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_WHILE = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)')
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH_GROUPS = re.compile(
    r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))?\s*\{([^}]*)\}"
)
# Between TPU slices: each chip sends its shard to the host, whose Megascale library exchanges it.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}x\{([\d,:]+)\}",_xla_megascale_transfer_type="(\w+)"')
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program, from the point of view of one device.

    Attributes:
      kind: one of KINDS.
      payload: bytes of the whole array that a group gathers, reduces or scatters; for an all-to-all and a permute, the
        bytes of one device.
      members: a group of devices, as indices into the program's device list (the flattened mesh); for a permute, a
        source and its target. Empty: all devices.
      count: number of executions in a run of the program.
    """

    kind: str
    payload: int
    members: tuple[int, ...]
    count: int


def collectives(text: str, unknown_trip_count: int = 1) -> list[Collective]:
    """Returns the collectives of a compiled program (`jax.stages.Compiled.as_text`), equal ones merged.

    A program for several TPU slices is the program of one slice; its sends to other slices count as the collective that
    they are part of. A start/done pair counts once. The all-reduce within a TPU fusion named all-reduce-scatter is a
    reduce-scatter. All branches of a conditional are counted: an upper bound.

    Args:
      unknown_trip_count: assumed for loops whose trip count is not in the text, such as the loop over microbatches.
    """
    computations, entry = computations_of(text)
    found: Counter[tuple[str, int, tuple[int, ...]]] = Counter()
    for name, times in calls(computations, entry, unknown_trip_count).items():
        for line in computations[name]:
            if (collective := _collective(line, name)) is not None:
                found[collective] += times
    return [Collective(*key, count) for key, count in found.items() if count]


def bytes_sent(collective: Collective, devices: int) -> float:
    """Computes the bytes that a device sends in all executions of a collective, with ring algorithms.

    Chan et al. 2007, "Collective communication: theory, practice, and experience". A device receives as many.

    Args:
      devices: number of devices of the program, for collectives over all of them.
    """
    size = len(collective.members) or devices
    if collective.kind == "collective-permute":
        return collective.payload * collective.count
    share = collective.payload * (size - 1) / size
    if collective.kind == "all-to-all":  # the payload is one device's
        return share * collective.count
    return (2 if collective.kind == "all-reduce" else 1) * share * collective.count


def mesh_axes(members: tuple[int, ...], shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which a group's members differ; for an empty group, all axes larger than 1.

    Args:
      shape: `Mesh.shape`, whose order of axes is that of the device list.
    """
    if not members:
        return tuple(axis for axis, size in shape.items() if size > 1)
    places = np.unravel_index(np.asarray(members), tuple(shape.values()))
    return tuple(axis for axis, place in zip(shape, places, strict=True) if len(set(place.tolist())) > 1)


def computations_of(text: str) -> tuple[dict[str, list[str]], str]:
    """Splits HLO text into (the instruction lines of each computation, the name of the entry computation)."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return computations, entry


def calls(computations: dict[str, list[str]], entry: str, unknown: int) -> Counter[str]:
    """Returns the number of executions of each computation."""
    times: Counter[str] = Counter({entry: 1})
    for name in _topological(computations, entry):
        for line in computations[name]:
            for called, repeats in _called(line, computations, unknown):
                times[called] += times[name] * repeats
    return times


def _topological(computations: dict[str, list[str]], entry: str) -> list[str]:
    """Returns the computations reachable from `entry` in topological order, callers first."""
    order: list[str] = []
    seen = {entry}
    stack: list[tuple[str, Iterator[str]]] = []

    def callees(name: str) -> Iterator[str]:
        return iter([called for line in computations[name] for called, _ in _called(line, computations, 1)])

    stack.append((entry, callees(entry)))
    while stack:
        name, rest = stack[-1]
        called = next(rest, None)
        if called is None:
            order.append(name)
            stack.pop()
        elif called not in seen:
            seen.add(called)
            stack.append((called, callees(called)))
    return order[::-1]


def _called(line: str, computations: dict[str, list[str]], unknown: int) -> Iterator[tuple[str, int]]:
    """Yields (computation, executions) for the computations that an instruction calls."""
    match = INSTRUCTION.match(line)
    operation = "" if match is None else match[3]
    if operation == "while" and (loop := _WHILE.search(line)):
        trips = _trip_count(line, computations[loop[1]], unknown)
        yield loop[1], trips + 1
        yield loop[2], trips
        return
    if operation.endswith(("-done", "-update")) or operation.startswith(("all-reduce", "reduce")):
        return  # counted at the start operation; a reduction's computation is a scalar operator
    names = _CALLED.findall(line) + [
        name.strip().lstrip("%") for group in _BRANCHES.findall(line) for name in group.split(",")
    ]
    yield from ((name, 1) for name in names if name in computations)


def _trip_count(line: str, condition: list[str], unknown: int) -> int:
    """Returns a while loop's trip count: its annotation, or the constant that its condition compares with."""
    if match := _TRIP_COUNT.search(line):
        return int(match[1])
    root = next((line for line in condition if "ROOT" in line), "")
    compared = re.search(r"compare\(.*?%?([\w.\-]+)\), direction=LT", root)
    if compared is None:
        return unknown
    constants = [re.search(rf"%?{re.escape(compared[1])} = s32\S* constant\((\d+)\)", line) for line in condition]
    return next((int(match[1]) for match in constants if match), unknown)


def _collective(line: str, computation: str) -> tuple[str, int, tuple[int, ...]] | None:
    match = INSTRUCTION.match(line)
    if match is None:
        return None
    _, shape, operation = match.groups()
    if operation == "send":
        return _between_slices(line, array_bytes(shape)[0])
    kind = operation.removesuffix("-start")
    if kind not in KINDS:
        return None
    members = _pair(line) if kind == "collective-permute" else _group(line)
    shapes = array_bytes(shape)
    if operation.endswith("-start") and kind in ("all-gather", "collective-permute"):
        arrays = [size for size in shapes if size > 4] or shapes  # a permute's context is two scalars
        payload = sum(arrays[len(arrays) // 2 :])  # operands come before results
    else:
        payload = sum(shapes)
    if kind == "reduce-scatter":
        payload *= len(members)
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"
    return (kind, payload, members) if len(members) != 1 else None


def _between_slices(line: str, sent: int) -> tuple[str, int, tuple[int, ...]] | None:
    """Parses a send that is part of a collective between slices; the group is the first chip of each slice."""
    match = _BETWEEN_SLICES.search(line)
    if match is None:
        return None
    slices = len(match[1].split(","))
    chips = max(map(int, re.findall(r"\d+", match[2]))) + 1
    members = tuple(range(0, slices * chips, chips))
    kind = match[3].lower().replace("_", "-")
    if kind == "one-to-one":
        return "collective-permute", sent, members[:2]
    return kind, sent * slices if kind == "all-gather" else sent, members


def array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array of an HLO shape such as "(bf16[8,128]{1,0}, f32[])"."""
    sizes = []
    for dtype, dims in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape)):
        digits = re.search(r"\d+", dtype)
        bits = _DTYPE_BITS.get(dtype, int(digits[0]) if digits else 8)
        sizes.append(math.ceil(math.prod(int(dim) for dim in dims.split(",") if dim) * bits / 8))
    return sizes


def _pair(line: str) -> tuple[int, ...]:
    """Returns the first (source, target) pair of a permute with two different devices."""
    match = _PAIRS.search(line)
    pairs = re.findall(r"\{(\d+),(\d+)\}", "" if match is None else match[1])
    return next(((int(source), int(target)) for source, target in pairs if source != target), (0,))


def _group(line: str) -> tuple[int, ...]:
    """Returns the first replica group, in any of XLA's notations; empty: all devices."""
    if match := _LISTED_GROUPS.search(line):
        return tuple(map(int, filter(None, match[1].split(","))))
    if match := _IOTA_GROUPS.search(line):
        return tuple(_iota(match[3]).reshape(int(match[1]), int(match[2]))[0].tolist())
    if match := _MESH_GROUPS.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        flat = np.arange(math.prod(sizes.values())) if match[2] is None else _iota(match[2]).ravel()
        index: list[slice | int] = []
        shape: list[int] = []
        chosen = {name: (pre, size) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])}
        for name, size in sizes.items():  # an axis may be split: 'x':(2)4 is the part of 4 behind one of 2
            if name not in chosen:
                shape, index = [*shape, size], [*index, 0]
            elif chosen[name][1] == "":
                shape, index = [*shape, size], [*index, slice(None)]
            else:
                pre, part = (int(number) for number in chosen[name])
                shape, index = [*shape, pre, part, size // pre // part], [*index, 0, slice(None), 0]
        return tuple(np.asarray(flat.reshape(shape)[tuple(index)]).ravel().tolist())
    return ()


def _iota(text: str) -> np.ndarray:
    """Parses an iota device list such as "[64,16]T(1,0)": arange, reshaped and transposed."""
    dims, _, permutation = text.partition("T")
    ids_N = np.arange(math.prod(shape := [int(dim) for dim in dims.strip("[]").split(",")])).reshape(shape)
    return ids_N.transpose([int(axis) for axis in permutation.strip("()").split(",")]) if permutation else ids_N
