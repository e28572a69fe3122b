"""Eq. (7), section 3.3: x_c = VAE(I) and x_d = VQVAE(I), the two tokenizers.

`KLVAE` is the continuous tokenizer (VA-VAE, KL-16), `BitVQ` the discrete one (MaskBit), whose
tokens are bits. Both load the official files.

B batch, h x w token grid, N = h w tokens, d_c channels of x_c, d_d bits of x_d.
Reads disk.py, which loads weights. Feeds all files that see pictures or bits. Read mixing.py next.
Try: python train.py --stage vae     (then look at runs/shapes/vae/reconstructions.png)
In programs run from this folder, this module hides the Hugging Face package of the same name.
"""
from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

import disk

# On a GPU, convolutions in float32 do not use TF32: its rounding would change some bits of x_d, and
# the features of fid.py. In training, autocast still runs convolutions in bf16.
torch.backends.cudnn.allow_tf32 = False


def reparameterize(mean, std, noise):
    """Eq. (7): x_c, a sample of the VAE's posterior. noise is standard normal; all of one shape."""
    return mean + std * noise


def kl_to_normal(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over each image.   (B, d_c, h, w) -> (B,)"""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


def bits_to_codes(bits):
    """int64 codes of bits in {-1, +1}, least significant first.   (..., e) -> (...)   [MaskBit]"""
    powers = torch.arange(bits.shape[-1], device=bits.device)
    return ((bits > 0).long() << powers).sum(-1)


def codes_to_bits(codes, e):
    """The e bits of each code as -1/+1, least significant first; the mask code 2^e gives zeros.

    (..., S) int -> (..., S e) float   [MaskBit]
    """
    powers = torch.arange(e, device=codes.device)
    codes = codes[..., None]
    bits = ((codes >> powers) & 1).float() * 2 - 1                   # (..., S, e)
    return torch.where(codes == 2 ** e, 0.0, bits).flatten(-2)


def quantise(z):
    """The sign of every channel, -1 where z is zero; any shape, no gradient.   [MaskBit]"""
    return torch.where(z > 0, 1.0, -1.0)


def entropy(p):
    """The entropy in nats of the distributions along the last axis.   (..., codes) -> (...)"""
    return -(p * p.clamp(min=1e-5).log()).sum(-1)                    # [MaskBit]


def quantiser_losses(z, codebook, mean_over_ranks=lambda q: q):
    """Three terms of `stages.vq_loss`, which weighs the two entropies.   [MaskBit]

    Every token has a distribution p over the codes. Returns the commitment loss times 0.25, the
    mean over tokens of the entropy of p, and the entropy of the mean of p.

    z: (B, d_d, h, w), the encoder's output
    codebook: (2^d_d, d_d), every code as bits
    mean_over_ranks: takes the mean of a tensor over the processes, see train.mean_over_ranks
    """
    z = z.float()
    commitment = 0.25 * (quantise(z) - z).square().mean()
    with torch.autocast(z.device.type, enabled=False):
        # The negative squared distance to each code, up to a constant, at temperature 0.01. The
        # division by 0.01 would magnify the rounding of bf16.
        rows = z.movedim(1, -1).flatten(0, -2)                       # (B h w, d_d)
        logits = (2 * rows @ codebook.T) / 0.01                      # (B h w, 2^d_d)
    p = logits.softmax(-1)
    mean_p = mean_over_ranks(p.mean(0))                              # (2^d_d,)
    return commitment, entropy(p).mean(), entropy(mean_p)


norm = partial(nn.GroupNorm, eps=1e-6)
conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut.

    Where the width changes, the shortcut is W x. MaskBit's weights expect another one, W u: the
    block returns u + W u, where u is the output of the two convolutions.
    """

    def __init__(self, c_in, c, groups, maskbit):
        super().__init__()
        self.norm1 = norm(groups, c_in)
        self.conv1 = conv3(c_in, c, bias=not maskbit)
        self.norm2 = norm(groups, c)
        self.conv2 = conv3(c, c, bias=not maskbit)
        self.projects_output = maskbit and c_in != c
        self.nin_shortcut = nn.Identity()
        if c_in != c:
            self.nin_shortcut = nn.Conv2d(c if maskbit else c_in, c, 1, bias=not maskbit)

    def forward(self, x):
        u = self.conv1(silu(self.norm1(x)))
        u = self.conv2(silu(self.norm2(u)))
        return u + self.nin_shortcut(u if self.projects_output else x)


class AttnBlock(nn.Module):
    """Self-attention over the pixels, with one head, beside a shortcut."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(groups, c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        u = self.norm(x)
        # One head: each is (B, 1, h w, c).
        q, k, v = (f(u).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        u = scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(u.unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """Residual blocks, the first n_attn of them with attention, then a resize by `scale`."""

    def __init__(self, c_in, c, blocks, groups, maskbit, n_attn=0, scale=1):
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(c_in if i == 0 else c, c, groups, maskbit) for i in range(blocks))
        self.attn = nn.ModuleList(
            AttnBlock(c, groups) if i < n_attn else nn.Identity() for i in range(blocks))
        self.maskbit = maskbit
        self.scale = scale
        self.resize = nn.Identity()
        if scale == 0.5:
            self.resize = nn.Conv2d(c, c, 3, stride=2)
        elif scale == 2:
            self.resize = conv3(c, c)

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        if self.scale == 0.5:
            # TensorFlow's padding SAME: an even side gets zeros at its end, an odd one at both
            # ends. No preset has odd sides.   [MaskBit]
            top, left = (side % 2 if self.maskbit else 0 for side in x.shape[2:])
            x = pad(x, (left, 1, top, 1))
        elif self.scale == 2:
            x = interpolate(x, scale_factor=2.0, mode="nearest")
        return self.resize(x)


def levels(widths, blocks, groups, maskbit, scale, attn_at):
    """One Level for each width. All but the last resize; the one at index attn_at has attention.
    """
    made = nn.Sequential()
    for i, c in enumerate(widths):
        n_attn = blocks if i == attn_at else 0
        own_scale = scale if i < len(widths) - 1 else 1
        made.append(Level(widths[max(i - 1, 0)], c, blocks, groups, maskbit, n_attn, own_scale))
    return made


def make_coders(width, mult, blocks, groups, encoder_out, decoder_in, maskbit=False,
                up_attention=False):
    """A tokenizer's encoder, to encoder_out channels, and its decoder, from decoder_in channels.

    Level i of the encoder has `blocks` blocks of width * mult[i] channels. All levels but the last
    halve the picture. `up_attention` gives the decoder's first level attention. KLVAE also has
    attention in both middles and in the encoder's last level; MaskBit has none.
    """
    widths = [width * k for k in mult]
    c = widths[-1]
    if maskbit:
        mid = partial(Level, c, c, blocks, groups, maskbit)
        up_blocks = blocks
        attn_down = None
    else:
        mid = partial(Level, c, c, 2, groups, maskbit, n_attn=1)
        up_blocks = blocks + 1
        attn_down = len(mult) - 1
    encoder = nn.Sequential(OrderedDict(
        conv_in=conv3(3, widths[0], bias=not maskbit),
        down=levels(widths, blocks, groups, maskbit, 0.5, attn_down),
        mid=mid(),
        norm_out=norm(groups, c),
        silu=nn.SiLU(),
        conv_out=nn.Conv2d(c, encoder_out, 1) if maskbit else conv3(c, encoder_out)))
    decoder = nn.Sequential(OrderedDict(
        conv_in=conv3(decoder_in, c),
        mid=mid(),
        up=levels(widths[::-1], up_blocks, groups, maskbit, 2, 0 if up_attention else None),
        norm_out=norm(groups, widths[0]),
        silu=nn.SiLU(),
        conv_out=conv3(widths[0], 3)))
    return encoder, decoder


# A part's name in official files, and its name here.   [VA-VAE] [MAR] [MaskBit]
RENAMED = {
    "mid.block_1": "mid.block.0", "mid.block_2": "mid.block.1", "mid.attn_1": "mid.attn.0",
    "downsample.conv": "resize", "upsample.conv": "resize",
    "res_blocks": "block", "down_conv": "resize", "upsample_conv": "resize",
}


def rename_official(state):
    """An official tokenizer's weights under our names, and its width, mult and blocks."""
    for official, own in RENAMED.items():
        state = {key.replace(official, own): value for key, value in state.items()}
    width = len(state["encoder.conv_in.weight"])
    depth = disk.count_modules(state, "encoder.down.")
    mult = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) // width for i in range(depth)]
    blocks = disk.count_modules(state, "encoder.down.0.block.")
    return state, dict(width=width, mult=mult, blocks=blocks)


