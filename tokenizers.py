"""Eq. (7), section 3.3: x_c = VAE(I) and x_d = VQVAE(I), the pictures I and the token cache.

`KLVAE` is the continuous tokenizer (VA-VAE, KL-16), `BitVQ` the discrete one (MaskBit), whose
tokens are bits. Pictures come from the embedded set `shapes`, class folders or MNIST-family files.
`cache_tokens` writes x_c and x_d of all pictures once, and training reads them by `Tokens`.

B batch, n pictures, h x w token grid, N = h w tokens, d_c channels of x_c, d_d bits of x_d.
Reads picture files. Feeds all the other files. Read mixing.py next.
Try: python train.py --stage vae     (then look at runs/shapes/vae/reconstructions.png)
Run from this folder, this module shadows the Hugging Face package of the same name.
"""
import colorsys
import gzip
import hashlib
import json
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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

    (B, N, S) int -> (B, N, S e) float   [MaskBit]
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
    """Commitment loss, mean entropy of a token, entropy of the mean token.   [MaskBit]

    z: (B, d_d, h, w), the encoder's output
    codebook: (2^d_d, d_d), every code as bits
    all_mean: averages the use of the codes over the processes of a distributed run
    """
    z = z.float()
    commitment = 0.25 * (quantise(z) - z).square().mean()
    # The division by 0.01 would magnify the rounding of bf16.
    with torch.autocast(z.device.type, enabled=False):
        logits = 2 * z.movedim(1, -1).flatten(0, -2) @ codebook.T / 0.01   # (B h w, 2^d_d)
    p = logits.softmax(-1)
    mean_p = all_mean(p.mean(0))                                     # (2^d_d,)
    return commitment, entropy(p).mean(), entropy(mean_p)


norm = partial(nn.GroupNorm, eps=1e-6)
conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut.

    Where the width changes, MaskBit's shortcut projects the block's own OUTPUT and drops the input,
    as its released weights expect.
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
    """Residual blocks, the first `attn` of them with attention, then `scale` times the size."""

    def __init__(self, c_in, c, blocks, groups, maskbit, attn=0, scale=1):
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(c_in if i == 0 else c, c, groups, maskbit) for i in range(blocks))
        self.attn = nn.ModuleList(
            AttnBlock(c, groups) if i < attn else nn.Identity() for i in range(blocks))
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
            # TensorFlow's padding SAME: an odd side gets zeros at both ends.   [MaskBit]
            top, left = (side % 2 if self.maskbit else 0 for side in x.shape[2:])
            x = pad(x, (left, 1, top, 1))
        elif self.scale == 2:
            x = interpolate(x, scale_factor=2.0, mode="nearest")
        return self.resize(x)


def levels(widths, blocks, groups, maskbit, scale, attn_at):
    """One Level for each width. All but the last change the size; number attn_at has attention."""
    made = nn.Sequential()
    for i, c in enumerate(widths):
        attn = blocks if i == attn_at else 0
        own_scale = scale if i < len(widths) - 1 else 1
        made.append(Level(widths[max(i - 1, 0)], c, blocks, groups, maskbit, attn, own_scale))
    return made


def coders(width, mult, blocks, groups, c_out, c_in, maskbit=False, attn=False):
    """A tokenizer's encoder, to c_out channels, and its decoder, from c_in channels.

    Level i of the encoder has `blocks` blocks of width * mult[i] channels. All levels but the last
    halve the picture. `attn` gives the decoder's first level attention; MaskBit has none anywhere.
    """
    widths = [width * k for k in mult]
    c = widths[-1]
    if maskbit:
        mid = partial(Level, c, c, blocks, groups, maskbit)
        up_blocks = blocks
        attn_down = None
    else:
        mid = partial(Level, c, c, 2, groups, maskbit, attn=1)
        up_blocks = blocks + 1
        attn_down = len(mult) - 1
    encoder = nn.Sequential(OrderedDict(
        conv_in=conv3(3, widths[0], bias=not maskbit),
        down=levels(widths, blocks, groups, maskbit, 0.5, attn_down),
        mid=mid(),
        norm_out=norm(groups, c),
        silu=nn.SiLU(),
        conv_out=nn.Conv2d(c, c_out, 1) if maskbit else conv3(c, c_out)))
    decoder = nn.Sequential(OrderedDict(
        conv_in=conv3(c_in, c),
        mid=mid(),
        up=levels(widths[::-1], up_blocks, groups, maskbit, 2, 0 if attn else None),
        norm_out=norm(groups, widths[0]),
        silu=nn.SiLU(),
        conv_out=conv3(widths[0], 3)))
    return encoder, decoder


