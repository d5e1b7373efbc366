"""Batch statistics of several processes: as one process with the batches of all of them.

Two processes are started once for this file. They are given the blocks that the tests have drawn,
each its own part of the batch, and write what they found; the tests put the parts together and
judge them like those of one process.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import block_grid
import pytest
import torch
import torch.distributed as dist
from block_grid import NORMS, Block, Case, X, assert_right, random_module, results_of
from conftest import SEED
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import d3net_kernels as dk
from d3net_kernels.statistics import batch_statistics

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()),
        reason="this torch is built without torch.distributed and gloo",
    ),
    pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch"),
]

PROCESSES = 2


@dataclass(frozen=True)
class Split:
    """A case, and how many items of its batch the first process has; maybe under autocast."""

    case: Case
    first: int
    autocast: torch.dtype | None = None

    def part(self, block: Block, rank: int) -> Block:
        """What the process `rank` is given of `block`."""
        rows = slice(None, self.first) if rank == 0 else slice(self.first, None)
        part = {
            name: t.detach()[rows].clone().requires_grad_(t.requires_grad)
            if name in ("x", "grad_output")
            else t
            for name, t in block.tensors.items()
        }
        return replace(block, tensors=part)


_SPLITS = [
    Split(Case("unequal", size=(5, 6, 7), layers=4), 2),
    Split(Case("one_value_in_one", size=(6, 1, 1)), 1),
    Split(Case("empty_in_one", size=(3, 6, 7)), 0),
    Split(Case("one_out", size=(3, 6, 7), out_layers=1), 1),
    Split(Case("frozen_some", size=(3, 6, 7), layers=4, frozen=(1, 3)), 1),
    Split(Case("no_running", size=(3, 6, 7), running=False), 2),
    Split(Case("no_running_eval", size=(3, 6, 7), running=False, mode="eval"), 2),
    Split(Case("eval", size=(3, 6, 7), mode="eval"), 2),
    Split(Case("frozen_all", size=(3, 6, 7), frozen=(0, 1, 2)), 1),
    Split(Case("mean_30", x_offset=30, size=(3, 6, 8)), 1),
    Split(Case("needs_parameters", size=(3, 6, 7), needs=block_grid.PARAMETERS), 1),
    Split(Case("channels_last", size=(3, 6, 7), layout="channels_last"), 1),
    Split(Case("float64", size=(3, 6, 7), dtype=torch.float64), 1),
    Split(Case("bfloat16", 9, 8, 4, (3, 9, 14), torch.bfloat16), 1),
    Split(Case("autocast", 9, 8, 4, (3, 9, 14)), 1, autocast=torch.bfloat16),
]
SPLITS = {
    f"{norm}-{split.case.name}": replace(split, case=replace(split.case, norm=norm))
    for norm in NORMS
    for split in _SPLITS
}


def _takes_batch(case: Case) -> list[bool]:
    """Which norms of a case take batch statistics."""
    return [
        not case.running or (case.mode == "train" and i not in case.frozen)
        for i in range(case.layers)
    ]


def _all_reduces(case: Case) -> tuple[int, int]:
    """How many are right, forward and backward: one for each source whose statistics are taken.

    A source 0 without a gradient has nothing to send back.
    """
    taking = _takes_batch(case)
    sources = taking if case.norm == "per_source" else [any(taking[i:]) for i in range(case.layers)]
    backward = sources if "x" in case.needs else sources[1:]
    return sum(sources), sum(backward)


class _Counted:
    """Counts the all-reduces made inside."""

    def __enter__(self) -> _Counted:
        self.calls = 0
        self._all_reduce = dist.all_reduce

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self._all_reduce(*args, **kwargs)

        dist.all_reduce = counting
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_reduce = self._all_reduce


# What follows runs in both processes, which find each other through a file.


@contextlib.contextmanager
def _in_group(file: Path, rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    blocks = torch.load(folder / "blocks.pt", weights_only=False)
    with _in_group(folder / "meeting_point", rank, PROCESSES):
        found = {name: _step(SPLITS[name], block, rank) for name, block in blocks.items()}
        found |= {f.__name__: f(rank) for f in (_far_mean, _penalty, _ddp, _too_few, _groups)}
    torch.save(found, folder / f"found{rank}.pt")


def _step(split: Split, block: Block, rank: int) -> dict[str, Any]:
    """Results on this process's part, and the all-reduces it took."""
    forward = []

    def operation(*args: Any, **kwargs: Any) -> Tensor:
        out = dk.d2_block(*args, **kwargs, process_group="world")
        forward.append(counted.calls)
        return out

    autocast = torch.autocast("cpu", dtype=split.autocast, enabled=split.autocast is not None)
    with _Counted() as counted, autocast:
        results = results_of(operation, split.part(block, rank))
    return {"results": results, "all_reduces": (forward[0], counted.calls - forward[0])}


