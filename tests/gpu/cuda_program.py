"""Runs the operations of csrc/cuda on CPU tensors: the host program compiled as it is, its kernels
by executing their PTX.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3net_kernels import _layout
from d3net_kernels.numerics import Problem
from d3net_kernels.precision import PRECISIONS

from .counters import Counters
from .module import Module, load
from .toolchain import cached, compile_ptx, digest, host_compiler, run

CSRC = Path(__file__).parents[2] / "csrc"

# kernel, blocks, threads of a block, bytes of dynamic shared memory, the bytes of its parameter,
# the memory it may touch
Launch = Callable[[str, int, int, int, bytes, Mapping[str, Tensor]], None]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # order of enum DType
_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int64)
_LAUNCH = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int64,
)


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_int64, _pointer = ctypes.c_int64, ctypes.c_void_p
_Strides = {"stride_0": _int64, "stride_1": _int64, "stride_2": _int64, "stride_3": _int64}
_View = _struct("View", data=_pointer, **_Strides)  # also Weight
_Source = _struct("Source", x=_View, channels=_int64, dilation_h=_int64, dilation_w=_int64)
_Psi = _struct("Psi", scale=_pointer, shift=_pointer, relu=ctypes.c_bool)
_Problem = _struct(
    "Problem",
    dtype=ctypes.c_int,
    batch=_int64,
    height=_int64,
    width=_int64,
    out_channels=_int64,
    in_channels=_int64,
    kernel_h=_int64,
    kernel_w=_int64,
    sources=ctypes.POINTER(_Source),
    num_sources=_int64,
    weight=_View,
    psi=_Psi,
    precision=ctypes.c_int,
)
_Vector = _struct("Vector", data=_pointer, stride=_int64, dtype=ctypes.c_int)
_Coefficients = _struct("Coefficients", scale=_Vector, shift=_Vector, bias=_Vector)
_Moments = _struct("Moments", mean=_Vector, variance=_Vector)
_Arch = _struct("Arch", capability=ctypes.c_int, multiprocessors=ctypes.c_int)
_CallStruct = _struct(
    "Call",
    problem=_Problem,
    coefficients=_Coefficients,
    arch=_Arch,
    allocate=_ALLOCATE,
    launch=_LAUNCH,
)


def _nan_bytes(size: int) -> Tensor:
    """Memory as cudaMalloc aligns it, every byte 0xff: NaN in every floating dtype."""
    memory = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
    start = -memory.data_ptr() % 256
    return memory[start : start + size]


@functools.cache
def _compiled_program() -> Path:
    sources = [CSRC / "cuda" / "program.cpp", Path(__file__).with_name("cuda_program.cpp")]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CSRC}"]
    headers = [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h")]
    compiler = host_compiler()
    key = digest([compiler, *flags], [*sources, *headers])

    def compile_(out: Path) -> None:
        run([compiler, *flags, *sources, "-o", out])

    return cached(f"cuda-program-{key}.so", compile_)


@functools.cache
def module_of(kernel: str, arch: str = "sm_80") -> Module:
    """The module of the instantiation file that holds `kernel`."""
    return load(ptx_of(kernel, arch))


def ptx_of(kernel: str, arch: str = "sm_80") -> str:
    """The PTX of the instantiation file that holds `kernel`."""
    return compile_ptx(source_of(kernel), arch, includes=[CSRC])


def source_of(kernel: str) -> Path:
    """The instantiation file of a kernel: named after its tile and dtype."""
    family, *rest = kernel.split("_")
    if family == "direct":
        return CSRC / "cuda" / f"direct_{rest[-1]}.cu"
    if family == "tensor" and rest[0] == "weight":
        return CSRC / "cuda" / f"tensor_weight_{rest[-1]}.cu"
    if family == "tensor":
        return CSRC / "cuda" / f"tensor_{rest[-2]}_{rest[-1]}.cu"
    return CSRC / "cuda" / "common.cu"


class Executed:
    """Executes launches on the PTX machine; keeps their counters by kernel."""

    def __init__(self, arch: str = "sm_80", **options: Any) -> None:
        self._arch, self._options = arch, options
        self.counters: dict[str, Counters] = {}

    def __call__(
        self,
        kernel: str,
        blocks: int,
        threads: int,
        shared: int,
        arguments: bytes,
        buffers: Mapping[str, Tensor],
    ) -> None:
        counters = module_of(kernel, self._arch).launch(
            kernel,
            grid=(blocks,),
            block=(threads,),
            args=[arguments],
            shared=shared,
            buffers=buffers,
            **self._options,
        )
        self.counters[kernel] = self.counters.get(kernel, Counters()) + counters


class Program:
    """The host program csrc/cuda/program.cpp; `launch` executes or records what it launches."""

    def __init__(
        self,
        launch: Launch,
        capability: int = 80,
        multiprocessors: int = 4,
        *,
        tf32: bool = False,
    ) -> None:
        self._library = ctypes.CDLL(str(_compiled_program()))
        self._launch = launch
        self._precision = PRECISIONS["high" if tf32 else "highest"]
        self._arch = _Arch(capability, multiprocessors)

    def results(self, p: Problem, *, moments: bool = False) -> dict[str, Tensor]:
        """Output and needed gradients by name, as numerics.results_of gives them.

        With `moments`, also "mean" and "variance" of the output.
        """
        with torch.no_grad():
            call = _Call(self._library, self._launch, self._arch, p, self._precision)
            return call.results(moments)


class _Call:
    """One problem in memory as a GPU would hold it: aligned, and nothing else within reach."""

    def __init__(self, library: Any, launch: Launch, arch: Any, p: Problem, precision: int) -> None:
        self._p, self._library = p, library
        self._buffers: dict[str, Tensor] = {}
        self._error: Exception | None = None
        inputs = [self._placed(f"inputs[{i}]", x) for i, x in enumerate(p.inputs)]
        weight = self._placed("weight", p.weight)
        sources = (_Source * len(inputs))(
            *(_Source(_view(x), x.shape[1], *d) for x, d in zip(inputs, p.dilations, strict=True))
        )
        n, _, h, w = inputs[0].shape
        self._dtype = _DTYPES.index(inputs[0].dtype)
        problem = _Problem(
            self._dtype,
            *(n, h, w),
            *weight.shape,
            sources,
            len(inputs),
            _view(weight),
            _Psi(None, None, p.relu),
            precision,
        )
        vectors = [
            _Vector() if t is None else _vector(self._placed(name, t))
            for name, t in (("scale", p.scale), ("shift", p.shift), ("bias", p.bias))
        ]

        def allocate(size: int) -> int:
            memory = _nan_bytes(max(size, 1))
            self._buffers[f"workspace {len(self._buffers)}"] = memory
            return memory.data_ptr()

        def start(
            kernel: bytes, blocks: int, threads: int, shared: int, at: int, size: int
        ) -> None:
            if self._error:
                return
            try:
                arguments = ctypes.string_at(at, size)
                launch(kernel.decode(), blocks, threads, shared, arguments, self._buffers)
            except Exception as error:  # ctypes would print and forget it; _run raises it
                self._error = error

        self._keep = (sources, allocate, start)
        self._call = _CallStruct(
            problem, _Coefficients(*vectors), arch, _ALLOCATE(allocate), _LAUNCH(start)
        )

    def results(self, moments: bool) -> dict[str, Tensor]:
        p = self._p
        n, _, h, w = p.inputs[0].shape
        outputs = p.weight.shape[0]
        out = self._empty("out", _layout.empty((n, outputs, h, w), p.inputs[0]))
        results = {"out": out}
        statistics = _Moments()
        if moments:
            kept = torch.empty(outputs, dtype=_layout.dtype_for(out))
            results |= {name: self._empty(name, kept) for name in ("mean", "variance")}
            statistics = _Moments(_vector(results["mean"]), _vector(results["variance"]))
        self._run("forward", _view(out), statistics)
        needed = {name for name, t in p.tensors().items() if t.requires_grad}
        gradient = _view(self._placed("grad_output", p.grad_output))
        if needed - {"weight", "bias"}:
            results |= self._data_gradients(gradient)
        if needed & {"weight", "bias"}:
            grad_weight = self._empty("grad weight", torch.empty(p.weight.shape, dtype=out.dtype))
            grad_bias = self._empty("grad bias", torch.empty(outputs, dtype=out.dtype))
            results |= {"grad weight": grad_weight, "grad bias": grad_bias}
            addresses = (ctypes.c_void_p(t.data_ptr()) for t in (grad_weight, grad_bias))
            self._run("backward_weight", gradient, *addresses)
        return {
            name: t
            for name, t in results.items()
            if not name.startswith("grad ") or name.removeprefix("grad ") in needed
        }

    def _data_gradients(self, gradient: Any) -> dict[str, Tensor]:
        p = self._p
        results = {
            f"grad inputs[{i}]": self._empty(f"grad inputs[{i}]", _layout.empty(x.shape, x))
            for i, x in enumerate(p.inputs)
            if x.requires_grad
        }
        names = [f"grad inputs[{i}]" for i in range(len(p.inputs))]
        views = (_View * len(names))(
            *(_view(results[name]) if name in results else _View() for name in names)
        )
        sums = _Coefficients()
        if p.scale is not None:
            for name in ("grad scale", "grad shift"):
                results[name] = self._empty(name, torch.empty_like(p.scale))
            sums = _Coefficients(_vector(results["grad scale"]), _vector(results["grad shift"]))
        self._run("backward_data", gradient, views, sums)
        return results

    def _run(self, operation: str, *arguments: Any) -> None:
        by_reference = [
            ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments
        ]
        run = getattr(self._library, f"program_{operation}")
        run.restype = ctypes.c_char_p
        refusal = run(ctypes.byref(self._call), *by_reference)
        if self._error:
            raise self._error
        if refusal is not None:
            raise RuntimeError(refusal.decode())

    def _placed(self, name: str, t: Tensor) -> Tensor:
        """A copy of `t` and of what lies between its elements."""
        t = t.detach()
        if t.numel() == 0:
            return t
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        memory = _nan_bytes(span * t.element_size()).view(t.dtype)
        memory.copy_(t.as_strided((span,), (1,)))
        self._buffers[name] = memory
        return memory.as_strided(t.shape, t.stride())

    def _empty(self, name: str, like: Tensor) -> Tensor:
        """A result like `like`, filled with NaN."""
        return self._placed(name, like.fill_(torch.nan))


def _view(t: Tensor) -> Any:
    return _View(t.data_ptr(), *t.stride())


def _vector(t: Tensor) -> Any:
    return _Vector(t.data_ptr(), t.stride(0), _DTYPES.index(t.dtype))
