"""What Triton emits for sm_80 (mma.sync) and sm_90 (wgmma) runs on the machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import toolchain
from .module import launch_triton

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

pytestmark = pytest.mark.skipif(
    bool(toolchain.why_no_engine()), reason=str(toolchain.why_no_engine())
)


@triton.jit  # type: ignore[untyped-decorator]
def product(  # type: ignore[no-untyped-def]
    a,
    b,
    c,
    rows,
    columns,
    depth,
    TILE: tl.constexpr,  # type: ignore[name-defined]  # noqa: N803
    STEP: tl.constexpr,  # type: ignore[name-defined]  # noqa: N803
):
    """c (rows x columns, float32) = a (rows x depth) b (depth x columns), row by row."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    step = tl.arange(0, STEP)
    total = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, depth, STEP):
        k = first + step
        left = (row[:, None] < rows) & (k[None, :] < depth)
        right = (k[:, None] < depth) & (column[None, :] < columns)
        x = tl.load(a + row[:, None] * depth + k[None, :], mask=left, other=0.0)
        y = tl.load(b + k[:, None] * columns + column[None, :], mask=right, other=0.0)
        total = tl.dot(x, y, total)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(c + row[:, None] * columns + column[None, :], total, mask=inside)


def compiled(capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=product,
        signature={
            **dict.fromkeys("ab", "*bf16"),
            "c": "*fp32",
            **dict.fromkeys(("rows", "columns", "depth"), "i32"),
            **dict.fromkeys(("TILE", "STEP"), "constexpr"),
        },
        constexprs={"TILE": 64, "STEP": 32},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(6)},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 3})


@pytest.mark.parametrize(
    "options", [{}, {"order": "random", "lanes": "random", "cp_async": "early", "seed": 3}], ids=str
)
@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma")])
def test_matrix_product(
    generator: torch.Generator, capability: int, instruction: str, options: dict[str, Any]
) -> None:
    kernel = compiled(capability)
    assert instruction in kernel.asm["ptx"]
    rows, columns, depth = 80, 144, 96
    a, b = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((rows, depth), (depth, columns))
    )
    c = torch.full((rows, columns), torch.nan)
    counters = launch_triton(kernel, (2, 3), [a, b, c, rows, columns, depth], **options)
    exact = a.double() @ b.double()
    rounding = torch.finfo(torch.float32).eps * depth * (a.double().abs() @ b.double().abs())
    assert torch.all((c - exact).abs() <= rounding)
    assert counters.issued("mma") > 0