class KLVAE(nn.Module):
    """x_c = VAE(I) of Eq. (7), of z = d_c channels.

    up_attention: whether the decoder's first level has attention, as in VA-VAE but not in KL-16
    groups: of every GroupNorm, 32 in the official models [VA-VAE] [MAR]. The preset tiny has 1, as
        its first level has 32 channels, each of which would be normalised by itself.   [ours]
    """

    def __init__(self, width, mult, blocks, z, up_attention=True, groups=32):
        super().__init__()
        self.encoder, self.decoder = make_coders(
            width, mult, blocks, groups, 2 * z, z, up_attention=up_attention)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        # Training starts with little posterior noise.   [ours]
        nn.init.constant_(self.quant_conv.bias[z:], -5)

    @classmethod
    def from_official(cls, state):
        """The model in an official file {name: tensor} of VA-VAE or KL-16.   [VA-VAE] [MAR]"""
        state, config = rename_official(state)
        last = disk.count_modules(state, "decoder.up.") - 1
        ours = {}
        for key, value in state.items():
            # Official files count the decoder's levels from the full resolution.
            if key.startswith("decoder.up."):
                _, _, level, rest = key.split(".", 3)
                key = f"decoder.up.{last - int(level)}.{rest}"
            # What is left out was needed to train VA-VAE only.
            if not key.startswith(("loss.", "foundation_model.", "linear_proj.")):
                ours[key] = value
        config["z"] = len(ours["post_quant_conv.weight"])
        config["up_attention"] = disk.count_modules(ours, "decoder.up.0.attn.") > 0
        return disk.build(cls, config, ours)

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> posterior mean and log variance, (B, d_c, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)                           # [VA-VAE]

    def decode(self, z):
        """z = x_c (B, d_c, h, w) -> images (B, 3, H, W), roughly in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


class BitVQ(nn.Module):
    """x_d = VQVAE(I) of Eq. (7): d_d = `bits` signs per token. No codebook is learned. [MaskBit]"""

    def __init__(self, width, mult, blocks, bits, groups=32):
        super().__init__()
        self.encoder, self.decoder = make_coders(
            width, mult, blocks, groups, bits, bits, maskbit=True)
        self.bits = bits
        powers = 2 ** torch.arange(bits, dtype=torch.int32)
        codes = torch.arange(2 ** bits)[:, None]
        # Official files hold these two.
        self.quantize = nn.Module()
        self.quantize.register_buffer("bits_to_indices", powers)
        self.quantize.register_buffer("codebook", codes_to_bits(codes, bits))

    @classmethod
    def from_official(cls, state):
        """The model in an official file {name: tensor} of MaskBit's tokenizer.   [MaskBit]"""
        state, config = rename_official(state)
        config["bits"] = len(state["encoder.conv_out.weight"])
        return disk.build(cls, config, state)

    def encode(self, images):
        """images (B, 3, H, W) in [0, 1] -> z (B, d_d, h, w), whose signs are x_d."""
        return self.encoder(images)

    def decode(self, x_d):
        """bits x_d (B, d_d, h, w) in {-1, +1} -> images (B, 3, H, W), roughly in [0, 1]."""
        return self.decoder(x_d)


