"""How many machine instructions ptxas makes of every line of a PTX text.

PTX instructions are not what a GPU issues: many moves and much address arithmetic vanish in ptxas,
other instructions become several. Here ptxas is told that every line of the text is a source line
of its own, so that the line table of what it makes leads back to the PTX instructions, and how
often each was executed to how often its machine instructions are issued. That table does not change
the code. Code that ptxas repeats counts as though each copy ran as often as all of them: too much,
never too little.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .counters import Counters
from .ptx.syntax import parse
from .toolchain import (
    Assembler,
    CompilerError,
    cached,
    digest,
    find_toolkit,
    run,
    toolkit_assembler,
)

_ENTRY = re.compile(r"^[^\n/]*\.entry\s+([\w$]+)")
_LINE = re.compile(r'//## File "[^"]*", line (\d+)')
_MACHINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)")


@functools.lru_cache(maxsize=256)
def machine_instructions(
    ptx: str, kernel: str, arch: str, assembler: Assembler | None = None
) -> dict[int, int]:
    """By line of `ptx`, the machine instructions of `kernel` on `arch` that come from it.

    Raises:
        CompilerError: if ptxas or nvdisasm refuses or is not there.
    """
    assembler = assembler or toolkit_assembler()
    disassembler = find_nvdisasm()
    if disassembler is None:
        raise CompilerError(why_no_nvdisasm())
    words = [assembler.version, *assembler.options, arch, kernel, ptx]
    key = digest(words, [Path(__file__)])

    def assemble(out: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            text, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            text.write_text(with_own_lines(ptx, kernel))
            options = {*assembler.options, "-lineinfo"}
            run([assembler.ptxas, f"-arch={arch}", *sorted(options), text, "-o", binary])
            out.write_text(json.dumps(count_lines(run([disassembler, "-g", "-c", binary]))))

    counts = json.loads(cached(f"machine-{arch}-{key}.json", assemble).read_text())
    return {int(line): number for line, number in counts.items()}


def with_own_lines(ptx: str, kernel: str) -> str:
    """`ptx` with one kernel, each instruction of which has its own line as its place of origin."""
    body = parse(ptx).kernels[kernel].body
    instructions = {s.line for s in body if not s.text.startswith(".")}
    out: list[str] = []
    skips = False
    for number, line in enumerate(ptx.splitlines(), 1):
        if entry := _ENTRY.match(line):
            skips = entry.group(1) != kernel
        if line.startswith(("\t.section", ".section")):
            break  # debug information, at the end
        if skips or line.lstrip().startswith((".loc", ".file")):
            skips = skips and line != "}"
            continue
        if number in instructions:
            out.append(f".loc 1 {number} 0")
        out.append(line)
        if line.startswith(".address_size"):
            out.append('.file 1 "kernel.ptx"')
    return "\n".join(out) + "\n"


def count_lines(disassembly: str) -> dict[int, int]:
    """Machine instructions by the line that nvdisasm names before them, without padding."""
    counts: Counter[int] = Counter()
    line = 0
    for text in disassembly.splitlines():
        if found := _LINE.search(text):
            line = int(found.group(1))
        elif (machine := _MACHINE.match(text)) and machine.group(1) != "NOP":
            counts[line] += 1
    return dict(counts)


def issued(counters: Counters, by_line: Mapping[int, int]) -> int:
    """Machine instructions that a launch issues: as often as what they were made from."""
    lines: dict[int, int] = {}
    for i in counters.instructions:
        lines[i.line] = max(lines.get(i.line, 0), i.issued)
    return sum(number * by_line.get(line, 0) for line, number in lines.items())


def find_nvdisasm() -> Path | None:
    """Of the CUDA toolkit, or the one that Triton brings."""
    toolkit = find_toolkit()
    folders = [toolkit.root / "bin"] if toolkit else []
    triton = importlib.util.find_spec("triton")
    for root in (triton.submodule_search_locations or []) if triton else []:
        folders.append(Path(root) / "backends" / "nvidia" / "bin")
    return next((f / "nvdisasm" for f in folders if (f / "nvdisasm").exists()), None)


def why_no_nvdisasm() -> str | None:
    """None if machine code can be read, else the reason and the cure."""
    if find_nvdisasm():
        return None
    return "no nvdisasm: install the CUDA toolkit with its nvdisasm, or Triton, which brings one"