def build(cls, config, state):
    """The model cls(**config) with the weights `state`, ready for inference."""
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
    "mid.block_1": "mid.block.0", "mid.block_2": "mid.block.1", "mid.attn_1": "mid.attn.0",
    "downsample.conv": "resize", "upsample.conv": "resize",
    "res_blocks": "block", "down_conv": "resize", "upsample_conv": "resize",
}


def read_official(state):
    """An official tokenizer's weights under our names, and its width, mult and blocks."""
    for official, own in RENAMED.items():
        state = {key.replace(official, own): value for key, value in state.items()}
    width = len(state["encoder.conv_in.weight"])
    depth = range(count_modules(state, "encoder.down."))
    mult = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) // width for i in depth]
    blocks = count_modules(state, "encoder.down.0.block.")
    return state, dict(width=width, mult=mult, blocks=blocks)


class KLVAE(nn.Module):
    """x_c = VAE(I) of Eq. (7), of z = d_c channels. VA-VAE has `attn`, KL-16 has not.

    groups: of every GroupNorm, 32 in the official models. At width 32 a group would be one channel,
    and the norm would erase its mean.   [VA-VAE] [MAR]
    """

    def __init__(self, width, mult, blocks, z, attn=True, groups=32):
        super().__init__()
        self.encoder, self.decoder = coders(width, mult, blocks, groups, 2 * z, z, attn=attn)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        # Training starts with little posterior noise.   [ours]
        nn.init.constant_(self.quant_conv.bias[z:], -5)

    @classmethod
    def from_official(cls, state):
        """The model in an official file {name: tensor} of VA-VAE or KL-16.   [VA-VAE] [MAR]"""
        state, config = read_official(state)
        last = count_modules(state, "decoder.up.") - 1
        ours = {}
        for key, value in state.items():
            # Official files count the decoder's levels from the full resolution.
            if key.startswith("decoder.up."):
                _, _, level, rest = key.split(".", 3)
                key = f"decoder.up.{last - int(level)}.{rest}"
            # The others belong to the training of VA-VAE.
            if not key.startswith(("loss.", "foundation_model.", "linear_proj.")):
                ours[key] = value
        config["z"] = len(ours["post_quant_conv.weight"])
        config["attn"] = count_modules(ours, "decoder.up.0.attn.") > 0
        return build(cls, config, ours)

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> posterior mean and log variance, (B, d_c, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z = x_c (B, d_c, h, w) -> images (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


class BitVQ(nn.Module):
    """x_d = VQVAE(I) of Eq. (7): d_d = `bits` signs a token, without a codebook.   [MaskBit]"""

    def __init__(self, width, mult, blocks, bits, groups=32):
        super().__init__()
        self.encoder, self.decoder = coders(width, mult, blocks, groups, bits, bits, maskbit=True)
        powers = 2 ** torch.arange(bits, dtype=torch.int32)
        codes = torch.arange(2 ** bits)[:, None]
        # Official files hold these two.
        self.quantize = nn.Module()
        self.quantize.register_buffer("bits_to_indices", powers)
        self.quantize.register_buffer("codebook", codes_to_bits(codes, bits))

    @classmethod
    def from_official(cls, state):
        """The model in an official file {name: tensor} of MaskBit's tokenizer.   [MaskBit]"""
        state, config = read_official(state)
        config["bits"] = len(state["encoder.conv_out.weight"])
        return build(cls, config, state)

    def encode(self, images):
        """images (B, 3, H, W) in [0, 1] -> z (B, d_d, h, w), whose signs are x_d."""
        return self.encoder(images)

    def decode(self, x_d):
        """bits x_d (B, d_d, h, w) in {-1, +1} -> images (B, 3, H, W), about in [0, 1]."""
        return self.decoder(x_d)


def center_crop(image, size):
    """ADM's centre crop of a Pillow image to size x size.   [MAR]"""
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.BOX)
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = [(side - size) // 2 for side in image.size]
    return image.crop((left, top, left + size, top + size))


def read_rgb(path):
    """Any picture as RGB: transparency is laid on white, 16-bit grey scaled to 8 bits.   [ours]"""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            grey = np.asarray(image, np.float64) / 257
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


# A data set is a class like the three below and an `if` in open_source. It is made from a folder,
# the split ("train" or "test"), the size of the pictures, and how many are wanted, None for all.
# It has
#     classes, labels    the names of the classes, and the class of every picture, (n,) int64
#     mirror             whether training may mirror the pictures
#     held_out           for split "test": whether its pictures are not those of split "train"
#     size               height and width of the pictures
#     read(i)            picture i as uint8 (3, size, size), or a text saying why it cannot be read


def choose(n, count):
    """`count` picture numbers out of n, at random but always the same; all in order if None."""
    if count is None:
        return np.arange(n)
    return np.random.RandomState(0).permutation(n)[:count]


class Folder:
    """Class folders, DIR/class/picture. Without class folders, DIR is one class.

    The splits are DIR/train and DIR/val (or DIR/test), if they are there.
    """

    # Mirror images are cached, too.   [MAR]
    mirror = True
    endings = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

    def __init__(self, root, split, size, count):
        names = ["train"] if split == "train" else ["val", "test", "train"]
        part = next((name for name in names if (root / name).is_dir()), ".")
        self.held_out = part in ("val", "test")
        self.size = size
        inside = sorted((root / part).iterdir())
        folders = [p for p in inside if p.is_dir() and not p.name.startswith(".")] or [root / part]
        self.classes = [folder.name for folder in folders]
        files = []
        labels = []
        for label, folder in enumerate(folders):
            found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in self.endings)
            if not found:
                endings = " ".join(sorted(self.endings))
                raise SystemExit(f"{folder}: no pictures in this folder (it takes {endings})")
            files += found
            labels += [label] * len(found)
        self.names = "\n".join(map(str, files))
        keep = choose(len(files), count)
        self.files = [files[i] for i in keep]
        self.labels = np.array(labels)[keep]

    def read(self, i):
        # A damaged picture can fail in any way.
        try:
            image = center_crop(read_rgb(self.files[i]), self.size)
        except Exception as error:
            return f"{self.files[i]}: {error}"
        return np.asarray(image).transpose(2, 0, 1)


def read_idx(root, name):
    """The uint8 array in the MNIST-family file `name`, gz or not, of the folder `root`."""
    path = next(iter(sorted(root.glob(f"{name}*ubyte*"))), None)
    if not path:
        raise SystemExit(f"{root}: there is no file {name}-ubyte or {name}-ubyte.gz")
    with reading(path, "readable idx file"):
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        axes = data[3]
        shape = np.frombuffer(data, ">u4", axes, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


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
        self.classes = [str(k) for k in range(labels.max() + 1)]
        if "fashion" in str(root).lower() and len(self.classes) <= 10:
            self.classes = self.clothes
        keep = choose(len(labels), count)
        self.images = images[keep]
        self.labels = labels[keep].astype(np.int64)

    def read(self, i):
        image = self.images[i]
        if max(image.shape) > self.size:
            image = np.asarray(center_crop(Image.fromarray(image), self.size))
        # The rows and columns that are missing are split between both sides.
        rows, columns = (self.size - side for side in image.shape)
        edges = ((rows // 2, (rows + 1) // 2), (columns // 2, (columns + 1) // 2))
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
    def distances(x, y):
        """Signed distances of points to the outlines of all classes; inside they are negative."""
        r = np.hypot(x, y)
        ax, ay = abs(x), abs(y)
        intersect, unite = np.maximum, np.minimum
        # Folding maps the ten edges of the star to one, from the tip (0, 1) to 0.42 (px, py).
        fold = abs(np.arctan2(x, y) % (2 * pi / 5) - pi / 5)
        px, py = cos(pi / 5), sin(pi / 5)
        star = (r * np.cos(fold) - 0.42) * py - r * np.sin(fold) * (px - 0.42)
        upright = intersect(ax - 0.28, ay - 0.9)
        level = intersect(ax - 0.9, ay - 0.28)
        round_tops = np.hypot(ax - 0.4, y - 0.3) - 0.566
        shaft = intersect(ax - 0.22, abs(y + 0.4) - 0.5)
        tip = intersect((ax + y - 0.9) / 1.414, -y)
        # In the order of `classes`.
        return [
            r - 0.85,
            abs(r - 0.67) - 0.22,
            intersect(ax, ay) - 0.75,
            intersect(0.866 * ax + 0.5 * y, -y) - 0.5,
            star / hypot(px - 0.42, py),
            unite(upright, level),
            unite((ax + abs(y + 0.1) - 0.8) / 1.414, round_tops),
            intersect(r - 0.9, 0.72 - np.hypot(x - 0.5, y)),
            unite(shaft, tip),
            intersect(ay - 0.85, (ax - 0.95 * ay - 0.05) / 1.38),
        ]

    def read(self, i):
        u = np.random.Generator(np.random.Philox(key=[self.seed, i])).random(16)
        axis = (np.arange(self.size) + 0.5) / self.size * 2 - 1
        X, Y = axis[None, :], -axis[:, None]
        # The pixels as the shape sees them: moved, scaled, turned.
        radius = 0.68 + 0.22 * u[0]
        turn = 0.4 * (u[1] - 0.5)
        dx = (X - 0.2 * (u[2] - 0.5)) / radius
        dy = (Y - 0.2 * (u[3] - 0.5)) / radius
        x = dx * cos(turn) + dy * sin(turn)
        y = dy * cos(turn) - dx * sin(turn)
        # How much of every pixel the shape covers: its edge is one pixel wide.
        distance = self.distances(x, y)[self.labels[i]]
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
    """The pictures of `data`, "shapes" or a folder, of split "train" or "test" (the held-out ones).
    size is their height and width, count how many; None: all (of the endless shapes 10,000)."""
    root = Path(data)
    where = str(root.resolve())
    if data == "shapes":
        source = Shapes(split, size, count or 10000)
        where = data
    elif not root.is_dir():
        raise SystemExit(f"--data {data}: no such folder; give a folder of pictures, or shapes")
    elif any(root.glob("*idx?-ubyte*")):
        source = Idx(root, split, size, count)
    else:
        source = Folder(root, split, size, count)
    source.made_from = dict(data=where, split=split, size=size, pictures=len(source.labels))
    # The same number of files under other names is another data set.
    if isinstance(source, Folder):
        source.made_from["names"] = hashlib.sha256(source.names.encode()).hexdigest()[:16]
    return source


def read_all(source):
    """All pictures that can be read, uint8 (n, 3, H, W), and their labels (n,)."""
    n = len(source.labels)
    with ThreadPoolExecutor() as threads:
        found = list(tqdm(threads.map(source.read, range(n)), "pictures", n, leave=False))
    report_skipped(source, [picture for picture in found if isinstance(picture, str)])
    good = [i for i in range(n) if not isinstance(found[i], str)]
    return np.stack([found[i] for i in good]), source.labels[good]


def report_skipped(source, skipped):
    """Print why pictures cannot be read. SystemExit if none can be."""
    n = len(source.labels)
    if len(skipped) == n:
        raise SystemExit(f"{source.made_from['data']}: none of its {n} pictures could be read")
    if skipped:
        print(f"skipped {len(skipped)} unreadable of {n} pictures:", *skipped, sep="\n  ")


@contextmanager
def reading(path, what):
    """Whatever goes wrong inside ends the program with one line: PATH: not a WHAT: reason."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"missing {reason}"
        raise SystemExit(f"{path}: not a {what}: {reason}") from None


def differences(was, now):
    """A text for every entry in which two dicts differ, also in dicts within them."""
    for name in was | now:
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new)
        elif old != new:
            yield f"{name} {old}, not {new}"


def check_same(path, was, now):
    """SystemExit naming what differs between two dicts that say how `path` was made."""
    # Tuples become lists, as in files.
    different = "; ".join(differences(*json.loads(json.dumps([was, now]))))
    if different:
        raise SystemExit(f"{path} was made with {different}: choose another --runs or --out "
                         "folder, or remove it")


def make_folder(folder):
    """Make the folder and those above it. SystemExit where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{folder} cannot be a folder: {error}") from None


def write_whole(path, write):
    """Write a file by write(file), whole or not at all. SystemExit where it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    make_folder(path.parent)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    # On a full disk torch.save raises a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{path} cannot be written: {error}") from None
    finally:
        if temporary.is_file():
            temporary.unlink()


def write_json(path, value):
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def read_json(path):
    """What write_json wrote, or {} if there is no such file."""
    with reading(path, "readable note; remove it"):
        return json.loads(path.read_text()) if path.is_file() else {}


def fingerprint(module):
    """16 hexadecimal digits that tell the weights of a module from others."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode(pictures, vae, vq, device, mirror):
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
    rows = dict(moments=moments, indices=indices)
    return {name: row.unflatten(0, (-1, len(views))).cpu().numpy() for name, row in rows.items()}


def cache_tokens(folder, source, vae, vq, device, batch=None):
    """Stage cache: Eq. (7) for every picture, in moments.npy and indices.npy; see `encode`.

    status.npy holds 0 for a picture to do, 1 for one done and 2 for an unreadable one, so that a
    killed run goes on. meta.json holds the mean and deviation of x_c.
    SystemExit if the folder was made from other pictures or tokenizers.
    """
    made_from = source.made_from | dict(vae=fingerprint(vae), vq=fingerprint(vq))
    meta = read_json(folder / "meta.json")
    n = len(source.labels)
    if not meta:
        make_folder(folder)
        # The row of a black picture tells the types and shapes.
        black = np.zeros((1, 3, source.size, source.size), np.uint8)
        row = encode(black, vae, vq, device, source.mirror) | dict(status=np.zeros(1, np.uint8))
        for name, value in row.items():
            shape = (n, *value.shape[1:])
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", value.dtype, shape)
        np.save(folder / "labels.npy", source.labels)
        meta = dict(made_from=made_from, classes=source.classes, complete=False)
        write_json(folder / "meta.json", meta)
    check_same(folder, meta["made_from"], made_from)
    if "mean" in meta:
        return
    files = {path.stem: np.load(path, mmap_mode="r+") for path in folder.glob("*.npy")}
    status = files["status"]
    skipped = []
    batch = batch or 2 ** 19 // source.size ** 2
    with ThreadPoolExecutor() as threads:
        for start in tqdm(range(0, n, batch), "tokens", unit="batch"):
            rows = start + np.flatnonzero(status[start:start + batch] != 1)
            pictures = dict(zip(rows, threads.map(source.read, rows)))
            skipped += [picture for picture in pictures.values() if isinstance(picture, str)]
            good = [i for i in rows if not isinstance(pictures[i], str)]
            if good:
                x = np.stack([pictures[i] for i in good])
                for name, value in encode(x, vae, vq, device, source.mirror).items():
                    files[name][good] = value
            # The status comes last, when the rows themselves are there.
            status[rows] = 2
            status[good] = 1
    if (status == 0).any():
        raise SystemExit(f"{folder}: another program was filling it, too; start again")
    report_skipped(source, skipped)
    mean, std = statistics(files["moments"], np.flatnonzero(status == 1))
    bits = vq.quantize.codebook.shape[1]
    meta |= dict(complete=True, skipped=skipped, mean=mean, std=std, bits=bits)
    write_json(folder / "meta.json", meta)


def statistics(moments, rows):
    """Mean and deviation of every channel of x_c, of up to 10,000 pictures.   [VA-VAE]"""
    rows = np.sort(np.random.RandomState(0).permutation(rows)[:10000])
    mean, logvar = torch.tensor(moments[rows, 0]).float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    x_c = reparameterize(mean, (0.5 * logvar).exp(), noise)          # (n, d_c, h, w)
    std, mean = torch.std_mean(x_c, (0, 2, 3))
    return mean.tolist(), std.tolist()


class Tokens:
    """The token cache in `folder`: x_c and x_d of n pictures with `labels` (n,) in `classes`."""

    def __init__(self, folder):
        with reading(folder, "complete token cache; remove it to make it again"):
            meta = read_json(folder / "meta.json")
            self.made_from = meta["made_from"]
            self.classes = meta["classes"]
            self.bits = meta["bits"]
            self.mean = torch.tensor(meta["mean"])
            self.std = torch.tensor(meta["std"])
            self.moments = np.load(folder / "moments.npy", mmap_mode="r")
            self.indices = np.load(folder / "indices.npy", mmap_mode="r")
            self.rows = np.flatnonzero(np.load(folder / "status.npy") == 1)
            self.labels = np.load(folder / "labels.npy")[self.rows]
        self.n = len(self.rows)
        self.N = self.indices[0, 0].size
        self.d_c = len(self.mean)

    def batch(self, pictures, rng):
        """The tokens of `pictures`, (B,) numbers below n, or of their mirror images, at random.

        Returns the normalised posterior's mean and deviation (B, N, d_c), x_d (B, N, d_d), y (B,).
        """
        rows = self.rows[pictures]
        view = (rng(torch.rand).cpu().numpy() * self.indices.shape[1]).astype(int)
        moments = torch.tensor(self.moments[rows, view]).float()     # (B, 2 d_c, h, w)
        mean, logvar = moments.flatten(2).transpose(1, 2).chunk(2, dim=2)
        mean = (mean - self.mean) / self.std                         # (B, N, d_c)
        std = (0.5 * logvar).exp() / self.std
        codes = torch.tensor(self.indices[rows, view]).flatten(1)    # (B, N)
        x_d = codes_to_bits(codes[..., None], self.bits)             # (B, N, d_d)
        return mean, std, x_d, torch.tensor(self.labels[pictures])
