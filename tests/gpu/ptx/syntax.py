"""The parts of a PTX text: kernels, their parameters and statements, variables.

Follows the PTX ISA, "Syntax". Every part knows its line, so that errors can name it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

TYPE_BYTES = {
    **{f"{kind}{8 * size}": size for kind in "bus" for size in (1, 2, 4, 8)},
    "f16": 2,
    "bf16": 2,
    "f16x2": 4,
    "bf16x2": 4,
    "f32": 4,
    "f64": 8,
    "b128": 16,
}


class PtxError(ValueError):
    """PTX that the harness does not understand; names the line and what stands there."""

    def __init__(self, line: int, text: str, what: str) -> None:
        super().__init__(f"PTX line {line}, `{' '.join(text.split())}`: {what}")
        self.line = line


@dataclass(frozen=True)
class Statement:
    """An instruction or directive without its semicolon, or one of the scope marks "{" and "}"."""

    line: int
    text: str


@dataclass(frozen=True)
class Variable:
    """A variable in shared, global, const or local memory. `size` is in bytes, None if extern.

    `values` are the initial values of its elements, of `element_bytes` each.
    """

    line: int
    space: str
    name: str
    alignment: int
    size: int | None
    element_bytes: int
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter at `offset` in the parameter block, sizes in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Kernel:
    """An entry point. `directives` stand between the parameters and the body."""

    line: int
    name: str
    parameters: tuple[Parameter, ...]
    directives: str
    body: tuple[Statement, ...]


@dataclass
class Source:
    """A PTX text taken apart."""

    target: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)


def split_commas(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s*(?:\.(?:const|global|local|shared)\s*)?(?:\.align\s+\d+\s*)?)?"
    r"([\w$]+)(?:\[(\d+)\])?$"
)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|global|const|local)\s+"
    r"(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?(?:\.v([24])\s+)?\.(\w+)\s+"
    r"([\w$]+)\s*(?:\[(\d*)\])?\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)\s*")


def parse(text: str) -> Source:
    """Take a PTX text apart.

    Raises:
        PtxError: for a variable or parameter that cannot be read, or calls of functions.
    """
    text = _without_comments(text)
    newlines = [i for i, character in enumerate(text) if character == "\n"]

    def line_of(position: int) -> int:
        return bisect_right(newlines, position - 1) + 1

    target = re.search(r"\.target\s+(\w+)", text)
    source = Source(target.group(1) if target else "")
    outside: list[tuple[int, int]] = []
    position = 0
    while entry := _ENTRY.search(text, position):
        end = _closing_brace(text, entry.end())
        name, parameters, directives = entry.groups()
        line = line_of(entry.start())
        source.kernels[name] = Kernel(
            line,
            name,
            tuple(_parameters(line, parameters or "")),
            directives,
            tuple(_statements(text, entry.end(), end, line_of)),
        )
        outside.append((position, entry.start()))
        position = end + 1
    outside.append((position, len(text)))
    for start, end in outside:
        for match in re.finditer(r"\.(?:shared|global|const)\b[^;]*;", text[start:end]):
            line = line_of(start + match.start())
            variable = parse_variable(line, match.group()[:-1])
            source.variables[variable.name] = variable
    return source


def parse_variable(line: int, text: str) -> Variable:
    """Read a variable's declaration."""
    match = _VARIABLE.match(text.strip())
    if not match or match.group(4) not in TYPE_BYTES:
        raise PtxError(line, text, "a variable that cannot be read")
    space, alignment, vector, element, name, length, initial = match.groups()
    element_bytes = TYPE_BYTES[element]
    whole = element_bytes * int(vector or 1)
    size = None if length == "" else whole * int(length or 1)
    values: tuple[int, ...] = ()
    if initial:
        numbers = split_commas(initial.strip().strip("{}"))
        try:
            values = tuple(parse_number(number)[0] for number in numbers)
        except ValueError:
            raise PtxError(line, text, "initial values that are not numbers") from None
    return Variable(line, space, name, int(alignment or whole), size, element_bytes, values)


def parse_number(text: str) -> tuple[int, bool]:
    """Value of a literal as bits, and whether it is a float.

    Raises:
        ValueError: if it is no number.
    """
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16), True
    digits = text.rstrip("U")
    if re.fullmatch(r"-?0[0-7]+", digits):
        return int(digits, 8), False
    return int(digits, 0), False


def split_labels(text: str) -> tuple[list[str], str]:
    """Labels in front of a statement, and the statement."""
    labels = []
    while match := _LABEL.match(text):
        labels.append(match.group(1))
        text = text[match.end() :]
    return labels, text


def _without_comments(text: str) -> str:
    """Blank out comments and debug information; lines keep their numbers."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match.group().count("\n")

    text = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.DOTALL)
    text = re.sub(r"^[ \t]*\.(?:loc|file)\b[^\n]*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\.section\s+[\w.]+\s*\{[^{}]*\}", blank, text, flags=re.DOTALL)


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return start + match.start()
    raise PtxError(text.count("\n", 0, start) + 1, text[start : start + 40], "no closing brace")


def _parameters(line: int, text: str) -> Iterator[Parameter]:
    offset = 0
    for part in split_commas(text):
        match = _PARAMETER.match(part)
        if not match or match.group(2) not in TYPE_BYTES:
            raise PtxError(line, part, "a kernel parameter that cannot be read")
        alignment, kind, name, length = match.groups()
        element = TYPE_BYTES[kind]
        align = int(alignment or element)
        offset = (offset + align - 1) // align * align
        size = element * int(length or 1)
        yield Parameter(name, offset, size)
        offset += size


def _statements(
    text: str, start: int, end: int, line_of: Callable[[int], int]
) -> Iterator[Statement]:
    """Split a body at semicolons; braces at the start of a statement are scopes, others vectors."""
    begin, depth = start, 0
    for match in re.finditer(r"[;{}]", text[start:end]):
        mark, at = match.group(), start + match.start()
        if mark == ";":
            yield from _statement(text, begin, at, line_of)
            begin = at + 1
        elif depth or not _starts_scope(text[begin:at], mark):
            depth += 1 if mark == "{" else -1
        else:
            yield from _statement(text, begin, at, line_of)  # labels before a scope
            yield Statement(line_of(at), mark)
            begin = at + 1


def _starts_scope(before: str, mark: str) -> bool:
    return not split_labels(before.strip())[1].strip() or mark == "}"


def _statement(
    text: str, begin: int, end: int, line_of: Callable[[int], int]
) -> Iterator[Statement]:
    part = text[begin:end]
    if part.strip():
        yield Statement(line_of(begin + len(part) - len(part.lstrip())), part.strip())
