"""Kernels of csrc/cuda with a bug put in: what the harness must catch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from .toolchain import BUILD, ROOT

CSRC = ROOT / "csrc"


@dataclass(frozen=True)
class Change:
    """Replaces code that stands exactly once in a file of csrc/cuda."""

    file: str
    old: str
    new: str = ""


@dataclass(frozen=True)
class Bug:
    """A bug, and how it is to show itself.

    `error` is a part of the KernelError's text; empty: the results are wrong.
    """

    name: str
    changes: tuple[Change, ...] = ()
    error: str = ""


NO_BUG = Bug("none")
BUGS = [
    Bug(
        "missing_syncthreads",
        (
            Change(
                "tensor.cuh",
                "wait_for_copies();\n      __syncthreads();",
                "wait_for_copies();",
            ),
        ),
        "no barrier between them",
    ),
    Bug(
        "missing_syncthreads_before_epilogue",
        (Change("tensor.cuh", "__syncthreads();  // the epilogue uses the buffers again"),),
        "no barrier between them",
    ),
    Bug(
        "missing_wait",
        (Change("tensor.cuh", "ptx::wait_for_copies();"),),
        "a wait is missing or too weak",
    ),
    Bug(
        "too_weak_wait",
        (Change("ptx.cuh", "cp.async.wait_group 0;", "cp.async.wait_group 1;"),),
        "a wait is missing or too weak",
    ),
    Bug(
        "off_by_one_store",
        (Change("tensor_epilogue.cuh", "if (h >= p_.height ||", "if (h > p_.height ||"),),
        "outside every buffer",
    ),
    Bug(
        "off_by_one_load",
        (Change("tensor.cuh", "lies_in(h, p_.height)", "lies_in(h, p_.height + 1)"),),
        "outside every buffer",
    ),
    Bug(
        "zero_padding_before_psi",
        (
            Change(
                "tensor.cuh",
                "inside_[pass] = 0;",
                "for (auto& raw : raw_[pass]) raw = {};\n        inside_[pass] = 0;",
            ),
            Change("tensor.cuh", "if (inside_[pass]) {", "if (true) {"),
        ),
    ),
    Bug(
        "wrong_fragment_order",
        (
            Change(
                "ptx.cuh",
                'm16n8k16.row.col.f32.bf16.bf16.f32 "\n        "{%0,%1,%2,%3}, {%4,%5,%6,%7}',
                'm16n8k16.row.col.f32.bf16.bf16.f32 "\n        "{%0,%1,%2,%3}, {%4,%6,%5,%7}',
            ),
        ),
    ),
    Bug(
        "swapped_halves",
        (Change("staging.cuh", "(i % 2 ? two & 0xffff0000u", "(i % 2 == 0 ? two & 0xffff0000u"),),
    ),
]


WEIGHT_BUGS = [
    Bug(
        "missing_syncthreads_between_walks",
        (Change("tensor_weight.cuh", "__syncthreads();  // the next walk begins with other rows"),),
        "no barrier between them",
    ),
    Bug(
        "missing_syncthreads_between_steps",
        (
            Change(
                "tensor_weight.cuh",
                "wait_for_copies();\n      __syncthreads();",
                "wait_for_copies();",
            ),
        ),
        "no barrier between them",
    ),
    Bug(
        "missing_wait_for_gradient",
        (Change("tensor_weight.cuh", "ptx::wait_for_copies();"),),
        "a wait is missing or too weak",
    ),
    Bug(
        "ring_too_short",
        (Change("geometry.h", "return 4 * weight_rows", "return 2 * weight_rows"),),
        "no barrier between them",
    ),
    Bug(
        "row_of_another_remainder",
        (Change("tensor_weight.cuh", "first_row_ + row < job_.stride && h", "h"),),
    ),
    Bug(
        "gradient_beyond_the_map",
        (Change("tensor_weight.cuh", "w < p_.width ? kBytes : 0", "kBytes"),),
        "outside every buffer",
    ),
]


def patched_csrc(bug: Bug) -> Path:
    """A copy of csrc with the bug in it.

    Raises:
        LookupError: if the code that the bug changes is not there exactly once: the kernels have
            moved on, and the bug has to follow them.
    """
    texts = {
        path.relative_to(CSRC): path.read_text()
        for path in sorted(CSRC.rglob("*"))
        if path.suffix in (".h", ".cuh", ".cu", ".cpp")
    }
    for change in bug.changes:
        path = Path("cuda") / change.file
        found = texts[path].count(change.old)
        if found != 1:
            raise LookupError(f"{bug.name}: {path} holds {found} times, not once:\n{change.old}")
        texts[path] = texts[path].replace(change.old, change.new)
    key = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:20]
    folder = BUILD / f"patched-{bug.name}-{key}"
    for path, text in texts.items():
        target = folder / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    return folder


def single_kernel(csrc: Path, family: str, name: str, instantiation: str) -> Path:
    """A source file with one kernel only: a fraction of the time to compile."""
    path = csrc / "cuda" / f"{name}.cu"
    text = f'#include "{family}_impl.cuh"\n{instantiation}\n'
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path
