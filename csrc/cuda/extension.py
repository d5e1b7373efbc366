"""Whether and how setup.py builds the second binary, ``d3net_kernels/_C_cuda.abi3.so``.

It is a binary of its own so that the CPU kernels load where there is no CUDA runtime. Built where
torch is a CUDA build, its toolkit is there, and somebody will use it: a GPU is in the machine, or
TORCH_CUDA_ARCH_LIST or D3NET_KERNELS_CUDA=1 ask for it. A toolkit alone is not asking, so that who
works on the CPU kernels waits for seconds and not for minutes. D3NET_KERNELS_CUDA=0 leaves it out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
SWITCH = "D3NET_KERNELS_CUDA"
ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # where nobody says which
NVCC_FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden", "-Wno-deprecated-gpu-targets")


class CudaUnavailableError(Exception):
    """The CUDA binary is not built; the message is the reason."""


def toolkit() -> Path:
    """The root of the CUDA toolkit. Never guessed from where nvcc lies: that may be a wrapper."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        nvcc = "/usr/local/cuda/bin/nvcc"
        if not Path(nvcc).exists():
            raise CudaUnavailableError(
                "there is no CUDA toolkit (nvcc); if there is, set CUDA_HOME"
            )
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    here = re.search(r"^#\$ _HERE_=(.*)$", said.stderr, re.MULTILINE)
    if here is None:
        raise CudaUnavailableError(f"{nvcc} does not say where its toolkit is; set CUDA_HOME")
    return Path(here[1]).parent


def _toolkit_for(torch: Any) -> Path:
    """The toolkit that will build the binary, or CudaUnavailableError."""
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise CudaUnavailableError(f"{SWITCH} is {switch!r}; accepted are 0 and 1")
    if switch == "0":
        raise CudaUnavailableError(f"{SWITCH}=0")
    if torch.version.cuda is None:
        raise CudaUnavailableError(f"torch {torch.__version__} is a build without CUDA")
    asked = switch == "1" or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not asked and not torch.cuda.is_available():
        raise CudaUnavailableError(f"no GPU is here; {SWITCH}=1 builds for one elsewhere")
    home = toolkit()
    nvcc = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    version = re.search(r"release (\d+)\.\d+", nvcc.stdout)
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        found = "no nvcc" if version is None else version[0]
        raise CudaUnavailableError(f"{home} has {found}, torch was built with {torch.version.cuda}")
    return home


def _all_archs(home: Path) -> str:
    """Every architecture of ARCHS that this nvcc knows, and PTX for later ones."""
    nvcc = [str(home / "bin" / "nvcc"), "--list-gpu-code"]
    known = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout.split()
    return ";".join(arch for arch in ARCHS if "sm_" + arch.replace(".", "") in known) + "+PTX"


def cuda_extension(torch: Any, sources: Sequence[str], depends: Sequence[str], flags: Any) -> Any:
    """The extension for setup(), or CudaUnavailableError; sets CUDA_HOME for torch's build.

    `flags` are those of the C++ compiler.
    """
    home = _toolkit_for(torch)
    os.environ["CUDA_HOME"] = str(home)
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = _all_archs(home)
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(home)  # it may have been imported before
    return cpp_extension.CUDAExtension(
        "d3net_kernels._C_cuda",
        list(sources),
        include_dirs=[str(FOLDER.parent)],
        depends=list(depends),
        extra_compile_args={
            "cxx": [*flags, "-DUSE_CUDA"],  # torch's headers then declare its CUDA functions
            "nvcc": [*NVCC_FLAGS, *(flag for flag in flags if flag.startswith("-D"))],
        },
        py_limited_api=True,
    )
