"""Machine instructions by line of the PTX: by hand, and of a kernel of few instructions."""

from __future__ import annotations

import re

import pytest

from . import toolchain
from .counters import Counters, InstructionCount, Traffic
from .machine_code import (
    count_lines,
    issued,
    machine_instructions,
    why_no_nvdisasm,
    with_own_lines,
)

needs_tools = pytest.mark.skipif(
    bool(toolchain.why_no_nvcc() or why_no_nvdisasm()),
    reason=str(toolchain.why_no_nvcc() or why_no_nvdisasm()),
)

PTX = """.version 8.0
.target sm_80
.address_size 64
.visible .entry other(.param .u64 p)
{
\tret;
}
.visible .entry kernel(.param .u64 p)
{
\t.reg .b32 %r<4>;
\t.reg .b64 %rd<3>;
\t.loc 1 7 0
\tld.param.u64 %rd1, [p];
\tcvta.to.global.u64 %rd2, %rd1;
\tmov.u32 %r1, %tid.x;
\tld.global.u32 %r2, [%rd2];
\tmov.b32 %r3, %r2;
\tst.global.u32 [%rd2+4], %r3;
\tst.global.u32 [%rd2+8], %r2; st.global.u32 [%rd2+12], %r2;
\tret;
}
\t.section\t.debug_str
\t{
\t}
"""
LOAD_PARAMETER, THREAD, LOAD, MOVE, STORE, TWO_STORES, END = 13, 15, 16, 17, 18, 19, 20  # lines


def test_every_instruction_gets_its_line() -> None:
    text = with_own_lines(PTX, "kernel")
    assert "other" not in text
    assert ".loc 1 7" not in text
    assert "debug_str" not in text
    located = re.findall(r"^\.loc 1 (\d+) 0\n\t(\S+)", text, re.MULTILINE)
    assert located[0] == (str(LOAD_PARAMETER), "ld.param.u64")
    assert [int(line) for line, _ in located] == list(range(LOAD_PARAMETER, END + 1))


def test_lines_by_hand() -> None:
    disassembly = """
\t.text.kernel:
        //## File "kernel.ptx", line 13
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 IADD3 R2, R1, 1, RZ ;
.L_x_0:
        //## File "kernel.ptx", line 16
        /*0020*/              @UP1 LDG.E R3, [R4.64] ;
        //## File "kernel.ptx", line 13
        /*0030*/                   EXIT ;
        /*0040*/                   NOP;
"""
    assert count_lines(disassembly) == {13: 3, 16: 1}


def test_issued_by_hand() -> None:
    """A line's instructions share what became of it; what vanished costs nothing."""
    nothing = Traffic()
    counters = Counters(
        tuple(
            InstructionCount(line, "", "", number, nothing, nothing)
            for line, number in ((13, 10), (16, 5), (19, 4), (19, 4))
        )
    )
    assert issued(counters, {13: 2, 19: 2}) == 10 * 2 + 4 * 2


@needs_tools
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code_of_a_kernel(arch: str) -> None:
    """Stores are one each, the load with its address some; nothing is left of two moves."""
    counts = machine_instructions(PTX, "kernel", arch)
    assert (counts[STORE], counts[TWO_STORES]) == (1, 2)
    assert counts[LOAD] >= 1
    assert not counts.keys() & {THREAD, MOVE}


@needs_tools
def test_what_ptxas_refuses_is_an_error() -> None:
    with pytest.raises(toolchain.CompilerError, match="ptxas"):
        machine_instructions(PTX.replace("%r3, %r2", "%r3, %r9"), "kernel", "sm_80")
