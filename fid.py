"""How far pictures are from a reference: FID, inception score, KID, of samples and of reconstructions. Section 4, Tables 1 to 3.

`frechet_distance`, `inception_score` and `kernel_distance` are the measures, `Statistics` gathers mean and covariance
in constant memory, `open_pictures` reads a run, a folder, an npz file or a data set. Features come from `Inception`,
whose distance is FID, or from a small classifier trained on the data set, whose distance is never called FID.

Reads runs and pictures through sample.py and tokenizers.py, writes json. The last file; read tests/ next.
Try: python fid.py runs/shapes-dcmix shapes; under torchrun the processes share the pictures

B batch, n pictures, d features, K classes; all statistics are float64.
"""
import argparse
import hashlib
import json
import math
import os
import time
import zipfile
import zlib
from collections import OrderedDict
from datetime import timedelta
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.special import log_softmax
from torch import distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

import sample
import tokenizers
from tokenizers import world

# ------------------------------------------------------------------ the measures

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), the distance of two normal distributions.   [Heusel 2017]

    mu (d,), sigma (d, d) -> float. S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), so eigh
    serves where others take sqrtm, for singular S too. ValueError on other shapes or non-finite values.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == 2 * mu1.shape:
        raise ValueError(f"mu {mu1.shape} and {mu2.shape}, sigma {sigma1.shape} and {sigma2.shape} do not fit together")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics hold values that are not finite")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T                   # S1^(1/2); below 0 is only rounding
    trace = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def inception_score(logits, splits=10, shuffle=2020):
    """exp(mean KL(p(y|x) || p(y))) in each of `splits` parts -> mean and deviation over the parts.   [Salimans 2016]

    logits (n, K); shuffle: the seed that first permutes the rows, or None. ValueError if n < splits.
    """
    n, scores = len(logits), []
    if n < splits:
        raise ValueError(f"{n} pictures cannot fill {splits} parts")
    rows = np.arange(n) if shuffle is None else np.random.RandomState(shuffle).permutation(n)
    log_p = log_softmax(np.asarray(logits, np.float64)[rows], axis=1)
    for i in range(splits):
        part = log_p[i * n // splits:(i + 1) * n // splits]
        marginal = np.exp(part).mean(0).clip(np.finfo(np.float64).tiny)      # (K,)   p(y)
        scores.append(np.exp((np.exp(part) * (part - np.log(marginal))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(features1, features2, subsets=100, size=1000, seed=2020):
    """KID: the unbiased squared maximum mean discrepancy of `subsets` pairs of random subsets -> mean and deviation.   [torch-fidelity]

    features (n, d), kernel (x y / d + 1)^3. ValueError if `size` is more than there is or less than 2.
    """
    if not 2 <= size <= min(len(features1), len(features2)):
        raise ValueError(f"subsets of {size} of {len(features1)} and {len(features2)} pictures")
    random, found = np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (np.float64(f[random.choice(len(f), size, replace=False)]) for f in (features1, features2))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        found.append((xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1)) - 2 * xy.mean())
    return float(np.mean(found)), float(np.std(found))


class Statistics:
    """Mean and covariance of features that come batch by batch, in constant memory."""

    def __init__(self, d):
        self.n, self.mean, self.scatter = 0, np.zeros(d), np.zeros((d, d))

    def add(self, features):
        """Take in features (B, d); the scatter is a sum of (x - mean)(x - mean)^T."""
        x = np.asarray(features, np.float64)
        self.merge(len(x), x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)))

    def merge(self, n, mean, scatter):
        """Take in the statistics of n other pictures; the scatter of all is that of both parts and of their means.   [Chan 1979]"""
        if n:
            delta, total = mean - self.mean, self.n + n
            self.scatter += scatter + np.outer(delta, delta) * self.n * n / total
            self.mean, self.n = self.mean + delta * n / total, total

    def covariance(self):
        return self.scatter / (self.n - 1)


# ------------------------------------------------------------------ features: Inception-v3 of 2015-12-05, those of FID

FIVE = dict(branch1x1="64 1x1", branch5x5="48 1x1, 64 5x5", branch3x3dbl="64 1x1, 96 3x3, 96 3x3", branch_pool="w 1x1")
SIX = dict(branch1x1="192 1x1", branch7x7="w 1x1, w 1x7, 192 7x1", branch7x7dbl="w 1x1, w 7x1, w 1x7, w 7x1, 192 1x7", branch_pool="192 1x1")
SEVEN = dict(branch1x1="320 1x1", branch3x3="384 1x1, 384 1x3 3x1", branch3x3dbl="448 1x1, 384 3x3, 384 1x3 3x1", branch_pool="192 1x1")
MEAN, MAX, HALF = partial(nn.AvgPool2d, 3, 1, 1, count_include_pad=False), partial(nn.MaxPool2d, 3, 1, 1), partial(nn.MaxPool2d, 3, 2)
MIXED = {  # block: the pool before its last branch, w, and its branches in the order in which they are joined. A branch is its convolutions:
    #        width and kernel, "/2" for stride 2 without padding; two kernels stand side by side on the same input
    "Mixed_5b": (MEAN, 32, FIVE), "Mixed_5c": (MEAN, 64, FIVE), "Mixed_5d": (MEAN, 64, FIVE),
    "Mixed_6a": (HALF, 0, dict(branch3x3="384 3x3/2", branch3x3dbl="64 1x1, 96 3x3, 96 3x3/2", pool="")),
    "Mixed_6b": (MEAN, 128, SIX), "Mixed_6c": (MEAN, 160, SIX), "Mixed_6d": (MEAN, 160, SIX), "Mixed_6e": (MEAN, 192, SIX),
    "Mixed_7a": (HALF, 0, dict(branch3x3="192 1x1, 320 3x3/2", branch7x7x3="192 1x1, 192 1x7, 192 7x1, 192 3x3/2", pool="")),
    "Mixed_7b": (MEAN, 0, SEVEN), "Mixed_7c": (MAX, 0, SEVEN)}


def conv(c_in, c_out, kernel, stride=1, padding=0):
    layers = dict(conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False), bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU(inplace=True))
    return nn.Sequential(OrderedDict(layers))