def _far_values() -> Tensor:
    values = torch.randn((5, 3, 4, 6), generator=torch.Generator().manual_seed(7)).double()
    values[:2] += 3  # the processes' own means differ
    return values


def _far_mean(rank: int) -> list[Tensor]:
    """Statistics of numbers near 1e9."""
    own = _far_values()[:2] if rank == 0 else _far_values()[2:]
    return list(batch_statistics(own + 1e9, dist.group.WORLD))


def _penalty_of(block: Block, **options: Any) -> dict[str, Tensor]:
    """Second derivatives: those of the square of the gradient with respect to x."""
    out = dk.d2_block(block.tensors["x"], block.params(), **block.options(), **options)
    (grad,) = torch.autograd.grad(out.sin().sum(), block.tensors["x"], create_graph=True)
    needed = block.needed()
    zeros = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(grad.square().sum(), list(needed.values()), **zeros)
    return {f"grad {name}": g for name, g in zip(needed, grads, strict=True)}


PENALTY = Split(Case("penalty", size=(3, 4, 5), dtype=torch.float64), 1)


def _penalised(norm: str) -> Block:
    case = replace(PENALTY.case, norm=norm)
    return case.block(torch.Generator().manual_seed(11))


def _penalty(rank: int) -> dict[str, dict[str, Tensor]]:
    return {
        norm: _penalty_of(PENALTY.part(_penalised(norm), rank), process_group="world")
        for norm in NORMS
    }


