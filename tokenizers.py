"""Eq. (7): x_c = VAE(I), x_d = VQVAE(I); the pictures I and the cache of their tokens.

`KLVAE` is the continuous tokenizer (VA-VAE, KL-16). `BitVQ` is the discrete one (MaskBit): its
tokens are bits, without a learned codebook. Both load official weights with `from_official`. The
pictures come from the embedded set `shapes`, from class folders or from MNIST-family files.
`Tokens` is the cache of x_c and x_d that training reads.

Reads picture files. Feeds all the other files. Read mixing.py next.
Try: python train.py --stage vae     (then look at runs/shapes/vae/reconstructions.png)
Run from this folder, this module shadows the Hugging Face package of the same name.

B batch, n pictures, H x W pixels, h x w token grid, N = h * w tokens,
d_c channels of x_c, d_d bits of x_d.
"""
import colorsys
import gzip
import hashlib
import json
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from math import cos, hypot, pi, sin
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu
from tqdm import tqdm


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

    codes (B, N, S) int in 0..2^e -> (B, N, S * e) float   [MaskBit]
    """
    powers = torch.arange(e, device=codes.device)
    codes = codes[..., None]
    bits = (codes >> powers & 1).float() * 2 - 1                     # (B, N, S, e)
    return torch.where(codes == 2 ** e, 0.0, bits).flatten(-2)


def quantise(z):
    """The sign of every channel, -1 where z is zero; any shape.   [MaskBit]"""
    return torch.where(z > 0, 1.0, -1.0)


def entropy(p):
    """The entropy in nats of the distributions along the last axis.   (..., K) -> (...)"""
    return -(p * p.clamp(min=1e-5).log()).sum(-1)


def quantiser_losses(z, codebook, all_mean=lambda q: q):
    """Commitment loss, entropy per token and entropy of the mean of the tokens.   [MaskBit]

    The training loss is commitment + 0.02 * (per_token - average).
    z:         (B, d_d, h, w), the encoder's output
    codebook:  (2^d_d, d_d), every code as bits
    all_mean:  averages the use of the codes over the processes of a distributed run
    Returns three scalars.
    """
    z = z.float()
    commitment = 0.25 * (quantise(z) - z).square().mean()
    # The division by 0.01 would magnify the rounding of bf16.
    with torch.autocast(z.device.type, enabled=False):
        logits = 2 * z.movedim(1, -1).flatten(0, -2) @ codebook.T / 0.01   # (B h w, 2^d_d)
    p = logits.softmax(-1)
    per_token = entropy(p).mean()
    average = entropy(all_mean(p.mean(0)))
    return commitment, per_token, average


def norm(groups, c):
    return nn.GroupNorm(groups, c, eps=1e-6)


def conv3(c_in, c_out, bias=True):
    """A 3 x 3 convolution that keeps the picture's size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut.

    Where the width changes, the KL-VAE's shortcut projects the input of the block. MaskBit's
    projects the block's own OUTPUT and drops the input, as its released weights expect.
    """

    def __init__(self, c_in, c_out, groups, maskbit):
        super().__init__()
        self.norm1 = norm(groups, c_in)
        self.conv1 = conv3(c_in, c_out, bias=not maskbit)
        self.norm2 = norm(groups, c_out)
        self.conv2 = conv3(c_out, c_out, bias=not maskbit)
        self.projects_output = maskbit and c_in != c_out
        if c_in == c_out:
            self.nin_shortcut = nn.Identity()
        elif maskbit:
            self.nin_shortcut = nn.Conv2d(c_out, c_out, 1, bias=False)
        else:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        u = self.conv1(silu(self.norm1(x)))
        u = self.conv2(silu(self.norm2(u)))
        return u + self.nin_shortcut(u if self.projects_output else x)


def one_head(x):
    """The pixels of x as the tokens of one attention head.   (B, c, h, w) -> (B, 1, h w, c)"""
    return x.flatten(2).transpose(1, 2)[:, None]


class AttnBlock(nn.Module):
    """Self-attention over the pixels, beside a shortcut."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(groups, c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        u = self.norm(x)
        q = one_head(self.q(u))                                      # (B, 1, h w, c)
        k = one_head(self.k(u))
        v = one_head(self.v(u))
        u = scaled_dot_product_attention(q, k, v)[:, 0]              # (B, h w, c)
        u = u.transpose(1, 2).unflatten(2, x.shape[2:])              # (B, c, h, w)
        return x + self.proj_out(u)


