"""Tests of official files, which are loaded by nothing but their path.

The program finds the architecture from keys and shapes. A file that does not fit gives one line.
"""
import argparse
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import backbone
import disk
import golden
import output
import sample

# The configurations of the published models, by the names of their layouts: (kind, configuration).
MAR = dict(N=256, d_c=16, classes=1000, K=64, guidance="none")
F16 = dict(width=128, mult=[1, 1, 2, 2, 4], blocks=2)
MASKBIT = dict(
    N=256, splits=2, classes=1000, D=1024, depth=24, heads=16, mlp=4096, prenorm=False, dropout=0.1,
)
FULL = {
    "mar_base": (
        "mixar",
        MAR | dict(D=768, depth=12, heads=12, head_depth=6, head_width=1024),
    ),
    "mar_large": (
        "mixar",
        MAR | dict(D=1024, depth=16, heads=16, head_depth=8, head_width=1280),
    ),
    "mar_huge": (
        "mixar",
        MAR | dict(D=1280, depth=20, heads=16, head_depth=12, head_width=1536),
    ),
    "kl16": ("vae", F16 | dict(z=16, up_attention=False)),
    "vavae_f16d32": ("vae", F16 | dict(z=32, up_attention=True)),
}
for _bits in (10, 12, 14, 16, 18):
    FULL[f"maskbit_tokenizer_{_bits}bit"] = ("vq", F16 | dict(bits=_bits))
    FULL[f"maskbit_generator_{_bits}bit"] = ("prior", MASKBIT | dict(bits=_bits))

# a tiny official file of each kind
TINY = {
    "mixar": "mar_tiny",
    "vae": "vavae_tiny",
    "vq": "maskbit_tokenizer_tiny",
    "prior": "maskbit_generator_tiny_postnorm",
}


# the full sizes, without their memory

def full_size(name):
    """The content of a full-size official file, on the meta device, which takes no memory."""
    state = {}
    for key, shape in golden.layout(name, "layouts").items():
        state[key] = torch.empty(shape, device="meta")
    return state


def read_without_building(kind, state):
    """The class, its configuration and the weights that from_official makes of an official file."""
    with mock.patch.object(disk, "build", lambda *found: found):
        return backbone.KINDS[kind].from_official(state)


@pytest.mark.parametrize("name", FULL)
def test_a_full_size_file_gives_the_right_model_key_for_key(name):
    """The file gives the published configuration.

    Every parameter of the file has its place in the model, and the other way round.
    """
    kind, expected = FULL[name]
    state = full_size(name)
    cls, config, ours = read_without_building(kind, state)
    assert {key: config[key] for key in expected} == expected
    with torch.device("meta"):
        model = cls(**config)
    assert golden.shapes(model) == {key: list(value.shape) for key, value in ours.items()}
    assert len(ours) == len(state)


@pytest.mark.parametrize("part, name", [
    ("vae", "vavae_f16d32"),
    ("vq", "maskbit_tokenizer_14bit"),
    ("prior", "maskbit_generator_14bit"),
    ("mar", "mar_base"),
])
def test_the_presets_are_the_models_of_the_official_files(part, name):
    """The preset base is VA-VAE, the 14-bit MaskBit models and MAR-B.

    Of MAR-B only the number of channels differs.
    """
    kind, _ = FULL[name]
    _, config, _ = read_without_building(kind, full_size(name))
    for key, value in backbone.PRESETS["base"][part].items():
        expected = list(value) if isinstance(value, tuple) else value
        assert config.get(key) == expected, key


@pytest.mark.parametrize("row, name, total", [
    ("MAR-B", "mar_base", 207924768),
    ("MAR-L", "mar_large", 478326304),
    ("MAR-H", "mar_huge", 942403104),
])
def test_mar_has_the_parameters_of_its_file(row, name, total):
    """A row of the table of `python backbone.py` has as many parameters as the official layout."""
    shapes = golden.layout(name, "layouts").values()
    assert sum(int(np.prod(shape)) for shape in shapes) == total
    assert sum(p.numel() for p in backbone.sized(row).parameters()) == total


@pytest.mark.parametrize("name", backbone.SIZES)
def test_the_table_agrees_with_the_paper(name):
    """The table's numbers are those of Tables 1 and 2 of the paper, in millions.

    DC-CA is within 0.2 %. The paper rounds MAR-L and MAR-H up.
    """
    count = sum(p.numel() for p in backbone.sized(name).parameters()) / 1e6
    paper = backbone.SIZES[name][4]
    assert abs(count - paper) < max(0.7, 0.002 * paper)


# tiny official files

def save(folder, content, name="file.pth"):
    """The path of a new file with this content."""
    torch.save(content, folder / name)
    return folder / name


def halved(state):
    """The same parameters with other values: half of each."""
    other = {}
    for key, value in state.items():
        other[key] = value * 0.5 if value.is_floating_point() else value
    return other


