"""Load PTX and launch its kernels on NumPy arrays or torch tensors, without a GPU."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import toolchain
from .counters import BufferBytes, Counters, InstructionCount, Traffic
from .ptx.decode import Decoded, Decoder
from .ptx.syntax import Parameter, Variable, parse


class Module:
    """A PTX text and the memory of its global variables."""

    def __init__(self, ptx: str) -> None:
        self._engine = toolchain.engine()
        self._source = parse(ptx)
        self._known = frozenset(self._engine.operation_names())
        self._globals = {
            v.name: _initial(v)
            for v in self._source.variables.values()
            if v.space in ("global", "const") and v.size
        }
        self._addresses = {name: a.ctypes.data for name, a in self._globals.items()}
        self._programs: dict[str, tuple[Any, list[Decoded]]] = {}
        self.kernels = {demangle(name): name for name in self._source.kernels}
        """Names of the kernels in the PTX text by their C++ names."""

    @property
    def target(self) -> str:
        """The architecture the text was made for."""
        return self._source.target

    def find(self, name: str) -> str:
        """Name in the PTX text of the one kernel that is called so or whose C++ name holds `name`.

        Raises:
            KeyError: if there is none or more than one.
        """
        if name in self._source.kernels:
            return name
        if name in self.kernels:
            return self.kernels[name]
        found = [mangled for full, mangled in self.kernels.items() if name in full]
        if len(found) != 1:
            kinds = "\n  ".join(self.kernels)
            raise KeyError(f"{len(found)} kernels match {name!r}; the module has\n  {kinds}")
        return found[0]

    def parameters(self, name: str) -> tuple[Parameter, ...]:
        """Parameters of a kernel, with offsets and sizes in bytes."""
        return self._source.kernels[self.find(name)].parameters

    def launch(
        self,
        name: str,
        *,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared: int = 0,
        buffers: Mapping[str, Any] | None = None,
        order: str = "forward",
        blocks: str = "forward",
        lanes: str = "lockstep",
        cp_async: str = "late",
        races: bool = True,
        seed: int = 0,
    ) -> Counters:
        """Execute a kernel.

        Args:
            name: see `find`.
            grid, block: up to three sizes, x first.
            args: one value a parameter: an array or tensor, whose memory the kernel may then touch
                (only read, if it is not writeable), a number, or the bytes of a struct.
            shared: bytes of dynamic shared memory.
            buffers: arrays or tensors by name that the kernel reaches through pointers in structs.
            order: of warps and lanes' atomics: "forward", "reverse" or "random". Each warp runs up
                to its next barrier; in random order they take turns.
            blocks: of blocks: "forward", "reverse" or "random".
            lanes: "lockstep", or "forward", "reverse", "random": one lane or some lanes at a time
                between instructions in which they meet. Counters are those of the hardware only in
                lockstep.
            cp_async: when copies happen: "late" (at their wait), "early" (at once), "random".
            races: fail on shared memory races between warps.
            seed: of everything random.

        Raises:
            KernelError: of the engine: an access out of bounds, a race, a deadlock; names the PTX
                line.
            PtxError: an instruction that is not known.
            ValueError: arguments that do not fit the parameters.
        """
        mangled = self.find(name)
        program, code = self._program(mangled)
        memory = _Memory()
        for label, array in (buffers or {}).items():
            memory.add(label, array)
        for label, array in self._globals.items():
            memory.add(label, array)
        parameters = self._source.kernels[mangled].parameters
        packed = _pack(parameters, args, memory)
        e = self._engine
        options = e.Options(
            warps=_choice(e.Order, "order", order),
            blocks=_choice(e.Order, "blocks", blocks),
            lanes=_choice(e.LaneMode, "lanes", lanes),
            copies=_choice(e.CopyMode, "cp_async", cp_async),
            check_races=races,
            seed=seed,
        )
        counts, distinct = e.launch(
            program, _dim3(grid), _dim3(block), shared, packed, memory.ranges, options
        )
        return Counters(
            tuple(
                InstructionCount(
                    d.line, d.text, d.operation, issued, Traffic(*in_global), Traffic(*in_shared)
                )
                for d, (issued, in_global, in_shared) in zip(code, counts, strict=True)
            ),
            {label: BufferBytes(read, written) for label, read, written in distinct},
        )

    def _program(self, mangled: str) -> tuple[Any, list[Decoded]]:
        if mangled not in self._programs:
            decoded = Decoder(
                self._source.kernels[mangled],
                self._source.variables,
                self._addresses,
                self._known,
            ).decode()
            e = self._engine
            program = e.Program(
                demangle(decoded.name),
                [
                    e.Instruction(
                        d.operation, d.guard, d.negated, d.operands, d.constants, d.line, d.text
                    )
                    for d in decoded.code
                ],
                decoded.constants,
                decoded.specials,
                decoded.register_bytes,
                decoded.shared_bytes,
                decoded.local_bytes,
                decoded.finest_store,
            )
            self._programs[mangled] = program, decoded.code
        return self._programs[mangled]


def load(ptx: str) -> Module:
    """The module of a PTX text, from nvcc or from Triton."""
    return Module(ptx)


def launch_triton(
    compiled: Any, grid: Sequence[int], args: Sequence[Any], **options: Any
) -> Counters:
    """Execute what triton.compile made; `options` are those of Module.launch.

    `args` are the kernel's arguments without its constexprs; Triton's own scratch pointers behind
    them are null.
    """
    module = load(compiled.asm["ptx"])
    (name,) = module.kernels.values()
    missing = len(module.parameters(name)) - len(args)
    return module.launch(
        name,
        grid=grid,
        block=(32 * compiled.metadata.num_warps,),
        shared=compiled.metadata.shared,
        args=[*args, *[0] * missing],
        **options,
    )


def demangle(name: str) -> str:
    """The C++ name of a symbol, or the symbol itself."""
    return str(toolchain.engine().demangle(name))


def pointer(array: Any) -> int:
    """Address of the first element of an array or tensor, for structs of pointers."""
    return int(array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data)


class _Memory:
    """The ranges of addresses that a launch may touch."""

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int, int, bool]] = []
        self._seen: dict[tuple[int, int], int] = {}

    def add(self, label: str, array: Any) -> int:
        start = pointer(array)
        if hasattr(array, "data_ptr"):
            shape, strides, item = array.shape, array.stride(), array.element_size()
            strides = [item * s for s in strides]
            writable = True
        else:
            shape, strides, item = array.shape, array.strides, array.itemsize
            writable = bool(array.flags.writeable)
        if any(stride < 0 for stride in strides):
            raise ValueError(f"{label} has a negative stride, which kernels do not get")
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        size = last + item if all(shape) else 0
        self.ranges.append((label, start, size, writable))
        return start


def _pack(parameters: Sequence[Parameter], args: Sequence[Any], memory: _Memory) -> bytes:
    if len(parameters) != len(args):
        raise ValueError(f"{len(args)} args for the {len(parameters)} parameters of the kernel")
    size = max((p.offset + p.size for p in parameters), default=0)
    packed = bytearray(size)
    for i, (parameter, arg) in enumerate(zip(parameters, args, strict=True)):
        value = _value(f"args[{i}]", parameter.size, arg, memory)
        packed[parameter.offset : parameter.offset + parameter.size] = value
    return bytes(packed)


def _value(label: str, size: int, arg: Any, memory: _Memory) -> bytes:
    if isinstance(arg, (bytes, bytearray)):
        if len(arg) != size:
            raise ValueError(f"{label} has {len(arg)} bytes, the parameter {size}")
        return bytes(arg)
    if isinstance(arg, ctypes.Structure):
        return _value(label, size, bytes(arg), memory)
    if isinstance(arg, (bool, int, np.integer)):
        return struct.pack("<q" if arg < 0 else "<Q", int(arg))[:size]
    if isinstance(arg, (float, np.floating)):
        return struct.pack({4: "<f", 8: "<d"}[size], arg)
    if not hasattr(arg, "data_ptr") and not isinstance(arg, np.ndarray):
        raise ValueError(f"{label} is a {type(arg).__name__}; give an array, a number or bytes")
    if size != 8:
        raise ValueError(f"{label} is an array, the parameter has {size} bytes")
    return struct.pack("<Q", memory.add(label, arg))


def _choice(choices: Any, label: str, name: str) -> Any:
    if name not in choices.__members__:
        raise ValueError(f"{label}={name!r}; accepted: {', '.join(choices.__members__)}")
    return choices.__members__[name]


def _dim3(sizes: Sequence[int]) -> list[int]:
    return [*(int(size) for size in sizes), *[1] * (3 - len(sizes))]


def _initial(variable: Variable) -> np.ndarray[Any, Any]:
    data = np.zeros(variable.size or 0, np.uint8)
    values = [v % (1 << 8 * variable.element_bytes) for v in variable.values]
    filled = b"".join(v.to_bytes(variable.element_bytes, "little") for v in values)
    data[: len(filled)] = np.frombuffer(filled, np.uint8)
    data.flags.writeable = variable.space == "global"
    return data
