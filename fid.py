"""How far pictures are from a reference: Frechet distance, inception score, reconstruction distance. Section 4, Tables 1 to 3.

`frechet_distance`, `inception_score` and `kid` are the measures, `Statistics` gathers mean and covariance in
constant memory, `open_pictures` reads a run, a folder, an npz file or a data set. Features come from a small
classifier trained on the data set, and what is measured with them is never called FID.

Reads runs and pictures through sample.py and tokenizers.py, writes json. The last file; read tests/ next.
Try: python fid.py runs/shapes-dcmix shapes

B batch, n pictures, d features, K classes; all statistics are float64.
"""
import argparse
import json
import math
import time
import zipfile
import zlib
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
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


def labelled(source, rows):
    """The readable pictures among `rows` -> uint8 (n, 3, size, size), labels (n,)."""
    read = [(source.read(i), source.labels[i]) for i in tqdm(rows, desc="pictures", unit="img", leave=False, disable=None)]
    pictures, labels = zip(*[pair for pair in read if not isinstance(pair[0], str)])
    return torch.tensor(np.stack(pictures)), torch.tensor(np.array(labels))


def training_pictures(data, size, most=60000):
    """The train split, the held-out one, and the classes; without a test split a tenth is held out."""
    train = tokenizers.open_source(data, "train", size, None if data == "shapes" else most)
    rows = np.arange(len(train.labels))
    try:
        test = tokenizers.open_source(data, "test", size, 10000)
        return labelled(train, rows), labelled(test, range(len(test.labels))), train.classes
    except LookupError:
        return labelled(train, rows[rows % 10 > 0]), labelled(train, rows[::10]), train.classes


def train_classifier(path, data, size, device, steps=700, B=128):
    """Train the classifier on the train split, the same way every time, and save it as `path` with its held-out accuracy."""
    (x, y), (x_test, y_test), classes = training_pictures(data, size)
    if len(classes) < 2:
        raise SystemExit(f"{data} has one class only, so no classifier can learn from it; give --features CKPT")
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
    meta = dict(data=data, pictures=len(y), steps=steps, held_out_accuracy=right / len(y_test))
    saved = dict(kind="classifier", config=dict(classes=len(classes), size=size), model=model.state_dict(), meta=meta)
    tokenizers.write_whole(path, lambda file: torch.save(saved, file))


def load_classifier(path, device):
    """The classifier saved at `path`, with its `name` and an `about` for the report. SystemExit on any other file."""
    saved = sample.load_checkpoint(path, "classifier")
    model = Classifier(**saved["config"])
    sample.load_weights(model, saved["model"], path)
    digits = tokenizers.fingerprint(model)
    model.name = f"small classifier {digits} of {saved['meta']['data']}"
    model.about = dict(name=model.name, file=str(path), sha256=digits, width=model.width, size=model.size) | saved["meta"]
    return model.eval().requires_grad_(False).to(device)


def find_classifier(args):
    """The classifier of --features, else of --data, else of the data set behind B or A, in runs/DATA/; trained if not there yet."""
    if args.features:
        return load_classifier(args.features, args.device)
    kinds = {what: kind_of(what) for what in (args.reference, args.pictures) if what}
    runs = [open_run(what, args.device, args.weights) for what, kind in kinds.items() if kind == "run"]
    behind = [what if kind == "data" else open_run(what, args.device, args.weights).meta["data"] for what, kind in kinds.items() if kind in ("data", "run")]
    data = args.data or (behind + [None])[0]
    if not data:
        raise SystemExit(f"nothing tells the data set behind {' and '.join(kinds)}, whose classifier gives the features; add --data DATA or --features CKPT")
    data = data if data == "shapes" else str(Path(data).resolve())
    path = (runs[0].shared.parent if runs else Path("runs")) / Path(data).name / "classifier.pt"
    if not path.is_file():
        train_classifier(path, data, min(runs[0].size, 64) if runs else 32, args.device)
    model = load_classifier(path, args.device)
    if model.about["data"] != data:
        raise SystemExit(f"{path} is the classifier of {model.about['data']}, not of {data}; move it away, or choose it with --features")
    return model


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
        raise SystemExit(f"{what}: no such run, folder, npz file or data set (shapes is one)")
    inside = [p for p in path.iterdir() if not p.name.startswith(".")]
    class_folders = sum(p.is_dir() for p in inside) > 1 and not any(p.suffix.lower() in tokenizers.EXTENSIONS for p in inside)
    return "data" if class_folders or (path / "train").is_dir() or list(path.glob("*-idx*ubyte*")) else "folder"


