"""Reference numbers of the official models, and the weights behind them.

`golden_data/*.npz` hold what the public implementations compute for tiny models: LTH14/mar fe470ac,
markweberdev/maskbit 5ea3d73, hustvl/LightningDiT 2725fed, toshas/torch-fidelity 5e211a9 and
mseitzer/pytorch-fid b9c1811 (PyTorch 2.14 on CPU, float32). The files hold no weights: every weight
follows from its name and shape, see `weight`.

`golden_data/tiny_layouts/*.json` are the parameter names and shapes of those tiny models.
`golden_data/layouts/*.json` are those of the full-size models.
"""
import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

import backbone

FOLDER = Path(__file__).resolve().parent / "golden_data"
CONSTANTS = ("bits_to_indices", "codebook", "num_batches_tracked")


@cache
def load(name):
    """golden_data/NAME.npz as a dict of tensors, which are read and never written to.

    Text stays a numpy array.
    """
    loaded = {}
    with np.load(FOLDER / f"{name}.npz") as arrays:
        for key, array in arrays.items():
            is_text = array.dtype.kind == "U"
            loaded[key] = array if is_text else torch.from_numpy(np.array(array))
    return loaded


def layout(name, folder="tiny_layouts"):
    """{official parameter name: shape} of golden_data/FOLDER/NAME.json.

    folder  "tiny_layouts" or, for the full sizes, "layouts"
    """
    return json.loads((FOLDER / folder / f"{name}.json").read_text())


def shapes(module):
    """{parameter name: shape} of a module."""
    return {key: list(value.shape) for key, value in module.state_dict().items()}


def weight(key, shape, scale=1.0):
    """A fresh copy of `known_weight`."""
    return known_weight(key, tuple(shape), scale).clone()


@cache
def known_weight(key, shape, scale):
    """The float32 weight that belongs to a parameter name and a shape.

    The weight is a normal random tensor. The name is the seed. Name and shape also say what kind
    of parameter it is, and so how large its entries are.
    """
    last = key.rsplit(".", 1)[-1]
    a = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if last == "running_var":
        a = 1 + 0.1 * abs(a)
    elif last == "running_mean":
        a = 0.1 * a
    elif len(shape) == 3 and shape[0] == 1:
        # position tables, the mask token
        a = 0.5 * a
    elif len(shape) == 4:
        # convolutions
        a = a * np.sqrt(2 / np.prod(shape[1:]))
    elif len(shape) >= 2:
        # linear layers, embeddings
        a = a / np.sqrt(np.prod(shape[1:]))
    elif last == "weight":
        # gains of norms
        a = 1 + 0.1 * a
    else:
        # biases
        a = 0.1 * a
    return torch.tensor(scale * a, dtype=torch.float32)


def scale(key, shape, probe):
    """The factor on a weight: 0.003 where the probe makes it small, 1 elsewhere. See `fill`."""
    is_gain = len(shape) == 1 and key.endswith(".weight")
    if probe == "all":
        return 0.003
    if probe == "nogain" and not is_gain:
        return 0.003
    return 1.0


def official(name, probe=None, folder="tiny_layouts"):
    """The content of an official file of that layout: {official parameter name: weight}.

    name, folder  see `layout`
    probe         see `fill`
    """
    state = {}
    for key, shape in layout(name, folder).items():
        if key.endswith("bits_to_indices"):
            state[key] = 2 ** torch.arange(shape[0], dtype=torch.int32)
        elif key.endswith("codebook"):
            code = torch.arange(shape[0])[:, None]
            place = torch.arange(shape[1])
            state[key] = (code // 2 ** place % 2 * 2 - 1).float()
        else:
            state[key] = weight(key, shape, scale(key, shape, probe))
    return state


def model(kind, name, probe=None):
    """The tiny official model of that layout.

    The program recognises the model by its keys and renames them, as it does with a real file.
    """
    return backbone.KINDS[kind].from_official(official(name, probe))


def fill(module, prefix="", probe=None):
    """The module in evaluation mode, each of its parameters set to the weight of its name.

    prefix  what precedes the names of this module in the whole model
    probe   "all" multiplies all weights by 0.003, "nogain" all but the gains of norms. Activations
            then become so small that the epsilon inside every norm shows.
    """
    for key, value in module.state_dict().items():
        if key.rsplit(".", 1)[-1] not in CONSTANTS:
            factor = scale(key, value.shape, probe)
            value.copy_(weight(prefix + key, value.shape, factor))
    return module.eval()


def difference(found, expected):
    """The largest absolute difference, divided by the largest absolute expected value."""
    same_shape = found.shape == expected.shape
    assert same_shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    largest_difference = (found - expected).detach().abs().max()
    return float(largest_difference / expected.detach().abs().max())
