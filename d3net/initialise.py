"""How the official release draws its parameters; all from torch's random numbers, so seedable.

Glorot & Bengio, AISTATS 2010. The output channels that count for a D2 block's convolution are those
of all its slots, which is how they are stored.
"""

from __future__ import annotations

from torch import Tensor, nn

HEAD_STD = 0.01


def glorot_uniform(model: nn.Module) -> None:
    """The segmentation backbone: uniform, with the limit sqrt(6 / (fan_in + fan_out))."""
    for module in _reset(model):
        nn.init.xavier_uniform_(_weight(module))


def glorot_normal(model: nn.Module) -> None:
    """The separation network: normal with std sqrt(2 / (fan_in + fan_out)); transposed: uniform."""
    for module in _reset(model):
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.xavier_uniform_(_weight(module))
        else:
            nn.init.xavier_normal_(_weight(module))


def small_normal(model: nn.Module) -> None:
    """The decode heads: normal with std 0.01."""
    for module in _reset(model):
        nn.init.normal_(_weight(module), std=HEAD_STD)


def _reset(model: nn.Module) -> list[nn.Module]:
    """Zero all biases, make every normalisation the identity, return the convolutions."""
    convs: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            convs.append(module)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return convs


def _weight(conv: nn.Module) -> Tensor:
    assert isinstance(conv.weight, Tensor)
    return conv.weight