class Mixed(nn.Module):
    """Branches of the same input, joined along the channels; see the table MIXED."""

    def __init__(self, c_in, pool, w, branches):
        super().__init__()
        self.pool, self.branches, self.width = pool(), {}, 0
        for branch, text in branches.items():
            c, chain = c_in, []                                              # of one name, or two side by side, per step
            steps = text.replace("w", str(w)).split(", ") if text else []
            for number, step in enumerate(steps, 1):
                width, *kernels = step.split()
                name = f"{branch}_{number}" if steps[1:] else branch
                chain.append([name + "a", name + "b"] if kernels[1:] else [name])
                for name, kernel in zip(chain[-1], kernels):
                    sides = tuple(map(int, kernel.removesuffix("/2").split("x")))
                    stride, padding = (2, 0) if kernel.endswith("/2") else (1, tuple(side // 2 for side in sides))
                    self.add_module(name, conv(c, int(width), sides, stride, padding))
                c = int(width) * len(kernels)
            self.branches[branch], self.width = chain, self.width + c

    def forward(self, x):
        joined = []
        for branch, chain in self.branches.items():
            y = self.pool(x) if "pool" in branch else x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            joined.append(y)
        return torch.cat(joined, dim=1)


def resize_tf1(x, size=299):
    """float (B, 3, H, W) -> (B, 3, size, size), bilinear from the corner without half a pixel's offset, as TensorFlow 1 does.   [torch-fidelity]"""
    for axis, line in ((3, (size,)), (2, (size, 1))):
        n = x.shape[axis]
        at = torch.arange(size, device=x.device) * torch.tensor(n / size, dtype=torch.float32)
        low = at.long()
        a, b = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * (at - low).view(line)
    return x


class Inception(nn.Sequential):
    """The network of TensorFlow's 2015 graph under the names of its released PyTorch file.   [torch-fidelity] [pytorch-fid]

    resize "torch-fidelity" or "pytorch-fid": the one difference between the two programs' features.
    """

    def __init__(self, resize="torch-fidelity"):
        layers = OrderedDict(Conv2d_1a_3x3=conv(3, 32, 3, 2), Conv2d_2a_3x3=conv(32, 32, 3), Conv2d_2b_3x3=conv(32, 64, 3, padding=1), pool1=HALF(),
                             Conv2d_3b_1x1=conv(64, 80, 1), Conv2d_4a_3x3=conv(80, 192, 3), pool2=HALF())
        width = 192
        for name, row in MIXED.items():
            layers[name] = Mixed(width, *row)
            width = layers[name].width
        super().__init__(layers | dict(fc=nn.Linear(width, 1008)))
        self.resize, self.width = resize, width

    def forward(self, images):
        """uint8 (B, 3, H, W) -> features (B, 2048), logits without their bias (B, 1008)."""
        if self.resize == "torch-fidelity":
            x = (resize_tf1(images.float()) - 128) / 128
        else:
            x = 2 * interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        *layers, fc = self
        for layer in layers:
            x = layer(x)
        features = x.mean((2, 3))
        return features, features @ fc.weight.T


URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
FILES, HASH = (Path(URL).name, "weights-inception-2015-12-05-6726825d.pth"), "6726825d"            # two names of one file, the start of its sha256
FID = {"Inception-v3 of 2015-12-05, resize of torch-fidelity": "FID", "Inception-v3 of 2015-12-05, resize of pytorch-fid": "FID (pytorch-fid's)"}


def released_weights():
    """Where torch.hub keeps either released file, fetched once. SystemExit where it cannot be.   [pytorch-fid] [torch-fidelity]"""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=HASH)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{path}: no such file, and {URL} cannot be fetched ({error}); put it there, or name it by --features") from None
    return path


def load_extractor(path, args, size):
    """The features in `path`, told by its keys: Inception's (for pictures of any size if `size` is None), or a classifier's. SystemExit on other files."""
    try:
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:                                                        # load_classifier says what is wrong
        saved = {}
    if "Mixed_5b.branch1x1.conv.weight" not in saved:
        return load_classifier(path, args.device)
    model, digits = Inception(args.resize), hashlib.sha256(Path(path).read_bytes()).hexdigest()
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}  # the released file has none
    sample.load_weights(model, counters | saved, path)
    model.name = f"Inception-v3 {'of 2015-12-05' if digits.startswith(HASH) else 'with the weights ' + digits[:16]}, resize of {args.resize}"
    model.about = dict(name=model.name, file=str(path), sha256=digits, width=model.width, size=size)
    model.size, model.samples, model.score = size, 50000, "inception_score"
    return model.eval().requires_grad_(False).to(args.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------ features: a small classifier of the data set

class Classifier(nn.Module):
    """A small convolutional network; its features are channel means at two depths: texture and colour, then shape.   [ours]"""

    def __init__(self, classes, size):
        super().__init__()
        block = lambda a, b, stride: nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.fine = nn.Sequential(block(3, 32, 1), block(32, 48, 2), block(48, 48, 1))
        self.coarse = nn.Sequential(block(48, 96, 2), block(96, 96, 1), block(96, 96, 2), block(96, 96, 1))
        self.size, self.width, self.head = size, 48 + 96, nn.Linear(48 + 96, classes)

    def forward(self, images):
        """uint8 (B, 3, size, size) -> features (B, d), logits (B, K)."""
        fine = self.fine(images.float() / 127.5 - 1)                         # (B, 48, size / 2, size / 2)
        features = torch.cat([fine.mean((2, 3)), self.coarse(fine).mean((2, 3))], dim=1)
        return features, self.head(features)


def train_classifier(path, data, size, device, steps=700, B=128):
    """Train the classifier on nine tenths of the train split, the same way every time; save it with its accuracy on the last tenth."""
    source = tokenizers.open_source(data, "train", size, None if data == "shapes" else 60000)
    read = [(source.read(i), source.labels[i]) for i in tqdm(range(len(source.labels)), desc="pictures", unit="img", disable=None)]
    good = [pair for pair in read if not isinstance(pair[0], str)]
    if len(good) < 10:
        raise SystemExit(f"{data}: {len(good)} readable pictures are too few to train a classifier; choose other --features")
    x, y = (torch.tensor(np.stack(a)) for a in zip(*good))
    torch.manual_seed(0)
    random, model = np.random.RandomState(0), Classifier(len(source.classes), size).to(device)
    kept, held_out = np.split(random.permutation(len(y)), [len(y) - len(y) // 10])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    order = np.concatenate([random.permutation(kept) for _ in range(math.ceil(steps * B / len(kept)))])
    for rows in (bar := tqdm(order[:steps * B].reshape(steps, B), desc="classifier", unit="step", disable=None)):
        with sample.autocast("auto", torch.device(device)):
            loss = cross_entropy(model(x[rows].to(device))[1].float(), y[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with torch.no_grad():
        model.eval()
        right = sum(int((model(x[rows].to(device))[1].argmax(1).cpu() == y[rows]).sum()) for rows in np.split(held_out, range(500, len(held_out), 500)))
    meta = dict(data=data, pictures=len(kept), skipped=len(read) - len(good), steps=steps, held_out_accuracy=right / len(held_out))
    saved = dict(kind="classifier", config=dict(classes=len(source.classes), size=size), model=model.state_dict(), meta=meta)
    tokenizers.write_whole(path, lambda file: torch.save(saved, file))


def load_classifier(path, device):
    """The classifier saved at `path`, with its `name` and an `about` for the report. SystemExit on any other file."""
    saved = sample.load_checkpoint(path, "classifier")
    model = Classifier(**saved["config"])
    sample.load_weights(model, saved["model"], path)
    digits = tokenizers.fingerprint(model)
    model.name = f"small classifier {digits} of {saved['meta']['data']}"
    model.about = dict(name=model.name, file=str(path), sha256=digits, width=model.width, size=model.size) | saved["meta"]
    model.samples, model.score = 2000, "classifier_score"
    return model.eval().requires_grad_(False).to(device)


def find_extractor(args):
    """The features of --features; for a classifier that of --data, else of the data set B or A or behind a run: RUNS/DATA/classifier.pt, trained if missing."""
    kinds = {what: kind_of(what) for what in (args.reference, args.pictures) if what}
    run = next((open_run(what, args.device, args.weights) for what in kinds if kinds[what] == "run"), None)
    if args.features != "classifier":
        path = released_weights() if args.features == "inception" else args.features
        return load_extractor(path, args, args.size or run and run.size)
    data = args.data or next((what for what in kinds if kinds[what] == "data"), run and run.meta["data"])
    if not data:
        raise SystemExit(f"nothing tells the data set behind {' and '.join(kinds)}, whose classifier gives the features; add --data DATA or --features")
    data = data if data == "shapes" else str(Path(data).resolve())
    path = (run.shared.parent if run else Path("runs")) / Path(data).name / "classifier.pt"
    if not path.is_file():
        train_classifier(path, data, min(run.size, 64) if run else 32, args.device)
    model = load_classifier(path, args.device)
    if model.about["data"] != data:
        raise SystemExit(f"{path} is the classifier of {model.about['data']}, not of {data}; move it away, or choose one with --features")
    return model


# ------------------------------------------------------------------ pictures: runs, folders, npz files, data sets

def kind_of(what):
    """"run", "npz", "data" or "folder". SystemExit if there is no such thing."""
    path = Path(what)
    if path.suffix == ".pt" or (path / "last.pt").is_file():
        return "run"
    if path.suffix == ".npz" and path.is_file():
        return "npz"
    if what != "shapes" and not path.is_dir():
        raise SystemExit(f"{what}: no such run, folder, npz file or data set (shapes is one)")
    if what == "shapes" or (path / "train").is_dir() or list(path.glob("*-idx*ubyte*")):
        return "data"
    inside = [p for p in path.iterdir() if p.is_dir() or p.suffix.lower() in tokenizers.EXTENSIONS]
    return "data" if len(inside) > 1 and all(p.is_dir() for p in inside) else "folder"


open_run = lru_cache(2)(sample.System)                                       # (run, device, weights)


def draw_run(system, numbers, settings, args):
    """Samples of a run: number i has class i mod K and is the picture sample.py draws under the same seed."""
    for start in range(0, len(numbers), args.batch_size):
        indices = numbers[start:start + args.batch_size]
        y = torch.tensor([i % len(system.meta["classes"]) for i in indices], device=system.device)
        with sample.autocast(args.amp, system.device):
            x_d = system.draw_discrete(args.seed, indices, y, settings)
            if args.decode == "discrete":
                drawn = system.decode_discrete(x_d)
            else:
                drawn = system.decode_continuous(system.draw_continuous(args.seed, indices, y, x_d, settings))
        yield from drawn.cpu().numpy()                                       # outside autocast, or the features would be bf16 too


def read_npz(what):
    """The pictures of `arr_0` uint8 (n, H, W, 3), one after the other, never all in memory."""
    try:
        with zipfile.ZipFile(what) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
                raise ValueError(f"arr_0 is {dtype} {shape}, expected uint8 (n, H, W, 3)")
            for _ in range(shape[0]):
                yield np.frombuffer(file.read(math.prod(shape[1:])), np.uint8).reshape(shape[1:]).transpose(2, 0, 1)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise SystemExit(f"{what}: expected an npz file with arr_0, or with mu and sigma; {error}") from None


def read_file(path):
    """uint8 (3, H, W), or the reason why not as text."""
    try:
        return np.asarray(tokenizers.read_rgb(path)).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{path}: {error}"


def open_pictures(what, count, extractor, args, size=None):
    """-> the pictures of this process, one by one, uint8 (3, H, W) or the reason why one cannot be read, and a note on all for the report.

    Process r of R has number r, r + R, ... of at most `count`, if given. Data sets have the `size` given, else the
    extractor's, and give their held-out split if they have one.
    """
    kind, (rank, ranks), size = kind_of(what), world(), size or extractor.size
    note = dict(source=what, kind=kind)
    if kind == "run":
        system = open_run(what, args.device, args.weights)
        settings = system.meta["sampling"] | {k: getattr(args, k) for k in ("ar_steps", "diffusion_steps", "cfg") if getattr(args, k) is not None}
        note |= {k: getattr(args, k) for k in ("decode", "seed", "weights", "amp", "batch_size")} | dict(step=system.step, settings=settings)
        return draw_run(system, range(count or extractor.samples)[rank::ranks], settings, args), note
    if kind == "npz":
        return islice(read_npz(what), rank, count, ranks), note
    if kind == "folder":
        return map(read_file, sorted(p for p in Path(what).rglob("*") if p.suffix.lower() in tokenizers.EXTENSIONS)[rank:count:ranks]), note
    if not size:
        raise SystemExit(f"{what}: nothing tells the size of its pictures; add --size, that of the pictures they are compared with")
    try:
        source, note["split"] = tokenizers.open_source(what, "test", size, count), "held out"
    except LookupError:
        source, note["split"] = tokenizers.open_source(what, "train", size, count), "train, nothing is held out"
    return map(source.read, range(len(source.labels))[rank::ranks]), note


def fit(picture, size):
    """uint8 (3, H, W) -> uint8 (3, size, size), as data sets are read; unchanged if size is None."""
    if size is None or picture.shape[1:] == (size, size):
        return picture
    return np.asarray(tokenizers.center_crop(Image.fromarray(picture.transpose(1, 2, 0)), size)).transpose(2, 0, 1)


def reconstruct(system, tokenizer, pictures):
    """A list of uint8 (3, H, W) -> the same encoded and decoded by a run's "vae" (posterior mean) or "vq"."""
    x = torch.tensor(np.stack([fit(p, system.size) for p in pictures])).to(system.device).float() / 255
    if tokenizer == "vae":
        y = system.vae.decode(system.vae.encode(x * 2 - 1)[0])
    else:
        y = system.vq.decode(tokenizers.quantise(system.vq.encode(x))) * 2 - 1
    return sample.to_bytes(y).cpu().numpy()


# ------------------------------------------------------------------ processes

def gather(mine):
    """What each process has, in order. SystemExit where another has ended by an error."""
    parts = [mine] * world()[1]
    if len(parts) > 1:
        try:
            dist.all_gather_object(parts, mine)
        except RuntimeError:                                                 # the connection is closed
            raise SystemExit(f"process {world()[0]} ends because another has") from None
    return parts


# ------------------------------------------------------------------ pictures -> statistics -> report

@torch.no_grad()
def measure(pictures, note, extractor, args, through=lambda batch: batch):
    """Stream pictures (see open_pictures) through the extractor -> dict(mu, sigma, n, extractor, note, features if --kid), None but in process 0."""
    rank, start = world()[0], time.time()
    statistics, rows, skipped = Statistics(extractor.width), [], []
    numbered = enumerate(tqdm(pictures, desc=note["source"], unit="img", leave=False, disable=rank > 0 or None))
    while some := list(islice(numbered, args.batch_size)):
        skipped += [p for _, p in some if isinstance(p, str)]
        if good := [(i, p) for i, p in some if not isinstance(p, str)]:
            fitted = [fit(p, extractor.size) for p in through([p for _, p in good])]
            if len({p.shape for p in fitted}) > 1:
                raise SystemExit(f"{note['source']}: its pictures differ in size; crop them all by --size")
            features, logits = (a.cpu().numpy() for a in extractor(torch.tensor(np.stack(fitted)).to(args.device)))
            statistics.add(features)
            rows += zip([i for i, _ in good], logits, features if args.kid else [None] * len(good))
    (statistics, rows, skipped), *others = gather((statistics, rows, skipped))
    for other, more, too in others:
        statistics.merge(other.n, other.mean, other.scatter)
        rows, skipped = rows + more, skipped + too
    if rank > 0:
        return None
    if skipped:
        print(f"{note['source']}: skipped {len(skipped)} unreadable pictures:", *skipped, sep="\n  ")
    if statistics.n <= (1 if args.force else extractor.width):
        raise SystemExit(f"{note['source']}: {statistics.n} pictures are too few for a covariance of {extractor.width} features; "
                         f"take more than {extractor.width}{'' if args.force else ', or --force it'}")
    _, logits, features = map(np.stack, zip(*sorted(rows, key=lambda row: row[0])))        # stable: process 0's picture i, process 1's, ...
    note |= dict(count=statistics.n, skipped=skipped, seconds=round(time.time() - start, 2))
    if statistics.n >= 10:
        note[extractor.score] = dict(zip(("mean", "deviation"), inception_score(logits))) | dict(splits=10, shuffle=2020)
    return dict(mu=statistics.mean, sigma=statistics.covariance(), n=statistics.n, extractor=extractor.name, note=note) | (dict(features=features) if args.kid else {})


def load_statistics(what):
    """The same dict from an npz file with mu (d,) and sigma (d, d), or None; `pictures` tells whether it also has pictures, as ADM's references do."""
    try:
        with np.load(what) as file:
            found = dict(n="not recorded", extractor="not recorded") | {k: file[k].tolist() for k in ("n", "extractor") if k in file.files}
            note = dict(source=what, kind="statistics", count=found["n"], extractor=found["extractor"])
            return found | dict(mu=file["mu"], sigma=file["sigma"], note=note, pictures="arr_0" in file.files)
    except (OSError, EOFError, KeyError, ValueError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error):
        return None                                                          # read_npz says what is wrong with an npz file


def compare(a, b, kid):
    """The note of a, with its distance to b."""
    both = f"{a['note']['source']} and {b['note']['source']}"
    if len({a["extractor"], b["extractor"]} - {"not recorded"}) > 1:
        raise SystemExit(f"{both} cannot be compared: their features are those of {a['extractor']} and of {b['extractor']}")
    try:
        found = dict(to=f"{b['note']['source']} ({b['n']})", frechet_distance=frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"]))
        if kid:
            settings = dict(subsets=100, size=min(1000, a["n"], b["n"]), seed=2020)
            found["kernel_distance"] = dict(zip(("mean", "deviation"), kernel_distance(a["features"], b["features"], **settings))) | settings
    except ValueError as error:
        raise SystemExit(f"{both} cannot be compared: {error}; both must hold the same features") from None
    return found | a["note"]


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("pictures", metavar="A", help="a run or its checkpoint, a folder of pictures, an npz of pictures (arr_0) or statistics (mu, sigma), or a data set")
    p.add_argument("reference", metavar="B", nargs="?", help="the same; a data set gives its held-out pictures (default: the data set of the run A)")
    p.add_argument("--rfd", action="store_true", help="beside samples of the run A, also B's pictures reconstructed by each of its tokenizers (the held-out ones of its data set if B is statistics)")
    p.add_argument("--kid", action="store_true", help="also the kernel distance; keeps all features in memory")
    p.add_argument("--features", default="classifier", metavar="WHICH", help="inception: FID's network, fetched once; classifier: RUNS/DATA/classifier.pt, trained if missing; "
                   "or a file of either (default: %(default)s)")
    p.add_argument("--resize", default="torch-fidelity", choices=["torch-fidelity", "pytorch-fid"], help="how Inception's input is resized (default: %(default)s)")
    p.add_argument("--size", type=int, help="crop pictures to this side before Inception (default: the run's, else none)")
    p.add_argument("--data", help="data set whose classifier gives the features (default: the one behind B or A)")
    p.add_argument("--count", type=int, help="pictures of A (default: of a run 2000, with Inception 50000; else all)")
    p.add_argument("--reference-count", type=int, help="pictures of B (default: of a run 2000, with Inception 50000; else all)")
    p.add_argument("--force", action="store_true", help="accept fewer pictures than features")
    p.add_argument("--save-stats", metavar="FILE.npz", help="write mu, sigma, n and extractor of A")
    p.add_argument("--json", metavar="FILE", help="write the report there (default: print it)")
    g = p.add_argument_group("samples of a run")
    g.add_argument("--seed", type=int, default=0, help="as in sample.py: the same pictures (default: %(default)s)")
    g.add_argument("--weights", default="ema", choices=["ema", "raw"], help="moving average or last weights (default: %(default)s)")
    g.add_argument("--decode", default="continuous", choices=["continuous", "discrete"],
                   help="discrete: the prior's X_d alone through the bit tokenizer (default: %(default)s)")
    for name, kind, text in (("ar-steps", int, "AR steps, Eq. 6"), ("diffusion-steps", int, "steps of the diffusion head, Eq. 5"), ("cfg", float, "guidance scale")):
        g.add_argument(f"--{name}", type=kind, help=f"{text} (default: the run's)")
    g.add_argument("--batch-size", type=int, default=100, help="pictures at once (default: %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)")
    g.add_argument("--amp", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="as in sample.py; features are always fp32 (default: %(default)s)")
    return p.parse_args(argv)


def evaluate(args):
    """Measure everything, in all processes -> the report, in process 0."""
    run = open_run(args.pictures, args.device, args.weights) if kind_of(args.pictures) == "run" else None
    if args.rfd and not run:
        raise SystemExit(f"--rfd reconstructs by the tokenizers of a run, and {args.pictures} is none")
    args.reference = args.reference or run and run.meta["data"]
    sides = [what for what in (args.pictures, args.reference) if what]
    saved = {what: found for what in sides if kind_of(what) == "npz" and (found := load_statistics(what))}
    if args.kid and (known := [what for what in saved if not saved[what]["pictures"]]):
        raise SystemExit(f"--kid needs the features of single pictures, and {known[0]} holds their statistics only")
    for turn in (world()[0] == 0, world()[0] > 0):                           # process 0 fetches or trains, the others then read
        if turn:
            extractor = None if args.reference and all(what in saved for what in sides) and not args.kid else find_extractor(args)
        gather(None)
    if extractor:                                                            # statistics beside pictures are Inception's: other features take the pictures
        theirs = not args.kid and args.resize == "torch-fidelity"
        saved = {what: s for what, s in saved.items() if not s["pictures"] or theirs and s["mu"].size == extractor.width}
    one = lambda what, count: saved.get(what) or measure(*open_pictures(what, count, extractor, args), extractor, args)
    reference = args.reference and one(args.reference, args.reference_count)
    pairs = [(one(args.pictures, args.count), reference)]
    if args.rfd:
        source = run.meta["data"] if saved.get(args.reference) else args.reference         # statistics have no pictures to reconstruct
        originals = one(source, args.reference_count) if saved.get(args.reference) else reference
        for tokenizer in ("vae", "vq"):
            pictures, note = open_pictures(source, args.reference_count, extractor, args, run.size)
            note["source"] += f" reconstructed by the {tokenizer} of {args.pictures}"
            pairs.append((measure(pictures, note, extractor, args, partial(reconstruct, run, tokenizer)), originals))
    if world()[0] > 0:
        return None
    if args.save_stats:
        tokenizers.write_whole(args.save_stats, lambda file: np.savez(file, **{k: pairs[0][0][k] for k in ("mu", "sigma", "n", "extractor")}))
    name = extractor.name if extractor else pairs[0][0]["extractor"]
    return dict(metric=FID.get(name, f"Frechet distance ({name}, not FID)"), extractor=extractor.about if extractor else name, reference=reference and reference["note"],
                results=[compare(a, b, args.kid) if b else a["note"] for a, b in pairs])


def tell(report, start, args):
    """Print a line for each result, and write or print the whole."""
    for r in report["results"]:
        distance = f"{report['metric']} to {r['to']}: {r['frechet_distance']:.4g}" if "to" in r else report["metric"]
        kernel = "KID" if report["metric"].startswith("FID") else "kernel distance"
        kid = "; {0} {mean:.4g} +- {deviation:.2g}".format(kernel, **r["kernel_distance"]) if "kernel_distance" in r else ""
        score = "".join(f"; {name} {r[key]['mean']:.3f} +- {r[key]['deviation']:.3f}" for name, key in (("IS", "inception_score"), ("IS(classifier)", "classifier_score")) if key in r)
        print(f"{r['source']} ({r['count']}): {distance}{kid}{score}")
    report |= dict(device=args.device, processes=world()[1], seconds=round(time.time() - start, 1), date=time.strftime("%Y-%m-%d %H:%M:%S"))
    if args.json:
        tokenizers.write_whole(args.json, lambda file: file.write(json.dumps(report, indent=1).encode()))
    else:
        print(json.dumps(report, indent=1))


def main(argv=None):
    args, start = parse(argv), time.time()
    if "LOCAL_RANK" in os.environ:                                           # started by torchrun
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
        dist.init_process_group("gloo", timeout=timedelta(days=1))           # only statistics travel: gloo serves GPUs too
    torch.backends.cudnn.allow_tf32 = False                                  # features are fp32 on every device
    try:
        if report := evaluate(args):
            tell(report, start, args)
        gather(None)                                                         # the others wait for process 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
