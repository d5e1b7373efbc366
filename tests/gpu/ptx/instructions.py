"""How each PTX instruction is decoded: its table is at the end.

Modifiers that steer caches or say what cannot be otherwise (".aligned") are dropped by name.
Approximate functions are computed exactly, hence .approx and .full are dropped too: tolerances of
tests come from theory, never from here.
"""

from __future__ import annotations

from .operands import FLOATS, InstructionDecoder, Modifiers, Operands, RefusedError, vector, window
from .registers import PREDICATE
from .syntax import TYPE_BYTES

_CACHE_HINTS = (
    *("nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "volatile", "relaxed", "weak"),
    *("cta", "gpu", "sys", "cluster"),
    *(f"L1::{hint}" for hint in ("evict_normal", "evict_unchanged", "evict_first", "evict_last")),
    *(f"L2::{hint}" for hint in ("evict_normal", "evict_first", "evict_last")),
    *("L1::no_allocate", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"),
)
_UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _bits(kind: str) -> str:
    return f"b{8 * TYPE_BYTES[kind]}"


def _integer(kind: str) -> str:
    """b32 is u32 where the operation does not care about signs."""
    return kind.replace("b", "u") if kind.startswith("b") and kind not in FLOATS else kind


def _float_name(m: Modifiers, opcode: str, kind: str) -> str:
    m.take("rn")
    m.take("approx", "full")
    parts = [opcode]
    if m.take("NaN"):
        parts.append("nan")
    if m.take("relu"):
        parts.append("relu")
    if m.take("ftz") and kind == "f32":  # 16-bit results are never flushed where nvcc says ftz
        parts.append("ftz")
    return ".".join([*parts, kind])


def _arithmetic(opcode: str, operands: int) -> InstructionDecoder:
    def decode(d: Operands, m: Modifiers, args: list[str]) -> str:
        kind = m.last_type()
        _expect(d, args, operands + 1)
        size = TYPE_BYTES[kind]
        d.writes(args[0], size)
        for arg in args[1:]:
            d.reads(arg, size, kind)
        if kind in FLOATS:
            return _float_name(m, opcode, kind)
        return f"{opcode}.{_integer(kind)}"

    return decode


def _expect(d: Operands, args: list[str], *numbers: int) -> None:
    if len(args) not in numbers:
        raise RefusedError(f"{len(args)} operands instead of {' or '.join(map(str, numbers))}")


def _multiply(opcode: str) -> InstructionDecoder:
    def decode(d: Operands, m: Modifiers, args: list[str]) -> str:
        kind = m.last_type()
        size = TYPE_BYTES[kind]
        _expect(d, args, 3 if opcode == "mul" else 4)
        part = m.take("lo", "hi", "wide")
        wide = 2 * size if part == "wide" else size
        d.writes(args[0], wide)
        d.reads(args[1], size, kind)
        d.reads(args[2], size, kind)
        if opcode == "mad":
            d.reads(args[3], wide, kind)
        if kind in FLOATS:
            return _float_name(m, "fma" if opcode == "mad" else opcode, kind)
        if part is None:
            raise RefusedError("needs .lo, .hi or .wide")
        return f"{opcode}.{part}.{_integer(kind)}"

    return decode


def _bitwise(opcode: str) -> InstructionDecoder:
    def decode(d: Operands, m: Modifiers, args: list[str]) -> str:
        kind = m.last_type()
        _expect(d, args, 2 if opcode == "not" else 3)
        if kind != "pred":
            d.writes(args[0], TYPE_BYTES[kind])
            for arg in args[1:]:
                d.reads(arg, TYPE_BYTES[kind])
            return f"{opcode}.{_bits(kind)}"
        return _on_predicates(d, opcode, args)

    return decode


def _on_predicates(d: Operands, opcode: str, args: list[str]) -> str:
    d.writes(args[0], PREDICATE)
    negations = 0
    for i, arg in enumerate(args[1:]):
        register, negated = d.predicate(arg)
        d.add(register.place)
        negations |= int(negated) << i
    d.constant(negations)
    return f"{opcode}.pred"


def _shift(opcode: str) -> InstructionDecoder:
    def decode(d: Operands, m: Modifiers, args: list[str]) -> str:
        kind = m.last_type()
        _expect(d, args, 3)
        d.writes(args[0], TYPE_BYTES[kind])
        d.reads(args[1], TYPE_BYTES[kind])
        d.reads(args[2], 4)
        return f"{opcode}.{_bits(kind) if opcode == 'shl' else _integer(kind)}"

    return decode


def _funnel_shift(d: Operands, m: Modifiers, args: list[str]) -> str:
    _expect(d, args, 4)
    d.writes(args[0], 4)
    for arg in args[1:]:
        d.reads(arg, 4)
    return f"shf.{m.need('l', 'r')}.{m.need('wrap', 'clamp')}.{m.need('b32')}"


def _counting(opcode: str) -> InstructionDecoder:
    def decode(d: Operands, m: Modifiers, args: list[str]) -> str:
        kind = m.last_type()
        _expect(d, args, 2)
        d.writes(args[0], TYPE_BYTES[kind] if opcode == "brev" else 4)
        d.reads(args[1], TYPE_BYTES[kind])
        return f"{opcode}.{kind}"

    return decode


def _words(opcode: str, operands: int, sizes: str = "first") -> InstructionDecoder:
    """Bit fields: the first `operands` have the type's size, the rest are 32-bit numbers."""

    def decode(d: Operands, m: Modifiers, args: list[str]) -> str:
        kind = m.last_type()
        d.writes(args[0], TYPE_BYTES[kind])
        for i, arg in enumerate(args[1:]):
            d.reads(arg, TYPE_BYTES[kind] if i < operands else 4)
        return f"{opcode}.{kind}"

    return decode


def _lop3(d: Operands, m: Modifiers, args: list[str]) -> str:
    _expect(d, args, 5)
    d.writes(args[0], 4)
    for arg in args[1:4]:
        d.reads(arg, 4)
    d.constant(int(args[4], 0))
    return f"lop3.{m.need('b32')}"


def _compare(d: Operands, m: Modifiers, args: list[str]) -> str:
    kind = m.last_type()
    comparison = m.need(
        *("eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"),
        *("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"),
    )
    combine = m.take("and", "or", "xor")
    _expect(d, args, 4 if combine else 3)
    results = args[0].split("|")
    d.writes(results[0], PREDICATE)
    d.writes(results[-1], PREDICATE)
    d.reads(args[1], TYPE_BYTES[kind], kind)
    d.reads(args[2], TYPE_BYTES[kind], kind)
    d.constant(("", "and", "or", "xor").index(combine or ""))
    if combine:
        register, negated = d.predicate(args[3])
        d.add(register.place)
        d.constant(int(negated))
    if kind in FLOATS:
        return f"setp.{comparison}.{'ftz.' if m.take('ftz') and kind == 'f32' else ''}{kind}"
    return f"setp.{_UNSIGNED_COMPARISONS.get(comparison, comparison)}.{_integer(kind)}"


def _select(d: Operands, m: Modifiers, args: list[str]) -> str:
    kind = m.last_type()
    _expect(d, args, 4)
    register, negated = d.predicate(args[3])
    first, second = (args[2], args[1]) if negated else (args[1], args[2])
    d.writes(args[0], TYPE_BYTES[kind])
    d.reads(first, TYPE_BYTES[kind], kind)
    d.reads(second, TYPE_BYTES[kind], kind)
    d.add(register.place)
    return f"selp.{_bits(kind)}"


def _move(d: Operands, m: Modifiers, args: list[str]) -> str:
    kind = m.last_type()
    _expect(d, args, 2)
    if kind == "pred":
        return _on_predicates(d, "mov", args)
    size = TYPE_BYTES[kind]
    into, source = vector(args[0]), vector(args[1])
    if len(into) == len(source) == 1:
        d.writes(args[0], size)
        d.reads(args[1], size, kind)
        return f"mov.{_bits(kind)}"
    if len(source) > 1:
        part = size // len(source)
        d.writes(args[0], size)
        for arg in source:
            d.reads(arg, part)
        return f"pack.{_bits(kind)}.b{8 * part}"
    part = size // len(into)
    whole = d.value(args[1], size)
    for arg in into:
        d.add(whole.place if arg == "_" else d.register(arg, part).place)
    d.add(whole.place)
    return f"unpack.{_bits(kind)}.b{8 * part}"


def _convert(d: Operands, m: Modifiers, args: list[str]) -> str:
    source = m.last_type()
    to = "tf32" if m.take("tf32") else m.last_type()
    rounding = m.take("rn", "rz", "rna", "rni", "rzi", "rmi", "rpi")
    how = [part for part in (rounding, m.take("relu"), m.take("sat")) if part]
    if to in ("bf16x2", "f16x2"):
        _expect(d, args, 3)
        d.writes(args[0], 4)
        d.reads(args[1], 4, source)
        d.reads(args[2], 4, source)
    else:
        _expect(d, args, 2)
        target = d.register(args[0])
        found = d.registers.find(args[1])
        register = found or d.value(args[1], TYPE_BYTES[source], source)
        d.add(target.place)
        d.add(register.place)
        d.constant(target.bytes, register.bytes)
    return ".".join(["cvt", *how, to, source])


def _space(m: Modifiers) -> str:
    for space in ("global", "shared", "local", "param", "const"):
        if m.take(space, f"{space}::cta", f"{space}::entry"):
            return space
    return "generic"


def _without_hints(m: Modifiers, args: list[str]) -> list[str]:
    """Drop cache modifiers, and the policy operand that comes with one of them."""
    hinted = False
    while hint := m.take(*_CACHE_HINTS):
        hinted |= hint == "L2::cache_hint"
    return args[:-1] if hinted else args


def _element(kind: str, register: int) -> str:
    """Name of a memory element of `kind` and its register: u16.4"""
    size = TYPE_BYTES[kind]
    sign = "s" if kind.startswith("s") else "u"
    return f"{sign}{8 * size}.{register}"


def _load(d: Operands, m: Modifiers, args: list[str]) -> str:
    args = _without_hints(m, args)
    _expect(d, args, 2)
    kind = m.last_type()
    space = _space(m)
    into = vector(args[0])
    width = m.take_match(r"v([248])")
    if len(into) != int(width.group(1) if width else 1):
        raise RefusedError("vector width and registers do not match")
    named = [d.register(arg) for arg in into if arg != "_"]
    size = named[0].bytes if named else TYPE_BYTES[kind]
    for arg in into:
        d.writes(arg, size)
    d.address(args[1], space)
    return f"ld.{_element(kind, size)}"


def _store(d: Operands, m: Modifiers, args: list[str]) -> str:
    args = _without_hints(m, args)
    _expect(d, args, 2)
    kind = m.last_type()
    space = _space(m)
    values = vector(args[1])
    width = m.take_match(r"v([248])")
    if len(values) != int(width.group(1) if width else 1):
        raise RefusedError("vector width and registers do not match")
    found = [r for arg in values if (r := d.registers.find(arg))]
    size = found[0].bytes if found else max(2, TYPE_BYTES[kind])
    d.address(args[0], space)
    for arg in values:
        d.reads(arg, size, kind)
    return f"st.{_element(kind, size)}"


def _atomic(opcode: str) -> InstructionDecoder:
    def decode(d: Operands, m: Modifiers, args: list[str]) -> str:
        args = _without_hints(m, args)
        m.take("noftz", "acq_rel", "acquire", "release")
        kind = m.last_type()
        space = _space(m)
        action = m.need("add", "min", "max", "and", "or", "exch", "cas")
        size = TYPE_BYTES[kind]
        if opcode == "atom":
            d.writes(args.pop(0), size)
        _expect(d, args, 3 if action == "cas" else 2)
        d.address(args[0], space)
        for arg in args[1:]:
            d.reads(arg, size, kind)
        named = {"add": kind.replace("s", "u"), "min": kind, "max": kind}.get(action, _bits(kind))
        return f"{opcode}.{action}.{named}"

    return decode


def _copy(d: Operands, m: Modifiers, args: list[str]) -> str:
    m.need("async")
    if step := m.take("commit_group", "wait_group", "wait_all"):
        if step == "wait_group":
            d.constant(int(args[0], 0))
        return f"cp.async.{step}"
    m.need("ca", "cg")
    m.need("shared", "shared::cta")
    m.need("global")
    args = _without_hints(m, args)
    _expect(d, args, 3, 4)
    d.address(args[0], "shared")
    d.address(args[1], "global")
    d.reads(args[3] if len(args) > 3 else args[2], 4)
    d.constant(int(args[2], 0))
    return "cp.async"


def _generic_address(d: Operands, m: Modifiers, args: list[str]) -> str:
    to = m.take("to")
    space = m.need("global", "shared", "local", "param", "const", "shared::cta")
    _expect(d, args, 2)
    m.need("u64")
    d.writes(args[0], 8)
    d.reads(args[1], 8)
    d.constant(window(space.split("::")[0]))
    return "cvta.to" if to else "cvta"


def _branch(d: Operands, m: Modifiers, args: list[str]) -> str:
    m.take("uni")
    if m.take("idx"):
        d.reads(args[0], 4)
        d.jump(d.branch_table(args[1]))
        return "brx.idx"
    d.jump([args[0]])
    return "bra"


def _plain(operation: str, *dropped: str) -> InstructionDecoder:
    """An instruction without effect on results, or one without operands."""

    def decode(d: Operands, m: Modifiers, args: list[str]) -> str:
        while m.take(*dropped):
            pass
        return operation

    return decode


def _without_effect(d: Operands, m: Modifiers, args: list[str]) -> str:
    """Fences, prefetches and cache policies; blocks run one after another."""
    while m.take_match(r".*"):
        pass
    return "nop"


def _cache_policy(d: Operands, m: Modifiers, args: list[str]) -> str:
    while m.take_match(r".*"):
        pass
    d.writes(args[0], 8)
    d.reads("0", 8)
    return "mov.b64"


def _barrier(d: Operands, m: Modifiers, args: list[str]) -> str:
    m.take("cta")
    if m.take("warp"):
        m.need("sync")
        d.reads(args[0], 4)
        return "bar.warp"
    m.take("aligned")
    if m.take("sync"):
        _expect(d, args, 1, 2)
        for arg in args:
            d.reads(arg, 4)
        return "bar.sync"
    if not m.take("red"):
        raise RefusedError("only .sync and .red barriers are supported")
    action = m.need("and", "or", "popc")
    kind = m.need("pred", "u32")
    _expect(d, args, 3, 4)
    d.writes(args[0], PREDICATE if kind == "pred" else 4)
    for arg in args[1:-1]:
        d.reads(arg, 4)
    register, negated = d.predicate(args[-1])
    d.add(register.place)
    d.constant(("", "and", "or", "popc").index(action), int(negated))
    return "bar.red"


def _shuffle(d: Operands, m: Modifiers, args: list[str]) -> str:
    m.need("sync")
    mode = m.need("up", "down", "bfly", "idx")
    m.need("b32")
    _expect(d, args, 5)
    into, *predicate = args[0].split("|")
    d.writes(into, 4)
    for arg in args[1:]:
        d.reads(arg, 4)
    d.constant(d.register(predicate[0], PREDICATE).place if predicate else -1)
    return f"shfl.{mode}"


def _vote(d: Operands, m: Modifiers, args: list[str]) -> str:
    m.need("sync")
    mode = m.need("ballot", "any", "all", "uni")
    m.need("b32", "pred")
    _expect(d, args, 3)
    d.writes(args[0], 4 if mode == "ballot" else PREDICATE)
    register, negated = d.predicate(args[1])
    d.add(register.place)
    d.reads(args[2], 4)
    d.constant(int(negated))
    return f"vote.{mode}"


def _reduce(d: Operands, m: Modifiers, args: list[str]) -> str:
    m.need("sync")
    action = m.need("add", "min", "max", "and", "or")
    kind = m.last_type()
    _expect(d, args, 3)
    d.writes(args[0], 4)
    d.reads(args[1], 4)
    d.reads(args[2], 4)
    return f"redux.{action}.{'s32' if action == 'add' else kind}"


def _elect(d: Operands, m: Modifiers, args: list[str]) -> str:
    m.need("sync")
    into, predicate = args[0].split("|")
    d.writes(into, 4)
    d.writes(predicate, PREDICATE)
    d.reads(args[1], 4)
    d.constant(int(into != "_"))
    return "elect"


def _active_mask(d: Operands, m: Modifiers, args: list[str]) -> str:
    m.need("b32")
    d.writes(args[0], 4)
    return "activemask.b32"


def _mma(d: Operands, m: Modifiers, args: list[str]) -> str:
    m.need("sync")
    m.need("aligned")
    shape = m.need("m16n8k16", "m16n8k8", "m16n8k4", "m8n8k4")
    m.need("row")
    m.need("col")
    result = m.need("f32", "f64")
    kind = m.need("bf16", "f16", "tf32", "f64")
    m.need(kind)
    m.need(result)
    depth = int(shape.split("k")[1])
    per_lane = depth // 8 if kind in ("bf16", "f16") else depth // 4
    sizes = (1, 1) if shape == "m8n8k4" else (2 * per_lane, per_lane)
    accumulators = 2 if shape == "m8n8k4" else 4
    _expect(d, args, 4)
    parts = [vector(arg) for arg in args]
    if [len(part) for part in parts] != [accumulators, *sizes, accumulators]:
        raise RefusedError("the fragments do not have the registers that the shape needs")
    size = TYPE_BYTES[result]
    for register in parts[0]:
        d.writes(register, size)
    for part in parts[1:]:
        for register in part:
            d.reads(register, size, "f64" if kind == "f64" else "")
    return f"mma.{shape}.{kind}"


def _ldmatrix(d: Operands, m: Modifiers, args: list[str]) -> str:
    m.need("sync")
    m.need("aligned")
    m.need("m8n8")
    number = m.need("x1", "x2", "x4")
    transposed = m.take("trans")
    m.need("shared", "shared::cta")
    m.need("b16")
    into = vector(args[0])
    if len(into) != int(number[1:]):
        raise RefusedError("number of matrices and registers do not match")
    for register in into:
        d.writes(register, 4)
    d.address(args[1], "shared")
    d.constant(int(transposed is not None))
    return "ldmatrix"


def _stmatrix(d: Operands, m: Modifiers, args: list[str]) -> str:
    m.need("sync")
    m.need("aligned")
    m.need("m8n8")
    number = m.need("x1", "x2", "x4")
    transposed = m.take("trans")
    m.need("shared", "shared::cta")
    m.need("b16")
    matrices = vector(args[1])
    if len(matrices) != int(number[1:]):
        raise RefusedError("number of matrices and registers do not match")
    d.address(args[0], "shared")
    for register in matrices:
        d.reads(register, 4)
    d.constant(int(transposed is not None))
    return "stmatrix"


def _wgmma(d: Operands, m: Modifiers, args: list[str]) -> str:
    if m.take("fence", "commit_group", "wait_group"):  # executed at once, nothing to wait for
        m.need("sync")
        m.need("aligned")
        return "nop"
    m.need("mma_async")
    m.need("sync")
    m.need("aligned")
    shape = m.take_match(r"m64n(\d+)k16")
    if not shape:
        raise RefusedError("only shapes m64nNk16 are supported")
    m.need("f32")
    kind = m.need("bf16", "f16")
    m.need(kind)
    columns = int(shape.group(1))
    sums, from_registers = vector(args[0]), args[1].startswith("{")
    flags = [int(arg, 0) for arg in args[4:]]
    if len(sums) != columns // 2 or flags[:2] != [1, 1]:
        raise RefusedError("accumulators do not match the shape, or an operand is negated")
    for register in sums:
        d.writes(register, 4)
    for register in vector(args[1]):
        d.reads(register, 4 if from_registers else 8)
    d.reads(args[2], 8)
    scale, negated = d.predicate(args[3])
    if negated:
        raise RefusedError("a negated scale-d is not supported")
    d.add(scale.place)
    transposed = flags[2:] or [0, 0]
    if from_registers:
        transposed = [0, transposed[0]]
    d.constant(("bf16", "f16").index(kind), columns, int(from_registers), *transposed)
    return "wgmma"


INSTRUCTIONS: dict[str, InstructionDecoder] = {
    **{name: _arithmetic(name, 2) for name in ("add", "sub", "div", "rem", "min", "max")},
    **{
        name: _arithmetic(name, 1)
        for name in ("neg", "abs", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh")
    },
    "fma": _arithmetic("fma", 3),
    "mul": _multiply("mul"),
    "mad": _multiply("mad"),
    **{name: _bitwise(name) for name in ("and", "or", "xor", "not")},
    "shl": _shift("shl"),
    "shr": _shift("shr"),
    "shf": _funnel_shift,
    **{name: _counting(name) for name in ("popc", "clz", "brev")},
    "bfe": _words("bfe", 1),
    "bfi": _words("bfi", 2),
    "prmt": _words("prmt", 3),
    "lop3": _lop3,
    "setp": _compare,
    "selp": _select,
    "mov": _move,
    "cvt": _convert,
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic("atom"),
    "red": _atomic("red"),
    "cp": _copy,
    "cvta": _generic_address,
    "bra": _branch,
    "brx": _branch,
    "ret": _plain("ret", "uni"),
    "exit": _plain("ret"),
    "trap": _plain("trap"),
    **dict.fromkeys(
        ("membar", "fence", "griddepcontrol", "prefetch", "nanosleep", "discard"), _without_effect
    ),
    "createpolicy": _cache_policy,
    "bar": _barrier,
    "barrier": _barrier,
    "shfl": _shuffle,
    "vote": _vote,
    "redux": _reduce,
    "elect": _elect,
    "activemask": _active_mask,
    "mma": _mma,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "wgmma": _wgmma,
}
"""Decoder of every instruction that is supported."""