class Halve(nn.Conv2d):
    """A convolution to half the size; one row of zeros is added below and one at the right."""

    def __init__(self, c):
        super().__init__(c, c, 3, stride=2)

    def forward(self, x):
        return super().forward(pad(x, (0, 1, 0, 1)))


class HalveSame(Halve):
    """The same with TensorFlow's padding SAME: an odd side gets zeros at both ends.   [MaskBit]"""

    def forward(self, x):
        height, width = x.shape[2:]
        return super().forward(pad(x, (width % 2, 0, height % 2, 0)))


class Double(nn.Conv2d):
    """Twice the size by repeating pixels, then a convolution."""

    def __init__(self, c):
        super().__init__(c, c, 3, padding=1)

    def forward(self, x):
        return super().forward(interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, then `resize`: Halve, HalveSame, Double or nn.Identity.

    The first `attn` of the residual blocks are each followed by attention.
    """

    def __init__(self, c_in, c, blocks, groups, maskbit=False, attn=0, resize=nn.Identity):
        super().__init__()
        inputs = [c_in] + [c] * (blocks - 1)
        self.block = nn.ModuleList(ResBlock(c_in, c, groups, maskbit) for c_in in inputs)
        attend = [AttnBlock(c, groups) for _ in range(attn)]
        self.attn = nn.ModuleList(attend + [nn.Identity()] * (blocks - attn))
        self.resize = resize(c)

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.resize(x)


def levels(widths, blocks, groups, resize, maskbit=False, attn_at=None):
    """One Level for each width. All but the last resize; level number attn_at has attention."""
    made = nn.Sequential()
    c_in = widths[0]
    for i, c in enumerate(widths):
        attn = blocks if i == attn_at else 0
        if i == len(widths) - 1:
            resize = nn.Identity
        made.append(Level(c_in, c, blocks, groups, maskbit, attn, resize))
        c_in = c
    return made


def build(cls, config, state):
    """The model cls(**config) with the weights `state`, ready for inference.

    RuntimeError names every missing, unexpected or mis-shaped weight.
    """
    # On the meta device no time is lost on initial weights.
    with torch.device("meta"):
        model = cls(**config)
    model.to_empty(device="cpu").load_state_dict(state)
    return model.eval().requires_grad_(False)


def count_modules(state, prefix):
    """How many numbered modules lie under `prefix` in the state dict `state`."""
    return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})


# How official files name a part, and how we do.   [VA-VAE] [MAR] [MaskBit]
RENAMED = {
    "mid.block_1": "mid.block.0",
    "mid.block_2": "mid.block.1",
    "mid.attn_1": "mid.attn.0",
    "downsample.conv": "resize",
    "upsample.conv": "resize",
    "res_blocks": "block",
    "down_conv": "resize",
    "upsample_conv": "resize",
}


def rename(state):
    """The weights of an official tokenizer under our names."""
    ours = {}
    for key, value in state.items():
        for official, own in RENAMED.items():
            key = key.replace(official, own)
        ours[key] = value
    return ours


def encoder_config(state):
    """width, mult and blocks of the tokenizer with the weights `state` under our names."""
    levels = range(count_modules(state, "encoder.down."))
    widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in levels]
    mult = [width // widths[0] for width in widths]
    blocks = count_modules(state, "encoder.down.0.block.")
    return dict(width=widths[0], mult=mult, blocks=blocks)


class KLVAE(nn.Module):
    """x_c = VAE(I) of Eq. (7).   [VA-VAE] [MAR]

    width, mult:  level i of the encoder has width * mult[i] channels; all but the last level
                  halve the picture, and the decoder takes the way back
    blocks:       residual blocks in a level of the encoder; the decoder has one more
    z:            d_c, the channels of x_c
    attn:         attention at the decoder's lowest resolution (VA-VAE has it, KL-16 has not)
    groups:       of the norms, officially 32; at width 32 a group would be a single channel,
                  and its norm would erase the mean colour of the picture
    """

    def __init__(self, width, mult, blocks, z, attn=True, groups=32):
        super().__init__()
        widths = [width * k for k in mult]
        c = widths[-1]
        self.encoder = nn.Sequential(OrderedDict(
            conv_in=conv3(3, widths[0]),
            down=levels(widths, blocks, groups, Halve, attn_at=len(mult) - 1),
            mid=Level(c, c, 2, groups, attn=1),
            norm_out=norm(groups, c),
            silu=nn.SiLU(),
            conv_out=conv3(c, 2 * z)))
        self.decoder = nn.Sequential(OrderedDict(
            conv_in=conv3(z, c),
            mid=Level(c, c, 2, groups, attn=1),
            up=levels(widths[::-1], blocks + 1, groups, Double, attn_at=0 if attn else None),
            norm_out=norm(groups, widths[0]),
            silu=nn.SiLU(),
            conv_out=conv3(widths[0], 3)))
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        # Training starts with little posterior noise. [ours]
        nn.init.constant_(self.quant_conv.bias[z:], -5)

    @classmethod
    def from_official(cls, state):
        """The model in an official file {name: tensor} of VA-VAE or KL-16.   [VA-VAE] [MAR]"""
        top = count_modules(state, "decoder.up.") - 1
        ours = {}
        for key, value in rename(state).items():
            # Official files count the decoder's levels from the full resolution, we from the
            # lowest, where the decoder starts.
            if key.startswith("decoder.up."):
                level, rest = key.removeprefix("decoder.up.").split(".", 1)
                key = f"decoder.up.{top - int(level)}.{rest}"
            # The others belong to the training of VA-VAE.
            if not key.startswith(("loss.", "foundation_model.", "linear_proj.")):
                ours[key] = value
        config = encoder_config(ours)
        config["z"] = len(ours["post_quant_conv.weight"])
        config["attn"] = count_modules(ours, "decoder.up.0.attn.") > 0
        return build(cls, config, ours)

    def encode(self, images):
        """Mean and log variance of the posterior, each (B, d_c, h, w).

        images (B, 3, H, W) in [-1, 1]. The log variance is kept in [-30, 20].
        """
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """The images (B, 3, H, W), about in [-1, 1], of z = x_c (B, d_c, h, w)."""
        return self.decoder(self.post_quant_conv(z))


class BitVQ(nn.Module):
    """x_d = VQVAE(I) of Eq. (7): a token is `bits` signs, no codebook is learned.   [MaskBit]

    bits is d_d; the other parameters are those of KLVAE. It has no attention.
    """

    def __init__(self, width, mult, blocks, bits, groups=32):
        super().__init__()
        widths = [width * k for k in mult]
        c = widths[-1]
        self.encoder = nn.Sequential(OrderedDict(
            conv_in=conv3(3, widths[0], bias=False),
            down=levels(widths, blocks, groups, HalveSame, maskbit=True),
            mid=Level(c, c, blocks, groups, maskbit=True),
            norm_out=norm(groups, c),
            silu=nn.SiLU(),
            conv_out=nn.Conv2d(c, bits, 1)))
        self.decoder = nn.Sequential(OrderedDict(
            conv_in=conv3(bits, c),
            mid=Level(c, c, blocks, groups, maskbit=True),
            up=levels(widths[::-1], blocks, groups, Double, maskbit=True),
            norm_out=norm(groups, widths[0]),
            silu=nn.SiLU(),
            conv_out=conv3(widths[0], 3)))
        codes = torch.arange(2 ** bits)
        self.quantize = nn.Module()
        self.quantize.register_buffer("bits_to_indices", 2 ** torch.arange(bits, dtype=torch.int32))
        self.quantize.register_buffer("codebook", codes_to_bits(codes[:, None], bits))

    @classmethod
    def from_official(cls, state):
        """The model in an official file {name: tensor} of MaskBit's tokenizer.   [MaskBit]"""
        ours = rename(state)
        config = encoder_config(ours)
        config["bits"] = len(ours["encoder.conv_out.weight"])
        return build(cls, config, ours)

    def encode(self, images):
        """z (B, d_d, h, w), whose signs are x_d, of images (B, 3, H, W) in [0, 1]."""
        return self.encoder(images)

    def decode(self, x_d):
        """The images (B, 3, H, W), about in [0, 1], of bits x_d (B, d_d, h, w) in {-1, +1}."""
        return self.decoder(x_d)


def center_crop(image, size):
    """ADM's centre crop of a Pillow image to size x size.   [MAR]"""
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.BOX)
    width, height = image.size
    scale = size / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)), Image.BICUBIC)
    width, height = image.size
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_rgb(path):
    """Any picture that Pillow reads, as an RGB image.

    Transparency is laid on white [ours]; 16-bit grey is scaled to 8 bits.
    """
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            grey = np.asarray(image, np.float64) / 257
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


