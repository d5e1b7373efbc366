"""Bad input: a clear error that names the argument, and nothing is modified."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import d3net_kernels as dk


def _good() -> dict[str, Any]:
    """Arguments of a good call: channels 2 and 3, K 4."""
    return {
        "inputs": [torch.randn(2, 2, 5, 6), torch.randn(2, 3, 5, 6)],
        "weight": torch.randn(4, 5, 3, 3),
        "bias": torch.randn(4),
        "scale": torch.randn(5),
        "shift": torch.randn(5),
        "relu": True,
    }


def _second(*shape: int, **options: Any) -> list[torch.Tensor]:
    return [torch.randn(2, 2, 5, 6), torch.zeros(shape, **options)]


_meta = {"device": "meta"}
_BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no sources": ({"inputs": []}, ValueError, "inputs is empty"),
    "inputs is text": ({"inputs": "x"}, TypeError, "inputs is of type str"),
    "inputs is None": ({"inputs": None}, TypeError, "inputs is of type NoneType"),
    "inputs is a generator": ({"inputs": iter([])}, TypeError, "accepted are a list or tuple"),
    "a source is None": (
        {"inputs": [torch.randn(2, 5, 5, 6), None]},
        TypeError,
        "inputs[1] is of type NoneType",
    ),
    "a source is an array": ({"inputs": [[[1.0]]]}, TypeError, "inputs[0] is of type list"),
    "three dimensions": ({"inputs": [torch.randn(5, 5, 6)]}, ValueError, "(N, C, H, W)"),
    "other N": ({"inputs": _second(1, 3, 5, 6)}, ValueError, "inputs[1] has shape (1, 3, 5, 6)"),
    "other H": ({"inputs": _second(2, 3, 4, 6)}, ValueError, "must share N, H and W"),
    "other W": ({"inputs": _second(2, 3, 5, 1)}, ValueError, "must share N, H and W"),
    "no channels first": ({"inputs": [torch.randn(2, 0, 5, 6)]}, ValueError, "inputs[0] has 0"),
    "no channels": ({"inputs": _second(2, 0, 5, 6)}, ValueError, "inputs[1] has 0 channels"),
    "other dtype": (
        {"inputs": _second(2, 3, 5, 6, dtype=torch.float64)},
        TypeError,
        "inputs[1] has dtype torch.float64 and inputs[0] torch.float32",
    ),
    "other device": ({"inputs": _second(2, 3, 5, 6, **_meta)}, ValueError, "inputs[1] is on meta"),
    "integers": (
        {"inputs": _second(2, 3, 5, 6, dtype=torch.int32)},
        TypeError,
        "inputs[1] has dtype torch.int32; accepted are float32",
    ),
    "complex": (
        {"inputs": [torch.zeros(2, 5, 5, 6, dtype=torch.complex64)]},
        TypeError,
        "dtype torch.complex64",
    ),
    "sparse": ({"inputs": [torch.zeros(2, 5, 5, 6).to_sparse()]}, TypeError, "layout"),
    "one tensor alone": (
        {"inputs": torch.randn(2, 5, 5, 6)},
        ValueError,
        "group_channels is None",
    ),
    "groups with a list": ({"group_channels": [2, 3]}, ValueError, "group_channels was given"),
    "groups too many": (
        {"inputs": torch.randn(2, 5, 5, 6), "group_channels": [2, 4]},
        ValueError,
        "add up to 6",
    ),
    "groups empty": (
        {"inputs": torch.randn(2, 5, 5, 6), "group_channels": []},
        ValueError,
        "group_channels is empty",
    ),
    "group of 0": (
        {"inputs": torch.randn(2, 5, 5, 6), "group_channels": [5, 0]},
        ValueError,
        "group_channels[1] is 0",
    ),
    "groups not ints": (
        {"inputs": torch.randn(2, 5, 5, 6), "group_channels": [2.0, 3]},
        TypeError,
        "group_channels[0] is 2.0",
    ),
    "groups an int": (
        {"inputs": torch.randn(2, 5, 5, 6), "group_channels": 5},
        TypeError,
        "group_channels is of type int",
    ),
    "groups of three dimensions": (
        {"inputs": torch.randn(5, 5, 6), "group_channels": [2, 3]},
        ValueError,
        "inputs has shape",
    ),
    "weight is None": ({"weight": None}, TypeError, "weight is of type NoneType"),
    "weight of 3 dimensions": ({"weight": torch.randn(4, 5, 3)}, ValueError, "weight has shape"),
    "weight of other channels": (
        {"weight": torch.randn(4, 6, 3, 3)},
        ValueError,
        "weight has 6 input channels, but the inputs have 5",
    ),
    "even kernel height": ({"weight": torch.randn(4, 5, 2, 3)}, ValueError, "2 x 3 kernel"),
    "even kernel width": ({"weight": torch.randn(4, 5, 3, 4)}, ValueError, "3 x 4 kernel"),
    "kernel of 0": ({"weight": torch.randn(4, 5, 0, 3)}, ValueError, "0 x 3 kernel"),
    "weight without outputs": ({"weight": torch.randn(0, 5, 3, 3)}, ValueError, "0 output"),
    "weight of other dtype": (
        {"weight": torch.randn(4, 5, 3, 3).double()},
        TypeError,
        "weight has dtype torch.float64",
    ),
    "weight elsewhere": ({"weight": torch.randn(4, 5, 3, 3, **_meta)}, ValueError, "weight is on"),
    "bias too long": ({"bias": torch.randn(5)}, ValueError, "bias has shape (5,)"),
    "bias of 2 dimensions": ({"bias": torch.randn(4, 1)}, ValueError, "accepted is (4,)"),
    "bias a number": ({"bias": 1.0}, TypeError, "bias is of type float"),
    "bias of other dtype": ({"bias": torch.randn(4).half()}, TypeError, "bias has dtype"),
    "bias elsewhere": ({"bias": torch.randn(4, **_meta)}, ValueError, "bias is on meta"),
    "dilations an int": ({"dilations": 2}, TypeError, "dilations is of type int"),
    "dilations text": ({"dilations": "12"}, TypeError, "dilations is of type str"),
    "dilations empty": ({"dilations": []}, ValueError, "0 entries for 2 source(s)"),
    "dilations too few": ({"dilations": [1]}, ValueError, "1 entries for 2 source(s)"),
    "dilations too many": ({"dilations": [1, 2, 4]}, ValueError, "3 entries for 2"),
    "dilation 0": ({"dilations": [1, 0]}, ValueError, "dilations[1] is 0"),
    "dilation negative": ({"dilations": [(1, -2), 1]}, ValueError, "dilations[0] is (1, -2)"),
    "dilation a float": ({"dilations": [1.0, 2]}, TypeError, "dilations[0] is 1.0"),
    "dilation a bool": ({"dilations": [True, 2]}, TypeError, "dilations[0] is True"),
    "dilation None": ({"dilations": [1, None]}, TypeError, "dilations[1] is None"),
    "dilation a triple": ({"dilations": [(1, 2, 3), 2]}, TypeError, "dilations[0] is (1, 2, 3)"),
    "dilation beyond int32": ({"dilations": [1, 2**31]}, ValueError, "dilations[1] is"),
    "too many sources for 2**i": (
        {
            "inputs": [torch.randn(2, 1, 5, 6)] * 32,
            "weight": torch.randn(4, 32, 3, 3),
            "dilations": None,
            "scale": None,
            "shift": None,
        },
        ValueError,
        "dilations is None, which stands for 2**i, for 32 sources",
    ),
    "scale alone": ({"shift": None}, ValueError, "scale was given without shift"),
    "shift alone": ({"scale": None}, ValueError, "shift was given without scale"),
    "scale too short": ({"scale": torch.randn(4)}, ValueError, "scale has shape (4,)"),
    "shift of 4 dimensions": (
        {"shift": torch.randn(1, 5, 1, 1)},
        ValueError,
        "shift has shape (1, 5, 1, 1)",
    ),
    "scale of other dtype": ({"scale": torch.randn(5).half()}, TypeError, "scale has dtype"),
    "scale an integer": ({"scale": torch.ones(5, dtype=torch.int64)}, TypeError, "scale has dtype"),
    "scale a number": ({"scale": 1.0}, TypeError, "scale is of type float"),
    "shift elsewhere": ({"shift": torch.randn(5, **_meta)}, ValueError, "shift is on meta"),
    "scale and shift differ": (
        {
            "inputs": [torch.randn(2, 5, 5, 6).half()],
            "weight": torch.randn(4, 5, 3, 3).half(),
            "bias": None,
            "shift": torch.randn(5).half(),
        },
        TypeError,
        "scale has dtype torch.float32 and shift torch.float16",
    ),
    "relu an int": ({"relu": 1}, TypeError, "relu is 1"),
    "relu text": ({"relu": "yes"}, TypeError, "relu is 'yes'"),
}


@pytest.mark.parametrize("name", _BAD)
def test_rejected(name: str) -> None:
    change, error, message = _BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        dk.multidilated_conv2d(**(_good() | change))


def test_nothing_is_modified() -> None:
    arguments = _good() | {"relu": "yes"}
    inputs, dilations = list(arguments["inputs"]), [1, (2, 2)]
    versions = [x._version for x in inputs]
    with pytest.raises(TypeError):
        dk.multidilated_conv2d(**arguments, dilations=dilations)
    assert all(a is b for a, b in zip(arguments["inputs"], inputs, strict=True))
    assert [x._version for x in inputs] == versions
    assert dilations == [1, (2, 2)]


def test_accepted() -> None:
    """The good call is good, also with tuples, float32 psi next to float16, and default 2**i."""
    arguments = _good()
    expected = dk.multidilated_conv2d(**arguments)
    inputs = tuple(arguments.pop("inputs"))
    for dilations in ([1, 2], ((1, 1), (2, 2)), [[1, 1], 2]):
        assert torch.equal(
            dk.multidilated_conv2d(inputs, **arguments, dilations=dilations), expected
        )
    half = {name: arguments[name].half() for name in ("weight", "bias")}
    out = dk.multidilated_conv2d([x.half() for x in inputs], **(arguments | half))
    assert out.dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 3, 2), {}, ValueError, "in_channels is 0"),
        ((4, 3.0, 2), {}, TypeError, "growth_rate is 3.0"),
        ((4, 3, 0), {}, ValueError, "num_layers is 0"),
        ((4, 3, 32), {}, ValueError, "num_layers, or the number of params.convs, is 32; accepted"),
        ((4, 3, 2), {"out_layers": 3}, ValueError, "out_layers is 3; accepted are 1..2"),
        ((4, 3, 2), {"out_layers": 0}, ValueError, "out_layers is 0"),
        ((4, 3, 2), {"norm": "batch"}, ValueError, "norm is 'batch'"),
    ],
)
def test_block_rejected(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        dk.D2Block(*arguments, **options)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(2, 5, 6, 7), ValueError, "x has 5 channels"),
        (torch.randn(4, 6, 7), ValueError, "x has shape (4, 6, 7)"),
        (torch.ones(2, 4, 6, 7, dtype=torch.int64), TypeError, "x has dtype torch.int64"),
        (torch.randn(2, 4, 6, 7).double(), TypeError, "and x torch.float64"),
        (torch.randn(1, 4, 1, 1), ValueError, "more than one value per channel"),
        (None, TypeError, "x is of type NoneType"),
    ],
)
def test_block_input_rejected(x: Any, error: type[Exception], message: str) -> None:
    block = dk.D2Block(4, 3, 2)
    before = copy_of_buffers(block)
    with pytest.raises(error, match=re.escape(message)):
        block(x)
    assert all(torch.equal(a, b) for a, b in zip(copy_of_buffers(block), before, strict=True))


def test_block_without_layers_rejected() -> None:
    with pytest.raises(ValueError, match=re.escape("the number of params.convs, is 0; accepted")):
        dk.d2_block(torch.randn(2, 4, 6, 7), dk.D2Params([], []))


def test_most_sources() -> None:
    """The dilation 2**30 of the last source is right: only its middle tap reaches the map."""
    inputs = [torch.randn(1, 1, 3, 4, dtype=torch.float64) for _ in range(31)]
    weight = torch.randn(2, 31, 3, 3, dtype=torch.float64)
    few = [min(1 << i, 4) for i in range(31)]  # beyond the map all dilations are alike
    expected = dk.reference.multidilated_conv2d(inputs, weight, dilations=few)
    torch.testing.assert_close(dk.multidilated_conv2d(inputs, weight), expected)


def copy_of_buffers(module: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], 4), ValueError, "in_channels is empty"),
        ((5, 4), TypeError, "in_channels is of type int"),
        (([2, 0], 4), ValueError, "in_channels[1] is 0"),
        (([2], 0), ValueError, "out_channels is 0"),
        (([2], 4, 2), ValueError, "kernel_size is 2"),
        (([2], 4, (3, 0)), ValueError, "kernel_size is (3, 0)"),
        (([2], 4, "3"), TypeError, "kernel_size is '3'"),
        (([2], 4, 3, [1, 2]), ValueError, "2 entries for 1 source(s)"),
    ],
)
def test_layer_rejected(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        dk.MultidilatedConv2d(*arguments)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensor() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 4, 5), torch.randn(3, 6, 7)])
    with pytest.raises(TypeError, match=r"inputs\[0\] is a nested tensor"):
        dk.multidilated_conv2d([nested], torch.randn(2, 3, 3, 3))


@pytest.mark.parametrize(
    ("channels", "message"),
    [((4, 4), "inputs\\[0\\] has 4 channels"), ((6, 2), "inputs\\[0\\]"), ((8,), "1 source")],
)
def test_module_wants_its_own_channels(channels: tuple[int, ...], message: str) -> None:
    """Also where the sum is right: sources swapped would be read with others' weights."""
    conv = dk.MultidilatedConv2d([2, 6], 1)
    with pytest.raises(ValueError, match=message):
        conv([torch.randn(1, c, 5, 5) for c in channels])
