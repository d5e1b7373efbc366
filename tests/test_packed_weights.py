"""Packed weights are kept from call to call: with which bits, for whom, and how much of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import d3net_kernels as dk

pytestmark = pytest.mark.skipif(
    dk.why_not("cpu") is not None, reason=f"no cpu backend: {dk.why_not('cpu')}"
)

MOST_BYTES = 128 << 20  # csrc/cpu/packed_cache.h


def _kept() -> int:
    return int(torch.ops.d3net_kernels.cpu_packed_bytes())


def _block(growth: int = 16) -> dk.D2Block:
    return dk.D2Block(24, growth, 3).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _nothing_of_others() -> None:
    """Whatever other tests left there is not asked for in so many look-ups, and forgotten."""
    block, x = _block(8), torch.randn(1, 24, 4, 6)
    for _ in range(1001):
        block(x)
    _block(8)(x)
    assert _kept() < MOST_BYTES // 8


def test_the_same_bits_with_and_without() -> None:
    """A call that packs, one that finds it packed, one that never keeps, and one that trains."""
    block, x = _block(), torch.randn(1, 24, 8, 12)
    packs = block(x)
    before = _kept()
    assert torch.equal(block(x), packs)
    assert _kept() == before > 0
    assert torch.equal(block(x.repeat(40, 1, 1, 1))[:1], packs)  # too large a call to keep for
    block.requires_grad_()
    trains = block(x)
    assert trains.requires_grad
    assert torch.equal(trains, packs)


def test_weights_in_channels_last() -> None:
    """As `model.to(memory_format=torch.channels_last)` makes them, in the same memory or not."""
    block, x = _block(), torch.randn(1, 24, 8, 12)
    contiguous = block(x)
    block.to(memory_format=torch.channels_last)
    before = _kept()
    for _ in range(2):
        assert torch.equal(block(x), contiguous)
        assert _kept() > before
    memory = block.convs[0].weight.permute(0, 2, 3, 1)  # contiguous
    block.convs[0].weight.set_(memory.reshape(block.convs[0].weight.shape))
    with dk.use_backend("reference"):
        expected = block(x)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["bfloat16", "medium"])
def test_another_split_of_the_input(how: str) -> None:
    """Pairs of channels end with a part: other parts, other packed weights."""
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    module = dk.NormConv2d(16, 48, dtype=dtype).eval().requires_grad_(False)
    x = torch.randn(1, 16, 4, 4, dtype=dtype)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        whole = module(x)
        for cut in (7, 9, 1):
            torch.testing.assert_close(module([x[:, :cut], x[:, cut:]]), whole)
        assert torch.equal(module(x), whole)
    finally:
        torch.set_float32_matmul_precision(before)


def _through_numpy(weight: torch.Tensor) -> None:
    weight.numpy()[...] *= 1.5


def _through_data(weight: torch.Tensor) -> None:
    weight.data[-1, -1, -1, -1] += 100


def _through_another_storage(weight: torch.Tensor) -> None:
    weight.set_(1.5 * weight)


@pytest.mark.parametrize(
    "change", [_through_numpy, _through_data, _through_another_storage], ids=lambda f: f.__name__
)
def test_changes_that_no_version_counts(change: Callable[[torch.Tensor], None]) -> None:
    block, x = _block(), torch.randn(1, 24, 8, 12)
    for conv in (block.convs[2], block.convs[0]):
        before = block(x)
        change(conv.weight.detach() if change is not _through_another_storage else conv.weight)
        after = block(x)
        with dk.use_backend("reference"):
            expected = block(x)
        assert not torch.allclose(after, before, atol=1e-2)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_addresses_that_come_again() -> None:
    """New weights may lie where others were; only their values tell them apart."""
    x = torch.randn(1, 24, 8, 12)
    for seed in range(20):
        torch.manual_seed(seed)
        block = _block()
        out = block(x)
        with dk.use_backend("reference"):
            torch.testing.assert_close(out, block(x), rtol=1e-4, atol=1e-4)
        del block


def test_never_more_than_the_limit() -> None:
    x = torch.randn(1, 24, 4, 6)
    blocks = [_block(96) for _ in range(60)]  # 2 MB of weights each, packed three to five times
    for block in blocks:
        block(x)
        assert _kept() <= MOST_BYTES
    assert _kept() > MOST_BYTES // 2
    first = blocks[0](x)
    with dk.use_backend("reference"):
        torch.testing.assert_close(first, blocks[0](x), rtol=1e-4, atol=1e-4)


def test_the_dead_make_room() -> None:
    """Blocks that are gone are forgotten after a while of other calls."""
    x = torch.randn(1, 24, 4, 6)
    blocks = [_block(96) for _ in range(60)]  # all at once, so that no two lie at one address
    for block in blocks:
        block(x)
    full = _kept()
    assert full > MOST_BYTES // 2
    del block, blocks
    small = [_block(8), _block(8)]
    for _ in range(600):
        for block in small:
            block(x)
    _block(8)(x)
    assert _kept() < full // 4


def test_the_unused_give_way_at_the_second_call() -> None:
    x = torch.randn(1, 24, 4, 6)
    others = [_block(96) for _ in range(60)]
    for other in others + others:
        other(x)
    full = _kept()
    block = _block(128)  # larger than what is free beside the others
    block(x)
    assert _kept() == full
    block(x)
    assert MOST_BYTES >= _kept() != full


def test_nothing_gives_way_in_a_network_too_large() -> None:
    x = torch.randn(1, 24, 4, 6)
    blocks = [_block(growth) for growth in (96, 112, 128, 144) for _ in range(12)]
    for block in 2 * blocks:
        block(x)
    full = _kept()
    assert full > MOST_BYTES * 3 // 4
    for block in 2 * blocks:
        block(x)
        assert _kept() == full  # after each call: what is thrown out and made differs in size


def test_two_threads_at_once() -> None:
    """Callers that share a block while a third changes another one."""
    block, x = _block(), torch.randn(1, 24, 8, 12)
    expected = block(x)
    others = [_block() for _ in range(4)]

    def call(i: int) -> bool:
        if i % 5 == 4:
            other = others[i // 5 % 4]
            other.convs[0].weight.data.mul_(1.01)
            other(x)
            return True
        return torch.equal(block(x), expected)

    with ThreadPoolExecutor(5) as pool:
        assert all(pool.map(call, range(200)))


def test_weights_that_change_under_several_threads() -> None:
    """A call that finds its entry outdated takes the same steps in every thread."""
    block, x = _block(), torch.randn(1, 24, 16, 24)
    torch.set_num_threads(4)  # conftest.py sets it back
    for _ in range(50):
        for _ in range(2):
            out = block(x)
        block.convs[1].weight.data.mul_(-1.01)
        changed = block(x)
        assert not torch.equal(changed, out)
        with dk.use_backend("reference"):
            torch.testing.assert_close(changed, block(x), rtol=1e-3, atol=1e-3)
