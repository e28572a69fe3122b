"""Eq. (7): x_c = VAE(I), x_d = VQVAE(I); the images I themselves and the cache of their tokens.

`KLVAE` is the continuous tokenizer (VA-VAE, KL-16), `BitVQ` the discrete one (MaskBit's lookup-free
bit tokens), both of the same parts; sample.py gives official files our parameter names. Images come from
the embedded set `shapes`, from class folders or from MNIST-family files. `Tokens` is the cache the training reads.

Reads files, feeds mixing.py, train.py, sample.py and fid.py. Read mixing.py next.
Try: python train.py --stage vae        (and look at runs/shapes/vae/reconstructions.png)
(Run from this folder, this module stands before the Hugging Face package of the same name.)

B batch, n images, h x w token grid, N = h * w, d_c channels of x_c, d_d bits of x_d.
"""
import colorsys
import gzip
import hashlib
import json
import os
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu
from torch.nn.functional import pad as zero_pad
from tqdm import tqdm

# ------------------------------------------------------------------ files: saved whole or not at all


def write_whole(path, write):
    """Call write(file) on a temporary file beside `path`, then rename it: a killed run leaves no half file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def fingerprint(module):
    """16 hexadecimal digits of the weights."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------ both autoencoders


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def set_groups(model, groups):
    """Other than the official 32 groups: at width 32 a group would be one channel and its norm would erase the picture's mean colour."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = groups


class ResBlock(nn.Module):
    """norm, silu, 3x3 convolution, twice, beside a shortcut.

    Where the width changes, the KL-VAE projects the block's input; MaskBit projects the block's own
    OUTPUT and leaves the input out, as its released weights expect.
    """

    def __init__(self, c_in, c_out, maskbit):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1, bias=not maskbit)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1, bias=not maskbit)
        self.maskbit = maskbit
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_out if maskbit else c_in, c_out, 1, bias=not maskbit)

    def forward(self, x):
        u = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        if hasattr(self, "nin_shortcut"):
            return u + self.nin_shortcut(u if self.maskbit else x)
        return u + x


class AttnBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))   # (B, 1, hw, c)
        y = scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(y)


class Halve(nn.Conv2d):
    """Stride 2; zeros right and bottom only, and with MaskBit (TensorFlow's SAME) on both sides of an odd size."""

    def __init__(self, c, maskbit):
        super().__init__(c, c, 3, stride=2)
        self.maskbit = maskbit

    def forward(self, x):
        top, left = (side % 2 * self.maskbit for side in x.shape[-2:])
        return super().forward(zero_pad(x, (left, 1, top, 1)))


class Double(nn.Conv2d):
    def __init__(self, c, maskbit):
        super().__init__(c, c, 3, padding=1)

    def forward(self, x):
        return super().forward(interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, the first `attn` of them followed by attention, then Halve, Double or nothing."""

    def __init__(self, c_in, c_out, blocks, attn, maskbit, resize=None):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out, maskbit) for j in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(attn))
        self.resize = resize(c_out, maskbit) if resize else nn.Identity()

    def forward(self, x):
        for j, block in enumerate(self.block):
            x = self.attn[j](block(x)) if j < len(self.attn) else block(x)
        return self.resize(x)


class Encoder(nn.Sequential):
    """Pictures (B, 3, H, W) -> (B, out, h, w); widths: channels per level, each level but the last halves the picture.

    maskbit: MaskBit's encoder, else the KL-VAE's, which has attention at the lowest level and in the middle.
    """

    def __init__(self, widths, blocks, out, maskbit):
        c, last = widths[-1], len(widths) - 1
        down = (Level(widths[max(i - 1, 0)], width, blocks, blocks * (i == last and not maskbit), maskbit, Halve if i < last else None)
                for i, width in enumerate(widths))
        super().__init__(OrderedDict(
            conv_in=nn.Conv2d(3, widths[0], 3, padding=1, bias=not maskbit), down=nn.Sequential(*down),
            mid=Level(c, c, blocks if maskbit else 2, 0 if maskbit else 1, maskbit),
            norm_out=norm(c), silu=nn.SiLU(), conv_out=nn.Conv2d(c, out, 1) if maskbit else nn.Conv2d(c, out, 3, padding=1)))


class Decoder(nn.Sequential):
    """(B, z, h, w) -> pictures (B, 3, H, W); up[0] is the lowest resolution. attn: attention there, too, not only in the middle.

    The KL-VAE's decoder has one block more per level than its encoder, MaskBit's has not.
    """

    def __init__(self, widths, blocks, z, attn, maskbit):
        widths, last, count = widths[::-1], len(widths) - 1, blocks if maskbit else blocks + 1
        up = (Level(widths[max(i - 1, 0)], width, count, count * (i == 0 and attn), maskbit, Double if i < last else None)
              for i, width in enumerate(widths))
        super().__init__(OrderedDict(
            conv_in=nn.Conv2d(z, widths[0], 3, padding=1), mid=Level(widths[0], widths[0], blocks if maskbit else 2, 0 if maskbit else 1, maskbit),
            up=nn.Sequential(*up), norm_out=norm(widths[-1]), silu=nn.SiLU(), conv_out=nn.Conv2d(widths[-1], 3, 3, padding=1)))


# ------------------------------------------------------------------ x_c: the KL-VAE (VA-VAE, KL-16)


class KLVAE(nn.Module):
    """x_c = VAE(I) of Eq. (7).   [VA-VAE] [MAR]

    width and mult give the channels per level, each level after the first halves the picture; `attn`
    puts attention at the decoder's lowest level (VA-VAE has it, KL-16 not).
    """

    def __init__(self, width, mult, blocks, z, attn=True, groups=32):
        super().__init__()
        widths = [width * k for k in mult]
        self.encoder, self.decoder = Encoder(widths, blocks, 2 * z, maskbit=False), Decoder(widths, blocks, z, attn, maskbit=False)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)
        set_groups(self, groups)

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> posterior mean and log variance in [-30, 20], each (B, z, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (B, z, h, w) -> images (B, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


def reparameterize(mean, logvar, eps):
    """A posterior sample from the given standard normal draw, all (B, z, h, w)."""
    return mean + (0.5 * logvar).exp() * eps


def kl_to_normal(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)) summed over each image.   (B, z, h, w) -> (B,)"""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


# ------------------------------------------------------------------ x_d: the bit tokenizer (MaskBit)


class BitVQ(nn.Module):
    """x_d = VQVAE(I) of Eq. (7): every token is `bits` signs, no codebook is learned.   [MaskBit]"""

    def __init__(self, width, mult, blocks, bits, groups=32):
        super().__init__()
        widths = [width * k for k in mult]
        self.encoder, self.decoder = Encoder(widths, blocks, bits, maskbit=True), Decoder(widths, blocks, bits, attn=False, maskbit=True)
        self.quantize = nn.Module()
        powers = 2 ** torch.arange(bits, dtype=torch.int32)
        self.quantize.register_buffer("bits_to_indices", powers)
        self.quantize.register_buffer("codebook", to_bits(torch.arange(2 ** bits), bits))
        set_groups(self, groups)

    def encode(self, images):
        """images (B, 3, H, W) in [0, 1] -> z (B, bits, h, w) before quantisation."""
        return self.encoder(images)

    def decode(self, x_d):
        """bits (B, bits, h, w) in {-1, +1} -> images (B, 3, H, W), about [0, 1]."""
        return self.decoder(x_d)


def quantise(z):
    """The sign of every channel, zero giving -1; any shape."""
    return torch.where(z > 0, 1.0, -1.0)


def to_indices(x_d):
    """bits (..., K) -> int64 (...), channel 0 least significant."""
    return ((x_d > 0).long() << torch.arange(x_d.shape[-1], device=x_d.device)).sum(-1)


def to_bits(indices, bits):
    """int (...) -> float (..., bits) in {-1, +1}, channel 0 least significant."""
    return (indices[..., None].long() >> torch.arange(bits, device=indices.device) & 1).float() * 2 - 1


def quantiser_losses(z, codebook, all_mean=lambda q: q):
    """Commitment loss, per-sample entropy and average entropy of the lookup-free quantiser.   [MaskBit]

    z (B, K, h, w), codebook (2^K, K) -> three scalars; the training loss is
    commitment + 0.02 * (per_sample - average). all_mean averages q, the codes' use, over ranks.
    """
    commitment = 0.25 * (quantise(z) - z).square().mean()
    logits = 2 * z.float().movedim(1, -1).flatten(0, -2) @ codebook.T / 0.01                     # (B h w, 2^K)
    p = logits.softmax(-1)
    q = all_mean(p.mean(0))
    per_sample = -(p * p.clamp(min=1e-5).log()).sum(-1).mean()
    return commitment, per_sample, -(q * q.clamp(min=1e-5).log()).sum()


# ------------------------------------------------------------------ images


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


EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class Folder:
    """Class folders of pictures: DIR/class/picture. With DIR/train and DIR/val (or test) these are the splits."""

    mirror = True                                                            # horizontal flips are cached too [MAR]

    def __init__(self, root, split, size):
        parts = {"train": ("train",), "test": ("val", "test")}[split]
        sub = [Path(root) / part for part in parts if (Path(root) / part).is_dir()]
        if not sub and split == "test":
            raise LookupError(f"{root}: no held-out pictures (no folder val or test)")
        root, self.size = (sub or [Path(root)])[0], size
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        self.files, labels = [], []
        for label, name in enumerate(self.classes):
            files = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in EXTENSIONS)
            if not files:
                raise SystemExit(f"{root / name}: this class folder holds no pictures; remove it or fill it")
            self.files += files
            labels += [label] * len(files)
        if not self.files:
            raise SystemExit(f"{root}: no class folders with pictures and no MNIST-family idx files found")
        self.labels = np.array(labels)

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
        shape = np.frombuffer(data, ">u4", data[3], 4)
        return np.frombuffer(data, np.uint8, int(np.prod(shape)), 4 + 4 * data[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise SystemExit(f"{path}: not a readable idx file ({error})") from None


class Idx:
    """MNIST-family files, grey pictures padded to `size` (or resized where larger)."""

    mirror = False                                                           # digits and shoes point one way

    def __init__(self, root, split, size):
        prefix = {"train": "train", "test": "t10k"}[split]
        found = [sorted(Path(root).glob(f"{prefix}-{what}*ubyte*")) for what in ("images", "labels")]
        if not any(found) and split == "test":
            raise LookupError(f"{root}: no held-out pictures (no t10k files)")
        if not all(found):
            raise SystemExit(f"{root}: needs {prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte (.gz or not)")
        self.images, self.labels = (read_idx(paths[0]) for paths in found)
        if self.images.ndim != 3 or len(self.images) != len(self.labels):
            raise SystemExit(f"{found[0][0]}: {self.images.shape} pictures for {self.labels.shape} labels")
        names = ("t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
                 if "fashion" in str(root).lower() else [str(k) for k in range(int(self.labels.max()) + 1)])
        self.classes, self.size, self.labels = names, size, self.labels.astype(np.int64)

    def read(self, i):
        image, edge = self.images[i], self.size - max(self.images.shape[1:])
        if edge < 0:
            image = np.asarray(center_crop(Image.fromarray(image), self.size))
        rest = [(s // 2, s - s // 2) for s in (self.size - image.shape[0], self.size - image.shape[1])]
        return np.broadcast_to(np.pad(image, rest), (3, self.size, self.size))


class Shapes:
    """The embedded set: ten classes of shapes drawn from signed distance functions; image i of a split
    is a function of (split, i). Colours, pose, gradient and stripes are continuous: more than bits keep.   [ours]
    """

    classes = "disc ring square triangle star plus heart moon arrow hourglass".split()
    mirror = False

    def __init__(self, split, size, count):
        self.seed, self.size, self.labels = {"train": 0, "test": 1}[split], size, np.arange(count) % 10

    @staticmethod
    def distance(label, x, y):
        """Signed distance of the points (x, y) to the outline of the shape, which fills about [-1, 1]^2; inside < 0."""
        r, ax, ay = np.hypot(x, y), abs(x), abs(y)
        if label == 4:                                                       # star: one edge of ten, the rest by folding
            fold = abs(np.arctan2(x, y) % (2 * np.pi / 5) - np.pi / 5)
            (px, py), q = (math.cos(np.pi / 5), math.sin(np.pi / 5)), 0.42
            return ((r * np.cos(fold) - q) * py - r * np.sin(fold) * (px - q)) / math.hypot(px - q, py)
        return [lambda: r - 0.85, lambda: abs(r - 0.67) - 0.22, lambda: np.maximum(ax, ay) - 0.75,
                lambda: np.maximum(0.866 * ax + 0.5 * y, -y) - 0.5, None,
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
    """The pictures of `data` ("shapes" or a folder), at most `count`.

    An object with labels (n,) int64, classes, mirror and read(i) -> uint8 (3, size, size) or the reason
    why not as text. SystemExit with one line if there is no such data, LookupError if it has no test split.
    """
    if data == "shapes":
        return Shapes(split, size, count or 10000)
    if not Path(data).is_dir():
        raise SystemExit(f"--data {data}: no such folder; give class folders, MNIST-family idx files, or shapes")
    source = (Idx if list(Path(data).glob("*-idx*ubyte*")) else Folder)(data, split, size)
    keep = np.random.RandomState(0).permutation(len(source.labels))[:count] if count else np.arange(len(source.labels))
    source.read, source.labels = (lambda i, read=source.read: read(keep[i])), source.labels[keep]
    return source


class Images:
    """All pictures of a split as one memory-mapped array, decoded once into `folder`.

    pixels uint8 (n, 3, size, size), labels int64 (n,), classes, mirror. Unreadable pictures are named, counted
    and left out.
    """

    def __init__(self, folder, data, split, size, count=None, write=True):
        folder, made_from = Path(folder), dict(data=data if data == "shapes" else str(Path(data).resolve()), split=split, size=size, count=count)
        if write and not (folder / "meta.json").is_file():
            self.decode(folder, open_source(data, split, size, count), made_from)
        meta = json.loads((folder / "meta.json").read_text())
        if meta["made_from"] != made_from:
            raise SystemExit(f"{folder} holds the pictures of {meta['made_from']}, not of {made_from}; choose another --runs folder")
        self.labels = np.load(folder / "labels.npy")
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")[:len(self.labels)]           # sized for the unreadable ones too
        self.classes, self.mirror = meta["classes"], meta["mirror"]

    @staticmethod
    def decode(folder, source, made_from):
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.lib.format.open_memmap(folder / "pixels.npy", "w+", np.uint8, (len(source.labels), 3, made_from["size"], made_from["size"]))
        labels, skipped = [], []
        for i in tqdm(range(len(source.labels)), desc=f"{made_from['split']} pictures", unit="img", leave=False):
            picture = source.read(i)
            if isinstance(picture, str):
                skipped.append(picture)
                continue
            pixels[len(labels)] = picture
            labels.append(source.labels[i])
        if skipped:
            print(f"skipped {len(skipped)} unreadable of {len(source.labels)} pictures:", *skipped, sep="\n  ")
        if not labels:
            raise SystemExit(f"{made_from['data']}: none of its {len(skipped)} pictures could be read")
        pixels.flush()
        np.save(folder / "labels.npy", np.array(labels))
        meta = dict(made_from=made_from, classes=source.classes, mirror=source.mirror, skipped=skipped)
        write_whole(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))


# ------------------------------------------------------------------ the token cache


@torch.no_grad()
def cache_tokens(folder, images, vae, vq, device, batch=256):
    """Eq. (7) for every picture (and its mirror image where images.mirror): posterior moments float16, bits as indices.

    Writes moments.npy (F, n, 2 d_c, h, w), indices.npy (F, n, h, w), F = 1 or 2, and meta.json last.
    The latents' mean and deviation per channel are those of posterior samples [VA-VAE].
    """
    folder, n, sums = Path(folder), len(images.labels), 0
    folder.mkdir(parents=True, exist_ok=True)
    moments = indices = None
    for start in tqdm(range(0, n, batch), desc="token cache", unit="batch", leave=False):
        pixels = torch.tensor(images.pixels[start:start + batch]).to(device).float() / 255
        for f, x in enumerate([pixels, pixels.flip(3)][:1 + images.mirror]):
            mean, logvar = (a.float() for a in vae.encode(x * 2 - 1))
            index = to_indices(quantise(vq.encode(x)).movedim(1, -1))
            if moments is None:
                shape = (1 + images.mirror, n)
                moments = np.lib.format.open_memmap(folder / "moments.npy", "w+", np.float16, (*shape, 2 * mean.shape[1], *mean.shape[2:]))
                indices = np.lib.format.open_memmap(folder / "indices.npy", "w+", np.int32, (*shape, *index.shape[1:]))
            moments[f, start:start + batch] = torch.cat([mean, logvar], dim=1).cpu().numpy()
            indices[f, start:start + batch] = index.cpu().numpy()
            sums = sums + torch.stack([mean.double(), mean.double().square() + logvar.double().exp()]).sum((1, 3, 4))
    moments.flush(), indices.flush()
    average, square = sums / indices.size                                    # of posterior samples, (d_c,) each
    meta = dict(vae=fingerprint(vae), vq=fingerprint(vq), mean=average.tolist(), std=(square - average ** 2).sqrt().tolist(), bits=vq.quantize.codebook.shape[1])
    write_whole(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))


class Tokens:
    """The cache of `cache_tokens`. SystemExit if other tokenizers than `vae`, `vq` made it."""

    def __init__(self, folder, vae, vq):
        self.meta = json.loads((Path(folder) / "meta.json").read_text())
        found, expected = (self.meta["vae"], self.meta["vq"]), (fingerprint(vae), fingerprint(vq))
        if found != expected:
            raise SystemExit(f"{folder} was made by tokenizers {found}, not by {expected}; remove it to make it again")
        self.moments, self.indices = (np.load(Path(folder) / name, mmap_mode="r") for name in ("moments.npy", "indices.npy"))
        self.mean, self.std = torch.tensor(self.meta["mean"]), torch.tensor(self.meta["std"])
        self.F, self.n = self.moments.shape[:2]

    def __getitem__(self, index):
        """index (flip (B,), picture (B,)) -> mean, deviation (B, N, d_c), normalised, and bits x_d (B, N, d_d)."""
        flip, picture = index
        mean, logvar = torch.tensor(self.moments[flip, picture]).float().flatten(2).transpose(1, 2).chunk(2, dim=2)
        x_d = to_bits(torch.tensor(self.indices[flip, picture]).flatten(1), self.meta["bits"])
        return (mean - self.mean) / self.std, (0.5 * logvar).exp() / self.std, x_d
