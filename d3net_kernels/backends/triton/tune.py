"""Times block sizes on this machine's GPU and keeps the best: `python -m d3net_kernels tune`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...precision import allowed_precision
from . import configs, why_not
from .configs import Config, Key

# Sources, outputs, (N, H, W): a layer of D3Net for every bucket of outputs of configs.py.
_LAYERS = (
    ([32, 12, 12], 12, (4, 256, 256)),
    ([64, 36, 36, 36], 36, (4, 128, 256)),
    ([128, 64, 64, 64], 64, (4, 64, 128)),
)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tune(device: torch.device | None = None) -> Path:
    """Time the candidates of every kernel, dtype and bucket; returns the file that was written.

    Raises:
        RuntimeError: Triton cannot run here; the message says why.
    """
    reason = why_not(())
    if reason is not None:
        raise RuntimeError(reason)
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    chosen = configs.tuned(device)  # the launches read it, so that a trial is an entry
    for dtype, layer in itertools.product(_DTYPES, _LAYERS):
        for key, run in _runs(dtype, *layer, device):
            best = configs.shipped(key)
            times = {best: _milliseconds(chosen, key, best, run)}
            for candidate in _candidates(key):
                times.setdefault(candidate, _milliseconds(chosen, key, candidate, run))
            best = min(times, key=lambda config: times[config])
            chosen[key.name] = best
            shipped = times[configs.shipped(key)]
            print(f"{key.name:<28} {times[best]:.3f} ms, shipped {shipped:.3f} ms: {best}")
    path = configs.cache_file(device)
    configs.write(path, chosen)
    return path


def _runs(
    dtype: torch.dtype,
    channels: list[int],
    outputs: int,
    size: tuple[int, int, int],
    device: torch.device,
) -> Iterator[tuple[Key, Callable[[], object]]]:
    """Each kernel of one layer, ready to be called."""
    from . import launch

    n, h, w = size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    inputs = [normal(n, c, h, w) for c in channels]
    weight, grad_output = normal(outputs, sum(channels), 3, 3), normal(n, outputs, h, w)
    scale, shift = (
        torch.rand(sum(channels), device=device),
        torch.rand(sum(channels), device=device),
    )
    dilations = [d for i in range(len(channels)) for d in (1 << i, 1 << i)]
    options = (dilations, scale, shift, True, allowed_precision(device.type))
    wanted = [1] * len(channels)
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: launch.forward(inputs, weight, None, *options),
        "backward_data": lambda: launch.backward_data(
            grad_output, inputs, weight, *options, wanted
        ),
        "backward_weight": lambda: launch.backward_weight(grad_output, inputs, weight, *options),
    }
    for kernel, run in runs.items():
        groups = channels if kernel == "backward_data" else [outputs]
        pieces = configs.output_blocks(groups)
        per_program = outputs if kernel == "forward" else sum(pieces)
        yield Key(kernel, configs.arch_of(device), dtype, per_program), run


def _candidates(key: Key) -> Iterator[Config]:
    if key.kernel == "backward_weight":
        choices = itertools.product((16, 32, 64), (16, 32), (1, 2, 4), (2, 3))
    else:
        choices = itertools.product((64, 128, 256), (16, 32), (2, 4, 8), (2, 3))
    return itertools.starmap(Config, choices)


def _milliseconds(
    chosen: dict[str, Config], key: Key, config: Config, run: Callable[[], object]
) -> float:
    """Median time; infinite where the GPU has too little memory or registers for `config`."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    chosen[key.name] = config
    try:
        return float(do_bench(run, return_mode="median"))
    except OutOfResources:
        return float("inf")
