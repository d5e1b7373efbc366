"""pytest-benchmark suite: whole D2 blocks, ours and every form of plain torch.

Run it with ``pytest benchmarks/test_blocks.py``. ``python -m benchmarks.blocks`` has every block,
precision and bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.block_forms import BlockShape, Call, forms_of
from benchmarks.forms import LAYOUTS

pytest.importorskip("pytest_benchmark", reason="pip install 'd3net-kernels[bench]'")

# A large and a small one of images, and of music.
SHAPES = [
    BlockShape(144, 36, 4, 4, 64, 128),
    BlockShape(144, 36, 4, 4, 16, 32),
    BlockShape(32, 32, 5, 1, 256, 256),
    BlockShape(16, 34, 8, 1, 16, 100),
]
CASES = [(mode, form) for mode in ("eval", "train") for form in forms_of(mode)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("mode", "form"), CASES)
def test_block(
    benchmark: Callable[[Callable[[], object]], object],
    shape: BlockShape,
    mode: str,
    form: str,
    layout: str,
) -> None:
    call = Call.random(shape, mode, layout)
    benchmark(call.prepared(forms_of(mode)[form]).call)
