"""Official files, loaded by nothing but their path: the architecture from keys and shapes, and one clear line for what does not fit."""
import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import backbone
import fid
import golden
import sample

MAR = dict(N=256, d_c=16, classes=1000, K=64, guidance="none")
F16 = dict(width=128, mult=[1, 1, 2, 2, 4], blocks=2)
FULL = {"mar_base": ("mixar", MAR | dict(D=768, depth=12, heads=12, head_depth=6, head_width=1024)),
        "mar_large": ("mixar", MAR | dict(D=1024, depth=16, heads=16, head_depth=8, head_width=1280)),
        "mar_huge": ("mixar", MAR | dict(D=1280, depth=20, heads=16, head_depth=12, head_width=1536)),
        "kl16": ("vae", F16 | dict(z=16, attn=False)), "vavae_f16d32": ("vae", F16 | dict(z=32, attn=True))}
for _bits in (10, 12, 14, 16, 18):
    FULL[f"maskbit_tokenizer_{_bits}bit"] = ("vq", F16 | dict(bits=_bits))
    FULL[f"maskbit_generator_{_bits}bit"] = ("prior", dict(N=256, bits=_bits, splits=2, classes=1000, D=1024, depth=24, heads=16, mlp=4096, prenorm=False, dropout=0.1))
TINY = {"mixar": "mar_tiny", "vae": "vavae_tiny", "vq": "maskbit_tokenizer_tiny", "prior": "maskbit_generator_tiny_postnorm"}


# the full sizes, without their memory

@pytest.mark.parametrize("name", FULL)
def test_a_full_size_file_gives_the_right_model_key_for_key(name):
    """Configuration as published; every parameter of the file has its place in the model and the other way round."""
    kind, expected = FULL[name]
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.layout(name, "layouts").items()}
    config, ours = backbone.from_official(state, kind, name)
    assert {key: config[key] for key in expected} == expected
    with torch.device("meta"):
        model = backbone.KINDS[kind](**config)
    assert golden.shapes(model) == {key: list(value.shape) for key, value in ours.items()} and len(ours) == len(state)


def test_the_presets_are_the_models_of_the_official_files():
    """base: VA-VAE, the 14-bit MaskBit models and MAR-B, of which only the channels differ."""
    for part, name in (("vae", "vavae_f16d32"), ("vq", "maskbit_tokenizer_14bit"), ("prior", "maskbit_generator_14bit"), ("mar", "mar_base")):
        state = {key: torch.empty(shape, device="meta") for key, shape in golden.layout(name, "layouts").items()}
        config, _ = backbone.from_official(state, FULL[name][0], name)
        preset = {key: list(value) if isinstance(value, tuple) else value for key, value in backbone.PRESETS["base"][part].items()}
        assert {key: config.get(key) for key in preset} == preset, part


@pytest.mark.parametrize("row, name, total", [("MAR-B", "mar_base", 207924768), ("MAR-L", "mar_large", 478326304), ("MAR-H", "mar_huge", 942403104)])
def test_mar_has_the_parameters_of_its_file(row, name, total):
    """The table of `python backbone.py` against the official layouts' totals."""
    assert sum(int(np.prod(shape)) for shape in golden.layout(name, "layouts").values()) == total
    assert sum(p.numel() for p in backbone.sized(row).parameters()) == total


@pytest.mark.parametrize("name", backbone.SIZES)
def test_the_table_agrees_with_the_paper(name):
    """Tables 1 and 2 of the paper in millions; DC-CA is within 0.2 %, MAR-L and MAR-H are rounded up there."""
    count, paper = sum(p.numel() for p in backbone.sized(name).parameters()) / 1e6, backbone.SIZES[name][4]
    assert abs(count - paper) < max(0.7, 0.002 * paper)


def test_floating_point_operations_of_a_forward_pass():
    """Two per multiply-add: encoder over 64 + 38 tokens, decoder over 320, of 12 D^2 weights a block, and the attention's two products."""
    D, depth = 768, 12
    linear = sum(2 * 12 * D * D * depth * L for L in (64 + 38, 64 + 256))
    attention = sum(2 * 2 * L * L * D * depth for L in (64 + 38, 64 + 256))
    ends = 2 * D * (16 * 256 + D * (64 + 38))                                # z_proj of all tokens, decoder_embed of the visible ones
    assert backbone.forward_flops(backbone.sized("MAR-B")) == linear + attention + ends


# tiny official files

def save(folder, content, name="file.pth"):
    torch.save(content, folder / name)
    return folder / name


def other(state):
    """The same parameters with other values."""
    return {key: value * 0.5 if value.is_floating_point() else value for key, value in state.items()}


