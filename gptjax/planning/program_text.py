"""The collectives of a compiled program, counted in its text.

XLA's own cost analysis counts the body of a loop once and does not tell collectives apart, so the text is read: each
computation once, times how often it is called.
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
# Between slices of TPUs: each chip hands its share to its host, whose library does the rest.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}x\{([\d,:]+)\}",_xla_megascale_transfer_type="(\w+)"')
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program, as one device takes part in it.

    Attributes:
      kind: one of KINDS.
      payload: bytes of the whole array that the devices of a group gather, reduce, scatter or exchange; of a permute,
        what one device sends.
      members: a group of devices, by their place in the program's device list (the mesh's, flattened); of a permute,
        a source and its target. Empty: all devices.
      count: how often a run of the program does it.
    """

    kind: str
    payload: int
    members: tuple[int, ...]
    count: int


def collectives(text: str, unknown_trip_count: int = 1) -> list[Collective]:
    """The collectives of a compiled program (`jax.stages.Compiled.as_text`), equal ones merged.

    A program for several slices of TPUs is that of one of them; what it sends to the others counts as the collective
    that it is a part of. An asynchronous pair counts once, and so does the all-reduce within a TPU fusion named
    all-reduce-scatter, which is a reduce-scatter. Of a conditional, all branches are counted: an upper bound.

    Args:
      unknown_trip_count: of loops whose length is not written in the program, as that over the microbatches.
    """
    computations, entry = computations_of(text)
    found: Counter[tuple[str, int, tuple[int, ...]]] = Counter()
    for name, times in calls(computations, entry, unknown_trip_count).items():
        for line in computations[name]:
            if (collective := _collective(line, name)) is not None:
                found[collective] += times
    return [Collective(*key, count) for key, count in found.items() if count]


def count_by_kind(found: list[Collective]) -> Counter[str]:
    """How often a run does each kind of collective."""
    counts: Counter[str] = Counter()
    for collective in found:
        counts[collective.kind] += collective.count
    return counts


def traffic(collective: Collective, devices: int) -> float:
    """Bytes that a device sends, and receives, in all runs of a collective by its ring algorithm (Chan et al. 2007).

    Args:
      devices: of the program, for a collective over all of them.
    """
    size = len(collective.members) or devices
    if collective.kind == "collective-permute":
        return collective.payload * collective.count
    share = collective.payload * (size - 1) / size
    if collective.kind == "all-to-all":  # the payload is one device's
        return share * collective.count
    return (2 if collective.kind == "all-reduce" else 1) * share * collective.count


def mesh_axes(members: tuple[int, ...], shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ; of all axes with more than a device if it is empty.

    Args:
      shape: `Mesh.shape`: its axes in the order in which the device list is laid out.
    """
    if not members:
        return tuple(axis for axis, size in shape.items() if size > 1)
    places = np.unravel_index(np.asarray(members), tuple(shape.values()))
    return tuple(axis for axis, place in zip(shape, places, strict=True) if len(set(place.tolist())) > 1)


def computations_of(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation that matter, and the entry's name."""
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
    """How often each computation runs."""
    times: Counter[str] = Counter({entry: 1})
    for name in _topological(computations, entry):
        for line in computations[name]:
            for called, repeats in _called(line, computations, unknown):
                times[called] += times[name] * repeats
    return times


def _topological(computations: dict[str, list[str]], entry: str) -> list[str]:
    """The computations below `entry`, callers before the called."""
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
    """The computations that an instruction runs, and how often."""
    match = INSTRUCTION.match(line)
    operation = "" if match is None else match[3]
    if operation == "while" and (loop := _WHILE.search(line)):
        trips = _trip_count(line, computations[loop[1]], unknown)
        yield loop[1], trips + 1
        yield loop[2], trips
        return
    if operation.endswith(("-done", "-update")) or operation.startswith(("all-reduce", "reduce")):
        return  # what was started is counted where it starts; a reduction's computation adds two numbers
    names = _CALLED.findall(line) + [
        name.strip().lstrip("%") for group in _BRANCHES.findall(line) for name in group.split(",")
    ]
    yield from ((name, 1) for name in names if name in computations)


def _trip_count(line: str, condition: list[str], unknown: int) -> int:
    """Of a while loop: as annotated, or else the constant that its condition compares the counter with."""
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
    """A chip's part in a collective over the slices; its group has the first chip of each."""
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
    """Bytes of each array in a shape such as "(bf16[8,128]{1,0}, f32[])"."""
    sizes = []
    for dtype, dims in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape)):
        digits = re.search(r"\d+", dtype)
        bits = _DTYPE_BITS.get(dtype, int(digits[0]) if digits else 8)
        sizes.append(math.ceil(math.prod(int(dim) for dim in dims.split(",") if dim) * bits / 8))
    return sizes


def _pair(line: str) -> tuple[int, ...]:
    """The first source and target of a permute that are not one device."""
    match = _PAIRS.search(line)
    pairs = re.findall(r"\{(\d+),(\d+)\}", "" if match is None else match[1])
    return next(((int(source), int(target)) for source, target in pairs if source != target), (0,))


def _group(line: str) -> tuple[int, ...]:
    """The first group of devices, in any of the forms that XLA writes; empty: all devices."""
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
    """Device ids of the form "[64,16]T(1,0)": counted up, reshaped, transposed."""
    dims, _, permutation = text.partition("T")
    ids_N = np.arange(math.prod(shape := [int(dim) for dim in dims.strip("[]").split(",")])).reshape(shape)
    return ids_N.transpose([int(axis) for axis in permutation.strip("()").split(",")]) if permutation else ids_N
