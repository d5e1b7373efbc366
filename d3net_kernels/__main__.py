"""What is here (info), whether it is right (verify), how fast (bench); Triton's sizes (tune)."""

from __future__ import annotations

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import __version__, _binary, backends, numerics
from .backends import cuda
from .functional import multidilated_conv2d, multidilated_conv2d_with_moments

_ON_GPU = ("cuda", "triton")
# Sources' channels, growth rate, (N, H, W), size of the kernel: odd sizes, one source, dilations
# beyond the map, a kernel that is not 3x3.
VERIFIED = (
    ([5], 7, (2, 9, 11), 3),
    ([16, 12, 12], 12, (1, 17, 24), 3),
    ([7, 3, 3, 3, 3, 3], 3, (2, 6, 35), 3),
    ([9, 5], 6, (2, 7, 13), 5),
)
KINDS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KINDS_ON_GPU = KINDS | {"tf32": torch.float32}
# For every tile of the tensor-core kernels a layer whose gradients take the same one.
VERIFIED_ON_GPU = tuple(([c, c], c, (2, 18, 72), 3) for c in (8, 16, 24, 32, 40))


def info() -> int:
    """Print versions, the binary and every backend."""
    rows = {
        "d3net_kernels": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "binary": str(_binary.PATH) if _binary.missing is None else "none",
        "threads": str(torch.get_num_threads()),
    }
    if _binary.missing is None:
        try:
            rows["instruction set"] = torch.ops.d3net_kernels.cpu_isa("")
        except RuntimeError as error:  # D3NET_KERNELS_ISA asks for what is not there
            rows["instruction set"] = f"error: {str(error).splitlines()[0]}"
    rows["CUDA binary"] = cuda.archs()
    forced = backends.forced()
    if forced is not None:
        rows["forced backend"] = forced
    for name in backends.NAMES:
        reason = backends.why_not(name)
        rows[f"backend {name}"] = "available" if reason is None else f"not available: {reason}"
    for name, value in rows.items():
        print(f"{name:<18}{value}")
    return 0


def verify(seed: int | None = None) -> int:
    """Compare the convolution of every available backend with float64.

    Ends with 1 where one is wrong, and where plain torch is the only one.
    """
    generator = torch.Generator()
    if seed is None:
        seed = generator.seed()
    generator.manual_seed(seed)
    print(f"random numbers of --seed {seed}")
    wrong, checked = 0, list[str]()
    for name in backends.NAMES:
        reason = backends.why_not(name)
        if reason is not None:
            print(f"{name:<10} not checked: {reason}")
            continue
        checked.append(name)
        on_gpu = name in _ON_GPU
        shapes = (*VERIFIED, *VERIFIED_ON_GPU) if on_gpu else VERIFIED
        for kind, dtype in KINDS_ON_GPU.items() if on_gpu else KINDS.items():
            start = time.perf_counter()
            with _tf32_allowed(kind == "tf32"):
                ratio = max(
                    _worst_ratio(name, kind, dtype, generator, *shape, relu)
                    for shape in shapes
                    for relu in ((True, False) if on_gpu else (True,))
                )
            seconds = time.perf_counter() - start
            verdict = "ok" if ratio <= 1 else "WRONG"
            wrong += ratio > 1
            print(
                f"{name:<10} {kind:<9} {verdict:<5} "
                f"error / allowed = {ratio:.3f}  ({seconds:.1f} s)"
            )
    if checked == ["reference"]:
        print("no kernels were checked: there is nothing but plain torch here")
        return 1
    return 1 if wrong else 0


@contextmanager
def _tf32_allowed(allowed: bool) -> Iterator[None]:
    """Whether convolutions of float32 on GPUs may round to TF32."""
    cudnn: Any = torch.backends.cudnn
    convolutions = cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def tune() -> int:
    """Find the fastest block sizes of the Triton kernels on this GPU, and keep them."""
    from .backends.triton.tune import tune

    try:
        print(f"written to {tune()}")
    except RuntimeError as reason:
        print(f"nothing to tune: {reason}")
        return 1
    return 0


def _worst_ratio(
    backend: str,
    kind: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    channels: list[int],
    out_channels: int,
    size: tuple[int, int, int],
    kernel: int,
    relu: bool,
) -> float:
    problem = numerics.random_problem(
        channels,
        out_channels,
        size,
        generator=generator,
        kernel=(kernel, kernel),
        dtype=dtype,
        psi_dtype=dtype,
        relu=relu,
    )
    if backend in _ON_GPU:
        problem = problem.map(Tensor.cuda)
    moments: list[Tensor] = []

    def with_moments(*arguments: Any, **options: Any) -> Tensor:
        out, *moments[:] = multidilated_conv2d_with_moments(*arguments, **options)
        return out

    ratios: list[float] = []
    with backends.use_backend(backend):
        for operation in (multidilated_conv2d, with_moments):
            results = numerics.results_of(operation, problem)
            ratios += numerics.error_ratios(problem, results, tf32=kind == "tf32").values()
    mean, var = (t.detach() for t in moments)
    ratios += numerics.moments_error_ratios(results["out"], mean, var).values()
    return max(ratios)


def bench(arguments: list[str]) -> int:
    """Time layers on a GPU against plain torch (in the source tree)."""
    try:
        from benchmarks import gpu
    except ImportError as error:
        print(f"the benchmarks are not installed, run this in the source tree ({error})")
        return 1
    return gpu.main(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["bench"]:  # it has options of its own
        return bench(given[1:])
    parser = argparse.ArgumentParser(prog="python -m d3net_kernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = {}
    for command in (info, verify, tune):
        parsers[command] = commands.add_parser(
            command.__name__, help=command.__doc__, description=command.__doc__
        )
        parsers[command].set_defaults(run=command)
    parsers[verify].add_argument(
        "--seed", type=int, help="of the random numbers, as an earlier run printed it"
    )
    commands.add_parser("bench", help=bench.__doc__)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="d3net_kernels runs on plain torch")
        options = vars(parser.parse_args(given))
        return int(options.pop("run")(**options))


if __name__ == "__main__":
    sys.exit(main())