def assert_gives_reference_z(model):
    """The model's z are those of the tiny official MAR."""
    g = golden.load("mar_tiny")
    with_class = torch.zeros(3, dtype=torch.bool)
    z = model(g["tokens"], None, g["mask"].bool(), g["labels"], with_class)
    assert golden.difference(z, g["decoder_z"]) < 1e-5


@torch.no_grad()
def test_a_mar_file_gives_its_moving_average(tmp_path):
    """MAR's trainer writes two sets of weights, the optimizer and an argparse.Namespace."""
    state = golden.official("mar_tiny")
    args = argparse.Namespace(model="mar_base", lr=1e-4, resume=None, eval=False)
    beside = dict(optimizer={}, epoch=399, scaler={}, args=args)
    path = save(tmp_path, dict(model=halved(state), model_ema=state, **beside))
    model, _ = backbone.load_model(path, "mixar")
    assert_gives_reference_z(model)
    meta = sample.describe_official(model)
    assert meta["latent_std"] == [1 / 0.2325] * 8
    assert len(meta["classes"]) == 10


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("name, recon", [("vavae_tiny", "recon"), ("kl_tiny", "kl_recon")])
@torch.no_grad()
def test_a_vae_file_gives_the_golden_pictures(tmp_path, name, recon, wrapper):
    """The weights may be wrapped in another dict. What only VA-VAE's training used is left out."""
    state = golden.official(name) | {
        "loss.discriminator.main.0.weight": torch.zeros(3),
        "foundation_model.model.norm.weight": torch.zeros(3),
        "linear_proj.weight": torch.zeros(7, 4, 1, 1),
    }
    content = {wrapper: state, "global_step": 7} if wrapper else state
    vae, _ = backbone.load_model(save(tmp_path, content), "vae")
    g = golden.load("vavae_tiny")
    assert golden.difference(vae.encode(g["image"])[0], g["mean"]) < 2e-5
    assert golden.difference(vae.decode(g["mean"]), g[recon]) < 2e-5


@torch.no_grad()
def test_a_maskbit_tokenizer_file_gives_the_golden_bits(tmp_path):
    """z and the reconstruction equal MaskBit's."""
    path = save(tmp_path, golden.official("maskbit_tokenizer_tiny"), "tokenizer.bin")
    vq, _ = backbone.load_model(path, "vq")
    g = golden.load("maskbit_tokenizer_tiny")
    assert golden.difference(vq.encode(g["image"]), g["z"]) < 1e-5
    assert golden.difference(vq.decode(g["bits"]), g["recon"]) < 1e-5


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("name", ["input_proj", "token_emb"])
@torch.no_grad()
def test_a_maskbit_generator_file_gives_the_golden_logits(tmp_path, norm, name):
    """Files are post-norm or pre-norm. The bit projection has one of two names."""
    state = {}
    for key, value in golden.official(f"maskbit_generator_tiny_{norm}norm").items():
        state[key.replace("input_proj", name)] = value
    prior, _ = backbone.load_model(save(tmp_path, state), "prior")
    g = golden.load("maskbit_generator_tiny")
    logits = prior(g["input_bits"], g["labels"], g["drop_mask"])
    assert golden.difference(logits, g[f"logits_{norm}"]) < 1e-5


@torch.no_grad()
def test_half_precision_files_become_float32(tmp_path):
    """A model is computed in float32, whatever precision its file has."""
    state = {key: value.half() for key, value in golden.official("vavae_tiny").items()}
    vae, _ = backbone.load_model(save(tmp_path, state), "vae")
    assert {p.dtype for p in vae.parameters()} == {torch.float32}


# one line for what does not fit

