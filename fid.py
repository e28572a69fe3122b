"""How far pictures are from a reference: Frechet distance, inception score, reconstruction distance. Section 4, Tables 1 to 3.

`frechet_distance` and `inception_score` are the measures, `Statistics` gathers mean and covariance in constant
memory, `open_pictures` reads a run, a folder, an npz file or a data set. Features come from a small classifier
trained on the data set, and what is measured with them is never called FID.

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
from itertools import islice
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


class Statistics:
    """Mean and covariance of features that come batch by batch, in constant memory."""

    def __init__(self, d):
        self.n, self.mean, self.scatter = 0, np.zeros(d), np.zeros((d, d))

    def add(self, features):
        """features (B, d); the scatter, a sum of (x - mean)(x - mean)^T, is that of both parts and of their means.   [Chan 1979]"""
        x = np.asarray(features, np.float64)
        delta, total = x.mean(0) - self.mean, self.n + len(x)
        self.scatter += (x - x.mean(0)).T @ (x - x.mean(0)) + np.outer(delta, delta) * self.n * len(x) / total
        self.mean, self.n = self.mean + delta * len(x) / total, total

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


def train_classifier(path, data, size, device, steps=700, B=128):
    """Train the classifier on nine tenths of the train split, the same way every time; save it with its accuracy on the last tenth."""
    source = tokenizers.open_source(data, "train", size, None if data == "shapes" else 60000)
    read = [(source.read(i), source.labels[i]) for i in tqdm(range(len(source.labels)), desc="pictures", unit="img", disable=None)]
    good = [pair for pair in read if not isinstance(pair[0], str)]
    if len(good) < 10:
        raise SystemExit(f"{data}: {len(good)} readable pictures are too few to train a classifier; choose one with --features CKPT")
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
    return model.eval().requires_grad_(False).to(device)


def find_classifier(args):
    """The classifier of --features, else of --data, else of the data set B or A or behind a run: RUNS/DATA/classifier.pt, trained if missing."""
    if args.features:
        return load_classifier(args.features, args.device)
    kinds = {what: kind_of(what) for what in (args.reference, args.pictures) if what}
    run = next((open_run(what, args.device, args.weights) for what in kinds if kinds[what] == "run"), None)
    data = args.data or next((what for what in kinds if kinds[what] == "data"), run and run.meta["data"])
    if not data:
        raise SystemExit(f"nothing tells the data set behind {' and '.join(kinds)}, whose classifier gives the features; add --data DATA or --features CKPT")
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


@lru_cache(2)
def open_run(run, device, weights):
    return sample.System(run, device, weights)


def draw_run(system, n, settings, args):
    """Samples of a run: number i has class i mod K and is the picture sample.py draws under the same seed."""
    for start in range(0, n, args.batch_size):
        indices = range(start, min(start + args.batch_size, n))
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


def open_pictures(what, count, size, args):
    """-> pictures one by one, uint8 (3, H, W) or the reason why one cannot be read, and a note on them for the report.

    At most `count`, if given; `size` for data sets, which give their held-out split if they have one.
    """
    kind = kind_of(what)
    note = dict(source=what, kind=kind)
    if kind == "run":
        system, count = open_run(what, args.device, args.weights), count or 2000
        settings = system.meta["sampling"] | {k: getattr(args, k) for k in ("ar_steps", "diffusion_steps", "cfg") if getattr(args, k) is not None}
        note |= {k: getattr(args, k) for k in ("decode", "seed", "weights", "amp", "batch_size")} | dict(step=system.step, settings=settings)
        pictures = draw_run(system, count, settings, args)
    elif kind == "npz":
        pictures = read_npz(what)
    elif kind == "folder":
        pictures = map(read_file, sorted(p for p in Path(what).rglob("*") if p.suffix.lower() in tokenizers.EXTENSIONS))
    else:
        try:
            source, note["split"] = tokenizers.open_source(what, "test", size, count), "held out"
        except LookupError:
            source, note["split"] = tokenizers.open_source(what, "train", size, count), "train, nothing is held out"
        pictures = map(source.read, range(len(source.labels)))
    return islice(pictures, count), note


def fit(picture, size):
    """uint8 (3, H, W) -> uint8 (3, size, size), as data sets are read."""
    if picture.shape[1:] == (size, size):
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


# ------------------------------------------------------------------ pictures -> statistics -> report

@torch.no_grad()
def measure(pictures, note, extractor, args, through=lambda batch: batch):
    """Stream pictures (see open_pictures) through the extractor -> dict(mu, sigma, n, extractor, note)."""
    statistics, logits, skipped, start = Statistics(extractor.width), [], [], time.time()
    pictures = iter(tqdm(pictures, desc=note["source"], unit="img", leave=False, disable=None))
    while some := list(islice(pictures, args.batch_size)):
        skipped += [p for p in some if isinstance(p, str)]
        if good := [p for p in some if not isinstance(p, str)]:
            x = torch.tensor(np.stack([fit(p, extractor.size) for p in through(good)])).to(args.device)
            features, scores = (a.cpu().numpy() for a in extractor(x))
            statistics.add(features)
            logits.append(scores)
    if skipped:
        print(f"{note['source']}: skipped {len(skipped)} unreadable pictures:", *skipped, sep="\n  ")
    if statistics.n <= (1 if args.force else extractor.width):
        raise SystemExit(f"{note['source']}: {statistics.n} pictures are too few for a covariance of {extractor.width} features; "
                         f"take more than {extractor.width}{'' if args.force else ', or --force it'}")
    note |= dict(count=statistics.n, skipped=skipped, seconds=round(time.time() - start, 2))
    if statistics.n >= 10:
        note["classifier_score"] = dict(zip(("mean", "deviation"), inception_score(np.concatenate(logits)))) | dict(splits=10, shuffle=2020)
    return dict(mu=statistics.mean, sigma=statistics.covariance(), n=statistics.n, extractor=extractor.name, note=note)


def load_statistics(what):
    """The same dict from an npz file with mu (d,) and sigma (d, d); None if `what` is something else."""
    try:
        with np.load(what) as file:
            found = dict(n="not recorded", extractor="not recorded") | {k: file[k].tolist() for k in ("n", "extractor") if k in file.files}
            return found | dict(mu=file["mu"], sigma=file["sigma"], note=dict(source=what, kind="statistics", count=found["n"], extractor=found["extractor"]))
    except (OSError, EOFError, KeyError, ValueError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error):
        return None                                                          # read_npz says what is wrong with an npz file


def compare(a, b):
    """The note of a, with its distance to b."""
    both = f"{a['note']['source']} and {b['note']['source']}"
    if len({a["extractor"], b["extractor"]} - {"not recorded"}) > 1:
        raise SystemExit(f"{both} cannot be compared: their features are those of {a['extractor']} and of {b['extractor']}")
    try:
        return dict(frechet_distance=frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])) | a["note"]
    except ValueError as error:
        raise SystemExit(f"{both} cannot be compared: {error}; both must hold the same features") from None


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("pictures", metavar="A", help="a run or its checkpoint, a folder of pictures, an npz of samples (arr_0) or statistics (mu, sigma), or a data set")
    p.add_argument("reference", metavar="B", nargs="?", help="the same; a data set gives its held-out pictures (default: the data set of the run A)")
    p.add_argument("--rfd", action="store_true", help="instead of samples of the run A, measure B's pictures reconstructed by each of its tokenizers")
    p.add_argument("--features", metavar="CKPT", help="classifier that gives the features (default: RUNS/DATA/classifier.pt, trained if missing)")
    p.add_argument("--data", help="data set whose classifier gives the features (default: the one behind B or A)")
    p.add_argument("--count", type=int, help="pictures of A (default: 2000 of a run, else all)")
    p.add_argument("--reference-count", type=int, help="pictures of B (default: 2000 of a run, else all)")
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


def main(argv=None):
    args, start = parse(argv), time.time()
    run = open_run(args.pictures, args.device, args.weights) if kind_of(args.pictures) == "run" else None
    if args.rfd and not run:
        raise SystemExit(f"--rfd reconstructs by the tokenizers of a run, and {args.pictures} is none")
    args.reference = args.reference or run and run.meta["data"]
    saved = {what: load_statistics(what) for what in (args.pictures, args.reference) if what and kind_of(what) == "npz"}
    extractor = None if args.reference and all(saved.get(what) for what in (args.pictures, args.reference)) else find_classifier(args)
    one = lambda what, count: saved.get(what) or measure(*open_pictures(what, count, extractor.size, args), extractor, args)
    reference, results = args.reference and one(args.reference, args.reference_count), []
    for tokenizer in ("vae", "vq") if args.rfd else ():
        pictures, note = open_pictures(args.reference, args.reference_count, run.size, args)
        note["source"] += f" reconstructed by the {tokenizer} of {args.pictures}"
        results.append(measure(pictures, note, extractor, args, partial(reconstruct, run, tokenizer)))
    results = results or [one(args.pictures, args.count)]
    if args.save_stats:
        tokenizers.write_whole(args.save_stats, lambda file: np.savez(file, **{k: results[0][k] for k in ("mu", "sigma", "n", "extractor")}))
    name = extractor.name if extractor else results[0]["extractor"]
    report = dict(metric=f"Frechet distance ({name}, not FID)", extractor=extractor.about if extractor else name, reference=reference and reference["note"],
                  results=[compare(r, reference) if reference else r["note"] for r in results],
                  device=args.device, seconds=round(time.time() - start, 1), date=time.strftime("%Y-%m-%d %H:%M:%S"))
    for r in report["results"]:
        score = "; IS(classifier) {mean:.3f} +- {deviation:.3f}".format(**r["classifier_score"]) if "classifier_score" in r else ""
        distance = f"{report['metric']} to {args.reference} ({reference['note']['count']}): {r['frechet_distance']:.4g}" if reference else name
        print(f"{r['source']} ({r['count']}): {distance}{score}")
    if args.json:
        tokenizers.write_whole(args.json, lambda file: file.write(json.dumps(report, indent=1).encode()))
    else:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