# Sources of pictures. To add a data set, write a class like the three below and one `if` in
# open_source. The constructor takes the folder, the split ("train" or "test"), the size and the
# count of pictures wanted (None: all). A source has
#     classes     the names of the classes
#     labels      (n,) int64, the class of every picture
#     mirror      True if training may mirror the pictures
#     held_out    True if the pictures of split "test" are not those of split "train"
#     size        the height and width of the pictures
#     read(i)     picture i as uint8 (3, size, size), or a text saying why it cannot be read
#     made_from   a dict that tells these pictures from others; open_source sets it


def choose(n, count):
    """The numbers of `count` of n pictures, always the same ones; of all, in order, if None."""
    if not count:
        return np.arange(n)
    return np.random.RandomState(0).permutation(n)[:count]


class Folder:
    """Pictures in class folders, DIR/class/picture. Without class folders DIR is one class.

    The splits are DIR/train and DIR/val (or DIR/test), if they are there.
    """

    # Horizontal flips are cached, too. [MAR]
    mirror = True
    endings = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

    def __init__(self, root, split, size, count):
        names = ["train"] if split == "train" else ["val", "test", "train"]
        found = [name for name in names if (root / name).is_dir()] + ["."]
        self.held_out = found[0] in ("val", "test")
        self.size = size
        root = root / found[0]
        folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
        self.classes = []
        files = []
        labels = []
        for label, folder in enumerate(folders or [root]):
            inside = sorted(p for p in folder.rglob("*") if p.suffix.lower() in self.endings)
            if not inside:
                raise SystemExit(f"{folder}: no pictures in this folder; fill it or remove it")
            self.classes.append(folder.name)
            files += inside
            labels += [label] * len(inside)
        names = "\n".join(map(str, files))
        self.names_hash = hashlib.sha256(names.encode()).hexdigest()[:16]
        keep = choose(len(files), count)
        self.files = [files[i] for i in keep]
        self.labels = np.array(labels)[keep]

    def read(self, i):
        try:
            image = center_crop(read_rgb(self.files[i]), self.size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{self.files[i]}: {error}"
        return np.asarray(image).transpose(2, 0, 1)


def read_idx(root, name):
    """The uint8 array in the MNIST-family file `name`, gz or not, of the folder `root`."""
    paths = sorted(root.glob(f"{name}*ubyte*"))
    if not paths:
        raise SystemExit(f"{root}: there is no file {name}-ubyte or {name}-ubyte.gz")
    data = paths[0].read_bytes()
    # A damaged file can fail in any way.
    try:
        if paths[0].suffix == ".gz":
            data = gzip.decompress(data)
        axes = data[3]
        shape = np.frombuffer(data, ">u4", axes, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except Exception as error:
        raise SystemExit(f"{paths[0]}: not a readable idx file ({error})") from None


class Idx:
    """MNIST-family files. Small pictures are padded with black to `size`, larger ones resized."""

    # Digits and shoes point one way.
    mirror = False
    clothes = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()

    def __init__(self, root, split, size, count):
        self.held_out = split == "test" and any(root.glob("t10k-*ubyte*"))
        self.size = size
        part = "t10k" if self.held_out else "train"
        images = read_idx(root, f"{part}-images-idx3")
        labels = read_idx(root, f"{part}-labels-idx1")
        self.classes = [str(k) for k in range(int(labels.max()) + 1)]
        if "fashion" in str(root).lower() and len(self.classes) <= 10:
            self.classes = self.clothes
        keep = choose(len(labels), count)
        self.images = images[keep]
        self.labels = labels[keep].astype(np.int64)

    def read(self, i):
        image = self.images[i]
        if max(image.shape) > self.size:
            image = np.asarray(center_crop(Image.fromarray(image), self.size))
        edges = [((self.size - side) // 2, (self.size - side + 1) // 2) for side in image.shape]
        return np.broadcast_to(np.pad(image, edges), (3, self.size, self.size))


class Shapes:
    """The embedded set: ten classes of shapes; picture i is a function of (split, i).   [ours]

    Colours, pose, background and stripes are continuous: they say more than the bits can keep.
    """

    classes = "disc ring square triangle star plus heart moon arrow hourglass".split()
    mirror = False
    held_out = True

    def __init__(self, split, size, count):
        self.seed = 0 if split == "train" else 1
        self.size = size
        self.labels = np.arange(count) % 10

    @staticmethod
    def distance(name, x, y):
        """Signed distance of points to the outline of a shape in about [-1, 1]^2; inside < 0."""
        r = np.hypot(x, y)
        ax = abs(x)
        ay = abs(y)
        # Folding maps the ten edges of the star to one, from the tip (0, 1) to 0.42 (px, py).
        fold = abs(np.arctan2(x, y) % (2 * pi / 5) - pi / 5)
        px = cos(pi / 5)
        py = sin(pi / 5)
        star = (r * np.cos(fold) - 0.42) * py - r * np.sin(fold) * (px - 0.42)
        intersection = np.maximum
        union = np.minimum
        upright = intersection(ax - 0.28, ay - 0.9)
        level = intersection(ax - 0.9, ay - 0.28)
        diamond = (ax + abs(y + 0.1) - 0.8) / 1.414
        discs = np.hypot(ax - 0.4, y - 0.3) - 0.566
        shaft = intersection(ax - 0.22, abs(y + 0.4) - 0.5)
        tip = intersection((ax + y - 0.9) / 1.414, -y)
        outlines = {
            "disc": r - 0.85,
            "ring": abs(r - 0.67) - 0.22,
            "square": intersection(ax, ay) - 0.75,
            "triangle": intersection(0.866 * ax + 0.5 * y, -y) - 0.5,
            "star": star / hypot(px - 0.42, py),
            "plus": union(upright, level),
            "heart": union(diamond, discs),
            "moon": intersection(r - 0.9, 0.72 - np.hypot(x - 0.5, y)),
            "arrow": union(shaft, tip),
            "hourglass": intersection(ay - 0.85, (ax - 0.95 * ay - 0.05) / 1.38),
        }
        return outlines[name]

    def read(self, i):
        u = np.random.Generator(np.random.Philox(key=[self.seed, i])).random(16)
        axis = (np.arange(self.size) + 0.5) / self.size * 2 - 1
        X = axis[None, :]
        Y = -axis[:, None]

        # The pixels in the frame of the shape: moved, scaled, turned.
        radius = 0.68 + 0.22 * u[0]
        turn = 0.4 * (u[1] - 0.5)
        dx = (X - 0.2 * (u[2] - 0.5)) / radius
        dy = (Y - 0.2 * (u[3] - 0.5)) / radius
        x = dx * cos(turn) + dy * sin(turn)
        y = dy * cos(turn) - dx * sin(turn)

        # How much of every pixel the shape covers: an edge is one pixel wide.
        distance = self.distance(self.classes[self.labels[i]], x, y)
        inside = np.clip(0.5 - distance * radius * self.size / 2, 0, 1)

        ramp = (1 + X * cos(6.28 * u[4]) + Y * sin(6.28 * u[4])) / 2
        start = colour(u[5], 0.7 * u[6], 0.1 + 0.35 * u[7])
        end = colour(u[8], 0.7 * u[9], 0.1 + 0.35 * u[10])
        ground = start * (1 - ramp) + end * ramp
        along = x * cos(3.14 * u[12]) + y * sin(3.14 * u[12])
        stripes = np.sin((6 + 8 * u[11]) * along)
        figure = colour(u[13], 0.4 + 0.6 * u[14], 0.8) * (1 + 0.25 * u[15] * stripes)
        picture = ground * (1 - inside) + figure * inside
        return (picture.clip(0, 1) * 255).astype(np.uint8)


def colour(h, s, v):
    """Hue, saturation and value as an RGB array (3, 1, 1)."""
    return np.array(colorsys.hsv_to_rgb(h, s, v))[:, None, None]


def open_source(data, split, size, count):
    """The source of the pictures in `data`; the comment above says what a source has.

    data:   "shapes", or a folder
    split:  "train", or "test" for the held-out pictures, or for all if none are held out
    size:   height and width of the pictures
    count:  how many of them; None for all (of the endless shapes 10,000)
    """
    root = Path(data)
    if data == "shapes":
        source = Shapes(split, size, count or 10000)
    elif not root.is_dir():
        raise SystemExit(f"--data {data}: no such folder; give a folder of pictures, or shapes")
    elif any(root.glob("*idx?-ubyte*")):
        source = Idx(root, split, size, count)
    else:
        source = Folder(root, split, size, count)
    where = data if data == "shapes" else str(root.resolve())
    made_from = dict(data=where, split=split, size=size, pictures=len(source.labels))
    source.made_from = made_from
    # As many pictures under other names are other pictures.
    if isinstance(source, Folder):
        made_from["names"] = source.names_hash
    return source


def write_whole(path, write):
    """Write the file `path` by write(file), whole or not at all, even if the program is killed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def read_json(path):
    """What write_json wrote, or {} if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def fingerprint(module):
    """16 hexadecimal digits that tell the weights of a module from others."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# A cache is a folder of .npy files with one row for each picture of a source, and meta.json.
# status.npy holds 0 for a picture that is still to do, 1 for one that is done and 2 for one that
# could not be read, so that a killed run goes on where it was.


def start_cache(folder, source, make, **made_with):
    """Create the files of a cache, unless an earlier run did.

    make:       uint8 (b, 3, H, W) -> {name of a file: array (b, ...)}
    made_with:  what the rows depend on besides the pictures
    SystemExit if the folder holds a cache that was made from something else.
    """
    made_from = source.made_from | made_with
    meta = read_json(folder / "meta.json")
    if meta:
        if meta["made_from"] != made_from:
            raise SystemExit(f"{folder} was made from {meta['made_from']}, not from {made_from}; "
                             "remove it, or choose another --runs folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    # The row of a black picture tells the types and shapes.
    row = make(np.zeros((1, 3, source.size, source.size), np.uint8))
    row["status"] = np.zeros(1, np.uint8)
    for name, value in row.items():
        shape = (len(source.labels), *value.shape[1:])
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", value.dtype, shape)
    np.save(folder / "labels.npy", source.labels)
    meta = dict(made_from=made_from, classes=source.classes, complete=False)
    write_json(folder / "meta.json", meta)


def fill_cache(folder, source, make, batch, rank=0, ranks=1):
    """Make the missing rows of a cache; each of the `ranks` processes takes its share of them.

    make is that of start_cache, batch the number of pictures that it is given at once.
    """
    files = {path.stem: np.load(path, mmap_mode="r+") for path in folder.glob("*.npy")}
    status = files["status"]
    starts = range(rank * batch, len(status), ranks * batch)
    with ThreadPoolExecutor(max(1, os.cpu_count() // ranks)) as threads:
        for start in tqdm(starts, f"{folder.name:6}", unit="batch", disable=rank > 0):
            rows = start + np.flatnonzero(status[start:start + batch] != 1)
            pictures = dict(zip(rows, threads.map(source.read, rows)))
            good = [i for i in rows if not isinstance(pictures[i], str)]
            if good:
                made = make(np.stack([pictures[i] for i in good]))
                for name, value in made.items():
                    files[name][good] = value
            # The status comes last, when the rows themselves are there.
            status[rows] = 2
            status[good] = 1


def finish_cache(folder, source):
    """Note in meta.json that the cache is complete, and which pictures could not be read.

    SystemExit if none could.
    """
    status = np.load(folder / "status.npy")
    if (status == 0).any():
        raise SystemExit(f"{folder}: another program was filling it, too; start again")
    skipped = [source.read(i) for i in np.flatnonzero(status == 2)]
    n = len(status)
    if len(skipped) == n:
        raise SystemExit(f"{source.made_from['data']}: none of its {n} pictures could be read")
    if skipped:
        print(f"skipped {len(skipped)} unreadable of {n} pictures:", *skipped, sep="\n  ")
    meta = read_json(folder / "meta.json")
    write_json(folder / "meta.json", meta | dict(complete=True, skipped=skipped))


def readable(folder, *names):
    """The arrays `names` of a cache, then the rows whose picture could be read."""
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
    status = np.load(folder / "status.npy")
    return *arrays, np.flatnonzero(status == 1)


@torch.no_grad()
def encode(pictures, vae, vq, device, mirror):
    """Eq. (7): the rows of the token cache for pictures (b, 3, H, W) uint8.

    Returns a dict, with F = 2 if mirror is True (the picture and its mirror image), else 1:
    moments  float16 (b, F, 2 d_c, h, w), posterior mean and log variance
    indices  int32 (b, F, h, w), the codes of x_d
    """
    x = torch.tensor(pictures).to(device).float() / 255              # (b, 3, H, W)
    views = [x, x.flip(3)] if mirror else [x]
    x = torch.stack(views, dim=1).flatten(0, 1)                      # (b F, 3, H, W)
    moments = torch.cat(vae.encode(x * 2 - 1), dim=1).half()
    bits = quantise(vq.encode(x)).movedim(1, -1)                     # (b F, h, w, d_d)
    indices = bits_to_codes(bits).int()
    F = len(views)
    return dict(moments=moments.unflatten(0, (-1, F)).cpu().numpy(),
                indices=indices.unflatten(0, (-1, F)).cpu().numpy())


def write_statistics(folder, bits):
    """Write mean and deviation of every channel of x_c, and `bits`, into a cache's meta.json.

    They are those of posterior samples of up to 10,000 pictures.   [VA-VAE]
    """
    moments, rows = readable(folder, "moments")
    rows = np.sort(np.random.RandomState(0).permutation(rows)[:10000])
    mean, logvar = torch.tensor(moments[rows, 0]).float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    x_c = reparameterize(mean, (0.5 * logvar).exp(), noise)          # (n, d_c, h, w)
    std, mean = torch.std_mean(x_c, (0, 2, 3))                       # (d_c,)
    meta = read_json(folder / "meta.json")
    meta |= dict(mean=mean.tolist(), std=std.tolist(), bits=bits)
    write_json(folder / "meta.json", meta)


class Tokens:
    """The token cache in `folder`: n pictures with `labels` (n,) in `classes`.

    SystemExit if it is not complete, or if other tokenizers than vae and vq made it.
    """

    def __init__(self, folder, vae, vq):
        self.meta = read_json(folder / "meta.json")
        if "mean" not in self.meta:
            raise SystemExit(f"{folder}: the token cache is not complete; make it by --stage cache")
        made_from = self.meta["made_from"]
        self.made_by = [made_from["vae"], made_from["vq"]]
        expected = [fingerprint(vae), fingerprint(vq)]
        if self.made_by != expected:
            raise SystemExit(f"{folder} was made by tokenizers {self.made_by}, not by {expected}; "
                             "remove it to make it again")
        names = ("moments", "indices", "labels")
        self.moments, self.indices, labels, self.rows = readable(folder, *names)
        self.n = len(self.rows)
        self.labels = labels[self.rows]
        self.classes = self.meta["classes"]
        self.mean = torch.tensor(self.meta["mean"])
        self.std = torch.tensor(self.meta["std"])

    def batch(self, pictures, draw):
        """The tokens of `pictures`, (B,) numbers in 0..n-1.

        draw(torch.rand) gives the (B,) uniform numbers of which 0.5 or more means mirrored.
        Returns the normalised posterior's mean and deviation (B, N, d_c), x_d (B, N, d_d), y (B,).
        """
        rows = self.rows[pictures]
        F = self.indices.shape[1]
        view = (draw(torch.rand).cpu().numpy() * F).astype(int)
        moments = torch.tensor(self.moments[rows, view]).float()     # (B, 2 d_c, h, w)
        mean, logvar = moments.flatten(2).transpose(1, 2).chunk(2, dim=2)
        mean = (mean - self.mean) / self.std                         # (B, N, d_c)
        std = (0.5 * logvar).exp() / self.std                        # (B, N, d_c)
        codes = torch.tensor(self.indices[rows, view]).flatten(1)    # (B, N)
        x_d = codes_to_bits(codes[..., None], self.meta["bits"])     # (B, N, d_d)
        return mean, std, x_d, torch.tensor(self.labels[pictures])
