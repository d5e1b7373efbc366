"""The PTX machine: matrices and copies against NumPy, what it must refuse, what it counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from . import toolchain
from .ptx_kernels import aligned, run

pytestmark = pytest.mark.skipif(
    bool(toolchain.why_no_engine()), reason=str(toolchain.why_no_engine())
)


@pytest.fixture
def rng(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(generator.initial_seed())


def bf16(x: Any) -> Any:
    rounded = torch.from_numpy(np.asarray(x, np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


# The rows of A (16 x 16) and of B transposed (8 x 16) come to shared memory, then to fragments by
# ldmatrix: the layouts of the two instructions have to agree with each other and with NumPy.
_TO_SHARED = """
 mov.u32 %r20, fixed; mul.lo.u32 %r21, %t, 16; add.s32 %r22, %r20, %r21; cvt.u64.u32 %d0, %r21;
 add.s64 %d1, %in, %d0; cp.async.cg.shared.global [%r22], [%d1], 16;
 setp.lt.u32 %p0, %t, 16; @%p0 cp.async.cg.shared.global [%r22+512], [%d1+512], 16;
 cp.async.commit_group; cp.async.wait_group 0; bar.warp.sync -1;
"""
_LDMATRIX = """
 and.b32 %r0, %t, 15; shl.b32 %r0, %r0, 5; shr.u32 %r1, %t, 4; shl.b32 %r1, %r1, 4;
 add.s32 %r0, %r0, %r1; add.s32 %r0, %r0, %r20;
 ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4,%r5,%r6,%r7}, [%r0];
 and.b32 %r0, %t, 7; shl.b32 %r0, %r0, 5; shr.u32 %r1, %t, 3; and.b32 %r1, %r1, 1;
 shl.b32 %r1, %r1, 4; add.s32 %r0, %r0, %r1; add.s32 %r0, %r0, %r20;
 ldmatrix.sync.aligned.m8n8.x2.shared::cta.b16 {%r8,%r9}, [%r0+512];
"""
_STORE_SUMS = """
 shr.u32 %r0, %t, 2; and.b32 %r1, %t, 3; shl.b32 %r0, %r0, 5; shl.b32 %r1, %r1, 3;
 add.s32 %r0, %r0, %r1; cvt.u64.u32 %d2, %r0; add.s64 %d2, %d2, %out;
 st.global.v2.f32 [%d2], {%f0,%f1}; st.global.v2.f32 [%d2+256], {%f2,%f3};
