"""How far pictures are from a reference: FID, inception score, KID, of samples and of reconstructions. Section 4, Tables 1 and 2.

`frechet_distance`, `inception_score` and `kernel_distance` are the measures, of features by `Inception`, whose distance is FID,
or by a small classifier trained on the data set, whose distance is never called FID; `measure` streams a run, a folder, an npz
file or a data set through either. Reads by sample.py and tokenizers.py, writes json. The last file; read tests/ next.
Try: python fid.py runs/shapes-dcmix shapes; under torchrun the processes share the pictures

B batch, n pictures, d features, K classes; all statistics are float64.
"""
import argparse
import hashlib
import json
import math
import time
import zipfile
from collections import OrderedDict
from functools import partial, reduce
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from scipy.special import log_softmax
from torch import distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, pad
from tqdm import tqdm

import backbone
import sample
import tokenizers
import train
from train import world


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), the distance of two normal distributions.   [Heusel 2017]

    mu (d,), sigma (d, d), also singular, all finite, else ValueError -> float. S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2).
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
    """exp(mean KL(p(y|x) || p(y))) in each of `splits` parts -> dict(mean, deviation) over the parts, with the settings.   [Salimans 2016]

    logits (n, K); shuffle: the seed that first permutes the rows, or None. ValueError if n < splits.
    """
    n, scores = len(logits), []
    if n < splits:
        raise ValueError(f"{n} pictures cannot fill {splits} parts")
    rows = np.arange(n) if shuffle is None else np.random.RandomState(shuffle).permutation(n)
    log_p = log_softmax(np.asarray(logits, np.float64)[rows], axis=1)
    for part in np.split(log_p, [i * n // splits for i in range(1, splits)]):
        marginal = np.exp(part).mean(0).clip(np.finfo(np.float64).tiny)      # (K,)   p(y)
        scores.append(np.exp((np.exp(part) * (part - np.log(marginal))).sum(1).mean()))
    return dict(mean=float(np.mean(scores)), deviation=float(np.std(scores)), splits=splits, shuffle=shuffle)


def kernel_distance(features1, features2, subsets=100, size=1000, seed=2020):
    """KID: the unbiased squared maximum mean discrepancy of `subsets` pairs of random subsets.   [torch-fidelity]

    features (n, d), kernel (x y / d + 1)^3 -> dict(mean, deviation) over the pairs, with the settings. ValueError if `size` is below 2 or more than there is.
    """
    if not 2 <= size <= min(len(features1), len(features2)):
        raise ValueError(f"subsets of {size} of {len(features1)} and {len(features2)} pictures")
    random, found = np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (np.float64(f[random.choice(len(f), size, replace=False)]) for f in (features1, features2))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        found.append((xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1)) - 2 * xy.mean())
    return dict(mean=float(np.mean(found)), deviation=float(np.std(found)), subsets=subsets, size=size, seed=seed)


def moments(features):
    """(n, d) -> n, mean (d,) and scatter (d, d), the sum of (x - mean)(x - mean)^T."""
    return len(features), features.mean(0, np.float64), len(features) * np.cov(features, rowvar=False, bias=True)


def merge(a, b):
    """The moments of two sets of features together, from those of each; one set may be empty.   [Chan 1979]"""
    (n1, mean1, scatter1), (n2, mean2, scatter2) = a, b
    n, delta = n1 + n2, mean2 - mean1
    return n, mean1 + delta * n2 / max(n, 1), scatter1 + scatter2 + np.outer(delta, delta) * n1 * n2 / max(n, 1)


five = lambda w: dict(branch1x1="64 1x1", branch5x5="48 1x1, 64 5x5", branch3x3dbl="64 1x1, 96 3x3, 96 3x3", branch_pool=f"{w} 1x1")
six = lambda w: dict(branch1x1="192 1x1", branch7x7=f"{w} 1x1, {w} 1x7, 192 7x1",
                     branch7x7dbl=f"{w} 1x1, {w} 7x1, {w} 1x7, {w} 7x1, 192 1x7", branch_pool="192 1x1")
SEVEN = dict(branch1x1="320 1x1", branch3x3="384 1x1, 384 1x3 3x1", branch3x3dbl="448 1x1, 384 3x3, 384 1x3 3x1", branch_pool="192 1x1")
MEAN, MAX, HALF = partial(nn.AvgPool2d, 3, 1, 1, count_include_pad=False), partial(nn.MaxPool2d, 3, 1, 1), partial(nn.MaxPool2d, 3, 2)
MIXED = {  # block: channels of its input, the pool before its last branch, its branches in the order in which they are joined. A branch is its
    #        convolutions: width and kernel, see `conv`; the last may be two side by side
    "Mixed_5b": (192, MEAN, five(32)), "Mixed_5c": (256, MEAN, five(64)), "Mixed_5d": (288, MEAN, five(64)),
    "Mixed_6a": (288, HALF, dict(branch3x3="384 3x3/2", branch3x3dbl="64 1x1, 96 3x3, 96 3x3/2", pool="")),
    "Mixed_6b": (768, MEAN, six(128)), "Mixed_6c": (768, MEAN, six(160)), "Mixed_6d": (768, MEAN, six(160)), "Mixed_6e": (768, MEAN, six(192)),
    "Mixed_7a": (768, HALF, dict(branch3x3="192 1x1, 320 3x3/2", branch7x7x3="192 1x1, 192 1x7, 192 7x1, 192 3x3/2", pool="")),
    "Mixed_7b": (1280, MEAN, SEVEN), "Mixed_7c": (2048, MAX, SEVEN)}


def conv(c_in, c_out, kernel):
    """kernel "HxW": padded to keep the size of the picture; "HxW/S": with stride S, not padded."""
    sides, _, stride = kernel.partition("/")
    H, W = map(int, sides.split("x"))
    layer = nn.Conv2d(c_in, c_out, (H, W), int(stride or 1), 0 if stride else (H // 2, W // 2), bias=False)
    return nn.Sequential(OrderedDict(conv=layer, bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """Branches of the same input, joined along the channels; see the table MIXED."""

    def __init__(self, c_in, pool, branches):
        super().__init__()
        self.pool, self.branches = pool(), {}
        for branch, text in branches.items():
            c, self.branches[branch] = c_in, []                              # of lists of layers that stand side by side
            steps = [step.split() for step in text.split(",") if step]
            for number, (width, *kernels) in enumerate(steps, 1):
                layers = [conv(c, int(width), kernel) for kernel in kernels]
                name = f"{branch}_{number}" if len(steps) > 1 else branch
                for side, layer in zip("ab", layers):
                    self.add_module(name + side if len(layers) > 1 else name, layer)
                self.branches[branch].append(layers)
                c = int(width)

    def forward(self, x):
        step = lambda y, layers: torch.cat([layer(y) for layer in layers], dim=1)                # on what the step before gave
        return torch.cat([reduce(step, chain, self.pool(x) if "pool" in branch else x) for branch, chain in self.branches.items()], dim=1)


class Inception(nn.Sequential):
    """The network of TensorFlow's 2015 graph under the names of its released PyTorch file.   [torch-fidelity] [pytorch-fid]

    resize "torch-fidelity" or "pytorch-fid": the one difference between the two programs' features. size: pictures are cropped to it before.
    """

    samples, score, width = 50000, "inception_score", 2048                   # of a run, the name of its score, and d

    def __init__(self, resize="torch-fidelity", size=None):
        stem = OrderedDict(Conv2d_1a_3x3=conv(3, 32, "3x3/2"), Conv2d_2a_3x3=conv(32, 32, "3x3/1"), Conv2d_2b_3x3=conv(32, 64, "3x3"), pool1=HALF(),
                           Conv2d_3b_1x1=conv(64, 80, "1x1"), Conv2d_4a_3x3=conv(80, 192, "3x3/1"), pool2=HALF())
        super().__init__(stem | {name: Mixed(*row) for name, row in MIXED.items()} | dict(fc=nn.Linear(2048, 1008)))
        self.resize, self.size = resize, size

    def forward(self, images):
        """uint8 (B, 3, H, W) -> features (B, 2048), logits without their bias (B, 1008)."""
        if self.resize == "torch-fidelity":
            wider = pad(images.float(), (0, 1, 0, 1), mode="replicate")      # TensorFlow 1 steps H / 299 from the corner, not from half a pixel in
            x = (interpolate(wider, (300, 300), mode="bilinear", align_corners=True)[..., :299, :299] - 128) / 128
        else:
            x = 2 * interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        *layers, fc = self
        features = reduce(lambda x, layer: layer(x), layers, x).mean((2, 3))
        return features, features @ fc.weight.T


URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
HASH = "6726825d"                                                            # the start of the file's sha256: with these weights a distance is FID


def released_weights():
    """Where torch.hub keeps the released file, fetched once. SystemExit where it cannot be.   [pytorch-fid]"""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=HASH)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{path}: no such file, and {URL} cannot be fetched ({error}); put it there, or name it by --features") from None
    return path


class Classifier(nn.Module):
    """A small convolutional network; its features are channel means at two depths: texture and colour, then shape.   [ours]"""

    samples, score = 2000, "classifier_score"

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
    pictures = [source.read(i) for i in tqdm(range(len(source.labels)), desc="pictures", unit="img", disable=None)]
    good = [i for i, picture in enumerate(pictures) if not isinstance(picture, str)]
    if len(good) < 10:
        raise SystemExit(f"{data}: {len(good)} readable pictures are too few to train a classifier; choose other --features")
    x, y = torch.tensor(np.stack([pictures[i] for i in good])), torch.tensor(source.labels[good])
    torch.manual_seed(0)
    random, model = np.random.RandomState(0), Classifier(len(source.classes), size).to(device)
    kept, held_out = np.split(random.permutation(len(y)), [len(y) - len(y) // 10])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    order = np.concatenate([random.permutation(kept) for _ in range(math.ceil(steps * B / len(kept)))])
    for rows in tqdm(order[:steps * B].reshape(steps, B), desc="classifier", unit="step", disable=None):
        with train.autocast("auto", torch.device(device)):
            loss = cross_entropy(model(x[rows].to(device))[1].float(), y[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    guess = torch.cat([model.eval()(part.to(device))[1].argmax(1).cpu() for part in x[held_out].split(500)])
    meta = dict(data=data, pictures=len(kept), skipped=len(pictures) - len(good), steps=steps, held_out_accuracy=(guess == y[held_out]).double().mean().item())
    saved = dict(kind="classifier", config=dict(classes=len(source.classes), size=size), model=model.state_dict(), meta=meta)
    tokenizers.write_whole(path, lambda file: torch.save(saved, file))


def load_extractor(path, args, size):
    """The features in `path`: our classifier's, or Inception's of pictures cropped to `size`. SystemExit on other files."""
    saved = backbone.load_checkpoint(path, "classifier", official=True)
    digits = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if "kind" in saved:
        model, weights, about = Classifier(**saved["config"]), saved["model"], saved["meta"]
        model.name = f"small classifier {digits[:16]} of {about['data']}"
    else:
        model, about = Inception(args.resize, size), {}
        model.name = f"Inception-v3 {'of 2015-12-05' if digits.startswith(HASH) else 'with the weights ' + digits[:16]}, resize of {args.resize}"
        weights = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")} | saved     # the released file has no counters
    backbone.load_weights(model, weights, path)
    if not model.size:
        raise SystemExit(f"{path}: Inception's features without a run need --size, the side to which all pictures are cropped")
    model.metric = "FID" if digits.startswith(HASH) else f"Frechet distance ({model.name}, not FID)"
    model.about = dict(name=model.name, file=str(path), sha256=digits, width=model.width, size=model.size) | about
    return model.eval().requires_grad_(False).to(args.device, memory_format=torch.channels_last)


def find_extractor(args, run):
    """The features of --features; the classifier is that of the data set behind a run, B or A: RUNS/DATA/classifier.pt, trained if missing."""
    if args.features != "classifier":
        return load_extractor(released_weights() if args.features == "inception" else args.features, args, args.size or run and run.size)
    data = run and run.meta["data"] or next((what for what in (args.reference, args.pictures) if what and kind_of(what) == "data"), None)
    if not data:
        raise SystemExit(f"nothing tells the data set behind {args.pictures}, whose classifier gives the features; choose --features")
    data = data if data == "shapes" else str(Path(data).resolve())
    path = (run.shared if run and run.meta["data"] else Path("runs") / Path(data).name) / "classifier.pt"
    if not path.is_file():
        train_classifier(path, data, min(run.size, 64) if run else 32, args.device)
    model = load_extractor(path, args, None)
    if model.about["data"] != data:
        raise SystemExit(f"{path} is the classifier of {model.about['data']}, not of {data}; move it away, or choose one with --features")
    return model


def kind_of(what):
    """"run", "npz", "data" or "folder". SystemExit if there is no such thing."""
    path = Path(what)
    if path.is_file() or (path / "last.pt").is_file():
        return "npz" if path.suffix == ".npz" else "run"
    if what != "shapes" and not path.is_dir():
        raise SystemExit(f"{what}: no such run, folder, npz file or data set (shapes is one)")
    return "data" if what == "shapes" or list(path.glob("*idx?-ubyte*")) or any(p.is_dir() for p in path.iterdir()) else "folder"


def read_npz(what):
    """The pictures of `arr_0` uint8 (n, H, W, 3), one after the other, never all in memory."""
    try:
        with zipfile.ZipFile(what) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
                raise ValueError(f"arr_0 is {dtype} {shape}{' in the order of Fortran' * fortran}, expected uint8 (n, H, W, 3)")
            for _ in range(shape[0]):
                yield np.frombuffer(file.read(math.prod(shape[1:])), np.uint8).reshape(shape[1:]).transpose(2, 0, 1)
    except Exception as error:                                               # a damaged file can fail in any way
        raise SystemExit(f"{what}: expected an npz file with arr_0, or with mu and sigma; {error}") from None


def open_pictures(what, count, size, args, run=None):
    """-> numbered pictures, what to do with a batch of them, and a note for the report. run: the System of `what` if it is a run.

    The pictures are uint8 (3, H, W), of files cropped to `size`, or the reason why one cannot be read; process r of R has r, r + R, ...
    of at most `count` (None: all). A step takes numbers and pictures and gives pictures; a run has one, which draws.
    """
    (rank, ranks), note, steps = world(), dict(source=what, kind=kind_of(what)), []
    if note["kind"] == "npz":
        return islice(enumerate(read_npz(what)), rank, count, ranks), steps, note
    if run and not args.truth:
        source = SimpleNamespace(read=lambda i: None, labels=np.arange(count) % len(run.meta["classes"]))
    else:
        source = tokenizers.open_source(run.meta["data"] if run else what, "test", run.size if run else size, count)
        note["split"] = "held out" if source.held_out else "all, nothing is held out"
        if run and count > (held_out := len(source.labels) * source.held_out):
            raise SystemExit(f"--count {count} with --truth: {run.meta['data']} holds out {held_out} pictures")
        if run and source.classes != run.meta["classes"]:
            raise SystemExit(f"{run.meta['data']}: the held-out pictures have the classes {source.classes}, the run {run.meta['classes']}")
    if run:
        note |= dict(step=run.step, settings=run.settings) | {k: getattr(args, k) for k in (*"decode truth seed weights amp batch_size".split(), *backbone.PARTS)}
        y = torch.tensor(source.labels, device=run.device)                   # number i is the picture sample.py draws under the same seed
        x_d = lambda pictures: run.encode_discrete(np.stack(pictures)) if args.truth else None
        steps.append(lambda numbers, pictures: run.draw(args.seed, numbers, y[numbers], args.decode, x_d(pictures)).cpu().numpy())
    return ((i, source.read(i)) for i in range(len(source.labels))[rank:count:ranks]), steps, note


def reconstruct(run, tokenizer, numbers, pictures):
    """The pictures encoded and decoded by a run's "vae" (posterior mean) or "vq"."""
    x = to_size(pictures, run.size)
    if tokenizer == "vq":
        return run.decode_discrete(run.encode_discrete(x)).cpu().numpy()
    return sample.to_bytes(run.few(lambda part: run.vae.decode(run.vae.encode(part)[0]), x.to(run.device).float() / 127.5 - 1)).cpu().numpy()


def to_size(pictures, size):
    """uint8 (3, H, W) each -> uint8 (B, 3, size, size), cropped as data sets are."""
    crop = lambda p: np.asarray(tokenizers.center_crop(Image.fromarray(p.transpose(1, 2, 0)), size)).transpose(2, 0, 1)
    return torch.tensor(np.stack([p if p.shape[1:] == (size, size) else crop(p) for p in pictures]))


@torch.no_grad()
def measure(pictures, steps, note, extractor, args):
    """Stream what open_pictures gave through the extractor -> dict(mu, sigma, n, features if --kid, note), None but in process 0."""
    (rank, ranks), start, d = world(), time.time(), extractor.width
    total, rows, skipped = (0, np.zeros(d), np.zeros((d, d))), [], []
    pictures = iter(tqdm(pictures, desc=note["source"], unit="img", leave=False, disable=rank > 0 or None))
    while some := list(islice(pictures, args.batch_size)):
        skipped += [p for _, p in some if isinstance(p, str)]
        if good := [(i, p) for i, p in some if not isinstance(p, str)]:
            numbers, batch = map(list, zip(*good))
            for step in steps:
                batch = step(numbers, batch)
            features, logits = (a.cpu().numpy() for a in extractor(to_size(batch, extractor.size).to(args.device)))
            total = merge(total, moments(features))
            rows += zip(numbers, logits, features if args.kid else features[:, :0])
    parts = [(total, rows, skipped)] * ranks
    if ranks > 1:
        dist.all_gather_object(parts, parts[0])
    if rank > 0:
        return None
    totals, rows, skipped = zip(*parts)
    (n, mean, scatter), rows, skipped = reduce(merge, totals), sum(rows, []), sum(skipped, [])
    if skipped:
        print(f"{note['source']}: skipped {len(skipped)} unreadable pictures:", *skipped, sep="\n  ")
    if n <= (1 if args.force else d):
        raise SystemExit(f"{note['source']}: {n} pictures are too few for a covariance of {d} features; take more than {d}, or --force it")
    _, logits, features = map(np.stack, zip(*sorted(rows, key=lambda row: row[0])))
    note |= dict(count=n, skipped=skipped, seconds=round(time.time() - start, 2)) | ({extractor.score: inception_score(logits)} if n >= 10 else {})
    return dict(mu=mean, sigma=scatter / (n - 1), n=n, features=features, note=note)


def load_statistics(what):
    """The same dict from an npz file with mu (d,) and sigma (d, d), whatever else it holds; None from others."""
    try:
        with np.load(what) as file:
            n, extractor = (file[k].item() if k in file else "not recorded" for k in ("n", "extractor"))
            return dict(mu=file["mu"], sigma=file["sigma"], n=n, note=dict(source=what, kind="statistics", count=n, extractor=extractor))
    except Exception:                                                        # read_npz says what is wrong with an npz file
        return None


def compare(a, b, kid):
    """The note of a, with its distance to b."""
    try:
        found = dict(to=f"{b['note']['source']} ({b['n']})", frechet_distance=frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"]))
    except ValueError as error:
        raise SystemExit(f"{a['note']['source']} and {b['note']['source']} cannot be compared: {error}; both must hold the same features") from None
    found |= dict(kernel_distance=kernel_distance(a["features"], b["features"], size=min(1000, a["n"], b["n"]))) if kid else {}
    return found | a["note"]


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("pictures", metavar="A", help="a run or its checkpoint, a folder of pictures, an npz with pictures (arr_0) or mu and sigma, or a data set")
    p.add_argument("reference", metavar="B", nargs="?", help="the same; a data set gives its held-out pictures (default: the data set of the run A)")
    p.add_argument("--rfd", action="store_true", help="beside samples of the run A, also B's pictures reconstructed by each of its tokenizers")
    p.add_argument("--truth", action="store_true", help="samples of the run A from X_d of its data's held-out pictures instead of the prior's")
    p.add_argument("--kid", action="store_true", help="also the kernel distance; keeps all features in memory")
    p.add_argument("--features", default="classifier", metavar="WHICH",
                   help="inception (FID's, fetched once), classifier (RUNS/DATA/classifier.pt, trained if missing) or a file of either (default: %(default)s)")
    p.add_argument("--resize", default="torch-fidelity", choices=["torch-fidelity", "pytorch-fid"], help="resizing of Inception's input (default: %(default)s)")
    p.add_argument("--size", type=train.within(1, kind=int), metavar="PIXELS", help="side to which pictures are cropped before Inception (default: the run's)")
    p.add_argument("--count", type=train.within(1, kind=int), metavar="N", help="pictures of A (default: of a run 2000, with Inception 50000; else all)")
    p.add_argument("--force", action="store_true", help="accept fewer pictures than features")
    p.add_argument("--save-stats", metavar="FILE.npz", help="write mu, sigma, n and extractor of A")
    p.add_argument("--json", metavar="FILE", help="write the report there (default: print it)")
    sample.add_options(p.add_argument_group("samples of a run"))
    return p.parse_args(argv)


def evaluate(args):
    """Measure everything, in all processes -> the report, in process 0."""
    runs = {what: sample.open_run(what, args) for what in (args.pictures, args.reference) if what and kind_of(what) == "run"}
    run = next(iter(runs.values()), None)
    A, B = args.pictures, args.reference or run and run.meta["data"]
    saved = {what: found for what in (A, B) if what and (found := load_statistics(what))}
    if args.truth and not (run and run.meta["data"]):
        raise SystemExit(f"--truth takes X_d from the data set of a run, and {A} names none")
    if args.rfd and (A not in runs or not B or B in saved):
        raise SystemExit(f"--rfd reconstructs pictures of B, not statistics, by the tokenizers of a run A; A is {A}, B {B}")
    if args.kid and (saved or not B):
        raise SystemExit(f"--kid compares single pictures of A and of B, not statistics; A is {A}, B {B}")
    if world()[0] == 0:                                                      # fetches or trains, the others then read
        find_extractor(args, run)
    train.barrier()
    extractor = find_extractor(args, run)
    if others := [f"{what} holds features of {by}" for what in saved if (by := saved[what]["note"]["extractor"]) not in (extractor.name, "not recorded")]:
        raise SystemExit(f"{others[0]}, not of {extractor.name}")

    def look(what, count=None, tokenizer=None):
        count = count or (extractor.samples if what in runs else None)
        pictures, steps, note = open_pictures(what, count, run.size if tokenizer else extractor.size, args, runs.get(what))
        if tokenizer:
            steps.append(partial(reconstruct, run, tokenizer))
            note["source"] += f" reconstructed by the {tokenizer} of {A}"
        return saved.get(what) or measure(pictures, steps, note, extractor, args)

    reference = B and look(B)
    measured = [look(A, args.count)] + [look(B, tokenizer=kind) for kind in ("vae", "vq") if args.rfd and getattr(run, kind)]
    if world()[0] > 0:
        return None
    if args.save_stats:
        tokenizers.write_whole(args.save_stats, lambda file: np.savez(file, extractor=extractor.name, **{k: measured[0][k] for k in ("mu", "sigma", "n")}))
    return dict(metric=extractor.metric, extractor=extractor.about, reference=reference and reference["note"],
                results=[compare(a, reference, args.kid) if reference else a["note"] for a in measured])


@train.processes()
def main(argv=None):
    args, start = parse(argv), time.time()
    if folders := [path for path in (args.json, args.save_stats) if path and Path(path).is_dir()]:
        raise SystemExit(f"{folders[0]} is a folder; name a file for the report or the statistics")
    torch.backends.cudnn.allow_tf32 = False                                  # features are fp32 on every device
    if report := evaluate(args):
        for r in report["results"]:
            found = [f"{report['metric']} to {r['to']}: {r['frechet_distance']:.4g}"] if "to" in r else []
            found += [f"{key.replace('_', ' ')} {r[key]['mean']:.4g} +- {r[key]['deviation']:.2g}" for key in r if key.endswith(("kernel_distance", "_score"))]
            print(f"{r['source']} ({r['count']}): {'; '.join(found)}")
        report |= dict(device=args.device, processes=world()[1], seconds=round(time.time() - start, 1), date=time.strftime("%Y-%m-%d %H:%M:%S"))
        tokenizers.write_json(args.json, report) if args.json else print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
