"""Eq. (7), section 3.3: both tokenizers, the centre crop and the bytes against official numbers."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dataset
import disk
import golden
import output
import tokenizers
from backbone import PRESETS

# Eq. (7) on literals


def test_eq07_x_c_is_a_sample_of_the_posterior():
    """Eq. (7): x_c is the mean plus the deviation times noise.

    The encoder puts out the LOGARITHM of the VARIANCE: log 4 is a deviation of 2.
    """
    mean = torch.tensor([1.0, 1.0])
    std = torch.tensor([2.0, 1.0])
    found = tokenizers.reparameterize(mean, std, torch.tensor([0.5, -3.0]))
    torch.testing.assert_close(found, torch.tensor([2.0, -2.0]))


def test_eq07_the_vae_puts_out_the_mean_first():
    """Eq. (7): the first d_c of the 2 d_c channels are the mean, the others the log variance.

    The log variance is kept in [-30, 20].
    """
    vae = tokenizers.KLVAE(width=8, mult=(1,), blocks=1, z=2, groups=1)
    nn.init.zeros_(vae.quant_conv.weight)
    vae.quant_conv.bias.data = torch.tensor([1.0, 2.0, -50.0, 50.0])
    mean, logvar = vae.encode(torch.zeros(1, 3, 4, 4))
    assert mean[0, :, 0, 0].tolist() == [1, 2]
    assert logvar[0, :, 0, 0].tolist() == [-30, 20]


def test_eq07_x_d_is_the_sign_of_every_channel():
    """Eq. (7): bits are -1 and +1, whatever the size of z; zero gives -1."""
    z = torch.tensor([-5.0, -0.1, 0.0, 0.1, 5.0])
    assert tokenizers.quantise(z).tolist() == [-1, -1, -1, 1, 1]


def test_eq07_the_first_bit_counts_least():
    """Eq. (7): the index of a token in a codebook of 2^d_d entries, which the cache keeps."""
    bits = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [1, 1, 1]])
    assert tokenizers.bits_to_codes(bits).tolist() == [1, 4, 7]


def test_eq07_kl_is_zero_for_a_standard_normal_posterior():
    """What the VAE is trained with, summed over a picture.

    KL = (mean^2 + variance - 1 - log variance) / 2
    """
    mean = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    logvar = torch.zeros(2, 3, 1, 1)
    assert tokenizers.kl_to_normal(mean, logvar).tolist() == [0, 6]
    logvar = torch.full((1, 1, 1, 1), 4.0).log()
    kl = tokenizers.kl_to_normal(torch.zeros(1, 1, 1, 1), logvar)
    assert kl.item() == pytest.approx(1.5 - math.log(2))


# x_c = VAE(I): VA-VAE, KL-16


def test_eq07_convolutions_are_fp32_on_every_gpu():
    """TF32 would round away bits of x_d."""
    assert not torch.backends.cudnn.allow_tf32


def tiny_vae(attn=True, probe=None):
    name = "vavae_tiny" if attn else "kl_tiny"
    return tokenizers.KLVAE.from_official(golden.official(name, probe))


@torch.no_grad()
def test_eq07_golden_vae_encoder():
    """Posterior mean and log variance, of a square picture and of one of another size.

    No log variance needs clamping here.
    """
    va = golden.load("vavae_tiny")
    vae = tiny_vae()
    assert golden.difference(vae.encoder(va["image"]), va["encoder_out"]) < 2e-5
    mean, logvar = vae.encode(va["image"])
    assert golden.difference(mean, va["mean"]) < 2e-5
    assert golden.difference(logvar, va["logvar"]) < 2e-5
    assert golden.difference((0.5 * logvar).exp(), va["std"]) < 2e-5
    moments = torch.cat(vae.encode(va["image_16x24"]), dim=1)
    assert golden.difference(moments, va["moments_16x24"]) < 2e-5


@torch.no_grad()
def test_eq07_golden_vae_decoder():
    """Pictures from the posterior mean, with attention (VA-VAE) and without (KL-16)."""
    va = golden.load("vavae_tiny")
    assert golden.difference(tiny_vae().decode(va["mean"]), va["recon"]) < 2e-5
    other_size = tiny_vae().decode(va["moments_16x24"][:, :4])
    assert golden.difference(other_size, va["recon_16x24"]) < 2e-5
    assert golden.difference(tiny_vae(attn=False).decode(va["mean"]), va["kl_recon"]) < 2e-5


@pytest.mark.parametrize("probe", ["all", "nogain"])
@torch.no_grad()
def test_eq07_golden_vae_norms(probe):
    """Weights so small that a wrong epsilon in any norm shows."""
    va = golden.load("vavae_tiny")
    g = golden.load("eps_probe_vae")
    vae = tiny_vae(True, probe)
    moments = torch.cat(vae.encode(va["image"]), dim=1)
    assert golden.difference(moments, g[f"moments_{probe}"]) < 2e-5
    assert golden.difference(vae.decode(va["mean"]), g[f"recon_{probe}"]) < 2e-5
    recon = tiny_vae(False, probe).decode(va["mean"])
    assert golden.difference(recon, g[f"kl_recon_{probe}"]) < 2e-5


def test_eq07_golden_posterior():
    """A sample of the posterior with given noise, and its KL to the standard normal per picture."""
    va = golden.load("vavae_tiny")
    x_c = tokenizers.reparameterize(va["mean"], (0.5 * va["logvar"]).exp(), va["eps"])
    assert golden.difference(x_c, va["sample"]) < 2e-5
    kl = tokenizers.kl_to_normal(va["mean"], va["logvar"])
    assert golden.difference(kl, va["kl"]) < 2e-5


@torch.no_grad()
def test_eq07_golden_log_variance_is_clamped():
    """Log variances of -50 and 50 become -30 and 20, so that no deviation is 0 or infinite."""
    va = golden.load("vavae_tiny")
    vae = tiny_vae()
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias[4:] = torch.tensor([-50.0, 50.0, 0.0, 0.0])
    logvar = vae.encode(va["image"])[1]
    assert logvar[0, :2, 0, 0].tolist() == va["clamp_logvar"].tolist() == [-30, 20]


# x_d = VQVAE(I): MaskBit


def tiny_vq(probe=None):
    return tokenizers.BitVQ.from_official(golden.official("maskbit_tokenizer_tiny", probe))


@torch.no_grad()
def test_eq07_golden_vq_encoder():
    """z of an even and of an odd-sized picture, which is padded on other sides.

    Also the signs of z and their indices, channel 0 least significant.
    """
    bit = golden.load("maskbit_tokenizer_tiny")
    vq = tiny_vq()
    z = vq.encode(bit["image"])
    assert golden.difference(z, bit["z"]) < 1e-5
    assert golden.difference(vq.encode(bit["odd_image"]), bit["odd_z"]) < 1e-5
    x_d = tokenizers.quantise(z)
    assert torch.equal(x_d, bit["bits"])
    assert torch.equal(tokenizers.bits_to_codes(x_d.movedim(1, -1)), bit["indices"])


def test_eq07_golden_vq_zero_is_a_minus():
    """z exactly 0 gives the bit -1."""
    bit = golden.load("maskbit_tokenizer_tiny")
    x_d = tokenizers.quantise(torch.zeros(1, 6))
    assert x_d[0].tolist() == bit["zero_bits"].tolist()
    assert tokenizers.bits_to_codes(x_d).tolist() == bit["zero_index"].tolist()


@torch.no_grad()
def test_eq07_golden_vq_decoder():
    """Pictures from the bits, and from the indices through the bits."""
    bit = golden.load("maskbit_tokenizer_tiny")
    vq = tiny_vq()
    assert golden.difference(vq.decode(bit["bits"]), bit["recon"]) < 1e-5
    x_d = tokenizers.codes_to_bits(bit["indices"][..., None], 6).movedim(-1, 1)
    assert golden.difference(vq.decode(x_d), bit["recon_from_indices"]) < 1e-5


@pytest.mark.parametrize("probe", ["all", "nogain"])
@torch.no_grad()
def test_eq07_golden_vq_norms(probe):
    """Weights so small that a wrong epsilon in any norm shows."""
    bit = golden.load("maskbit_tokenizer_tiny")
    g = golden.load("eps_probe_maskbit")
    vq = tiny_vq(probe)
    assert golden.difference(vq.encode(bit["image"]), g[f"z_{probe}"]) < 1e-5
    assert golden.difference(vq.decode(bit["bits"]), g[f"decoded_{probe}"]) < 1e-5


@pytest.mark.parametrize("name", ["z", "zsmall", "given"])
def test_eq07_golden_quantiser_losses(name):
    """Commitment, the two entropies and the gradient of their sum, for large and for small z."""
    bit = golden.load("maskbit_tokenizer_tiny")
    z = bit[f"train_{name}_input"].clone().requires_grad_()
    losses = tokenizers.quantiser_losses(z, tiny_vq().quantize.codebook)
    commitment, per_token, average = losses
    entropy = 0.02 * (per_token - average)
    total = commitment + entropy
    total.backward()
    found = {
        "commitment_loss": commitment,
        "per_sample_entropy": per_token,
        "avg_entropy": average,
        "entropy_loss": entropy,
        "quantizer_loss": total,
    }
    for what, value in found.items():
        assert golden.difference(value, bit[f"train_{name}_{what}"]) < 1e-4, what
    assert golden.difference(z.grad, bit[f"train_{name}_grad_quantizer_loss"]) < 1e-3


def test_eq07_quantiser_losses_are_fp32_under_autocast():
    """Autocast changes nothing: a division by 0.01 would magnify the rounding of bf16."""
    bit = golden.load("maskbit_tokenizer_tiny")
    z = bit["train_zsmall_input"]
    codebook = tiny_vq().quantize.codebook
    with torch.autocast("cpu", torch.bfloat16):
        found = tokenizers.quantiser_losses(z, codebook)
    assert found == tokenizers.quantiser_losses(z, codebook)


def test_eq07_golden_commitment_loss():
    """In evaluation only the commitment loss counts."""
    bit = golden.load("maskbit_tokenizer_tiny")
    commitment, _, _ = tokenizers.quantiser_losses(bit["z"], tiny_vq().quantize.codebook)
    assert golden.difference(commitment, bit["eval_commitment_loss"]) < 1e-4


def test_groups_of_the_norms_can_be_set():
    """Small tokenizers use fewer groups than the official 32, in every norm."""
    config = dict(width=32, mult=(1, 2), blocks=1, groups=4)
    for model in (tokenizers.KLVAE(z=4, **config), tokenizers.BitVQ(bits=4, **config)):
        norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
        assert {module.num_groups for module in norms} == {4}


# official weights


def test_official_files_need_no_weights_of_training_alone():
    """A VA-VAE file also holds its discriminator and more, under loss., foundation_model., ..."""
    state = golden.official("vavae_tiny")
    state["loss.discriminator.weight"] = torch.zeros(3)
    state["foundation_model.model.cls_token"] = torch.zeros(3)
    state["linear_proj.weight"] = torch.zeros(3)
    vae = tokenizers.KLVAE.from_official(state)
    assert disk.fingerprint(vae) == disk.fingerprint(tiny_vae())


@pytest.mark.parametrize("cls, name", [
    (tokenizers.KLVAE, "vavae_tiny"),
    (tokenizers.KLVAE, "kl_tiny"),
    (tokenizers.BitVQ, "maskbit_tokenizer_tiny"),
])
def test_official_weights_are_all_there_and_for_inference(cls, name):
    """Every official weight has its place, a missing or an unknown one is named."""
    state = golden.official(name)
    model = cls.from_official(state)
    assert not model.training
    assert len(model.state_dict()) == len(state)
    with pytest.raises(RuntimeError, match="encoder.other"):
        cls.from_official(state | {"encoder.other": torch.zeros(1)})
    del state["decoder.norm_out.weight"]
    with pytest.raises(RuntimeError, match="decoder.norm_out.weight"):
        cls.from_official(state)


# pictures and bytes


def synthetic(width, height):
    x = np.arange(width)[None, :]
    y = np.arange(height)[:, None]
    red = (3 * x + 5 * y) % 256
    green = x * y // 7 % 256
    blue = (x // 9 + y // 11) % 2 * 180 + (x + 2 * y) % 60
    return np.stack(np.broadcast_arrays(red, green, blue), axis=2).astype(np.uint8)


@pytest.mark.parametrize("width, height, size", [
    (301, 187, 32),
    (301, 187, 64),
    (64, 333, 32),
    (64, 333, 64),
    (150, 99, 32),
    (257, 256, 64),
    (40, 50, 64),
])
def test_golden_center_crop(width, height, size):
    """ADM's centre crop of larger and smaller pictures.

    Another version of Pillow may round a byte differently.
    """
    g = golden.load("data")
    image = synthetic(width, height)
    assert np.array_equal(image[:4, :4], g[f"synth_{width}x{height}_corner"].numpy())
    expected = g[f"adm_{width}x{height}_to{size}"].numpy()
    found = np.asarray(dataset.center_crop(Image.fromarray(image), size)).astype(int)
    assert abs(found - expected).max() <= 1


def test_golden_bytes():
    """Pictures in [-1, 1] become bytes as in MAR: clipped, then rounded half to even.

    VA-VAE's code rounds half up. MaskBit's pictures in [0, 1] are truncated.
    """
    g = golden.load("data")
    found = output.to_bytes(g["to_uint8_in_pm1"])
    assert found.tolist() == g["to_uint8_mar"].tolist()
    # The only values that VA-VAE's code rounds otherwise.
    ties = (g["to_uint8_in_pm1"] + 1) * 127.5 % 1 == 0.5
    assert found[~ties].tolist() == g["to_uint8_vavae"][~ties].tolist()
    assert output.truncate(g["to_uint8_in_01"]).tolist() == g["to_uint8_maskbit"].tolist()


def test_a_new_vae_starts_with_little_posterior_noise():
    """Log variance about -5, mean about 0: the decoder sees the mean from the first step on."""
    torch.manual_seed(0)
    vae = tokenizers.KLVAE(**PRESETS["tiny"]["vae"])
    mean, logvar = vae.encode(torch.rand(4, 3, 32, 32) * 2 - 1)
    assert logvar.mean().item() == pytest.approx(-5, abs=0.5)
    assert mean.mean().item() == pytest.approx(0, abs=0.5)
