"""The pictures I, and the token cache: Eq. (7) for all of them, once.

The pictures are the embedded set `shapes`, class folders or MNIST-family files.

n pictures, B batch, h x w token grid, N = h w tokens, d_c channels of x_c, d_d bits of x_d.
Reads disk.py, tokenizers.py and picture files. Feeds stages, sample, features and fid.py.
Not needed to follow the paper.
Try: python train.py --data DIR --stage cache
"""
import colorsys
import gzip
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from math import cos, hypot, pi, sin
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import disk
import tokenizers


def center_crop(image, size):
    """ADM's centre crop of a Pillow image to size x size.   [MAR]"""
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.BOX)
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = [(side - size) // 2 for side in image.size]
    return image.crop((left, top, left + size, top + size))


def read_rgb(path):
    """Any picture as RGB: transparency is laid on white, 16-bit grey scaled to 8 bits.   [ours]

    ValueError for values of unknown range, and for strips of which a square crop shows little.
    """
    with Image.open(path) as image:
        if image.mode in ("I", "F"):
            raise ValueError("its 32-bit values have no known range; save it with 8 or 16 bits")
        if max(image.size) > 100 * min(image.size):
            raise ValueError(f"a strip of {image.width} x {image.height} pixels")
        # Phones store a picture as the sensor saw it, with a tag that says how to turn it.
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            grey = np.asarray(image, np.float64) / 257
            image = Image.fromarray(grey.astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


# A data set is a class like the three below, and a branch in open_source. It is made from a folder
# (not Shapes), the split "train" or "test", the size of the pictures and how many, None for all:
#     classes, labels    the names of the classes, and the class of every picture, (n,) int64
#     names              a text for every picture that holds its size or a digest, so that another
#                        picture has another text, and not the folder, which may be moved
#     mirror             whether training may mirror the pictures, unless --mirror says otherwise
#     held_out           whether the pictures are held out from training
#     size               height and width of the pictures
#     read(i)            picture i as uint8 (3, size, size), or a text saying why it cannot be read
# open_source adds `data`, the folder, and `skipped`, the names of pictures that cannot be read.


def choose(n, count):
    """`count` picture numbers out of n, at random but always the same; all in order if None."""
    if count is None:
        return np.arange(n)
    return np.random.RandomState(0).permutation(n)[:count]


def hidden(name):
    """Whether a file or folder of this name belongs to an operating system or is hidden."""
    return name[0] in ".@#$" or name in ("__MACOSX", "lost+found")


def printable(path):
    """A path as text, also where its name is not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def files_below(folder):
    """The files below a folder, sorted, without hidden ones. A folder reached twice counts once."""
    found = []
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not hidden(name))
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        found += [Path(place, name) for name in files if not hidden(name)]
    return sorted(found)


def folders_in(folder):
    """The folders in a folder that are not hidden. Names that are numbers are sorted as numbers."""
    found = [path for path in folder.iterdir() if path.is_dir() and not hidden(path.name)]
    numbers = sorted((p for p in found if p.name.isdecimal()), key=lambda p: (int(p.name), p.name))
    return numbers + sorted(path for path in found if not path.name.isdecimal())


def find_split(root, split):
    """The folder with the pictures of a split, and whether it is held out from training.

    `root` holds splits if it has one for training and one held out, or only folders of such names.
    In a folder with bus, car and train, "train" is a class.
    """
    folders = {path.name.lower(): path for path in folders_in(root)}
    train = [folders.pop(name) for name in ("train", "training") if name in folders]
    held_out = [folders.pop(name) for name in "val valid validation dev test testing".split()
                if name in folders]
    both = train and held_out
    only_splits = (train or held_out) and not folders
    if not (both or only_splits):
        return root, False
    if split == "test" and both:
        return held_out[0], True
    return (train + held_out)[0], False


class Folder:
    """Class folders, DIR/class/picture. Without class folders, DIR is one class. See find_split."""

    mirror = True                      # [MAR]

    def __init__(self, root, split, size, count):
        root, self.held_out = find_split(root, split)
        self.size = size
        endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        folders = folders_in(root)
        loose = [path for path in root.iterdir() if path.suffix.lower() in endings]
        if folders and loose:
            raise SystemExit(f"{root}: {len(loose)} pictures, such as {loose[0].name}, lie beside "
                             f"the folder {folders[0].name}; put every picture into a class folder")
        files = []
        labels = []
        others = 0
        for label, folder in enumerate(folders or [root]):
            below = files_below(folder)
            found = [p for p in below if p.suffix.lower() in endings and p.is_file()]
            if not found or "last.pt" in [path.name for path in below]:
                raise SystemExit(f"{folder}: {len(found)} of its {len(below)} files are pictures; "
                                 "a class folder needs some, and no last.pt of a run")
            files += found
            labels += [label] * len(found)
            others += len(below) - len(found)
        if others:
            print(f"{root}: {others} files that are not pictures are left out")
        self.classes = [printable(folder.name) for folder in folders or [root]]
        keep = choose(len(files), count)
        self.files = [files[i] for i in keep]
        self.labels = np.array(labels)[keep]
        self.names = [f"{printable(path.relative_to(root))} {path.stat().st_size}"
                      for path in self.files]

    def read(self, i):
        try:
            image = center_crop(read_rgb(self.files[i]), self.size)
        except Exception as error:
            return f"{printable(self.files[i])}: {error}"
        return np.asarray(image).transpose(2, 0, 1)


def idx_files(root, pattern="*"):
    """The MNIST-family files in a folder, gz or not, with `pattern` before "idx" in their names."""
    return sorted(path for path in root.glob(f"{pattern}idx?-ubyte*") if path.is_file())


def read_idx(root, part, content, axes):
    """The uint8 array, with `axes` axes, of a split ("train") and a kind of content ("images").

    A file name may begin with anything, as in emnist-letters-train-images-idx3-ubyte.
    """
    found = idx_files(root, f"*{part}-{content}?")
    if len({path.name.removesuffix(".gz") for path in found}) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise SystemExit(f"{root}: one file ...{part}-{content}-idx{axes}-ubyte[.gz] is needed, "
                         f"it has {names}")
    with disk.reading(found[0], "readable idx file"):
        data = found[0].read_bytes()
        if found[0].suffix == ".gz":
            data = gzip.decompress(data)
        if data[:4] != bytes([0, 0, 8, axes]):
            raise ValueError(f"it does not hold bytes along {axes} axes")
        shape = np.frombuffer(data, ">u4", axes, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


class Idx:
    """MNIST-family files, as RGB. Pictures are padded with black to `size`, or shrunk to it."""

    mirror = False                     # digits and shoes point one way
    clothes = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
    # How the labels of Fashion-MNIST begin.
    fashion = [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]

    def __init__(self, root, split, size, count):
        held_out = [part for part in ("t10k", "test") if idx_files(root, f"*{part}-labels?")]
        self.held_out = split == "test" and len(held_out) > 0
        self.size = size
        part = held_out[0] if self.held_out else "train"
        images = read_idx(root, part, "images", 3)
        labels = read_idx(root, part, "labels", 1)
        if len(images) != len(labels):
            raise SystemExit(f"{root}: {len(images)} pictures do not fit {len(labels)} labels")
        training = read_idx(root, "train", "labels", 1)
        # The labels of EMNIST's letters begin with 1.
        values = np.union1d(training, labels)
        self.classes = [str(value) for value in values]
        if training[:10].tolist() == self.fashion:
            self.classes = self.clothes
        digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        keep = choose(len(labels), count)
        self.images = images[keep]
        self.labels = np.searchsorted(values, labels[keep])
        self.names = [f"{digest} {i}" for i in keep]

    def read(self, i):
        image = self.images[i]
        if max(image.shape) > self.size:
            image = np.asarray(center_crop(Image.fromarray(image), self.size))
        extra = [self.size - side for side in image.shape]
        edges = [(n // 2, (n + 1) // 2) for n in extra]
        return np.broadcast_to(np.pad(image, edges), (3, self.size, self.size))


class Shapes:
    """The embedded set: ten classes of shapes; picture i is a function of (split, i).   [ours]

    Colours, pose, ground and stripes are continuous: they say more than the bits can keep.
    """

    classes = "disc ring square triangle star plus heart moon arrow hourglass".split()
    mirror = False

    def __init__(self, split, size, count):
        self.held_out = split == "test"
        self.seed = 1 if self.held_out else 0
        self.size = size
        self.labels = np.arange(count) % 10
        self.names = [f"shapes {split} {i}" for i in range(count)]

    @staticmethod
    def distances(x, y):
        """Signed distances of points to the outlines of all classes; inside they are negative."""
        r = np.hypot(x, y)
        ax, ay = abs(x), abs(y)
        intersect, unite = np.maximum, np.minimum
        # Folding maps the ten edges of the star to one, from its tip (px, py) to (0.42, 0).
        fold = abs(np.arctan2(x, y) % (2 * pi / 5) - pi / 5)
        px, py = cos(pi / 5), sin(pi / 5)
        star = (r * np.cos(fold) - 0.42) * py - r * np.sin(fold) * (px - 0.42)
        upright = intersect(ax - 0.28, ay - 0.9)
        level = intersect(ax - 0.9, ay - 0.28)
        round_tops = np.hypot(ax - 0.4, y - 0.3) - 0.566
        shaft = intersect(ax - 0.22, abs(y + 0.4) - 0.5)
        tip = intersect((ax + y - 0.9) / 1.414, -y)
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
    """The pictures of `data`, "shapes" or a folder.

    split: "train", or "test" for the held-out ones
    size: their height and width
    count: how many, None for all (of the endless shapes 10,000)
    """
    root = Path(data).resolve()
    if data == "shapes":
        source = Shapes(split, size, count or 10000)
    elif not root.is_dir():
        raise SystemExit(f"{data}: no such folder; give a folder of pictures, or shapes")
    elif idx_files(root):
        source = Idx(root, split, size, count)
    elif idx_files(root / "raw"):
        raise SystemExit(f"{data}: its files lie in {root / 'raw'}; give that folder")
    else:
        source = Folder(root, split, size, count)
    if len(source.labels) == 0:
        raise SystemExit(f"{data}: no pictures")
    source.data = data if data == "shapes" else str(root)
    source.skipped = []
    return source


def describe(source, skipped):
    """An identity of a source's pictures, which does not depend on the folder they lie in.

    skipped: the names of unreadable pictures, which do not count: they may be removed
    """
    names = sorted(set(source.names) - set(skipped))
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return dict(size=source.size, mirror=source.mirror, pictures=len(names), names=digest[:16])


def read_all(source):
    """All pictures that can be read, uint8 (n, 3, H, W), and labels (n,). Threads read files."""
    n = len(source.labels)
    with ThreadPoolExecutor(None if isinstance(source, Folder) else 1) as threads:
        found = list(tqdm(threads.map(source.read, range(n)), "pictures", n, leave=False))
    reasons = {i: picture for i, picture in enumerate(found) if isinstance(picture, str)}
    report_skipped(source, reasons)
    good = np.setdiff1d(np.arange(n), list(reasons))
    return np.stack([found[i] for i in good]), source.labels[good]


def report_skipped(source, reasons):
    """Set source.skipped and print {number: reason}. SystemExit if no picture can be read."""
    n = len(source.labels)
    if len(reasons) == n:
        first = next(iter(reasons.values()))
        raise SystemExit(f"{source.data}: none of its {n} pictures could be read, such as {first}")
    source.skipped = [source.names[i] for i in reasons]
    if reasons:
        print(f"skipped {len(reasons)} unreadable of {n} pictures:", *reasons.values(), sep="\n  ")


# The files of a token cache, each with a row for every picture, and their types.
CACHE_FILES = dict(moments=np.float16, indices=np.int32, status=np.uint8, labels=np.int64)


def open_arrays(folder, mode):
    """The arrays of a token cache as a dict, on the disk. SystemExit naming one that is damaged."""
    arrays = {}
    for name, kind in CACHE_FILES.items():
        path = folder / f"{name}.npy"
        with disk.reading(path, f"part of a token cache (remove {folder} to make it again)"):
            arrays[name] = np.load(path, mmap_mode=mode)
            n, F, d, h, w = arrays["moments"].shape
            shapes = dict(moments=(n, F, d, h, w), indices=(n, F, h, w), status=(n,), labels=(n,))
            if arrays[name].dtype != kind or arrays[name].shape != shapes[name]:
                raise ValueError(f"expected {kind.__name__} numbers of the shape {shapes[name]}")
    return arrays


def begin_cache(folder, source, example):
    """Make a token cache's files for all pictures; `example`, {name: array}, has one picture."""
    folder.mkdir(parents=True, exist_ok=True)
    n = len(source.labels)
    need = n * sum(value.nbytes for value in example.values())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise SystemExit(f"{folder}: the tokens of {n} pictures take {need / 1e9:.3g} GB, but "
                         f"{free / 1e9:.3g} GB are free; choose another --runs, or --images")
    for name, value in example.items():
        shape = (n, *value.shape[1:])
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", CACHE_FILES[name], shape)
        if name == "labels":
            array[:] = source.labels


def cache_tokens(folder, source, vae, vq, device, batch=None):
    """Stage cache: Eq. (7) for every picture, in moments.npy and indices.npy.

    status.npy holds 1 for each picture that is done, so that a killed run goes on. meta.json holds
    the mean and deviation of x_c, and what all this was made from. One process writes them.
    SystemExit if the folder was made from other pictures or tokenizers.
    """
    meta = disk.read_json(folder / "meta.json")
    made_with = dict(vae=disk.fingerprint(vae), vq=disk.fingerprint(vq))
    if not meta:
        black = np.zeros((1, 3, source.size, source.size), np.uint8)         # gives the shapes
        example = tokenizers.encode_pictures(black, vae, vq, device, source.mirror)
        example |= dict(status=np.zeros(1, np.uint8), labels=source.labels[:1])
        begin_cache(folder, source, example)
        meta = dict(made_from=describe(source, []) | made_with, classes=source.classes, skipped=[])
        disk.write_json(folder / "meta.json", meta)
    with disk.reading(folder / "meta.json", "note of a token cache; remove it"):
        now = describe(source, meta["skipped"]) | made_with
        disk.check_same(folder, meta["made_from"], now)
    # the mean is written last
    if "mean" in meta:
        return
    arrays = open_arrays(folder, "r+")
    # more at once take more memory, and more time
    fill_cache(arrays, source, vae, vq, device, batch or max(2 ** 15 // source.size ** 2, 8))
    mean, std = statistics(arrays["moments"], np.flatnonzero(arrays["status"] == 1))
    meta |= dict(made_from=describe(source, source.skipped) | made_with, skipped=source.skipped,
                 mean=mean, std=std, bits=vq.bits)
    disk.write_json(folder / "meta.json", meta)


def fill_cache(arrays, source, vae, vq, device, batch):
    """Encode the pictures that are still to do, `batch` at once, into the arrays of a cache."""
    status = arrays["status"]
    reasons = {}
    with ThreadPoolExecutor(None if isinstance(source, Folder) else 1) as threads:
        for start in tqdm(range(0, len(status), batch), "tokens"):
            rows = start + np.flatnonzero(status[start:start + batch] != 1)
            pictures = dict(zip(rows, threads.map(source.read, rows)))
            reasons |= {i: picture for i, picture in pictures.items() if isinstance(picture, str)}
            good = [i for i in rows if i not in reasons]
            if good:
                x = np.stack([pictures[i] for i in good])
                encoded = tokenizers.encode_pictures(x, vae, vq, device, source.mirror)
                for name, value in encoded.items():
                    arrays[name][good] = value
            # it comes last, when the rows themselves are there
            status[good] = 1
    report_skipped(source, reasons)


def statistics(moments, rows):
    """Mean and deviation of every channel of x_c, of up to 10,000 pictures.   [VA-VAE]"""
    rows = np.sort(np.random.RandomState(0).permutation(rows)[:10000])
    mean, logvar = torch.tensor(moments[rows, 0]).float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    x_c = tokenizers.reparameterize(mean, (0.5 * logvar).exp(), noise)          # (n, d_c, h, w)
    std, mean = torch.std_mean(x_c, (0, 2, 3))
    return mean.tolist(), std.tolist()


class Tokens:
    """The token cache in `folder`: n pictures with `labels` (n,), numbers of `classes`."""

    def __init__(self, folder):
        arrays = open_arrays(folder, "r")
        with disk.reading(folder, "complete token cache; remove it to make it again"):
            meta = disk.read_json(folder / "meta.json")
            self.made_from = meta["made_from"]
            self.classes = meta["classes"]
            self.bits = meta["bits"]
            d_c = arrays["moments"].shape[2] // 2
            self.mean, self.std = tokenizers.check_statistics(meta["mean"], meta["std"], d_c)
            self.rows = np.flatnonzero(arrays["status"] == 1)
            complete = self.made_from.get("pictures", len(self.rows))
            if len(self.rows) != complete:
                raise ValueError(f"{len(self.rows)} of its {complete} pictures are there")
            self.labels = arrays["labels"][self.rows]
            if not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
                raise ValueError(f"labels.npy has classes beyond {len(self.classes)}")
        self.moments = arrays["moments"]
        self.indices = arrays["indices"]
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
        if not moments.isfinite().all() or (codes >> self.bits).any():
            raise SystemExit("the token cache is damaged; remove its folder to make it again")
        x_d = tokenizers.codes_to_bits(codes[..., None], self.bits)             # (B, N, d_d)
        return mean, std, x_d, torch.tensor(self.labels[pictures])