@lru_cache(2)
def open_run(run, device, weights):
    """All models of a run, with the folder `shared` of its data set and the `size` of its pictures."""
    system = sample.System(run, device, weights)
    system.shared = (Path(run) if Path(run).is_dir() else Path(run).parent) / system.meta["shared"]
    system.size = math.isqrt(system.model.N) << len(system.vae.encoder.down) - 1
    return system


def draw_run(system, n, settings, args):
    """Samples of a run: number i has class i mod K and is the picture sample.py draws under the same seed."""
    for start in range(0, n, args.batch_size):
        indices = range(start, min(start + args.batch_size, n))
        y = torch.tensor([i % len(system.meta["classes"]) for i in indices], device=system.device)
        with sample.autocast(args.amp, system.device):
            x_d = system.draw_discrete(args.seed, indices, y, settings)
            if args.decode == "discrete":
                yield from system.decode_discrete(x_d).cpu().numpy()
            else:
                yield from system.decode_continuous(system.draw_continuous(args.seed, indices, y, x_d, settings)).cpu().numpy()


def read_npz(what):
    """`arr_0` uint8 (n, H, W, 3) of an npz file: n, and the pictures one after the other, never all in memory."""
    try:
        file = zipfile.ZipFile(what).open("arr_0.npy")
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{what}: expected an npz file with arr_0, or with mu and sigma ({error})") from None
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
        raise SystemExit(f"{what}: arr_0 is {dtype} {shape}, expected uint8 (n, H, W, 3)")

    def pictures():
        for i in range(shape[0]):
            try:
                yield np.frombuffer(file.read(math.prod(shape[1:])), np.uint8).reshape(shape[1:]).transpose(2, 0, 1)
            except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                raise SystemExit(f"{what}: damaged at picture {i} of {shape[0]} ({error})") from None

    return shape[0], pictures()


def read_file(path):
    """uint8 (3, H, W), or the reason why not as text."""
    try:
        return np.asarray(tokenizers.read_rgb(path)).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{path}: {error}"


def open_pictures(what, count, size, args):
    """-> n, pictures one by one as uint8 (3, H, W) or the reason why one cannot be read, and a note for the report.

    At most `count`, if given; a data set gives its held-out split if it has one. SystemExit if there is nothing to read.
    """
    kind, note = kind_of(what), {}
    if kind == "run":
        system, n = open_run(what, args.device, args.weights), count or 2000
        settings = system.meta["sampling"] | {k: getattr(args, k) for k in ("ar_steps", "diffusion_steps", "cfg") if getattr(args, k) is not None}
        note = {k: getattr(args, k) for k in ("decode", "seed", "weights", "amp", "batch_size")} | dict(step=system.step, settings=settings)
        pictures = draw_run(system, n, settings, args)
    elif kind == "npz":
        n, pictures = read_npz(what)
    elif kind == "folder":
        files = sorted(p for p in Path(what).rglob("*") if p.suffix.lower() in tokenizers.EXTENSIONS and not p.name.startswith("."))
        n, pictures = len(files), map(read_file, files)
    else:
        try:
            source, note["split"] = tokenizers.open_source(what, "test", size, count), "held out"
        except LookupError:
            source, note["split"] = tokenizers.open_source(what, "train", size, count), "train, nothing is held out"
        n, pictures = len(source.labels), map(source.read, range(len(source.labels)))
    if n == 0:
        raise SystemExit(f"{what}: no pictures in it")
    return min(n, count or n), pictures, dict(source=what, kind=kind) | note


