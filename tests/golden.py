"""Reference numbers, and the weights behind them.

`golden_data/*.npz` hold what the public implementations compute for tiny models: LTH14/mar fe470ac,
markweberdev/maskbit 5ea3d73, hustvl/LightningDiT 2725fed, toshas/torch-fidelity 5e211a9 and mseitzer/pytorch-fid
b9c1811 (PyTorch 2.14 on CPU, float32). They hold no weights: every weight follows from its name and shape, see
`weight`. `golden_data/tiny_layouts/*.json` are the parameter names and shapes of those models, `golden_data/layouts/`
of full-size ones.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import torch

import backbone

FOLDER = Path(__file__).resolve().parent / "golden_data"
CONSTANTS = ("bits_to_indices", "codebook", "num_batches_tracked")


def load(name):
    """golden_data/NAME.npz as a dict of tensors (text stays numpy)."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: a if a.dtype.kind == "U" else torch.from_numpy(np.array(a)) for key, a in arrays.items()}


def layout(name, folder="tiny_layouts"):
    """golden_data/FOLDER/NAME.json as {official parameter name: shape}; folder "layouts" holds the full sizes."""
    return json.loads((FOLDER / folder / f"{name}.json").read_text())


def shapes(module):
    """The same of a module."""
    return {key: list(value.shape) for key, value in module.state_dict().items()}


def weight(key, shape, scale=1.0):
    """The float32 weight of that name and shape: random numbers seeded by the name, sized by what the name says it is."""
    last = key.rsplit(".", 1)[-1]
    a = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if last == "running_var":
        a = 1 + 0.1 * abs(a)
    elif last == "running_mean":
        a = 0.1 * a
    elif len(shape) == 3 and shape[0] == 1:                                  # position tables, mask token
        a = 0.5 * a
    elif len(shape) == 4:                                                    # convolutions
        a = a * np.sqrt(2 / np.prod(shape[1:]))
    elif len(shape) >= 2:
        a = a / np.sqrt(np.prod(shape[1:]))
    elif last == "weight":                                                   # gains of norms
        a = 1 + 0.1 * a
    else:                                                                    # biases
        a = 0.1 * a
    return torch.tensor(scale * a, dtype=torch.float32)


def scale(key, shape, probe):
    gain = len(shape) == 1 and key.endswith(".weight")
    return 0.003 if probe == "all" or probe == "nogain" and not gain else 1.0


def official(name, probe=None, folder="tiny_layouts"):
    """The content of an official file of that layout, {official name: weight}; probe: see `fill`."""
    state = {}
    for key, shape in layout(name, folder).items():
        if key.endswith("bits_to_indices"):
            state[key] = 2 ** torch.arange(shape[0], dtype=torch.int32)
        elif key.endswith("codebook"):
            state[key] = (torch.arange(shape[0])[:, None] // 2 ** torch.arange(shape[1]) % 2 * 2 - 1).float()
        else:
            state[key] = weight(key, shape, scale(key, shape, probe))
    return state


def model(kind, name, probe=None):
    """The tiny official model of that layout, through the program's own recognition and renaming."""
    return backbone.build(kind, *backbone.from_official(official(name, probe), kind, name), name)


def fill(module, prefix="", probe=None):
    """Give `module` (in evaluation mode) the weights of its names; `prefix` is what precedes them in the whole model.

    probe "all" multiplies all weights by 0.003, "nogain" all but the gains of norms: activations become so small
    that the epsilon inside every norm shows.
    """
    for key, value in module.state_dict().items():
        if key.rsplit(".", 1)[-1] not in CONSTANTS:
            value.copy_(weight(prefix + key, tuple(value.shape), scale(key, value.shape, probe)))
    return module.eval()


def difference(found, expected):
    """The largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())
