"""Multidilated convolution (D3Net, CVPR 2021) for PyTorch: one fused operator and its modules."""

from importlib import metadata

from . import autocast, autograd, reference, vmap  # noqa: F401 (rules register themselves)
from .backends import use_backend, why_not
from .backends.triton import dispatch  # noqa: F401 (likewise)
from .block import d2_block, norm_conv2d
from .block_params import ConvParams, D2Params, NormParams
from .functional import multidilated_conv2d
from .modules import D2Block, MultidilatedConv2d, NormConv2d

try:
    __version__ = metadata.version("d3net-kernels")
except metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ConvParams",
    "D2Block",
    "D2Params",
    "MultidilatedConv2d",
    "NormConv2d",
    "NormParams",
    "d2_block",
    "multidilated_conv2d",
    "norm_conv2d",
    "reference",
    "use_backend",
    "why_not",
]