def fit(picture, size):
    """uint8 (3, H, W) -> uint8 (3, size, size), as data sets are read."""
    if picture.shape[1:] == (size, size):
        return picture
    return np.asarray(tokenizers.center_crop(Image.fromarray(picture.transpose(1, 2, 0)), size)).transpose(2, 0, 1)


def reconstruct(system, tokenizer, pictures):
    """Pictures (3, H, W) encoded and decoded by a run's "vae" (posterior mean) or "vq"."""
    x = torch.tensor(np.stack([fit(p, system.size) for p in pictures])).to(system.device).float() / 255
    if tokenizer == "vae":
        y = system.vae.decode(system.vae.encode(x * 2 - 1)[0])
    else:
        y = system.vq.decode(tokenizers.quantise(system.vq.encode(x))) * 2 - 1
    return sample.to_bytes(y).cpu().numpy()


# ------------------------------------------------------------------ from pictures to statistics to the report


@torch.no_grad()
def measure(n, pictures, note, extractor, args, through=lambda batch: batch):
    """Stream pictures (see open_pictures) through the extractor -> dict(mu, sigma, n, extractor, features, note)."""
    statistics, batch, logits, features, skipped, start = Statistics(extractor.width), [], [], [], [], time.time()
    for i, picture in zip(range(n), tqdm(pictures, desc=note["source"], unit="img", total=n, leave=False, disable=None)):
        (skipped if isinstance(picture, str) else batch).append(picture)
        if batch and (len(batch) == args.batch_size or i == n - 1):
            x = torch.tensor(np.stack([fit(p, extractor.size) for p in through(batch)]))
            f, scores = (a.cpu().numpy() for a in extractor(x.to(args.device)))
            statistics.add(f)
            logits.append(scores)
            features += [f] if args.kid else []
            batch = []
    if skipped:
        print(f"{note['source']}: skipped {len(skipped)} unreadable of {n} pictures:", *skipped, sep="\n  ")
    if statistics.n <= (1 if args.force else extractor.width):
        raise SystemExit(f"{note['source']}: {statistics.n} pictures are too few for a covariance of {extractor.width} features; "
                         f"take more than {extractor.width}, or --force it")
    note = note | dict(count=statistics.n, skipped=skipped, seconds=round(time.time() - start, 2))
    if statistics.n >= 10:
        note["classifier_score"] = dict(zip(("mean", "deviation"), inception_score(np.concatenate(logits))), splits=10, shuffle=2020)
    return dict(mu=statistics.mean, sigma=statistics.covariance(), n=statistics.n, extractor=extractor.name, features=features, note=note)


def load_statistics(what):
    """The same dict from an npz file with mu (d,) and sigma (d, d); None if `what` is something else."""
    if kind_of(what) != "npz":
        return None
    try:
        with np.load(what) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            n, extractor = (file[k].item() if k in file.files else "not recorded" for k in ("n", "extractor"))
            note = dict(source=what, kind="statistics", count=n, extractor=extractor)
            return dict(mu=file["mu"], sigma=file["sigma"], n=n, extractor=extractor, features=[], note=note)
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise SystemExit(f"{what}: expected an npz file with arr_0, or with mu and sigma ({error})") from None


