"""Every family of instructions of the PTX machine against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from . import toolchain
from .ptx.syntax import PtxError
from .ptx_kernels import aligned, elementwise, run

pytestmark = pytest.mark.skipif(
    bool(toolchain.why_no_engine()), reason=str(toolchain.why_no_engine())
)

I32, U32, I64, U64 = (np.dtype(t) for t in (np.int32, np.uint32, np.int64, np.uint64))
F32, F64, F16 = (np.dtype(t) for t in (np.float32, np.float64, np.float16))
U16 = np.dtype(np.uint16)


@pytest.fixture
def rng(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(generator.initial_seed())


def numbers(rng: np.random.Generator, dtype: np.dtype[Any]) -> Any:
    """32 numbers of a dtype, the special ones among them."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        special = [0, 1, 2, limits.max, limits.min, limits.max - 1]
        drawn = rng.integers(limits.min, limits.max, 26, dtype, endpoint=True)
        return np.concatenate([np.array(special, dtype), drawn])
    exceptional = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        np.inf,
        -np.inf,
        np.nan,
        np.finfo(dtype).smallest_subnormal,
    ]
    return np.concatenate([exceptional, rng.standard_normal(24) * 3]).astype(dtype)


def same(a: Any, b: Any) -> None:
    """Equal bit by bit, but for the payload of a NaN."""
    if a.dtype.kind == "f":
        nan = np.isnan(b)
        np.testing.assert_array_equal(np.isnan(a), nan)
        a, b = (np.where(nan, 0, x).astype(x.dtype).view(f"u{x.itemsize}") for x in (a, b))
    np.testing.assert_array_equal(a, b)


def bf16(x: Any) -> Any:
    """float32 to the bits of bfloat16, by torch."""
    return (
        torch.from_numpy(np.asarray(x, np.float32)).bfloat16().view(torch.int16).numpy().view(U16)
    )


BINARY: list[tuple[str, np.dtype[Any], Callable[[Any, Any], Any]]] = [
    ("add.s32", I32, lambda a, b: a + b),
    ("sub.s32", I32, lambda a, b: a - b),
    ("mul.lo.s32", I32, lambda a, b: a * b),
    ("mul.hi.s32", I32, lambda a, b: (a.astype(I64) * b >> 32).astype(I32)),
    ("mul.hi.u32", U32, lambda a, b: (a.astype(U64) * b >> np.uint64(32)).astype(U32)),
    ("add.s64", I64, lambda a, b: a + b),
    ("mul.lo.s64", I64, lambda a, b: a * b),
    ("min.s32", I32, np.minimum),
    ("max.u32", U32, np.maximum),
    ("min.u64", U64, np.minimum),
    ("and.b32", U32, np.bitwise_and),
    ("or.b64", U64, np.bitwise_or),
    ("xor.b16", U16, np.bitwise_xor),
    ("add.f32", F32, lambda a, b: a + b),
    ("sub.rn.f32", F32, lambda a, b: a - b),
    ("mul.f32", F32, lambda a, b: a * b),
    ("div.rn.f32", F32, lambda a, b: a / b),
    ("add.f64", F64, lambda a, b: a + b),
    ("mul.rn.f64", F64, lambda a, b: a * b),
    ("div.rn.f64", F64, lambda a, b: a / b),
    ("min.f32", F32, np.fmin),
    ("max.f32", F32, np.fmax),
    ("max.NaN.f32", F32, np.maximum),
    ("add.f16", F16, lambda a, b: a + b),
    ("mul.f16", F16, lambda a, b: a * b),
]


@pytest.mark.parametrize(("name", "dtype", "truth"), BINARY, ids=[b[0] for b in BINARY])
def test_two_operands(
    rng: np.random.Generator, name: str, dtype: np.dtype[Any], truth: Callable[[Any, Any], Any]
) -> None:
    a, b = numbers(rng, dtype), rng.permutation(numbers(rng, dtype))
    if name.startswith(("min.f", "max.f")):  # NumPy does not order -0 and 0
        a[:2] = b[b == 0] = 1
    with np.errstate(all="ignore"):
        same(elementwise(f"{name} y, x0, x1;", [a, b], dtype), truth(a, b))