def _train(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The state after three steps of training."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        (block(x.roll(step, 3)) - 1).square().mean().backward()
        optimizer.step()
    return {name.removeprefix("module."): t for name, t in block.state_dict().items()}


def _module(**options: Any) -> dk.D2Block:
    torch.manual_seed(5)
    return random_module(**options).double()


def _ddp(rank: int) -> dict[str, Tensor]:
    """Training under DistributedDataParallel."""
    block = DistributedDataParallel(_module(process_group="world"))
    return _train(block, X.double()[rank : rank + 1])


def _too_few(rank: int) -> dict[str, Any]:
    """Whole batches of no and of one value."""
    found = {}
    for items in (0, 1):
        block = _module(process_group="world")
        x = X[: items if rank == 0 else 0, :, :1, :1].double().requires_grad_()
        out = block(x)
        out.sum().backward()
        found[str(items)] = out.detach(), x.grad, block.state_dict()
    return found


def _groups(rank: int) -> dict[str, Any]:
    """What a group of this process alone, a group of others and one of all come to."""
    of_all, of_first = dist.new_group([0, 1]), dist.new_group([0])
    found: dict[str, Any] = {}
    for name, group in (("all", of_all), ("first", of_first)):
        try:
            with _Counted() as counted:
                _module(process_group=group)(X[rank : rank + 1].double())
            found[name] = counted.calls
        except TypeError as error:
            found[name] = str(error)
    block = _module(process_group=of_all)
    with pytest.raises(TypeError, match="ProcessGroup"):
        copy.deepcopy(block)
    with dk.use_backend("reference"), pytest.raises(RuntimeError, match="reference backend"):
        block(X.double())
    return found


# And what follows in the process of the tests.


@pytest.fixture(scope="module")
def blocks() -> dict[str, Block]:
    generator = torch.Generator().manual_seed(SEED)
    return {name: split.case.block(generator) for name, split in SPLITS.items()}


@pytest.fixture(scope="module")
def found(blocks: dict[str, Block], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("sync")
    torch.save(blocks, folder / "blocks.pt")
    torch.multiprocessing.spawn(_work, args=(folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"found{r}.pt", weights_only=False) for r in range(PROCESSES)]


def _merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of the whole batch; those that every process has must have the same bits."""
    merged = {}
    for name, own in parts[0].items():
        others = [part[name] for part in parts]
        if name in ("out", "grad x"):
            merged[name] = torch.cat(others)
        elif name.startswith("grad "):
            merged[name] = sum(t.double() for t in others).to(own.dtype)
        else:
            assert all(torch.equal(t, own) for t in others), name
            merged[name] = own
    return merged


@pytest.mark.parametrize("name", SPLITS)
def test_right(name: str, blocks: dict[str, Block], found: list[dict]) -> None:
    results = _merged([f[name]["results"] for f in found])
    assert_right(blocks[name], results, autocast=SPLITS[name].autocast)


@pytest.mark.parametrize("name", SPLITS)
def test_one_all_reduce_per_source_and_direction(name: str, found: list[dict]) -> None:
    assert [f[name]["all_reduces"] for f in found] == [_all_reduces(SPLITS[name].case)] * PROCESSES


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_group_results_are_others(norm: str, blocks: dict[str, Block]) -> None:
    """The tests above would see it if the processes did not share their statistics."""
    name = f"{norm}-unequal"
    parts = [results_of(dk.d2_block, SPLITS[name].part(blocks[name], r)) for r in range(PROCESSES)]
    for part in parts:  # running statistics, each its own
        part |= {key: parts[0][key] for key in part if key.startswith(("mean", "var"))}
    ratios = block_grid.error_ratios(blocks[name], _merged(parts))
    of_all_layers = ["out", "grad x", *(f"grad weight[{i}]" for i in range(4))]
    assert min(ratios[key] for key in of_all_layers) > 100


def test_large_mean_does_not_cancel(found: list[dict]) -> None:
    values = _far_values() + 1e9
    expected = values.mean((0, 2, 3)), (values - 1e9).var((0, 2, 3), correction=0)
    for f in found:
        mean, var, size = f["_far_mean"]
        torch.testing.assert_close((mean, var), expected)
        assert size == 5 * 4 * 6


@pytest.mark.parametrize("norm", NORMS)
def test_double_backward(norm: str, found: list[dict]) -> None:
    expected = _penalty_of(_penalised(norm))
    merged = _merged([f["_penalty"][norm] for f in found])
    for name, grad in expected.items():
        torch.testing.assert_close(merged[name], grad, msg=name)


def test_distributed_data_parallel(found: list[dict]) -> None:
    """Parameters and buffers after a few steps, as without processes."""
    expected = _train(_module(), X.double())
    for f in found:
        assert list(f["_ddp"]) == list(expected)
        for name, t in expected.items():
            torch.testing.assert_close(f["_ddp"][name], t, msg=name)


def test_less_than_two_values_leave_running_statistics_alone(found: list[dict]) -> None:
    before = _module().state_dict()
    for rank, f in enumerate(found):
        for items, (out, grad, state) in f["_too_few"].items():
            own = int(items) if rank == 0 else 0
            assert out.shape == (own, 27, 1, 1)
            assert out.isfinite().all()
            assert grad.isfinite().all()
            for name, t in before.items():
                assert "num_batches" in name or torch.equal(state[name], t), name


def test_groups(found: list[dict]) -> None:
    assert [f["_groups"]["all"] for f in found] == [3, 3]
    assert found[0]["_groups"]["first"] == 0, "a group of one needs nobody"
    assert "that this process belongs to" in found[1]["_groups"]["first"]


def test_group_of_one_is_none(tmp_path: Path) -> None:
    """The same bits through the same node, and the same refusal of a single value."""
    block, other = _module(process_group="world"), _module()
    with _in_group(tmp_path / "meeting_point", 0, 1):
        out = block(X.double())
        with pytest.raises(ValueError, match="more than one value per channel"):
            block(X[:1, :, :1, :1].double())
    expected = other(X.double())
    assert torch.equal(out, expected)
    assert type(out.grad_fn) is type(expected.grad_fn)
    for b, c in zip(block.buffers(), other.buffers(), strict=True):
        assert torch.equal(b, c)


def test_eval_needs_no_processes() -> None:
    """A block that was trained in a group serves without one."""
    block = _module(process_group="world").eval()
    assert torch.equal(block(X.double()), _module().eval()(X.double()))


def test_group_is_not_in_the_state_but_in_copies() -> None:
    block = _module(process_group="world")
    assert list(block.state_dict()) == list(_module().state_dict())
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.process_group == "world"
    assert "process_group='world'" in repr(block)
    assert "process_group" not in repr(_module())


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        ("word", ValueError, "process_group is 'word'; accepted are None, 'world' and a"),
        (2, TypeError, "process_group is 2; accepted are None, 'world' and a"),
        (True, TypeError, "process_group is True; accepted are None, 'world' and a"),
    ],
)
def test_bad_group(group: Any, error: type[Exception], words: str) -> None:
    calls: list[Callable[[], Any]] = [
        functools.partial(dk.D2Block, 17, 9, 3, process_group=group),
        functools.partial(_call_with, group),
    ]
    for call in calls:
        with pytest.raises(error, match=words):
            call()


def _call_with(group: Any) -> Tensor:
    block = Case("").block(torch.Generator().manual_seed(0))
    return dk.d2_block(block.tensors["x"], block.params(), process_group=group)


def test_not_initialised() -> None:
    block = _module(process_group="world")
    with pytest.raises(RuntimeError, match="is not initialised"):
        block(X.double())
    assert block.norms[0].num_batches_tracked == 0, "a refused call counts in the statistics"
