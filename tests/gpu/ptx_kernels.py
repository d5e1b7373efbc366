"""Hand-written PTX around a few instructions, for the tests of the machine itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .counters import Counters
from .module import load

_HEAD = """.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry k(.param .u64 in, .param .u64 out) {
 .reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %d<32>; .reg .f32 %f<32>;
 .reg .f64 %g<16>; .reg .b64 %in, %out; .reg .b32 %t, %t4, %lane;
 .shared .align 16 .b8 fixed[1024];
 ld.param.u64 %in, [in]; ld.param.u64 %out, [out];
 cvta.to.global.u64 %in, %in; cvta.to.global.u64 %out, %out;
 mov.u32 %t, %tid.x; shl.b32 %t4, %t, 2; mov.u32 %lane, %laneid;
"""


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy at a multiple of 256 bytes, as cudaMalloc gives it: sectors are counted from there."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run(
    body: str,
    data: NDArray[Any],
    out: NDArray[Any],
    *,
    threads: int = 32,
    shared: int = 0,
    **options: Any,
) -> Counters:
    """Execute a body of PTX in one block; %in and %out are the addresses of the arrays."""
    module = load(_HEAD + body + "\n ret;\n}\n")
    return module.launch(
        "k", grid=(1,), block=(threads,), args=[data, out], shared=shared, **options
    )


def elementwise(
    instructions: str, operands: list[NDArray[Any]], result: np.dtype[Any]
) -> NDArray[Any]:
    """Apply instructions to 32 values an operand: registers x0, x1, ... give y.

    The registers have the width of the arrays' elements.
    """
    width = {2: "b16", 4: "b32", 8: "b64"}
    lines, at = [], 0
    raw = b""
    for i, operand in enumerate(operands):
        size = operand.itemsize
        lines += [
            f".reg .{width[size]} x{i}; mul.wide.u32 %d0, %t, {size};",
            f"add.s64 %d0, %d0, %in; ld.global.{width[size]} x{i}, [%d0+{at}];",
        ]
        at += 32 * size
        raw += np.broadcast_to(operand, 32).tobytes()
    out = np.zeros(32, result)
    size = out.itemsize
    lines += [
        f".reg .{width[size]} y; {instructions}",
        f"mul.wide.u32 %d1, %t, {size}; add.s64 %d1, %d1, %out; st.global.{width[size]} [%d1], y;",
    ]
    run("\n".join(lines), np.frombuffer(raw, np.uint64), out)
    return out
