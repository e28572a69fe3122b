"""Eq. (7): x_c = VAE(I), x_d = VQVAE(I); the images I themselves and the cache of their tokens.

`KLVAE` is the continuous tokenizer (VA-VAE, KL-16), `BitVQ` the discrete one (MaskBit's lookup-free
bit tokens), both of the same parts; backbone.py gives official files our parameter names. Images come from
the embedded set `shapes`, from class folders or from MNIST-family files. `Tokens` is the cache the training reads.

Reads files and mixing.py, feeds train.py, sample.py and fid.py. Read mixing.py next.
Try: python train.py --stage vae        (and look at runs/shapes/vae/reconstructions.png)
(Run from this folder, this module stands before the Hugging Face package of the same name.)

B batch, n images, h x w token grid, N = h * w, d_c channels of x_c, d_d bits of x_d.
"""
import colorsys
import gzip
import hashlib
import json
import math
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu
from tqdm import tqdm

def reparameterize(mean, std, noise):
    """Eq. (7): x_c as a sample of the VAE's posterior, from standard normal noise; all of one shape."""
    return mean + std * noise


def kl_to_normal(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)) summed over each image.   (B, z, h, w) -> (B,)"""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


def bits_to_codes(bits):
    """bits (..., e) in {-1, +1} -> int64 (...), the first least significant.   [MaskBit]"""
    return ((bits > 0).long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def codes_to_bits(codes, e):
    """Codes of e bits each, least significant first, as -1/+1; the mask code 2^e gives zeros.   [MaskBit]

    codes (B, N, S) int in 0..2^e -> (B, N, S * e) float.
    """
    bits = (codes[..., None] >> torch.arange(e, device=codes.device) & 1).float() * 2 - 1
    return torch.where(codes[..., None] == 2 ** e, 0.0, bits).flatten(-2)


def quantise(z):
    """The sign of every channel, zero giving -1; any shape."""
    return torch.where(z > 0, 1.0, -1.0)


def quantiser_losses(z, codebook, all_mean=lambda q: q):
    """Commitment loss, per-sample entropy and average entropy of the lookup-free quantiser.   [MaskBit]

    z (B, d_d, h, w), codebook (2^d_d, d_d) -> three scalars; the training loss is
    commitment + 0.02 * (per_sample - average). all_mean averages q, the codes' use, over ranks.
    """
    z = z.float()
    commitment = 0.25 * (quantise(z) - z).square().mean()
    with torch.autocast(z.device.type, enabled=False):                       # the division by 0.01 would make much of bf16's rounding
        logits = 2 * z.movedim(1, -1).flatten(0, -2) @ codebook.T / 0.01     # (B h w, 2^d_d)
    p = logits.softmax(-1)
    q = all_mean(p.mean(0))
    per_sample = -(p * p.clamp(min=1e-5).log()).sum(-1).mean()
    return commitment, per_sample, -(q * q.clamp(min=1e-5).log()).sum()


norm = partial(nn.GroupNorm, eps=1e-6)                                       # groups, channels


class ResBlock(nn.Module):
    """norm, silu, 3x3 convolution, twice, beside a shortcut.

    Where the width changes, the KL-VAE projects the block's input; MaskBit projects the block's own
    OUTPUT and leaves the input out, as its released weights expect.
    """

    def __init__(self, c_in, c_out, maskbit, groups):
        super().__init__()
        self.norm1, self.conv1 = norm(groups, c_in), nn.Conv2d(c_in, c_out, 3, padding=1, bias=not maskbit)
        self.norm2, self.conv2 = norm(groups, c_out), nn.Conv2d(c_out, c_out, 3, padding=1, bias=not maskbit)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_out if maskbit else c_in, c_out, 1, bias=not maskbit)
        self.projects_output = maskbit and c_in != c_out

    def forward(self, x):
        u = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return u + self.nin_shortcut(u if self.projects_output else x)


class AttnBlock(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(groups, c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (f(normed).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))   # (B, 1, hw, c)
        y = scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(y)


class Level(nn.Module):
    """One resolution: residual blocks, the first `attn` of them followed by attention, then a step to half or double size, or none.

    Halving pads right and bottom only, with MaskBit (TensorFlow's SAME) both sides where the size is odd.
    """

    def __init__(self, c_in, c, blocks, attn, maskbit, groups, resize=None):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if j == 0 else c, c, maskbit, groups) for j in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c, groups) if j < attn else nn.Identity() for j in range(blocks))
        self.resize = nn.Conv2d(c, c, 3, stride=2 if resize == "halve" else 1, padding=1 if resize == "double" else 0) if resize else nn.Identity()
        self.maskbit, self.how = maskbit, resize

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        if self.how == "halve":
            top, left = (side % 2 * self.maskbit for side in x.shape[-2:])
            x = pad(x, (left, 1, top, 1))
        elif self.how == "double":
            x = interpolate(x, scale_factor=2.0, mode="nearest")
        return self.resize(x)


def autoencoder(width, mult, blocks, out, z, attn, maskbit, groups):
    """Encoder, pictures (B, 3, H, W) -> (B, out, h, w), and decoder, (B, z, h, w) -> pictures, of the KL-VAE or, with `maskbit`, of MaskBit.

    width * mult: channels per level of the encoder, each but the last halves the picture; the decoder goes back, up[0] is the lowest resolution.
    The KL-VAE has attention in the middle and at the encoder's lowest level, with `attn` at the decoder's, too, and one block more per level there.
    """
    def levels(widths, blocks, attn, resize):
        """A Level per width, each but the last followed by `resize`; attention in the levels with `attn`.   -> nn.Sequential"""
        rows = zip([widths[0], *widths], widths, attn, [resize] * (len(widths) - 1) + [None])
        return nn.Sequential(*(Level(c_in, c, blocks, blocks * attends, maskbit, groups, step) for c_in, c, attends, step in rows))

    widths, plain = [width * k for k in mult], [False] * (len(mult) - 1)     # plain: the levels without attention
    c, middle = widths[-1], (blocks, 0) if maskbit else (2, 1)
    encoder = nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(3, widths[0], 3, padding=1, bias=not maskbit),
        down=levels(widths, blocks, plain + [not maskbit], "halve"),
        mid=Level(c, c, *middle, maskbit, groups), norm_out=norm(groups, c), silu=nn.SiLU(),
        conv_out=nn.Conv2d(c, out, 1) if maskbit else nn.Conv2d(c, out, 3, padding=1)))
    decoder = nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(z, c, 3, padding=1), mid=Level(c, c, *middle, maskbit, groups),
        up=levels(widths[::-1], blocks if maskbit else blocks + 1, [attn] + plain, "double"),
        norm_out=norm(groups, widths[0]), silu=nn.SiLU(), conv_out=nn.Conv2d(widths[0], 3, 3, padding=1)))
    return encoder, decoder


class KLVAE(nn.Module):
    """x_c = VAE(I) of Eq. (7).   [VA-VAE] [MAR]

    width and mult give the channels per level; `attn` puts attention at the decoder's lowest level (VA-VAE has it, KL-16 not).
    groups of the norms: at width 32 each of the official 32 would be one channel, its norm would erase the picture's mean colour.
    """

    def __init__(self, width, mult, blocks, z, attn=True, groups=32):
        super().__init__()
        self.encoder, self.decoder = autoencoder(width, mult, blocks, out=2 * z, z=z, attn=attn, maskbit=False, groups=groups)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)
        nn.init.constant_(self.quant_conv.bias[z:], -5)                      # training starts with little posterior noise [ours]

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> posterior mean and log variance in [-30, 20], each (B, z, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (B, z, h, w) -> images (B, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


class BitVQ(nn.Module):
    """x_d = VQVAE(I) of Eq. (7): every token is `bits` signs, no codebook is learned.   [MaskBit]"""

    def __init__(self, width, mult, blocks, bits, groups=32):
        super().__init__()
        self.encoder, self.decoder = autoencoder(width, mult, blocks, out=bits, z=bits, attn=False, maskbit=True, groups=groups)
        self.quantize = nn.Module()
        self.quantize.register_buffer("bits_to_indices", 2 ** torch.arange(bits, dtype=torch.int32))
        self.quantize.register_buffer("codebook", codes_to_bits(torch.arange(2 ** bits)[:, None], bits))

    def encode(self, images):
        """images (B, 3, H, W) in [0, 1] -> z (B, bits, h, w) before quantisation."""
        return self.encoder(images)

    def decode(self, x_d):
        """bits (B, bits, h, w) in {-1, +1} -> images (B, 3, H, W), about [0, 1]."""
        return self.decoder(x_d)


def center_crop(image, size):
    """ADM's centre crop of a Pillow image: halve with BOX while twice too large, resize BICUBIC, crop.   [MAR]"""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def read_rgb(path):
    """Any picture Pillow reads, as RGB; transparency is laid on white [ours], 16-bit grey scaled to 8."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


class Folder:
    """Class folders of pictures, DIR/class/picture; without folders in it, DIR is one class. With DIR/train and DIR/val (or test) these are the splits."""

    mirror = True                                                            # horizontal flips are cached too [MAR]
    endings = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

    def __init__(self, root, split, size):
        part = next((name for name in dict(train=["train"], test=["val", "test", "train"])[split] if (root / name).is_dir()), ".")
        root, self.held_out, self.size = root / part, part in ("val", "test"), size
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) or [root]
        self.classes = [folder.name for folder in folders]
        files = [sorted(p for p in folder.rglob("*") if p.suffix.lower() in self.endings) for folder in folders]
        if [] in files:
            advice = ", and no MNIST-family idx files" if folders == [root] else "; remove it or fill it"
            raise SystemExit(f"{folders[files.index([])]}: no pictures in this folder{advice}")
        self.files, self.labels = sum(files, []), np.repeat(np.arange(len(files)), [len(some) for some in files])

    def read(self, i):
        """uint8 (3, size, size), or the reason why not as text."""
        try:
            return np.asarray(center_crop(read_rgb(self.files[i]), self.size)).transpose(2, 0, 1)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{self.files[i]}: {error}"


def read_idx(path):
    """An MNIST-family file, gz or not -> uint8 array. SystemExit on anything else."""
    try:
        data = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
        if data[:3] != b"\0\0\x08":
            raise ValueError("it does not hold bytes")
        shape = np.frombuffer(data, ">u4", data[3], 4)
        return np.frombuffer(data, np.uint8, int(np.prod(shape)), 4 + 4 * data[3]).reshape(shape)
    except Exception as error:                                               # a damaged file can fail in any way
        raise SystemExit(f"{path}: not a readable idx file ({error})") from None


class Idx:
    """MNIST-family files, grey pictures padded to `size` (or resized where larger)."""

    mirror = False                                                           # digits and shoes point one way

    def __init__(self, root, split, size):
        self.held_out = split == "test" and any(root.glob("t10k-*ubyte*"))
        prefix = "t10k" if self.held_out else "train"
        found = [sorted(root.glob(f"{prefix}-{what}*ubyte*")) for what in ("images", "labels")]
        if not all(found):
            raise SystemExit(f"{root}: needs {prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte (.gz or not)")
        (self.images, labels), self.size = (read_idx(paths[0]) for paths in found), size
        if self.images.ndim != 3 or labels.shape != self.images.shape[:1] or not len(labels):
            raise SystemExit(f"{found[0][0]}: {self.images.shape} pictures for {labels.shape} labels")
        clothes = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
        self.classes = clothes if "fashion" in str(root).lower() and labels.max() < 10 else [str(k) for k in range(int(labels.max()) + 1)]
        self.labels = labels.astype(np.int64)

    def read(self, i):
        image = self.images[i]
        if max(image.shape) > self.size:
            image = np.asarray(center_crop(Image.fromarray(image), self.size))
        edges = [((self.size - side) // 2, (self.size - side + 1) // 2) for side in image.shape]
        return np.broadcast_to(np.pad(image, edges), (3, self.size, self.size))


class Shapes:
    """The embedded set: ten classes of shapes drawn from signed distance functions; image i of a split
    is a function of (split, i). Colours, pose, gradient and stripes are continuous: more than bits keep.   [ours]
    """

    classes = "disc ring square triangle star plus heart moon arrow hourglass".split()
    mirror, held_out = False, True

    def __init__(self, split, size, count):
        self.seed, self.size, self.labels = {"train": 0, "test": 1}[split], size, np.arange(count) % 10

    @staticmethod
    def distance(label, x, y):
        """Signed distance of the points (x, y) to the outline of the shape, which fills about [-1, 1]^2; inside < 0."""
        r, ax, ay = np.hypot(x, y), abs(x), abs(y)
        fold = abs(np.arctan2(x, y) % (2 * np.pi / 5) - np.pi / 5)           # star: one edge of ten, the rest by folding
        (px, py), q = (math.cos(np.pi / 5), math.sin(np.pi / 5)), 0.42
        return [lambda: r - 0.85, lambda: abs(r - 0.67) - 0.22, lambda: np.maximum(ax, ay) - 0.75,
                lambda: np.maximum(0.866 * ax + 0.5 * y, -y) - 0.5,
                lambda: ((r * np.cos(fold) - q) * py - r * np.sin(fold) * (px - q)) / math.hypot(px - q, py),
                lambda: np.minimum(np.maximum(ax - 0.28, ay - 0.9), np.maximum(ax - 0.9, ay - 0.28)),
                lambda: np.minimum((ax + abs(y + 0.1) - 0.8) / 1.414, np.hypot(ax - 0.4, y - 0.3) - 0.566),
                lambda: np.maximum(r - 0.9, 0.72 - np.hypot(x - 0.5, y)),
                lambda: np.minimum(np.maximum(ax - 0.22, abs(y + 0.4) - 0.5), np.maximum((ax + y - 0.9) / 1.414, -y)),
                lambda: np.maximum(ay - 0.85, (ax - 0.95 * ay - 0.05) / 1.38)][label]()

    def read(self, i):
        """uint8 (3, size, size)."""
        u = np.random.Generator(np.random.Philox(key=[self.seed, i])).random(16)
        colour = lambda h, s, v: np.array(colorsys.hsv_to_rgb(h, s, v))[:, None, None]
        axis = (np.arange(self.size) + 0.5) / self.size * 2 - 1
        X, Y = axis[None, :], -axis[:, None]
        radius, turn = 0.68 + 0.22 * u[0], 0.4 * (u[1] - 0.5)
        dx, dy = (X - 0.2 * (u[2] - 0.5)) / radius, (Y - 0.2 * (u[3] - 0.5)) / radius
        x, y = dx * math.cos(turn) + dy * math.sin(turn), dy * math.cos(turn) - dx * math.sin(turn)
        inside = np.clip(0.5 - self.distance(self.labels[i], x, y) * radius * self.size / 2, 0, 1)
        ramp = (1 + X * math.cos(6.28 * u[4]) + Y * math.sin(6.28 * u[4])) / 2
        ground = colour(u[5], 0.7 * u[6], 0.1 + 0.35 * u[7]) * (1 - ramp) + colour(u[8], 0.7 * u[9], 0.1 + 0.35 * u[10]) * ramp
        stripes = np.sin((6 + 8 * u[11]) * (x * math.cos(3.14 * u[12]) + y * math.sin(3.14 * u[12])))
        figure = colour(u[13], 0.4 + 0.6 * u[14], 0.8) * (1 + 0.25 * u[15] * stripes)
        return ((ground * (1 - inside) + figure * inside).clip(0, 1) * 255).astype(np.uint8)


def open_source(data, split, size, count):
    """The pictures of `data` ("shapes" or a folder), at most `count`; split "train", or "test": those held out, or all if none are.

    An object with labels (n,) int64, classes, mirror, held_out, size, made_from and read(i) -> uint8 (3, size, size) or the
    reason why not as text. SystemExit with one line if there is no such data.
    """
    if data == "shapes":
        source = Shapes(split, size, count or 10000)
    elif not Path(data).is_dir():
        raise SystemExit(f"--data {data}: no such folder; give class folders, MNIST-family idx files, or shapes")
    else:
        source = (Idx if list(Path(data).glob("*idx?-ubyte*")) else Folder)(Path(data), split, size)
        keep = np.random.RandomState(0).permutation(len(source.labels))[:count] if count else np.arange(len(source.labels))
        source.read, source.labels = (lambda i, read=source.read: read(keep[i])), source.labels[keep]
    source.made_from = dict(data=data if data == "shapes" else str(Path(data).resolve()), split=split, size=size, pictures=len(source.labels))
    if hasattr(source, "files"):                                             # other pictures, another cache
        source.made_from["names"] = hashlib.sha256("\n".join(map(str, source.files)).encode()).hexdigest()[:16]
    return source


def write_whole(path, write):
    """Call write(file) on a temporary file beside `path`, then rename it: a killed run leaves no half file. SystemExit where none can be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SystemExit(f"{path} cannot be written: {error}") from None
    finally:
        if temporary.is_file():
            temporary.unlink()


def write_json(path, value):
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def fingerprint(module):
    """16 hexadecimal digits of the weights."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def start_cache(folder, source, make, **made_with):
    """Make the files of a cache: memory-mapped arrays under `folder` with a row per picture of `source`. Returns the dict in meta.json.

    make(uint8 (b, 3, H, W)) -> {name of a file: array (b, ...)}. SystemExit if `folder` was made from something else.
    """
    folder, n, made_from = Path(folder), len(source.labels), source.made_from | made_with
    meta = read_json(folder / "meta.json")
    if meta.get("made_from", made_from) != made_from:
        raise SystemExit(f"{folder} was made from {meta['made_from']}, not from {made_from}; remove it, or choose another --runs folder")
    if not meta:
        folder.mkdir(parents=True, exist_ok=True)
        row = make(np.zeros((1, 3, source.size, source.size), np.uint8))     # types and shapes, from a black picture
        for name, value in (row | {"status": np.zeros(1, np.uint8)}).items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", value.dtype, (n, *value.shape[1:]))    # zeros; takes no space yet
        np.save(folder / "labels.npy", source.labels)
        meta = dict(made_from=made_from, classes=source.classes, complete=False)
        write_json(folder / "meta.json", meta)
    return meta


def fill_cache(folder, source, make, batch, rank=0, ranks=1):
    """Fill process `rank`'s share of the rows. status.npy says 0 for a picture to do, 1 done, 2 unreadable, so a killed run goes on where it was."""
    folder, n = Path(folder), len(source.labels)
    files = {path.stem: np.load(path, mmap_mode="r+") for path in folder.glob("*.npy")}
    starts = tqdm(range(rank * batch, n, ranks * batch), f"{folder.name:6}", unit="img", unit_scale=ranks * batch, disable=rank > 0)
    with ThreadPoolExecutor(max(1, os.cpu_count() // ranks)) as threads:
        for start in starts:
            rows = start + np.flatnonzero(files["status"][start:start + batch] != 1)
            pictures = list(threads.map(source.read, rows))
            good = np.array([not isinstance(picture, str) for picture in pictures], bool)
            if good.any():
                for name, value in make(np.stack([p for p, fine in zip(pictures, good) if fine])).items():
                    files[name][rows[good]] = value
            files["status"][rows] = np.where(good, 1, 2)                     # last, when the rows themselves are there


def finish_cache(folder, source):
    """Note that a cache is complete, and which pictures could not be read. SystemExit if none could."""
    folder, n = Path(folder), len(source.labels)
    status = np.load(folder / "status.npy")
    if (status == 0).any():
        raise SystemExit(f"{folder}: another program was filling it, too; start again")
    skipped = [source.read(i) for i in np.flatnonzero(status == 2)]
    if len(skipped) == n:
        raise SystemExit(f"{source.made_from['data']}: none of its {n} pictures could be read")
    if skipped:
        print(f"skipped {len(skipped)} unreadable of {n} pictures:", *skipped, sep="\n  ")
    write_json(folder / "meta.json", read_json(folder / "meta.json") | dict(complete=True, skipped=skipped))


def read_json(path):
    """What write_json wrote, {} if there is no such file. SystemExit if it is damaged."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise SystemExit(f"{path} is damaged ({error}); remove {path.parent} to make it again") from None


def readable(folder, *names):
    """The files `names` of a cache, and which of their rows hold a picture that could be read."""
    *arrays, status = (np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in (*names, "status"))
    return *arrays, np.flatnonzero(status == 1)


@torch.no_grad()
def encode(pictures, vae, vq, device, mirror):
    """Eq. (7) for pictures (b, 3, H, W) uint8 (and their mirror images): posterior moments as float16, bits as codes.

    -> dict(moments (b, F, 2 d_c, h, w), indices (b, F, h, w)), F = 1 or 2 with the mirror image.
    """
    x, F = torch.tensor(pictures).to(device).float() / 255, 1 + mirror
    x = torch.stack([x, x.flip(3)][:F], dim=1).flatten(0, 1)                 # (b F, 3, H, W)
    moments, index = torch.cat(vae.encode(x * 2 - 1), dim=1), bits_to_codes(quantise(vq.encode(x)).movedim(1, -1))
    return {name: a.unflatten(0, (-1, F)).cpu().numpy() for name, a in (("moments", moments.half()), ("indices", index.int()))}


def write_statistics(folder, bits):
    """Mean and deviation per channel of posterior samples of up to 10,000 pictures [VA-VAE], into meta.json."""
    moments, rows = readable(folder, "moments")
    rows = np.sort(np.random.RandomState(0).permutation(rows)[:10000])
    mean, logvar = torch.tensor(moments[rows, 0]).float().chunk(2, dim=1)
    x_c = reparameterize(mean, (0.5 * logvar).exp(), torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))
    std, mean = torch.std_mean(x_c, (0, 2, 3))                               # (d_c,)
    write_json(Path(folder) / "meta.json", read_json(Path(folder) / "meta.json") | dict(mean=mean.tolist(), std=std.tolist(), bits=bits))


class Tokens:
    """The cache of `cache_tokens`: n pictures in `classes`. SystemExit if it is not complete or not of the tokenizers `vae`, `vq`."""

    def __init__(self, folder, vae, vq):
        self.meta, expected = read_json(Path(folder) / "meta.json"), [fingerprint(vae), fingerprint(vq)]
        if "mean" not in self.meta:
            raise SystemExit(f"{folder}: the token cache is not complete; make it with --stage cache")
        self.made_by = [self.meta["made_from"][kind] for kind in ("vae", "vq")]
        if self.made_by != expected:
            raise SystemExit(f"{folder} was made by tokenizers {self.made_by}, not by {expected}; remove it to make it again")
        self.moments, self.indices, labels, self.rows = readable(folder, "moments", "indices", "labels")
        self.n, self.labels, self.classes = len(self.rows), labels[self.rows], self.meta["classes"]
        self.mean, self.std = torch.tensor(self.meta["mean"]), torch.tensor(self.meta["std"])

    def batch(self, picture, draw):
        """picture (B,) in 0..n-1 -> mean, deviation (B, N, d_c), normalised, x_d (B, N, d_d), y (B,); mirrored where draw(torch.rand) (B,) is 0.5 or more."""
        rows, flip = self.rows[picture], (draw(torch.rand).cpu().numpy() * self.indices.shape[1]).astype(int)
        mean, logvar = torch.tensor(self.moments[rows, flip]).float().flatten(2).transpose(1, 2).chunk(2, dim=2)
        x_d = codes_to_bits(torch.tensor(self.indices[rows, flip]).flatten(1)[..., None], self.meta["bits"])
        return (mean - self.mean) / self.std, (0.5 * logvar).exp() / self.std, x_d, torch.tensor(self.labels[picture])
