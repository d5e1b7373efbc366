"""Runs the operations of csrc/cuda/program.cpp on CPU tensors, the launches through a callback.

The host code is compiled as it is; what a launch does is up to the caller: record it, or execute
the kernel's PTX.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3net_kernels import _layout
from d3net_kernels.numerics import Problem

# kernel, blocks, threads of a block, dynamic shared memory in bytes, address of the arguments,
# their size in bytes
Launch = Callable[[str, int, int, int, int, int], None]

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
)
_Vector = _struct("Vector", data=_pointer, stride=_int64, dtype=ctypes.c_int)
_Coefficients = _struct("Coefficients", scale=_Vector, shift=_Vector, bias=_Vector)
_Moments = _struct("Moments", mean=_Vector, variance=_Vector)
_Arch = _struct("Arch", capability=ctypes.c_int, multiprocessors=ctypes.c_int)
_Call = _struct(
    "Call",
    problem=_Problem,
    coefficients=_Coefficients,
    arch=_Arch,
    allocate=_ALLOCATE,
    launch=_LAUNCH,
)


def aligned_nan(bytes_: int) -> Tensor:
    """Memory as cudaMalloc aligns it, every byte 0xff: NaN in every floating dtype."""
    memory = torch.full((bytes_ + 256,), 0xFF, dtype=torch.uint8)
    start = -memory.data_ptr() % 256
    return memory[start : start + bytes_]


def aligned(t: Tensor) -> Tensor:
    """A copy with the same values, strides and memory around it, aligned as torch does on CUDA."""
    if t.numel() == 0:
        return t
    size = t.element_size()
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    memory = aligned_nan(span * size).view(t.dtype)
    whole = memory.as_strided(t.shape, t.stride())
    # Overlapping elements (expanded tensors) hold equal values, so that their order is no matter.
    memory.copy_(t.as_strided((span,), (1,)))
    return whole


class Program:
    """The compiled host program, with what its launches do."""

    def __init__(self, library: Path, launch: Launch, capability: int = 80, sms: int = 4) -> None:
        self._library = ctypes.CDLL(str(library))
        self._launch = launch
        self._arch = _Arch(capability, sms)

    def results(self, p: Problem, *, moments: bool = False) -> dict[str, Tensor]:
        """Output and needed gradients by name, as numerics.results_of gives them.

        With `moments`, also "mean" and "variance" of the output.
        """
        with torch.no_grad():
            return self._results(p, moments)

    def _results(self, p: Problem, moments: bool) -> dict[str, Tensor]:
        keep: list[Any] = []  # whatever the call points to
        call = self._call(p, keep)
        needed = {name for name, t in p.tensors().items() if t.requires_grad}
        n, _, h, w = p.inputs[0].shape
        out = _nan_like((n, p.weight.shape[0], h, w), p.inputs[0])
        statistics = [
            aligned_nan(8 * p.weight.shape[0]).view(_layout.dtype_for(out))[: p.weight.shape[0]]
            for _ in range(2 * moments)
        ]
        given = _Moments(*(_vector(t) for t in statistics)) if moments else _Moments()
        self._library.program_forward(
            ctypes.byref(call), ctypes.byref(_view(out)), ctypes.byref(given)
        )
        results = {"out": out} | dict(zip(("mean", "variance"), statistics, strict=False))
        gradient = aligned(p.grad_output.detach())
        view = _view(gradient)
        if needed & {"scale", "shift"} or any(name.startswith("inputs") for name in needed):
            grads = [_nan_like(x.shape, x) if x.requires_grad else x.new_empty(0) for x in p.inputs]
            views = (_View * len(grads))(*(_view(g) if g.numel() else _View() for g in grads))
            sums = _Coefficients()
            if p.scale is not None:
                scale, shift = (aligned(torch.full_like(p.scale, torch.nan)) for _ in range(2))
                sums = _Coefficients(_vector(scale), _vector(shift), _Vector())
                results |= {"grad scale": scale, "grad shift": shift}
            self._library.program_backward_data(
                ctypes.byref(call), ctypes.byref(view), views, ctypes.byref(sums)
            )
            results |= {f"grad inputs[{i}]": g for i, g in enumerate(grads)}
        if needed & {"weight", "bias"}:
            weight = aligned(torch.full(p.weight.shape, torch.nan, dtype=p.weight.dtype))
            bias = aligned(torch.full((p.weight.shape[0],), torch.nan, dtype=p.weight.dtype))
            self._library.program_backward_weight(
                ctypes.byref(call),
                ctypes.byref(view),
                ctypes.c_void_p(weight.data_ptr()),
                ctypes.c_void_p(bias.data_ptr()),
            )
            results |= {"grad weight": weight, "grad bias": bias}
        extra = {"out", "mean", "variance"}
        return {k: v for k, v in results.items() if k in extra or k.removeprefix("grad ") in needed}

    def _call(self, p: Problem, keep: list[Any]) -> Any:
        inputs = [aligned(x.detach()) for x in p.inputs]
        weight = aligned(p.weight.detach())
        sources = (_Source * len(inputs))(
            *(_Source(_view(x), x.shape[1], *d) for x, d in zip(inputs, p.dilations, strict=True))
        )
        vectors = [None if t is None else aligned(t.detach()) for t in (p.scale, p.shift, p.bias)]
        n, _, h, w = inputs[0].shape
        problem = _Problem(
            _DTYPES.index(inputs[0].dtype),
            *(n, h, w),
            *weight.shape,
            sources,
            len(inputs),
            _view(weight),
            _Psi(None, None, p.relu),
        )

        def allocate(bytes_: int) -> int:
            keep.append(aligned_nan(max(bytes_, 1)))
            return int(keep[-1].data_ptr())

        def launch(kernel: bytes, *arguments: int) -> None:
            self._launch(kernel.decode(), *arguments)

        call = _Call(
            problem,
            _Coefficients(*(_Vector() if v is None else _vector(v) for v in vectors)),
            self._arch,
            _ALLOCATE(allocate),
            _LAUNCH(launch),
        )
        keep += [inputs, weight, sources, vectors, call]
        return call


def _view(t: Tensor) -> Any:
    return _View(t.data_ptr(), *t.stride())


def _vector(t: Tensor) -> Any:
    return _Vector(t.data_ptr(), t.stride(0), _DTYPES.index(t.dtype))


def _nan_like(shape: Any, like: Tensor) -> Tensor:
    """What the operators allocate for a result, filled with NaN."""
    return aligned(_layout.empty(shape, like).fill_(torch.nan))
