"""Operands and modifiers of one instruction on their way from text to places and numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .registers import PREDICATE, Register, RegisterFile
from .syntax import TYPE_BYTES, parse_number, split_commas

# Windows of generic addresses, as in engine/machine.h.
_WINDOWS = {"shared": 0x51 << 56, "local": 0x52 << 56, "param": 0x53 << 56, "global": 0, "const": 0}
SPACES = {"generic": 0, "global": 1, "const": 1, "shared": 2, "local": 3, "param": 4}
FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")


class RefusedError(Exception):
    """Why an instruction cannot be decoded; becomes a PtxError with its line."""


class Modifiers:
    """The parts of an opcode behind its name; every one has to be taken."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts = list(parts)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def take(self, *choices: str) -> str | None:
        """Take the first part that is one of `choices` off; None if there is none."""
        for part in self._parts:
            if part in choices:
                self._parts.remove(part)
                return part
        return None

    def need(self, *choices: str) -> str:
        found = self.take(*choices)
        if found is None:
            raise RefusedError(f"needs one of {', '.join(choices)}")
        return found

    def take_match(self, pattern: str) -> re.Match[str] | None:
        """As take, for a part that matches in full."""
        for part in self._parts:
            if match := re.fullmatch(pattern, part):
                self._parts.remove(part)
                return match
        return None

    def last_type(self) -> str:
        """The type an opcode ends with."""
        if not self._parts or (self._parts[-1] not in TYPE_BYTES and self._parts[-1] != "pred"):
            raise RefusedError("the type is not known")
        return self._parts.pop()

    def finish(self) -> None:
        if self._parts:
            raise RefusedError(f"modifier .{self._parts[0]} is not supported here")


@dataclass
class Operands:
    """Collects what one instruction works on.

    `addresses` are those of the variables and parameters by name; `targets` the labels that the
    instruction may jump to.
    """

    registers: RegisterFile
    addresses: Mapping[str, int]
    branch_tables: Mapping[str, list[str]]
    places: list[int] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)

    def register(self, name: str, size: int | None = None) -> Register:
        """A declared register, of `size` bytes a lane if given."""
        found = self.registers.find(name)
        if found is None:
            raise RefusedError(f"{name} is not a register")
        if size is not None and found.bytes != size:
            raise RefusedError(f"{name} holds {found.bytes} bytes, the instruction works on {size}")
        return found

    def value(self, text: str, size: int, kind: str = "") -> Register:
        """A source operand: register, literal, special register or the address of a variable."""
        if found := self.registers.find(text):
            if found.bytes != size:
                raise RefusedError(
                    f"{text} holds {found.bytes} bytes, the instruction works on {size}"
                )
            return found
        if text.startswith("%"):
            if size == 8 and text in ("%clock64", "%globaltimer"):
                return self.registers.constant(0, 8)
            special = self.registers.special(text)
            if special is None or size != 4:
                raise RefusedError(f"special register {text} of {size} bytes is not known")
            return special
        if text == "WARP_SZ":
            return self.registers.constant(32, size)
        if (address := self._address_of(text)) is not None:
            return self.registers.constant(address, size)
        return self.registers.constant(self._literal(text, kind), size)

    def _address_of(self, text: str) -> int | None:
        match = re.fullmatch(r"([A-Za-z_$][\w$]*)\s*(?:\+\s*(-?\w+))?", text)
        if not match:
            return None
        name, offset = match.group(1), int(match.group(2) or "0", 0)
        return self.addresses[name] + offset if name in self.addresses else None

    def _literal(self, text: str, kind: str) -> int:
        try:
            bits, is_float = parse_number(text)
        except ValueError:
            raise RefusedError(f"operand {text} is not known") from None
        if kind in FLOATS and not is_float:
            raise RefusedError(f"literal {text} for a {kind}")
        return bits

    def reads(self, text: str, size: int, kind: str = "") -> None:
        """Add a source operand."""
        self.places.append(self.value(text, size, kind).place)

    def writes(self, text: str, size: int) -> None:
        """Add a destination; "_" throws the value away."""
        register = self.registers.allocate(size) if text == "_" else self.register(text, size)
        self.places.append(register.place)

    def add(self, place: int) -> None:
        """Add an operand by its place."""
        self.places.append(place)

    def constant(self, *values: int) -> None:
        """Add constants of the instruction."""
        self.constants.extend(values)

    def predicate(self, text: str) -> tuple[Register, bool]:
        """A source predicate, perhaps negated, or 0 or 1."""
        negated = text.startswith("!")
        name = text.lstrip("!")
        if found := self.registers.find(name):
            if found.bytes != PREDICATE:
                raise RefusedError(f"{name} is not a predicate")
            return found, negated
        return self.registers.constant(self._literal(name, ""), PREDICATE), negated

    def address(self, text: str, space: str) -> None:
        """Add an address operand `[base + offset]` and its three constants."""
        inner = text.strip()
        if not (inner.startswith("[") and inner.endswith("]")):
            raise RefusedError(f"{text} is not an address")
        match = re.fullmatch(r"([%\w$]+)\s*(?:\+\s*(-?\w+))?", inner[1:-1].strip())
        if not match:
            raise RefusedError(f"address {text} cannot be read")
        base, offset = match.group(1), int(match.group(2) or "0", 0)
        register = self.registers.find(base)
        if register is None:
            place = self._address_of(base)
            register = self.registers.constant(
                self._literal(base, "") if place is None else place, 8
            )
        if register.bytes not in (4, 8):
            raise RefusedError(f"{base} cannot hold an address")
        self.add(register.place)
        self.constant(SPACES[space], offset, register.bytes)

    def jump(self, targets: list[str]) -> None:
        """The constants of this instruction will be the places of these labels."""
        self.targets.extend(targets)

    def branch_table(self, name: str) -> list[str]:
        if name not in self.branch_tables:
            raise RefusedError(f"no .branchtargets {name} in front of it")
        return self.branch_tables[name]


InstructionDecoder = Callable[[Operands, Modifiers, list[str]], str]
"""Adds operands and constants, takes the modifiers, and returns the operation's name."""


def vector(text: str) -> list[str]:
    """The parts of `{a, b}`, or the one register."""
    return split_commas(text[1:-1]) if text.startswith("{") else [text]


def window(space: str) -> int:
    """Window of generic addresses of a space."""
    return _WINDOWS[space]
