"""The register file of a warp: 32 lanes of a register side by side, predicates as bits."""

from __future__ import annotations

from dataclasses import dataclass, field

from .syntax import TYPE_BYTES, PtxError, split_commas

LANES = 32
PREDICATE = 0  # the "bytes" of a predicate register

# In the order of SpecialRegister in engine/machine.h.
_SPECIAL = [
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    "%laneid",
    "%warpid",
    "%nwarpid",
    *(f"%lanemask_{name}" for name in ("eq", "lt", "le", "gt", "ge")),
    "%dynamic_smem_size",
    "%total_smem_size",
    "%clock",
]


@dataclass(frozen=True)
class Register:
    """A register: its first byte in the file, and its bytes a lane (0: a predicate)."""

    place: int
    bytes: int


@dataclass
class RegisterFile:
    """Hands out places; knows the names that are visible in the current scope."""

    size: int = 0
    constants: dict[tuple[int, int], Register] = field(default_factory=dict)
    specials: dict[str, Register] = field(default_factory=dict)
    _predicates: list[Register] = field(default_factory=list)  # 16 fit where a short one does
    _scopes: list[dict[str, Register]] = field(default_factory=lambda: [{}])

    def allocate(self, size: int) -> Register:
        """A new register of `size` bytes a lane."""
        if size == PREDICATE:
            if not self._predicates:
                first = self.allocate(2).place
                self._predicates = [Register(first + i, PREDICATE) for i in range(0, 64, 4)]
            return self._predicates.pop(0)
        register = Register(self.size, size)
        self.size += LANES * size
        return register

    def open_scope(self) -> None:
        self._scopes.append({})

    def close_scope(self) -> None:
        self._scopes.pop()

    def declare(self, line: int, text: str) -> None:
        """`.reg .b32 %r<3>, x;` declares %r0, %r1, %r2 and x."""
        _, kind, names = text.split(maxsplit=2)
        kind = kind.lstrip(".")
        if kind != "pred" and (kind not in TYPE_BYTES or TYPE_BYTES[kind] not in (2, 4, 8)):
            raise PtxError(line, text, f"registers of type {kind} are not supported")
        size = PREDICATE if kind == "pred" else TYPE_BYTES[kind]
        for name in split_commas(names):
            if "<" in name:
                prefix, number = name.rstrip(">").split("<")
                for i in range(int(number)):
                    self._scopes[-1][f"{prefix}{i}"] = self.allocate(size)
            else:
                self._scopes[-1][name] = self.allocate(size)

    def find(self, name: str) -> Register | None:
        """The register of this name, from the innermost scope on."""
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return None

    def constant(self, value: int, size: int) -> Register:
        """A register that holds a value in all lanes, as bits."""
        key = (value & ((1 << 8 * size) - 1) if size else int(bool(value)), size)
        if key not in self.constants:
            self.constants[key] = self.allocate(size)
        return self.constants[key]

    def special(self, name: str) -> Register | None:
        """A special register of 32 bits; None if there is none of this name."""
        if name not in _SPECIAL:
            return None
        if name not in self.specials:
            self.specials[name] = self.allocate(4)
        return self.specials[name]

    def special_places(self) -> list[tuple[int, int]]:
        """Place and number of every special register that is used."""
        return [(r.place, _SPECIAL.index(name)) for name, r in self.specials.items()]
