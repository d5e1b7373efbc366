"""``d3net demo``: separate a real song with a small D3Net, plain torch against fused."""

from d3net.demo.demo import run_demo

__all__ = ["run_demo"]