@torch.no_grad()
def encode_pictures(pictures, vae, vq, device, mirror):
    """Eq. (7) for uint8 pictures (b, 3, H, W) and, if `mirror`, for their mirror images, too.

    F is 2 with mirror images, else 1.
    Returns a dict: moments (b, F, 2 d_c, h, w), float16 posterior means and log variances, and
    indices (b, F, h, w), int32 codes of x_d.
    """
    x = torch.tensor(pictures).to(device).float() / 255
    views = [x, x.flip(3)] if mirror else [x]
    x = torch.stack(views, dim=1).flatten(0, 1)                      # (b F, 3, H, W)
    moments = torch.cat(vae.encode(x * 2 - 1), dim=1).half()
    indices = bits_to_codes(quantise(vq.encode(x)).movedim(1, -1)).int()
    encoded = dict(moments=moments, indices=indices)
    for name, array in encoded.items():
        encoded[name] = array.unflatten(0, (-1, len(views))).cpu().numpy()
    return encoded


def check_statistics(mean, std, d_c, device="cpu"):
    """The mean and deviation of x_c, lists, as tensors (d_c,). ValueError if they are invalid."""
    mean = torch.tensor(mean, dtype=torch.float32, device=device)
    std = torch.tensor(std, dtype=torch.float32, device=device)
    finite = mean.isfinite().all() and std.isfinite().all() and (std > 0).all()
    if not finite or not mean.shape == std.shape == (d_c,):
        raise ValueError(f"mean and deviation of x_c must be {d_c} finite numbers, the deviation "
                         "above 0")
    return mean, std