def refused(path, kind, *words):
    """Loading ends with one line that names the file and contains all `words`."""
    with pytest.raises(SystemExit) as error:
        backbone.load_model(path, kind)
    line = str(error.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("kind", TINY)
def test_a_file_of_another_family_is_refused(tmp_path, kind):
    """The line says which kind of file was expected, and why this is none."""
    path = save(tmp_path, golden.official(TINY[kind]))
    for wanted in TINY:
        if wanted != kind:
            refused(path, wanted, f"not a {wanted} checkpoint")

    foreign = save(tmp_path, {"weight": torch.zeros(3), "bias": torch.zeros(3)})
    refused(foreign, kind, f"not a {kind} checkpoint", "missing")
    refused(save(tmp_path, [1, 2]), kind, f"not a {kind} checkpoint", "list")
    refused(save(tmp_path, {}), kind, f"not a {kind} checkpoint", "missing")


@pytest.mark.parametrize("kind", TINY)
def test_any_missing_key_is_named(tmp_path, kind):
    """The line says "missing", also for the keys that tell the architecture."""
    state = golden.official(TINY[kind])
    # a fifth of them; a block has eight keys or more, so each of its kinds comes in some block
    for missing in list(state)[::5]:
        rest = {key: value for key, value in state.items() if key != missing}
        path = save(tmp_path, rest)
        with pytest.raises(SystemExit) as error:
            backbone.load_model(path, kind)
        line = str(error.value)
        assert line.startswith(str(path)), missing
        assert "missing" in line.lower(), missing


@pytest.mark.parametrize("kind", TINY)
def test_any_mis_shaped_key_is_refused(tmp_path, kind):
    """A parameter that is a scalar, or that has one row more, gives one line.

    It does so whatever the architecture then looks like. Only class_emb may have any number of
    rows.
    """
    state = golden.official(TINY[kind])
    # a fifth of them
    for key, value in list(state.items())[::5]:
        refused(save(tmp_path, state | {key: torch.zeros(())}), kind)
        if key != "class_emb.weight":
            one_row_more = torch.zeros(value.shape[0] + 1, *value.shape[1:])
            refused(save(tmp_path, state | {key: one_row_more}), kind)


@pytest.mark.parametrize("kind, extra, named", [
    ("mixar", "encoder_blocks.0.attn.qkv.lora", "encoder_blocks.0.attn.qkv.lora"),
    ("vae", "encoder.extra", "encoder.extra"),
    ("vq", "loss.weight", "loss.weight"),
    ("prior", "token_emb.weight", "token_emb.weight"),
])
def test_an_unexpected_key_is_named(tmp_path, kind, extra, named):
    """A key that has no place in the model is named."""
    state = golden.official(TINY[kind]) | {extra: torch.zeros(3)}
    refused(save(tmp_path, state), kind, named)


class Hostile:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", TINY)
def test_hostile_and_truncated_files_are_refused_without_running_them(tmp_path, kind):
    """The one type allowed beside tensors is argparse.Namespace, with harmless content only."""
    state = golden.official(TINY[kind])
    hostile = Hostile(tmp_path / "it ran")
    contents = [
        {"model": hostile},
        state | {"args": hostile},
        {"model": state, "args": argparse.Namespace(x=hostile)},
        {"model": state, "args": Path("x")},
    ]
    for content in contents:
        refused(save(tmp_path, content), kind, "could run code when loaded")
    assert not hostile.mark.exists()

    whole = save(tmp_path, state).read_bytes()
    short = tmp_path / "short.pth"
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        short.write_bytes(whole[:length])
        refused(short, kind, f"not a {kind} checkpoint")
    refused(tmp_path / "nowhere.pth", kind, "no such file")


# an official MAR makes pictures

def kl_file(folder, z):
    """The path, as text, of a new tiny KL-VAE file with z latent channels."""
    new_size = {4: z, 8: 2 * z}
    shapes = golden.layout("kl_tiny")
    of_latents = (
        "encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight",
        "quant_conv.weight", "quant_conv.bias",
        "post_quant_conv.weight", "post_quant_conv.bias",
    )
    for key in of_latents:
        shapes[key] = [new_size.get(n, n) for n in shapes[key]]
    state = {key: golden.weight(key, shape) for key, shape in shapes.items()}
    return str(save(folder, {"model": state}, f"kl{z}.ckpt"))


@pytest.fixture
def mar_file(tmp_path):
    """The path, as text, of a tiny official MAR file."""
    content = {"model_ema": golden.official("mar_tiny"), "args": argparse.Namespace()}
    return str(save(tmp_path, content, "mar_tiny.pth"))


FEW_STEPS = ["--ar-steps", "2", "--diffusion-steps", "3", "--amp", "fp32"]


def test_sampling_an_official_mar_needs_its_vae_and_nothing_else(tmp_path, mar_file, capsys):
    """python sample.py mar_base.pth --vae kl16.ckpt makes pictures. No prior is used."""
    vae = kl_file(tmp_path, 8)
    three = ["--count", "3", *FEW_STEPS, "--classes", "7,2"]
    npz = tmp_path / "s.npz"
    sample.main([mar_file, "--vae", vae, "--out", str(npz), *three])
    assert np.load(npz)["arr_0"].shape == (3, 8, 8, 3)
    assert " 0% of it the prior" in capsys.readouterr().out

    wrong = [
        ([], "add --vae FILE"),
        (["--vae", kl_file(tmp_path, 4)], "has 8 channels; what it is used with has 4"),
        (["--vae", mar_file], "not a vae checkpoint"),
        (["--vae", vae, "--decode", "discrete"], "has no discrete tokens"),
    ]
    for options, line in wrong:
        with pytest.raises(SystemExit, match=line):
            sample.main([mar_file, *options, "--out", str(tmp_path / "x.npz"), *three])


@torch.no_grad()
def test_latents_of_an_official_mar_are_divided_by_its_scale(tmp_path, mar_file):
    """MAR multiplies KL-16's latents by 0.2325. Before decoding, they are divided by it."""
    system = sample.System(mar_file, vae=kl_file(tmp_path, 8))
    x_c = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    latents = x_c.transpose(1, 2).unflatten(2, (4, 4)) / 0.2325
    expected = output.to_bytes(system.vae.decode(latents))
    found = system.decode_continuous(x_c)
    assert (found.int() - expected.int()).abs().max() <= 1
