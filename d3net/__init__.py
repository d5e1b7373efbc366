"""D3Net: the networks and applications built on the fused operations of ``d3net_kernels``."""

from d3net.registry import create_model, list_models
from d3net.segmentation import BackboneConfig, D3NetBackbone, SegmentationConfig, SegmentationNet
from d3net.separation import BandConfig, SeparationConfig, SeparationNet
from d3net.weights import load_nnabla_h5, save_nnabla_h5

__all__ = [
    "BackboneConfig",
    "BandConfig",
    "D3NetBackbone",
    "SegmentationConfig",
    "SegmentationNet",
    "SeparationConfig",
    "SeparationNet",
    "create_model",
    "list_models",
    "load_nnabla_h5",
    "save_nnabla_h5",
]
