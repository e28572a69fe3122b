"""How far samples are from pictures: Frechet distance, inception score, reconstruction distance. Section 4, Tables 1 to 3.

`frechet_distance`, `inception_score` and `kid` are the measures, `Statistics` gathers mean and covariance
in constant memory, `open_pictures` reads samples of a run, folders, npz files and data sets. Features come
from a small classifier trained on the data set; such a distance is never called FID.

Reads runs/ and pictures through sample.py and tokenizers.py, writes json. This is the last file; tests/ is next.
Try: python fid.py runs/shapes-dcmix shapes

n pictures, d features, K classes; every array of statistics is float64.
"""
import argparse
import json
import math
import os
import time
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from scipy.special import log_softmax
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import sample
import tokenizers

# ------------------------------------------------------------------ the measures


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), the distance of two normal distributions.   [Heusel 2017]

    mu (d,), sigma (d, d) -> float. S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), so
    eigh does what sqrtm would, also for singular S. ValueError on other shapes or non-finite values.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == 2 * mu1.shape:
        raise ValueError(f"statistics of other shapes: mu {mu1.shape} and {mu2.shape}, sigma {sigma1.shape} and {sigma2.shape}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics hold values that are not finite")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T                   # S1^(1/2); below 0 is only rounding
    trace = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def inception_score(logits, splits=10, shuffle=2020):
    """exp(mean KL(p(y|x) || p(y))) in each of `splits` parts -> mean and deviation over parts.   [Salimans 2016]

    logits (n, K); shuffle: the seed that permutes the rows first, or None. ValueError if n < splits.
    """
    n = len(logits)
    if n < splits:
        raise ValueError(f"{n} pictures cannot fill {splits} parts")
    rows = np.arange(n) if shuffle is None else np.random.RandomState(shuffle).permutation(n)
    log_p = log_softmax(np.asarray(logits, np.float64)[rows], axis=1)
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits:(i + 1) * n // splits]
        marginal = np.exp(part).mean(0).clip(np.finfo(np.float64).tiny)      # p(y)                       (K,)
        scores.append(np.exp((np.exp(part) * (part - np.log(marginal))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kid(features1, features2, subsets=100, subset_size=1000, seed=2020):
    """Kernel distance with the kernel (x.y / d + 1)^3, unbiased at any n -> mean and deviation over subsets.   [Binkowski 2018]"""
    random, (m, d), found = np.random.RandomState(seed), (subset_size, features1.shape[1]), []
    for _ in range(subsets):
        x, y = (np.float64(f[random.choice(len(f), m, replace=False)]) for f in (features1, features2))
        kxx, kyy, kxy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        found.append((kxx.sum() - np.trace(kxx) + kyy.sum() - np.trace(kyy)) / (m * (m - 1)) - 2 * kxy.mean())
    return float(np.mean(found)), float(np.std(found))


class Statistics:
    """Mean and covariance of features that come batch by batch, in constant memory."""

    def __init__(self, d):
        self.n, self.mean, self.scatter = 0, np.zeros(d), np.zeros((d, d))

    def add(self, features):
        """features (B, d)"""
        x = np.asarray(features, np.float64)
        centred = x - x.mean(0)
        self.merge(len(x), x.mean(0), centred.T @ centred)

    def merge(self, n, mean, scatter):
        """Take in n more features of this mean (d,) and scatter (d, d), the sum of (x - mean)(x - mean)^T.   [Chan 1979]"""
        total, delta = self.n + n, mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(delta, delta) * (self.n * n / max(total, 1))
        self.mean, self.n = self.mean + delta * (n / max(total, 1)), total

    def covariance(self):
        return self.scatter / (self.n - 1)


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


def read_all(source, rows):
    """The readable pictures among `rows` -> uint8 (n, 3, size, size), labels (n,)."""
    read = [(source.read(i), source.labels[i]) for i in tqdm(rows, desc="pictures", unit="img", leave=False, disable=None)]
    pictures, labels = zip(*[pair for pair in read if not isinstance(pair[0], str)])
    return torch.tensor(np.stack(pictures)), torch.tensor(np.array(labels))


def training_pictures(data, size, most=60000):
    """The train split and the held-out one as (pictures, labels), and the classes; without a test split a tenth is held out."""
    train = tokenizers.open_source(data, "train", size, None if data == "shapes" else most)
    rows = np.arange(len(train.labels))
    try:
        test = tokenizers.open_source(data, "test", size, 10000)
        return read_all(train, rows), read_all(test, range(len(test.labels))), train.classes
    except LookupError:
        return read_all(train, rows[rows % 10 > 0]), read_all(train, rows[::10]), train.classes


def train_classifier(path, data, size, device, steps=700, B=128):
    """Train the classifier on the train split, the same way every time, and save it as `path` with its held-out accuracy."""
    (x, y), (x_test, y_test), classes = training_pictures(data, size)
    if len(classes) < 2:
        raise SystemExit(f"{data} has one class only, which no classifier can learn; give --features CKPT of another data set")
    torch.manual_seed(0)
    random, model = np.random.RandomState(0), Classifier(len(classes), size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    order = np.concatenate([random.permutation(len(y)) for _ in range(math.ceil(steps * B / len(y)))])
    for step in (bar := tqdm(range(steps), desc="classifier", unit="step", disable=None)):
        rows = order[step * B:(step + 1) * B]
        with sample.autocast("auto", torch.device(device)):
            loss = cross_entropy(model(x[rows].to(device))[1].float(), y[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with torch.no_grad():
        model.eval()
        right = sum(int((model(a.to(device))[1].argmax(1).cpu() == b).sum()) for a, b in zip(x_test.split(500), y_test.split(500)))
    meta = dict(data=data, pictures=len(y), steps=steps, accuracy=right / len(y_test))
    saved = dict(kind="classifier", config=dict(classes=len(classes), size=size), model=model.state_dict(), meta=meta)
    tokenizers.write_whole(path, lambda file: torch.save(saved, file))


def load_classifier(path, device):
    """The classifier saved at `path`, with its `name` and an `about` for the report. SystemExit on any other file."""
    saved = sample.load_checkpoint(path, "classifier")
    model = Classifier(**saved["config"])
    sample.load_weights(model, saved["model"], path)
    digits = tokenizers.fingerprint(model)
    model.name = f"small classifier {digits} trained on {saved['meta']['data']}"
    model.about = dict(name=model.name, file=str(path), sha256=digits, width=model.width, size=model.size) | saved["meta"]
    return model.eval().requires_grad_(False).to(device)


# ------------------------------------------------------------------ pictures: runs, folders, npz files, data sets


def kind_of(what):
    """"run", "npz", "data" or "folder". SystemExit if there is no such thing."""
    path = Path(what)
    if what == "shapes":
        return "data"
    if path.suffix == ".pt" or (path / "last.pt").is_file():
        return "run"
    if path.suffix == ".npz" and path.is_file():
        return "npz"
    if not path.is_dir():
        raise SystemExit(f"{what}: no such run, folder, npz file or data set; give one of these, or shapes")
    inside = [p for p in path.iterdir() if not p.name.startswith(".")]
    class_folders = sum(p.is_dir() for p in inside) > 1 and not any(p.suffix.lower() in tokenizers.EXTENSIONS for p in inside)
    return "data" if class_folders or (path / "train").is_dir() or list(path.glob("*-idx*ubyte*")) else "folder"


@lru_cache(2)
def open_run(run, device, weights):
    """All models of a run, its folder `shared` and the side of its pictures."""
    system = sample.System(run, device, weights)
    system.shared = (Path(run) if Path(run).is_dir() else Path(run).parent) / system.meta["shared"]
    system.size = math.isqrt(system.model.N) << len(system.vae.encoder.down) - 1
    return system


def run_pictures(what, count, args):
    """Samples of a run: number i has class i mod K and is the picture that sample.py draws under the same seed."""
    system, n = open_run(what, args.device, args.weights), count or 2000
    changed = {k: getattr(args, k) for k in ("ar_steps", "diffusion_steps", "cfg") if getattr(args, k) is not None}
    settings = system.meta["sampling"] | changed

    def read(indices):
        y = torch.tensor([i % len(system.meta["classes"]) for i in indices], device=system.device)
        with sample.autocast(args.amp, system.device):
            x_d = system.draw_discrete(args.seed, indices, y, settings)
            if args.decode == "discrete":
                return list(system.decode_discrete(x_d).cpu().numpy())
            return list(system.decode_continuous(system.draw_continuous(args.seed, indices, y, x_d, settings)).cpu().numpy())

    return n, read, dict(decode=args.decode, seed=args.seed, weights=args.weights, step=system.step, amp=args.amp, batch=args.batch_size, settings=settings)


def npz_pictures(what, count):
    """`arr_0` uint8 (n, H, W, 3) of an npz file, read piece by piece without holding it in memory."""
    try:
        file = zipfile.ZipFile(what).open("arr_0.npy")
        header = np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(file) == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{what}: expected an npz file with arr_0, or with mu and sigma ({error})") from None
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
        raise SystemExit(f"{what}: arr_0 is {dtype} {shape}, expected uint8 (n, H, W, 3)")
    start, bytes_each = file.tell(), math.prod(shape[1:])

    def read(indices):
        try:
            file.seek(start + indices[0] * bytes_each)
            pictures = np.frombuffer(file.read(len(indices) * bytes_each), np.uint8).reshape(len(indices), *shape[1:])
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise SystemExit(f"{what}: picture {indices[0]} and those after it cannot be read ({error})") from None
        return list(pictures.transpose(0, 3, 1, 2))

    return min(count or shape[0], shape[0]), read, {}


def folder_pictures(what, count, size):
    """Every picture below a folder, in the order of the names."""
    files = sorted(p for p in Path(what).rglob("*") if p.suffix.lower() in tokenizers.EXTENSIONS and not p.name.startswith("."))[:count]
    if not files:
        raise SystemExit(f"{what}: this folder holds no pictures ({', '.join(sorted(tokenizers.EXTENSIONS))})")

    def read_one(path):
        try:
            return np.asarray(tokenizers.center_crop(tokenizers.read_rgb(path), size)).transpose(2, 0, 1)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{path}: {error}"

    return len(files), lambda indices: [read_one(files[i]) for i in indices], {}


def data_pictures(what, count, size):
    """The held-out pictures of a data set, or, where it holds none out, those of its train split."""
    try:
        source, split = tokenizers.open_source(what, "test", size, count), "held out"
    except LookupError:
        source, split = tokenizers.open_source(what, "train", size, count), "train (this data set holds nothing out)"
    return len(source.labels), lambda indices: [source.read(i) for i in indices], dict(split=split)


def open_pictures(what, count, size, args):
    """-> n, read(range of numbers) -> list of uint8 (3, H, W), or of the reason why not as text; and a note for the report."""
    kind = kind_of(what)
    n, read, note = {"run": lambda: run_pictures(what, count, args), "npz": lambda: npz_pictures(what, count),
                     "folder": lambda: folder_pictures(what, count, size), "data": lambda: data_pictures(what, count, size)}[kind]()
    return n, read, dict(source=what, kind=kind) | note


def reconstructions(system, tokenizer, pictures):
    """`pictures` as of open_pictures, each encoded and decoded by the "vae" (posterior mean) or the "vq" of a run."""
    n, read, note = pictures

    @torch.no_grad()
    def reconstruct(indices):
        found = read(indices)
        good = [p for p in found if not isinstance(p, str)]
        if good:
            x = torch.tensor(np.stack(good)).to(system.device).float() / 255
            y = (system.vae.decode(system.vae.encode(x * 2 - 1)[0]) if tokenizer == "vae" else
                 system.vq.decode(tokenizers.quantise(system.vq.encode(x))) * 2 - 1)
            good = list(sample.to_bytes(y).cpu().numpy())
        return good + [p for p in found if isinstance(p, str)]

    return n, reconstruct, note | dict(reconstructed_by=tokenizer)


# ------------------------------------------------------------------ the report


def fit(picture, size):
    """uint8 (3, H, W) -> uint8 (3, size, size)."""
    if picture.shape[1:] == (size, size):
        return picture
    return np.asarray(tokenizers.center_crop(Image.fromarray(picture.transpose(1, 2, 0)), size)).transpose(2, 0, 1)


@torch.no_grad()
def measure(pictures, extractor, args):
    """Stream pictures (see open_pictures) through the extractor -> dict(mu, sigma, n, extractor, features or None, note).

    Under torchrun every process takes every ranks-th batch; logits are put back in order, so the score is the same.
    """
    n, read, note = pictures
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    statistics, kept, skipped, started = Statistics(extractor.width), {}, [], time.time()
    for start in tqdm(range(rank * args.batch_size, n, ranks * args.batch_size), desc="measuring", unit="batch", leave=False, disable=rank > 0 or None):
        found = read(range(start, min(start + args.batch_size, n)))
        skipped += [p for p in found if isinstance(p, str)]
        good = [fit(p, extractor.size) for p in found if not isinstance(p, str)]
        if good:
            features, logits = (a.cpu().numpy() for a in extractor(torch.tensor(np.stack(good)).to(args.device)))
            statistics.add(features)
            kept[start] = logits, features if args.kid else None
    parts = [(statistics, kept, skipped)]
    if ranks > 1:
        parts = [None] * ranks
        dist.all_gather_object(parts, (statistics, kept, skipped))
    total, kept = Statistics(extractor.width), {k: v for part in parts for k, v in part[1].items()}
    for part, _, _ in parts:
        total.merge(part.n, part.mean, part.scatter)
    skipped = sum((part[2] for part in parts), [])
    if skipped and rank == 0:
        print(f"{note['source']}: skipped {len(skipped)} unreadable of {n} pictures:", *skipped[:20], sep="\n  ")
    if total.n < (2 if args.force else extractor.width + 1):
        raise SystemExit(f"{note['source']}: {total.n} pictures are too few for a covariance of {extractor.width} features; "
                         f"give more than {extractor.width}, or --force")
    logits, features = zip(*(kept[k] for k in sorted(kept)))
    note |= dict(count=total.n, skipped=skipped, seconds=round(time.time() - started, 2))
    if total.n >= 10:
        note["classifier_score"] = dict(zip(("mean", "deviation"), inception_score(np.concatenate(logits))), splits=10, shuffle=2020)
    return dict(mu=total.mean, sigma=total.covariance(), n=total.n, extractor=extractor.name, note=note,
                features=np.concatenate(features) if args.kid else None)


def load_statistics(what):
    """The same dict from an npz file with mu (d,) and sigma (d, d), or None if `what` is no such file."""
    try:
        with np.load(what) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            n, extractor = (file[k].item() if k in file.files else None for k in ("n", "extractor"))
            return dict(mu=file["mu"], sigma=file["sigma"], n=n, extractor=extractor, features=None,
                        note=dict(source=what, kind="statistics", count=n, extractor=extractor or "not recorded in the file"))
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{what}: expected an npz file with arr_0, or with mu and sigma ({error})") from None