@torch.no_grad()
def test_a_mar_file_gives_its_ema_or_with_raw_its_last_weights(tmp_path):
    """As the trainer writes it: two sets of weights, the optimiser and an argparse.Namespace."""
    g, state = golden.load("mar_tiny"), golden.official("mar_tiny")
    z = lambda model: model(g["tokens"], None, g["mask"].bool(), g["labels"], torch.zeros(3, dtype=torch.bool))
    args = argparse.Namespace(model="mar_base", lr=1e-4, resume=None, eval=False)
    path = save(tmp_path, dict(model=other(state), model_ema=state, optimizer={}, epoch=399, scaler={}, args=args))
    model, saved = backbone.load_model(path, "mixar")
    assert golden.difference(z(model), g["decoder_z"]) < 1e-5
    meta = sample.official_meta(saved["config"])
    assert meta["latent_std"] == [1 / 0.2325] * 8 and len(meta["classes"]) == 10
    raw, _ = backbone.load_model(path, "mixar", "raw")
    assert torch.equal(raw.mask_token, state["mask_token"] * 0.5)
    swapped = save(tmp_path, dict(model=state, model_ema=other(state)), "swapped.pth")
    assert golden.difference(z(backbone.load_model(swapped, "mixar", "raw")[0]), g["decoder_z"]) < 1e-5


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("name, recon", [("vavae_tiny", "recon"), ("kl_tiny", "kl_recon")])
@torch.no_grad()
def test_a_vae_file_gives_the_golden_pictures(tmp_path, name, recon, wrapper):
    """Bare or wrapped; what only the training of VA-VAE used is left out."""
    g, state = golden.load("vavae_tiny"), golden.official(name)
    state |= {"loss.discriminator.main.0.weight": torch.zeros(3), "foundation_model.model.norm.weight": torch.zeros(3), "linear_proj.weight": torch.zeros(7, 4, 1, 1)}
    vae, _ = backbone.load_model(save(tmp_path, {wrapper: state, "global_step": 7} if wrapper else state), "vae")
    assert golden.difference(vae.encode(g["image"])[0], g["mean"]) < 2e-5
    assert golden.difference(vae.decode(g["mean"]), g[recon]) < 2e-5


@torch.no_grad()
def test_a_maskbit_tokenizer_file_gives_the_golden_bits(tmp_path):
    g = golden.load("maskbit_tokenizer_tiny")
    vq, _ = backbone.load_model(save(tmp_path, golden.official("maskbit_tokenizer_tiny"), "tokenizer.bin"), "vq")
    assert golden.difference(vq.encode(g["image"]), g["z"]) < 1e-5
    assert golden.difference(vq.decode(g["bits"]), g["recon"]) < 1e-5


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("name", ["input_proj", "token_emb"])
@torch.no_grad()
def test_a_maskbit_generator_file_gives_the_golden_logits(tmp_path, norm, name):
    """Post-norm and pre-norm; the bit projection has two names."""
    g = golden.load("maskbit_generator_tiny")
    state = {key.replace("input_proj", name): value for key, value in golden.official(f"maskbit_generator_tiny_{norm}norm").items()}
    prior, _ = backbone.load_model(save(tmp_path, state), "prior")
    assert golden.difference(prior(g["input_bits"], g["labels"], g["drop_mask"]), g[f"logits_{norm}"]) < 1e-5


@torch.no_grad()
def test_half_precision_files_become_float32(tmp_path):
    vae, _ = backbone.load_model(save(tmp_path, {key: value.half() for key, value in golden.official("vavae_tiny").items()}), "vae")
    assert {p.dtype for p in vae.parameters()} == {torch.float32}


# one line for what does not fit

def refused(path, kind, *words):
    """Loading ends with one line that names the file and says all `words`."""
    with pytest.raises(SystemExit) as error:
        backbone.load_model(path, kind)
    line = str(error.value)
    assert line.startswith(str(path)) and "\n" not in line
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("kind", TINY)
def test_a_file_of_another_family_is_refused(tmp_path, kind):
    path = save(tmp_path, golden.official(TINY[kind]))
    for wanted in TINY:
        if wanted != kind:
            refused(path, wanted, f"expected a {wanted} checkpoint or an official {backbone.OFFICIAL[wanted][0]} file", f"found an official {backbone.OFFICIAL[kind][0]} file")
    refused(save(tmp_path, {"weight": torch.zeros(3), "bias": torch.zeros(3)}), kind, backbone.OFFICIAL[kind][0], "no model known here", "weight, bias")
    refused(save(tmp_path, [1, 2]), kind, f"expected a {kind} checkpoint", "list")
    refused(save(tmp_path, {}), kind, "no model known here")


@pytest.mark.parametrize("kind", TINY)
def test_any_missing_key_is_named(tmp_path, kind):
    """Also those that tell the architecture."""
    state = golden.official(TINY[kind])
    for key in state:
        path = save(tmp_path, {k: v for k, v in state.items() if k != key})
        with pytest.raises(SystemExit) as error:
            backbone.load_model(path, kind)
        assert str(error.value).startswith(str(path)) and "missing" in str(error.value), key


@pytest.mark.parametrize("kind", TINY)
def test_any_mis_shaped_key_is_refused(tmp_path, kind):
    """A scalar, or one row more: one line whatever the architecture then looks like. Only class_emb may have any number of rows."""
    state = golden.official(TINY[kind])
    for key, value in state.items():
        for wrong in [torch.zeros(())] + [torch.zeros(value.shape[0] + 1, *value.shape[1:])] * (key != "class_emb.weight"):
            refused(save(tmp_path, state | {key: wrong}), kind)


