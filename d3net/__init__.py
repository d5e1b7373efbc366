"""D3Net: the networks and applications built on the fused operations of ``d3net_kernels``."""
