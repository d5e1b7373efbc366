"""What a launch did, counted while its PTX was executed.

Units follow the hardware: 32-byte sectors for global memory, 128-byte wavefronts for shared memory.
A broadcast counts once. PTX instructions are not machine instructions: address arithmetic and moves
often vanish in ptxas.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

_CLASSES = {
    "mma": "mma",
    "wgmma": "mma",
    "ldmatrix": "ldmatrix",
    "stmatrix": "ldmatrix",
    "cp": "cp.async",
    "atom": "atomic",
    "red": "atomic",
    "bar": "barrier",
    "shfl": "shuffle",
    "vote": "shuffle",
    "redux": "shuffle",
    "bra": "branch",
    "brx": "branch",
    "ret": "branch",
    "mov": "move",
    "pack": "move",
    "unpack": "move",
    "cvta": "move",
    "cvt": "convert",
    "nop": "nothing",
}
_SPACES = ("global", "shared", "local", "param", "const")


@dataclass(frozen=True)
class Traffic:
    """Accesses to one memory.

    requests: warp instructions with an active lane; units: sectors or wavefronts; ideal: the least
    units for the same bytes; bytes: of all lanes, repeated ones counted again.
    """

    requests: int = 0
    units: int = 0
    ideal: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.requests + other.requests,
            self.units + other.units,
            self.ideal + other.ideal,
            self.bytes + other.bytes,
        )


@dataclass(frozen=True)
class InstructionCount:
    """One instruction of the PTX text: warp instructions issued, and its memory traffic."""

    line: int
    text: str
    operation: str
    issued: int
    global_traffic: Traffic
    shared_traffic: Traffic

    @property
    def kind(self) -> str:
        """Class of the instruction; loads and stores carry their memory space."""
        name, *rest = self.operation.split(".")
        if name in ("ld", "st"):
            spaces = [space for space in _SPACES if f".{space}" in self.text]
            return f"{name}.{spaces[0] if spaces else 'generic'}"
        if name not in _CLASSES:
            return (
                "float" if any(part[0] in "f" or part[:2] == "bf" for part in rest) else "integer"
            )
        return _CLASSES[name]


@dataclass(frozen=True)
class BufferBytes:
    """Distinct bytes of a buffer that were touched, in whole sectors inside the buffer."""

    read: int
    written: int


@dataclass(frozen=True)
class Counters:
    """Counts of one launch, or the sum of several."""

    instructions: tuple[InstructionCount, ...] = ()
    buffers: dict[str, BufferBytes] = field(default_factory=dict)

    def __add__(self, other: Counters) -> Counters:
        """Instructions side by side; distinct bytes are added buffer by buffer."""
        buffers = dict(self.buffers)
        for name, b in other.buffers.items():
            a = buffers.get(name, BufferBytes(0, 0))
            buffers[name] = BufferBytes(a.read + b.read, a.written + b.written)
        return replace(self, instructions=self.instructions + other.instructions, buffers=buffers)

    def issued(self, *kinds: str) -> int:
        """Warp instructions of these classes, of all classes if none is given."""
        return sum(i.issued for i in self.instructions if not kinds or i.kind in kinds)

    def by_kind(self) -> dict[str, int]:
        """Warp instructions by class."""
        sums: dict[str, int] = defaultdict(int)
        for i in self.instructions:
            sums[i.kind] += i.issued
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def operations(self) -> dict[str, int]:
        """Warp instructions by operation."""
        sums: dict[str, int] = defaultdict(int)
        for i in self.instructions:
            sums[i.operation] += i.issued
        return {name: number for name, number in sums.items() if number}

    @property
    def global_traffic(self) -> Traffic:
        """Traffic with global memory, in sectors."""
        return sum((i.global_traffic for i in self.instructions), Traffic())

    @property
    def shared_traffic(self) -> Traffic:
        """Traffic with shared memory, in wavefronts."""
        return sum((i.shared_traffic for i in self.instructions), Traffic())

    @property
    def load_bytes(self) -> int:
        """Bytes that global loads through L1 deliver, broadcasts once."""
        loads = [i.global_traffic for i in self.instructions if i.kind.startswith("ld.")]
        return sum(min(t.bytes, 32 * t.units) for t in loads)

    @property
    def distinct_bytes(self) -> int:
        """Bytes that have to cross DRAM at least: distinct ones read plus distinct ones written."""
        return sum(b.read + b.written for b in self.buffers.values())

    def worst(self, number: int = 5) -> list[InstructionCount]:
        """The instructions with most sectors and wavefronts above the ideal."""

        def excess(i: InstructionCount) -> int:
            total = i.global_traffic + i.shared_traffic
            return total.units - total.ideal

        return [
            i for i in sorted(self.instructions, key=excess, reverse=True)[:number] if excess(i)
        ]