OTHER: list[tuple[str, list[np.dtype[Any]], np.dtype[Any], Callable[..., Any]]] = [
    ("mul.wide.s32 y, x0, x1;", [I32, I32], I64, lambda a, b: a.astype(I64) * b),
    ("mad.wide.u32 y, x0, x1, x2;", [U32, U32, U64], U64, lambda a, b, c: a.astype(U64) * b + c),
    ("mad.lo.s32 y, x0, x1, x2;", [I32, I32, I32], I32, lambda a, b, c: a * b + c),
    ("neg.s32 y, x0;", [I32], I32, lambda a: -a),
    ("abs.f32 y, x0;", [F32], F32, np.abs),
    ("not.b32 y, x0;", [U32], U32, np.invert),
    ("shl.b32 y, x0, 7;", [U32], U32, lambda a: a << np.uint32(7)),
    ("shl.b32 y, x0, 32;", [U32], U32, lambda a: a * np.uint32(0)),
    ("shr.s32 y, x0, 9;", [I32], I32, lambda a: a >> 9),
    ("shr.s32 y, x0, 99;", [I32], I32, lambda a: a >> 31),
    ("shr.u64 y, x0, 9;", [U64], U64, lambda a: a >> np.uint64(9)),
    ("bfe.u32 y, x0, 4, 9;", [U32], U32, lambda a: a >> np.uint32(4) & np.uint32(511)),
    ("bfe.s32 y, x0, 20, 12;", [I32], I32, lambda a: a >> 20),
    ("bfi.b32 y, x0, x1, 8, 8;", [U32, U32], U32,
     lambda a, b: (b & np.uint32(0xFFFF00FF)) | (a & np.uint32(255)) << np.uint32(8)),
    ("bfi.b64 y, x0, x1, 1, 63;", [U64, U64], U64,
     lambda a, b: (b & np.uint64(1)) | a << np.uint64(1)),
    ("prmt.b32 y, x0, x1, 0x5410;", [U32, U32], U32,
     lambda a, b: (a & np.uint32(0xFFFF)) | b << np.uint32(16)),
    ("lop3.b32 y, x0, x1, x2, 0xe8;", [U32] * 3, U32, lambda a, b, c: (a & b) | (a & c) | (b & c)),
    ("shf.l.wrap.b32 y, x0, x1, 5;", [U32, U32], U32,
     lambda a, b: b << np.uint32(5) | a >> np.uint32(27)),
    ("popc.b32 y, x0;", [U32], U32, np.bitwise_count),
    ("clz.b32 y, x0;", [U32], U32, lambda a: [32 - int(x).bit_length() for x in a]),
    ("{ .reg .pred q; setp.lt.s32 q, x0, x1; selp.b32 y, 1, 0, q; }", [I32, I32], U32,
     lambda a, b: a < b),
    ("{ .reg .pred q; setp.hi.u32 q, x0, x1; selp.b32 y, 1, 0, q; }", [U32, U32], U32,
     lambda a, b: a > b),
    ("{ .reg .pred q; setp.ne.f32 q, x0, x1; selp.b32 y, 1, 0, q; }", [F32, F32], U32,
     lambda a, b: (a < b) | (a > b)),
    ("{ .reg .pred q; setp.neu.f32 q, x0, x1; selp.b32 y, 1, 0, q; }", [F32, F32], U32,
     lambda a, b: a != b),
    ("{ .reg .pred q, s; setp.gt.f32 q|s, x0, x1; selp.b32 y, 1, 0, s; }", [F32, F32], U32,
     lambda a, b: ~(a > b)),
    ("{ .reg .pred q, s; setp.gt.s32 q, x0, 0; setp.lt.or.s32 s, x1, 0, !q;"
     "selp.b32 y, 1, 0, s; }", [I32, I32], U32, lambda a, b: (b < 0) | ~(a > 0)),
    ("fma.rn.f64 y, x0, 0d3FF0000000000000, x1;", [F64, F64], F64, lambda a, b: a + b),
    ("sqrt.rn.f32 y, x0;", [F32], F32, np.sqrt),
    ("rcp.rn.f32 y, x0;", [F32], F32, lambda a: np.float32(1) / a),
    ("cvt.rn.f32.s32 y, x0;", [I32], F32, lambda a: a.astype(F32)),
    ("cvt.rzi.s32.f32 y, x0;", [F32], I32,
     lambda a: np.trunc(np.nan_to_num(a, nan=0).astype(F64)).clip(-(2**31), 2**31 - 1).astype(I32)),
    ("cvt.rni.f32.f32 y, x0;", [F32], F32, np.rint),
    ("cvt.s64.s32 y, x0;", [I32], I64, lambda a: a.astype(I64)),
    ("cvt.u64.u32 y, x0;", [U32], U64, lambda a: a.astype(U64)),
    ("cvt.u32.u64 y, x0;", [U64], U32, lambda a: a.astype(U32)),
    ("cvt.s32.s8 y, x0;", [I32], I32, lambda a: a.astype(np.int8).astype(I32)),
    ("cvt.f64.f32 y, x0;", [F32], F64, lambda a: a.astype(F64)),
    ("cvt.rn.f32.f64 y, x0;", [F64], F32, lambda a: a.astype(F32)),
    ("cvt.rn.f16.f32 y, x0;", [F32], F16, lambda a: a.astype(F16)),
    ("cvt.f32.f16 y, x0;", [F16], F32, lambda a: a.astype(F32)),
    ("cvt.sat.f32.f32 y, x0;", [F32], F32, lambda a: np.nan_to_num(a, nan=0).clip(0, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("code", "kinds", "result", "truth"), OTHER, ids=[o[0] for o in OTHER])
def test_other_arithmetic(
    rng: np.random.Generator,
    code: str,
    kinds: list[np.dtype[Any]],
    result: np.dtype[Any],
    truth: Callable[..., Any],
) -> None:
    operands = [rng.permutation(numbers(rng, kind)) for kind in kinds]
    with np.errstate(all="ignore"):
        expected = np.asarray(truth(*operands)).astype(result)
    if code.startswith("cvt.sat"):
        operands[0][operands[0] == 0] = expected[operands[0] == 0] = 0  # one zero
    same(elementwise(code, operands, result), expected)


def test_fused_multiply_add_rounds_once(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 32)).astype(F32)
    c = -(a * b)  # what is left is the rounding of the product
    exact = a.astype(F64) * b + c
    result = elementwise("fma.rn.f32 y, x0, x1, x2;", [a, b, c], F32)
    same(result, exact.astype(F32))
    assert np.any(result != 0)


@pytest.mark.parametrize("relu", ["", ".relu"])
def test_pairs_of_bfloat16(rng: np.random.Generator, relu: str) -> None:
    """The first operand is the high half; .relu clips negatives and keeps NaN."""
    high, low = numbers(rng, F32), rng.permutation(numbers(rng, F32))
    got = elementwise(f"cvt.rn{relu}.bf16x2.f32 y, x0, x1;", [high, low], U32)
    for half, source in ((got >> np.uint32(16), high), (got & np.uint32(0xFFFF), low)):
        clipped = np.where(source < 0, np.float32(0), source) if relu else source
        nan = np.isnan(source)
        np.testing.assert_array_equal(half[~nan].astype(U16), bf16(clipped)[~nan])
        assert np.all(half[nan] == 0x7FFF)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(("name", "truth"), [("le", np.less_equal), ("gtu", np.greater)])
def test_comparison_of_pairs(
    rng: np.random.Generator, kind: str, name: str, truth: Callable[[Any, Any], Any]
) -> None:
    """The first predicate is about the low halves; gtu holds where a number is NaN, too."""
    a, b = numbers(rng, U32), rng.permutation(numbers(rng, U32))
    got = elementwise(
        f"{{ .reg .pred q, s; .reg .b32 z; setp.{name}.{kind}x2 q|s, x0, x1;"
        "selp.b32 y, 1, 0, q; selp.b32 z, 2, 0, s; or.b32 y, y, z; }",
        [a, b],
        U32,
    )
    for bit in (0, 1):
        x, y = (
            half.view(F16).astype(F32) if kind == "f16" else (half.astype(U32) << 16).view(F32)
            for half in ((n >> np.uint32(16 * bit)).astype(U16) for n in (a, b))
        )
        unordered = np.isnan(x) | np.isnan(y)
        expected = truth(x, y) | (unordered if name == "gtu" else False)
        np.testing.assert_array_equal(got >> np.uint32(bit) & 1, expected)


def test_tf32_ties_go_away_from_zero() -> None:
    ties = np.array([0x3F801000, 0xBF801000, 0x3F800FFF, 0x3F803000], U32)
    got = elementwise("cvt.rna.tf32.f32 y, x0;", [np.resize(ties, 32)], U32)[:4]
    np.testing.assert_array_equal(got, [0x3F802000, 0xBF802000, 0x3F800000, 0x3F804000])


@pytest.mark.parametrize("width", ["", ".v2", ".v4"])
@pytest.mark.parametrize("lanes", ["lockstep", "forward", "reverse", "random"])
def test_vectors_through_shared_memory(rng: np.random.Generator, width: str, lanes: str) -> None:
    n = int(width[2:] or 1)
    data = aligned(rng.integers(0, 2**32, (32, n), U32))
    out = aligned(np.zeros_like(data))
    registers = "{" + ", ".join(f"%r{i}" for i in range(n)) + "}" if n > 1 else "%r0"
    body = f"""
     mul.lo.u32 %r20, %t, {4 * n}; cvt.u64.u32 %d0, %r20; add.s64 %d1, %d0, %in;
     ld.global.nc.L1::no_allocate{width}.b32 {registers}, [%d1];
     mov.u32 %r21, fixed; add.s32 %r21, %r21, %r20;
     st.shared{width}.b32 [%r21], {registers};
     bar.warp.sync -1;
     sub.s32 %r22, 31, %t; mul.lo.u32 %r22, %r22, {4 * n}; mov.u32 %r23, fixed;
     add.s32 %r23, %r23, %r22; ld.shared{width}.b32 {registers}, [%r23];
     add.s64 %d2, %d0, %out; st.global{width}.b32 [%d2], {registers};"""
    counters = run(body, data, out, lanes=lanes)
    np.testing.assert_array_equal(out, data[::-1])
    if lanes == "lockstep":
        assert counters.global_traffic.units == counters.global_traffic.ideal == 8 * n
        assert counters.shared_traffic.units == counters.shared_traffic.ideal == 2 * n


def test_shuffles_and_votes(rng: np.random.Generator) -> None:
    data = rng.integers(0, 2**31, 32, U32)
    out = np.zeros((6, 32), U32)
    stores = "".join(f"st.global.b32 [%d1+{128 * i}], %r{i + 1};" for i in range(6))
    body = f"""
     cvt.u64.u32 %d0, %t4; add.s64 %d1, %d0, %out; add.s64 %d0, %d0, %in;
     ld.global.b32 %r0, [%d0];
     shfl.sync.bfly.b32 %r1, %r0, 5, 31, -1;
     shfl.sync.up.b32 %r2|%p1, %r0, 3, 0, -1;
     shfl.sync.down.b32 %r3, %r0, 4, 31, -1;
     shfl.sync.idx.b32 %r4, %r0, 9, 31, -1;
     setp.gt.u32 %p2, %r0, 1000000000; vote.sync.ballot.b32 %r5, %p2, -1;
     selp.b32 %r6, 1, 0, %p1; {stores}"""
    run(body, data, out)
    lane = np.arange(32)
    np.testing.assert_array_equal(out[0], data[lane ^ 5])
    np.testing.assert_array_equal(out[1], data[np.where(lane < 3, lane, lane - 3)])
    np.testing.assert_array_equal(out[2], data[np.where(lane > 27, lane, lane + 4)])
    np.testing.assert_array_equal(out[3], data[9])
    np.testing.assert_array_equal(out[4], sum(1 << int(i) for i in lane if data[i] > 10**9))
    np.testing.assert_array_equal(out[5], lane >= 3)


@pytest.mark.parametrize("lanes", ["lockstep", "random"])
def test_divergent_loops_meet_again(lanes: str) -> None:
    """Every lane runs its own number of rounds; the shuffle behind the loop has them all."""
    body = """
     mov.u32 %r0, 0;
    L1: add.s32 %r0, %r0, 2; add.s32 %r1, %t, %t; setp.lt.s32 %p0, %r0, %r1; @%p0 bra L1;
     shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;
     cvt.u64.u32 %d0, %t4; add.s64 %d1, %d0, %out; st.global.b32 [%d1], %r2;"""
    out = np.zeros(32, U32)
    run(body, np.zeros(1, U32), out, lanes=lanes)
    rounds = np.maximum(2, 2 * np.arange(32))
    np.testing.assert_array_equal(out, rounds[np.arange(32) ^ 1])


def test_atomics_add_up(rng: np.random.Generator) -> None:
    out = np.zeros(2, F32)
    body = """
     cvt.rn.f32.u32 %f0, %t; red.global.add.f32 [%out], %f0;
     atom.global.add.f32 %f1, [%out+4], 0f3F800000;"""
    run(body, np.zeros(1), out, threads=96)
    np.testing.assert_array_equal(out, [np.arange(96).sum(), 96])


@pytest.mark.parametrize(("threads", "extra"), [(64, 0), (96, 4)])
def test_block_barrier_and_its_reduction(threads: int, extra: int) -> None:
    body = f"""
     setp.eq.u32 %p0, %t, 63; bar.red.or.pred %p1, 0, %p0; selp.b32 %r0, 1, 0, %p1;
     mov.u32 %r1, fixed; add.s32 %r1, %r1, %t4; st.shared.b32 [%r1], %t;
     bar.sync 0; xor.b32 %r2, %t, 32; min.u32 %r2, %r2, {threads - 1}; shl.b32 %r2, %r2, 2;
     mov.u32 %r1, fixed; add.s32 %r1, %r1, %r2; ld.shared.b32 %r3, [%r1]; add.s32 %r3, %r3, %r0;
     cvt.u64.u32 %d0, %t4; add.s64 %d1, %d0, %out; st.global.b32 [%d1], %r3;"""
    out = np.zeros(threads, U32)
    run(body, np.zeros(1), out, threads=threads, order="random")
    np.testing.assert_array_equal(out, np.minimum(np.arange(threads) ^ 32, threads - 1) + 1)


def test_unknown_register_type_is_an_error() -> None:
    with pytest.raises(PtxError, match="not supported"):
        run(".reg .b128 %big;", np.zeros(1), np.zeros(1))
