"""A kernel of a PTX text as a program of the machine.

Names, operands and constants of the operations are those that engine/ops_*.cpp register. What is
not known here or there is an error that names the instruction and its line: a modifier is either
part of an operation's name, or in a list of those that do not change a result, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from .instructions import INSTRUCTIONS
from .operands import SPACES, Modifiers, Operands, RefusedError
from .registers import PREDICATE, RegisterFile
from .syntax import (
    Kernel,
    PtxError,
    Statement,
    Variable,
    parse_variable,
    split_commas,
    split_labels,
)


@dataclass(frozen=True)
class Decoded:
    """One instruction: fields of engine.Instruction, guard is a place or -1."""

    operation: str
    guard: int
    negated: bool
    operands: list[int]
    constants: list[int]
    line: int
    text: str


@dataclass(frozen=True)
class DecodedKernel:
    """Everything engine.Program needs."""

    name: str
    code: list[Decoded]
    constants: list[tuple[int, int, int]]  # place, bytes a lane, value
    specials: list[tuple[int, int]]
    register_bytes: int
    shared_bytes: int
    local_bytes: int
    finest_store: int  # bytes, at most 4


@dataclass
class Decoder:
    """Decodes one kernel.

    `variables` are those of the module, `addresses` of its global ones, `known` the operations of
    the machine.
    """

    kernel: Kernel
    variables: Mapping[str, Variable]
    addresses: Mapping[str, int]
    known: Container[str]
    registers: RegisterFile = field(default_factory=RegisterFile)
    local_bytes: int = 0
    _names: dict[str, int] = field(default_factory=dict)
    _code: list[Decoded] = field(default_factory=list)
    _labels: dict[str, int] = field(default_factory=dict)
    _branch_tables: dict[str, list[str]] = field(default_factory=dict)
    _jumps: list[tuple[int, list[str]]] = field(default_factory=list)

    def decode(self) -> DecodedKernel:
        shared_bytes = self._lay_out_shared()
        self._names.update(self.addresses)
        self._names.update({p.name: p.offset for p in self.kernel.parameters})
        for statement in self.kernel.body:
            self._statement(statement)
        self._code.append(Decoded("ret", -1, False, [], [], self.kernel.line, "end of the kernel"))
        for index, targets in self._jumps:
            jump = self._code[index]
            for target in targets:
                if target not in self._labels:
                    raise PtxError(jump.line, jump.text, f"no label {target}")
                jump.constants.append(self._labels[target])
        return DecodedKernel(
            name=self.kernel.name,
            code=self._code,
            constants=[(r.place, r.bytes, v) for (v, _), r in self.registers.constants.items()],
            specials=self.registers.special_places(),
            register_bytes=self.registers.size,
            shared_bytes=shared_bytes,
            local_bytes=self.local_bytes,
            finest_store=self._finest_store(),
        )

    def _finest_store(self) -> int:
        """The fewest bytes that a store may write to shared memory, at most 4."""
        fewest = 4
        for decoded in self._code:
            name, *kind = decoded.operation.split(".")
            if name == "st" and decoded.constants[0] in (SPACES["shared"], SPACES["generic"]):
                values = len(decoded.operands) - 1
                fewest = min(fewest, int(kind[0][1:]) // 8 * values)
        return fewest

    def _lay_out_shared(self) -> int:
        """Static shared variables one after another, extern ones behind them; the static bytes."""
        body = "\n".join(s.text for s in self.kernel.body)
        used = {name for name in re.findall(r"[\w$]+", body) if name in self.variables}
        variables = [v for v in self.variables.values() if v.name in used and v.space == "shared"]
        for statement in self.kernel.body:
            if statement.text.startswith(".shared"):
                variables.append(parse_variable(statement.line, statement.text))
        offset = 0
        for v in sorted(variables, key=lambda v: v.size is None):
            offset = (offset + v.alignment - 1) // v.alignment * v.alignment
            self._names[v.name] = offset
            offset += v.size or 0
        return offset

    def _statement(self, statement: Statement) -> None:
        labels, text = split_labels(statement.text)
        line = statement.line
        if text.startswith(".branchtargets"):
            targets = split_commas(text.removeprefix(".branchtargets"))
            self._branch_tables |= dict.fromkeys(labels, targets)
            return
        for label in labels:
            if label in self._labels:
                raise PtxError(line, text, f"label {label} occurs twice")
            self._labels[label] = len(self._code)
        if not text or text.startswith((".pragma", ".shared")):
            return
        if text == "{":
            self.registers.open_scope()
        elif text == "}":
            self.registers.close_scope()
        elif text.startswith(".reg"):
            self.registers.declare(line, text)
        elif text.startswith(".local"):
            variable = parse_variable(line, text)
            align = variable.alignment
            self.local_bytes = (self.local_bytes + align - 1) // align * align
            self._names[variable.name] = self.local_bytes
            self.local_bytes = (self.local_bytes + (variable.size or 0) + 15) // 16 * 16
        elif text.startswith("."):
            raise PtxError(line, text, "this directive is not supported")
        else:
            self._instruction(line, text)

    def _instruction(self, line: int, text: str) -> None:
        match = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
        if not match:
            raise PtxError(line, text, "not an instruction")
        negation, guard_name, opcode, rest = match.groups()
        name, *parts = opcode.split(".")
        operands = Operands(self.registers, self._names, self._branch_tables)
        modifiers = Modifiers(parts)
        try:
            guard = operands.register(guard_name, PREDICATE).place if guard_name else -1
            if name not in INSTRUCTIONS:
                raise RefusedError(f"instruction {name} is not supported")
            operation = INSTRUCTIONS[name](operands, modifiers, split_commas(rest))
            modifiers.finish()
            if operation not in self.known:
                raise RefusedError(f"the machine has no operation {operation}")
        except RefusedError as refusal:
            raise PtxError(line, text, str(refusal)) from None
        if operands.targets:
            self._jumps.append((len(self._code), operands.targets))
        self._code.append(
            Decoded(
                operation,
                guard,
                negation == "!",
                operands.places,
                operands.constants,
                line,
                " ".join(text.split()),
            )
        )