@pytest.mark.parametrize("kind, extra", [("mixar", "encoder_blocks.0.attn.qkv.lora"), ("vae", "encoder.extra"), ("vq", "loss.weight"), ("prior", "token_emb.weight")])
def test_an_unexpected_key_is_named(tmp_path, kind, extra):
    refused(save(tmp_path, golden.official(TINY[kind]) | {extra: torch.zeros(3)}), kind, extra.replace("token_emb", "input_proj"))


def test_one_parameter_under_two_names_is_refused(tmp_path):
    """The bit projection as token_emb and as input_proj: which one counts?"""
    state = golden.official(TINY["prior"])
    refused(save(tmp_path, state | {"token_emb.bias": state["input_proj.bias"]}), "prior", "input_proj.bias under two names")


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", TINY)
def test_hostile_and_truncated_files_are_refused_without_running_them(tmp_path, kind):
    """The one type allowed beside tensors is argparse.Namespace, and only with harmless content."""
    state, hostile = golden.official(TINY[kind]), Hostile(tmp_path / "it ran")
    for content in ({"model": hostile}, state | {"args": hostile}, {"model": state, "args": argparse.Namespace(x=hostile)}, {"model": state, "args": Path("x")}):
        refused(save(tmp_path, content), kind, "it would run code when loaded")
    assert not hostile.mark.exists()
    whole = save(tmp_path, state).read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "short.pth").write_bytes(whole[:length])
        refused(tmp_path / "short.pth", kind, "truncated")
    refused(tmp_path / "nowhere.pth", kind, "no such file")


# an official MAR draws pictures

def kl_file(folder, z):
    """A tiny KL-VAE file with z latent channels."""
    shapes, width = golden.layout("kl_tiny"), {4: z, 8: 2 * z}
    for key in ("encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight", "quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias"):
        shapes[key] = [width.get(n, n) for n in shapes[key]]
    return save(folder, {"model": {key: golden.weight(key, shape) for key, shape in shapes.items()}}, f"kl{z}.ckpt")


@pytest.fixture
def mar_file(tmp_path):
    return save(tmp_path, {"model_ema": golden.official("mar_tiny"), "args": argparse.Namespace()}, "mar_tiny.pth")


def test_sampling_an_official_mar_needs_its_vae_and_nothing_else(tmp_path, mar_file, capsys):
    """python sample.py mar_base.pth --vae kl16.ckpt: no prior is drawn."""
    few = ["--count", "3", "--ar-steps", "2", "--diffusion-steps", "3", "--amp", "fp32", "--classes", "7,2"]
    sample.main([str(mar_file), "--vae", str(kl_file(tmp_path, 8)), "--out", str(tmp_path / "s.npz"), *few])
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (3, 8, 8, 3)
    assert " 0% of it the prior" in capsys.readouterr().out
    sample.main([str(mar_file), "--vae", str(kl_file(tmp_path, 8)), "--out", str(tmp_path / "s.gif"), *few[2:]])
    for more, words in (([], "add --vae FILE"), (["--vae", kl_file(tmp_path, 4)], "8 channels, expected the 4"), (["--vae", mar_file], "found an official MAR file"),
                        (["--vae", kl_file(tmp_path, 8), "--decode", "discrete"], "need --vq FILE and --prior FILE")):
        with pytest.raises(SystemExit, match=words):
            sample.main([str(mar_file), *map(str, more), "--out", str(tmp_path / "x.npz"), *few])


def test_an_official_mar_is_scored_without_a_run(tmp_path, mar_file):
    """python fid.py mar_base.pth REFERENCE --vae kl16.ckpt: the pictures that sample.py draws, class i mod K."""
    few = ["--vae", str(kl_file(tmp_path, 8)), "--count", "20", "--ar-steps", "2", "--diffusion-steps", "3", "--amp", "fp32"]
    sample.main([str(mar_file), "--out", str(tmp_path / "s.npz"), *few])
    classifier = fid.Classifier(10, 8)
    torch.save(dict(kind="classifier", config=dict(classes=10, size=8), model=classifier.state_dict(), meta=dict(data="none")), tmp_path / "features.pt")
    fid.main([str(mar_file), str(tmp_path / "s.npz"), *few, "--features", str(tmp_path / "features.pt"), "--force", "--json", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())["results"][0]["frechet_distance"] < 1e-8


@torch.no_grad()
def test_latents_of_an_official_mar_are_divided_by_its_scale(tmp_path, mar_file):
    """MAR multiplies KL-16's latents by 0.2325; before decoding they are divided by it."""
    system = sample.System(mar_file, vae=kl_file(tmp_path, 8))
    x_c = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    expected = sample.to_bytes(system.vae.decode(x_c.transpose(1, 2).unflatten(2, (4, 4)) / 0.2325))
    assert (system.decode_continuous(x_c).int() - expected.int()).abs().max() <= 1
