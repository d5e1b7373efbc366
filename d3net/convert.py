"""Between the official .h5 files and .safetensors files of our networks."""

from __future__ import annotations

from pathlib import Path

import torch

from d3net.files import path_of
from d3net.official_names import official_parameters
from d3net.pretrained import load_safetensors, read_metadata, save_safetensors
from d3net.registry import create_model, list_models
from d3net.weights import Report, compare, load_nnabla_h5, read_h5, save_nnabla_h5

MODEL_KEY = "model"


def convert(source: str | Path, target: str | Path, name: str | None = None) -> str:
    """Write the weights in `source` as `target`: .h5 to .safetensors, or the reverse.

    Args:
        source: the file to read.
        target: the file to write; its ending says what it becomes.
        name: the network, see :func:`d3net.list_models`; None to recognise it. An official file is
            recognised by its names and shapes, one of ours by the name that this function leaves.

    Returns:
        The name of the network.

    Raises:
        FileNotFoundError: `source` is missing.
        ValueError: an ending is not accepted, the network is not recognised, or the file does not
            fit it, with every missing, unexpected and misshapen name. Nothing is written then.
    """
    endings = path_of("source", source).suffix, path_of("target", target).suffix
    if endings == (".h5", ".safetensors"):
        name = name or recognise(source)
        model = create_model(name)
        load_nnabla_h5(source, model)
        save_safetensors(model.state_dict(), target, metadata={MODEL_KEY: name})
    elif endings == (".safetensors", ".h5"):
        name = name or read_metadata(source).get(MODEL_KEY)
        if name is None:
            raise ValueError(f"{source} does not say which network it is; name the model")
        model = create_model(name)
        load_safetensors(source, model)
        save_nnabla_h5(target, model)
    else:
        raise ValueError(
            f"source is {source} and target {target}; accepted are an .h5 file to read and a "
            ".safetensors file to write, or the reverse"
        )
    return name


def recognise(path: str | Path) -> str:
    """The network that an official .h5 file belongs to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no HDF5, or fits none exactly; the message compares it with the nearest.
    """
    arrays = read_h5(path)
    reports: dict[str, Report] = {}
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        try:
            reports[name] = compare(official_parameters(model), arrays)
        except TypeError:  # the official release has no such network
            continue
        if reports[name].complete:
            return name
    nearest = max(reports, key=lambda name: len(reports[name].loaded))
    if not reports[nearest].loaded:
        raise ValueError(f"{path} has nothing of any D3Net: {len(arrays)} arrays, other names")
    raise ValueError(f"{path} fits no network; the nearest is {nearest}. {reports[nearest]}")