def compare(a, b, args):
    """The note of a with its distances to b."""
    names = {side["extractor"] for side in (a, b)} - {"not recorded"}
    if len(names) > 1:
        raise SystemExit(f"{a['note']['source']} and {b['note']['source']} have features of different extractors: {' and '.join(sorted(names))}")
    try:
        found = dict(frechet_distance=frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"]))
    except ValueError as error:
        raise SystemExit(f"{a['note']['source']} and {b['note']['source']}: {error}; both must hold the same features") from None
    if args.kid:
        if not (a["features"] and b["features"]):
            raise SystemExit("--kid needs pictures on both sides, not statistics")
        size = min(1000, a["n"], b["n"])
        mean, deviation = kid(np.concatenate(a["features"]), np.concatenate(b["features"]), subset_size=size)
        found["kernel_distance"] = dict(mean=mean, deviation=deviation, subsets=100, subset_size=size, seed=2020)
    return a["note"] | found


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("pictures", metavar="A", help="a run or its checkpoint, a folder of pictures, an npz of samples (arr_0) or of statistics (mu, sigma), or a data set")
    p.add_argument("reference", metavar="B", nargs="?", help="the same; a data set gives its held-out pictures (default: the data set of the run A)")
    p.add_argument("--rfd", action="store_true", help="measure B's pictures reconstructed by each tokenizer of the run A, not A's samples")
    p.add_argument("--kid", action="store_true", help="the kernel distance too: unbiased for few pictures, keeps all features in memory")
    p.add_argument("--features", metavar="CKPT", help="classifier that gives the features (default: RUNS/DATA/classifier.pt, trained if missing)")
    p.add_argument("--data", help="data set whose classifier gives the features (default: the one behind B or A)")
    p.add_argument("--count", type=int, help="pictures of A (default: 2000 of a run, else all)")
    p.add_argument("--reference-count", type=int, help="pictures of B (default: the same)")
    p.add_argument("--force", action="store_true", help="accept fewer pictures than features")
    p.add_argument("--json", metavar="FILE", help="write the report there (default: print it)")
    p.add_argument("--save-stats", metavar="FILE.npz", help="write mu, sigma, n, extractor of A")
    g = p.add_argument_group("samples of a run")
    g.add_argument("--seed", type=int, default=0, help="as in sample.py: the same pictures")
    g.add_argument("--weights", default="ema", choices=["ema", "raw"], help="moving average or last weights")
    g.add_argument("--decode", default="continuous", choices=["continuous", "discrete"], help="discrete: the prior's X_d alone through the bit tokenizer")
    for name, kind, text in (("ar-steps", int, "AR steps of MixAR"), ("diffusion-steps", int, "steps of the diffusion head"), ("cfg", float, "guidance scale of MixAR")):
        g.add_argument(f"--{name}", type=kind, help=f"{text} (default: the run's)")
    g.add_argument("--batch-size", type=int, default=100, help="pictures at once")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    g.add_argument("--amp", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="as in sample.py; features are always fp32")
    return p.parse_args(argv)


def main(argv=None):
    args, start = parse(argv), time.time()
    a_run = kind_of(args.pictures) == "run"
    if args.rfd and not a_run:
        raise SystemExit(f"--rfd needs a run for A, to reconstruct by its tokenizers; {args.pictures} is none")
    if a_run and not args.reference:
        args.reference = open_run(args.pictures, args.device, args.weights).meta["data"]
    saved = {what: load_statistics(what) for what in (args.pictures, args.reference) if what}
    extractor = find_classifier(args) if None in saved.values() else None
    side = lambda what, count: saved[what] or measure(*open_pictures(what, count, extractor.size, args), extractor, args)
    reference = side(args.reference, args.reference_count) if args.reference else None
    if args.rfd:
        system, results = open_run(args.pictures, args.device, args.weights), []
        for tokenizer in ("vae", "vq"):
            n, pictures, note = open_pictures(args.reference, args.reference_count, system.size, args)
            note |= dict(reconstructed_by=f"{tokenizer} of {args.pictures}")
            results.append(measure(n, pictures, note, extractor, args, partial(reconstruct, system, tokenizer)))
    else:
        results = [side(args.pictures, args.count)]
    if args.save_stats:
        tokenizers.write_whole(args.save_stats, lambda file: np.savez(file, **{k: results[0][k] for k in ("mu", "sigma", "n", "extractor")}))
    name = extractor.name if extractor else results[0]["extractor"]
    report = dict(metric=f"Frechet distance ({name}, not FID)", extractor=extractor.about if extractor else name, reference=reference and reference["note"],
                  results=[compare(r, reference, args) if reference else r["note"] for r in results],
                  device=args.device, seconds=round(time.time() - start, 1), date=time.strftime("%Y-%m-%d %H:%M:%S"))
    for r in report["results"]:
        print(summary(r, report))
    if args.json:
        tokenizers.write_whole(args.json, lambda file: file.write(json.dumps(report, indent=1).encode()))
    else:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