"""


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("depth", [16, 8])
@pytest.mark.parametrize("cp_async", ["late", "early", "random"])
def test_ldmatrix_and_mma(rng: np.random.Generator, kind: str, depth: int, cp_async: str) -> None:
    a, b, c = (rng.integers(-8, 9, shape) / 4 for shape in ((16, 16), (8, 16), 1))
    rows = np.concatenate([a, b])
    data = bf16(rows) if kind == "bf16" else rows.astype(np.float16).view(np.uint16)
    fragments = "{%r4,%r5,%r6,%r7}, {%r8,%r9}" if depth == 16 else "{%r4,%r5}, {%r8}"
    bits = int(np.float32(c[0]).view(np.uint32))
    body = f"""{_TO_SHARED}{_LDMATRIX}
     mov.f32 %f4, 0f{bits:08X};
     mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{%f0,%f1,%f2,%f3}},
       {fragments}, {{%f4,%f4,%f4,%f4}};
     {_STORE_SUMS}"""
    out = np.full((16, 8), np.nan, np.float32)
    counters = run(body, aligned(data), out, cp_async=cp_async)
    np.testing.assert_array_equal(out, a[:, :depth] @ b[:, :depth].T + c)
    assert counters.by_kind()["mma"] == 1
    assert counters.by_kind()["ldmatrix"] == 2


def test_transposed_ldmatrix(rng: np.random.Generator) -> None:
    data = aligned(rng.integers(0, 2**16, (24, 16), np.uint16))
    out = np.zeros(32, np.uint32)
    body = f"""{_TO_SHARED}
     and.b32 %r0, %t, 7; shl.b32 %r0, %r0, 5; add.s32 %r0, %r0, %r20;
     ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {{%r4}}, [%r0];
     cvt.u64.u32 %d0, %t4; add.s64 %d0, %d0, %out; st.global.b32 [%d0], %r4;"""
    run(body, data, out)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(8, 8), data[:8, :8].T)


def test_tf32_and_double_mma(rng: np.random.Generator) -> None:
    """A and B are indices of the fragments' figures in the PTX ISA, worked out here by hand."""
    a, b = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
    lane = np.arange(32)
    group, member = lane // 4, lane % 4
    fragments = [a[group + 8 * (r % 2), member + 4 * (r // 2)] for r in range(4)]
    fragments += [b[member + 4 * r, group] for r in range(2)]
    loads = "".join(f"ld.global.b32 %r{i}, [%d0+{128 * i}];" for i in range(6))
    body = f"""
     cvt.u64.u32 %d0, %t4; add.s64 %d0, %d0, %in; {loads} mov.f32 %f4, 0f00000000;
     mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{%f0,%f1,%f2,%f3}},
       {{%r0,%r1,%r2,%r3}}, {{%r4,%r5}}, {{%f4,%f4,%f4,%f4}};
     {_STORE_SUMS}"""
    out = np.full((16, 8), np.nan, np.float32)
    run(body, np.stack(fragments), out)
    np.testing.assert_array_equal(out, a @ b)
    a64, b64 = rng.standard_normal((2, 8, 4))
    pairs = np.stack([a64[group, member], b64[group, member]])
    sums = np.full((8, 8), np.nan)
    body = """
     mul.wide.u32 %d0, %t, 8; add.s64 %d1, %d0, %in; ld.global.f64 %g0, [%d1];
     ld.global.f64 %g1, [%d1+256]; mov.f64 %g4, 0d0000000000000000;
     mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%g2,%g3}, {%g0}, {%g1}, {%g4,%g4};
     mul.wide.u32 %d0, %t, 16; add.s64 %d1, %d0, %out; st.global.v2.f64 [%d1], {%g2,%g3};"""
    run(body, pairs, sums)
    np.testing.assert_allclose(sums, a64 @ b64.T, rtol=1e-15, atol=1e-15)


_REFUSED = {
    "load behind the buffer": ("ld.global.b32 %r0, [%in+128];", "outside every buffer"),
    "load before the buffer": ("ld.global.b32 %r0, [%in+-4];", "outside every buffer"),
    "null pointer": ("mov.b64 %d0, 0; ld.global.b32 %r0, [%d0];", "outside every buffer"),
    "store to a constant buffer": ("st.global.b32 [%in], %t;", "read-only buffer"),
    "misaligned vector": ("ld.global.v2.b32 {%r0,%r1}, [%in+4];", "not aligned"),
    "shared memory": ("mov.u32 %r0, dynamic; ld.shared.b32 %r1, [%r0+64];", "1088 bytes of shared"),
    "ldmatrix": (
        "mov.u32 %r0, dynamic; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r0+64];",
        "outside the 1088 bytes",
    ),
    "half a warp at mma's door": (
        "setp.lt.u32 %p0, %t, 16; @%p0 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [fixed];",
        "deadlock|needs lanes",
    ),
    "a shuffle whose lanes do not all come": (
        "setp.lt.u32 %p0, %t, 16; @%p0 shfl.sync.idx.b32 %r0, %t, 0, 31, -1;",
        "deadlock|needs lanes",
    ),
    "a copy nobody waits for": (
        "mov.u32 %r0, fixed; add.s32 %r0, %r0, %t4; cp.async.ca.shared.global [%r0], [%in], 4;",
        "never waited for",
    ),
    "a trap": ("trap;", "traps"),
    "a parameter": ("st.param.b64 [in], %in;", "writes a kernel parameter"),
}


@pytest.mark.parametrize(("body", "error"), _REFUSED.values(), ids=_REFUSED)
def test_refused(body: str, error: str) -> None:
    data = np.zeros(32, np.uint32)
    data.flags.writeable = False
    with pytest.raises(toolchain.engine().KernelError, match=error):
        run(body, data, np.zeros(32, np.uint32), shared=64)


_HANDOVER = """
 mov.u32 %r0, fixed; add.s32 %r1, %r0, %t4; st.shared.b32 [%r1], %t; {sync}
 xor.b32 %r2, %t, 32; shl.b32 %r2, %r2, 2; add.s32 %r2, %r2, %r0; ld.shared.b32 %r3, [%r2];
 cvt.u64.u32 %d0, %t4; add.s64 %d0, %d0, %out; st.global.b32 [%d0], %r3;"""


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_a_race_between_warps_is_found_in_any_order(order: str) -> None:
    out = np.zeros(64, np.uint32)
    run(_HANDOVER.format(sync="bar.sync 0;"), np.zeros(1), out, threads=64, order=order)
    np.testing.assert_array_equal(out, np.arange(64) ^ 32)
    with pytest.raises(toolchain.engine().KernelError, match="no barrier between them"):
        run(_HANDOVER.format(sync=""), np.zeros(1), out, threads=64, order=order)


def test_without_the_detector_a_race_reads_poison() -> None:
    out = np.zeros(64, np.uint32)
    run(_HANDOVER.format(sync=""), np.zeros(1), out, threads=64, races=False)
    assert np.all(out[:32] == 0xFFFFFFFF)


def test_a_missing_syncwarp_shows_when_lanes_run_apart() -> None:
    body = _HANDOVER.replace("xor.b32 %r2, %t, 32", "xor.b32 %r2, %t, 1")
    out = np.zeros(32, np.uint32)
    run(body.format(sync=""), np.zeros(1), out, lanes="forward")
    assert np.any(out != np.arange(32) ^ 1)
    run(body.format(sync="bar.warp.sync -1;"), np.zeros(1), out, lanes="forward")
    np.testing.assert_array_equal(out, np.arange(32) ^ 1)


def test_named_barriers_deadlock_when_a_warp_does_not_come() -> None:
    body = "setp.lt.u32 %p0, %t, 32; @%p0 bar.sync 1, 64; @!%p0 bar.sync 2, 64;"
    with pytest.raises(toolchain.engine().KernelError, match="deadlock"):
        run(body, np.zeros(1), np.zeros(1), threads=64)


@pytest.mark.parametrize(
    ("stride", "sectors", "wavefronts"),
    [(0, 1, 1), (4, 4, 1), (8, 8, 2), (32, 32, 8), (128, 32, 32)],
)
def test_sectors_and_wavefronts(stride: int, sectors: int, wavefronts: int) -> None:
    """Lane l touches 4 bytes at l * stride: by hand, banks are 32 of 4 bytes."""
    body = f"""
     mul.lo.u32 %r0, %t, {stride}; cvt.u64.u32 %d0, %r0; add.s64 %d0, %d0, %in;
     ld.global.b32 %r1, [%d0]; mov.u32 %r2, dynamic; add.s32 %r2, %r2, %r0;
     ld.shared.b32 %r3, [%r2];"""
    counters = run(body, aligned(np.zeros(1024, np.uint32)), np.zeros(1), shared=4096)
    assert counters.global_traffic.units == sectors
    assert counters.global_traffic.ideal == (1 if stride == 0 else 4)
    assert counters.shared_traffic.units == wavefronts
    assert counters.shared_traffic.ideal == 1
    touched = {0: 32, 4: 128, 8: 256, 32: 1024, 128: 1024}[stride]
    assert counters.buffers["args[0]"].read == touched
