"""The reference against the definition written out in numpy, taps and zeros by hand."""

from __future__ import annotations

import grid
import numpy as np
import pytest
import torch

from d3net_kernels import reference
from d3net_kernels.numerics import Problem


def _by_definition(problem: Problem) -> np.ndarray:
    """out[n, k, r, c] = b[k] + sum over sources, channels and taps of w * psi(x) or of zero."""
    weight = problem.weight.detach().numpy()
    growth, _, kernel_h, kernel_w = weight.shape
    n, _, height, width = problem.inputs[0].shape
    out = np.zeros((n, growth, height, width))
    channel = 0
    for source, (dh, dw) in zip(problem.inputs, problem.dilations, strict=True):
        for x in source.detach().numpy().transpose(1, 0, 2, 3):
            y = x
            if problem.scale is not None and problem.shift is not None:
                y = y * problem.scale[channel].item() + problem.shift[channel].item()
            if problem.relu:
                y = np.maximum(y, 0)
            for a in range(kernel_h):
                for b in range(kernel_w):
                    for row in range(height):
                        for column in range(width):
                            r = row + (a - kernel_h // 2) * dh
                            c = column + (b - kernel_w // 2) * dw
                            if 0 <= r < height and 0 <= c < width:
                                tap = weight[:, channel, a, b]
                                out[:, :, row, column] += y[:, None, r, c] * tap
            channel += 1
    return out if problem.bias is None else out + problem.bias.detach().numpy()[:, None, None]


def _reference(problem: Problem) -> np.ndarray:
    return reference.multidilated_conv2d(
        problem.inputs,
        problem.weight,
        problem.bias,
        dilations=problem.dilations,
        scale=problem.scale,
        shift=problem.shift,
        relu=problem.relu,
    ).numpy(force=True)


def test_zeros_are_padded_after_psi() -> None:
    """With shift 1 everywhere the border sees fewer ones than the middle, not the same number."""
    x, ones = torch.zeros(1, 1, 3, 3), torch.ones(1)
    out = reference.multidilated_conv2d(
        [x], torch.ones(1, 1, 3, 3), scale=ones, shift=ones, relu=True
    )
    assert out[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


@pytest.mark.parametrize("psi", ["same", None])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    ("kernel", "dilations", "size"),
    [
        ((3, 3), (1, 2, 4), (2, 5, 6)),
        ((1, 1), (1, 1, 1), (2, 3, 4)),
        ((5, 3), ((2, 1), (1, 3), (9, 9)), (1, 6, 5)),
        ((3, 3), (1, 2, 4), (1, 1, 1)),
        ((3, 3), (1, 2, 4), (2, 0, 3)),
    ],
)
def test_equals_the_definition(
    psi: str | None,
    relu: bool,
    kernel: tuple[int, int],
    dilations: tuple[int, ...],
    size: tuple[int, int, int],
    generator: torch.Generator,
) -> None:
    case = grid.Case(
        "", (2, 1, 2), 3, size, kernel, dilations, dtype=torch.float64, psi=psi, relu=relu
    )
    problem = case.problem(generator)
    np.testing.assert_allclose(_reference(problem), _by_definition(problem), rtol=1e-12, atol=1e-12)


def test_one_tensor_is_the_same_as_a_list(generator: torch.Generator) -> None:
    problem = grid.Case("").problem(generator)
    groups = [x.shape[1] for x in problem.inputs]
    together = reference.multidilated_conv2d(
        torch.cat(problem.inputs, 1), problem.weight, group_channels=groups
    )
    assert torch.equal(together, reference.multidilated_conv2d(problem.inputs, problem.weight))
