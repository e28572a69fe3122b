"""Two sets of pictures compared: FID (the paper's gFID), inception score, rFID. Section 4, Table 1.

`evaluate` is the whole program: open the feature network, measure B, measure A, compare, report.
`measure` streams pictures through a network of features.py and takes mean and covariance of the
features; `frechet_distance` compares those of two sets.

A run is sampled with its own settings. For other settings, write the pictures with sample.py first.
Reads runs through sample.py, data sets through dataset.py and networks through features.py, besides
disk, output and train.py. Writes JSON. It is the last file.
Try: python fid.py runs/shapes-dcmix shapes

B batch, n pictures, d features, K classes. All statistics are float64.
"""
import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.special import log_softmax
from tqdm import tqdm

import dataset
import disk
import features
import output
import sample
import train


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The Frechet distance of two normal distributions, a float.   [Heusel 2017]

        |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

    mu1, mu2: the means, (d,).
    sigma1, sigma2: the covariances S1 and S2, (d, d); they may be singular.

    Raises ValueError if the shapes do not fit together.
    """
    mu1, sigma1 = np.asarray(mu1, np.float64), np.asarray(sigma1, np.float64)
    mu2, sigma2 = np.asarray(mu2, np.float64), np.asarray(sigma2, np.float64)
    shapes = [a.shape for a in (mu1, mu2, sigma1, sigma2)]
    d = mu1.size
    if shapes != [(d,), (d,), (d, d), (d, d)]:
        raise ValueError(f"the shapes of mu and sigma do not fit together: {shapes}")

    # S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2). None is negative:
    # one below 0 is a rounding error.
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T           # S1^(1/2)
    trace = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)


def inception_score(logits, splits=10, shuffle=2020):
    """exp(mean KL(p(y|x) || p(y))), computed in each of several parts.   [Salimans 2016]

    logits: (n, K), n at least `splits`.
    splits: the number of parts.
    shuffle: seed of the permutation of the rows before they are split [torch-fidelity]; None keeps
        their order.

    Returns a dict: mean and deviation over the parts, splits, shuffle.
    """
    n = len(logits)
    if n < splits:
        raise ValueError(f"{n} pictures cannot fill {splits} parts")
    rows = np.arange(n)
    if shuffle is not None:
        rows = np.random.RandomState(shuffle).permutation(n)
    log_p = log_softmax(np.asarray(logits, np.float64)[rows], axis=1)

    scores = []
    for part in np.split(log_p, [i * n // splits for i in range(1, splits)]):
        p = np.exp(part)                                             # (n / splits, K)   p(y|x)
        marginal = p.mean(0).clip(np.finfo(np.float64).tiny)         # (K,)              p(y)
        scores.append(np.exp((p * (part - np.log(marginal))).sum(1).mean()))
    mean, deviation = float(np.mean(scores)), float(np.std(scores))
    return dict(mean=mean, deviation=deviation, splits=splits, shuffle=shuffle)


def find_weights(args, run, data):
    """The path of the network that --features names, fetched or trained if it is missing.

    run: the sample.System of a run whose data set is `data`, or None.
    data: the data set whose classifier is wanted, or None.
    """
    if args.features == "inception":
        return features.released_weights()
    if args.features != "classifier":
        return args.features
    if not data:
        raise SystemExit(f"cannot tell the data set of {args.pictures}; give B or --features")
    if data != "shapes":
        data = str(Path(data).resolve())
    folder = run.shared if run else Path("runs") / Path(data).name
    path = folder / "classifier.pt"
    if not path.is_file():
        features.train_classifier(path, data, min(run.size, 64) if run else 32, args.device)
    with disk.reading(path, "classifier"):
        other = disk.load_checkpoint(path, "classifier")["meta"]["data"]
    if other != data:
        raise SystemExit(f"{path} is the classifier of {other}, not of {data}; move it away")
    return path


def open_extractor(args, a, b):
    """The feature network of --features; a classifier is that of the run, else of B, else of A."""
    run = a.run or (b and b.run)
    data = a.data
    if b and b.data and not a.run:
        data = b.data
    path = find_weights(args, run, data)
    return features.load_extractor(path, args.resize, args.size or (run and run.size), args.device)


def read_npz(path, *names):
    """The arrays of those names in an npz file, as far as it holds them, in a dict."""
    with disk.reading(path, "readable npz file"), np.load(path) as file:
        return {name: file[name] for name in names if name in file}


class PictureSet:
    """A or B of the command line.

    what: its name there.
    kind: "run", "npz" (pictures), "statistics" (mu and sigma), "data" or "folder".
    run: the sample.System of a run, else None.
    data: the data set, or that of the run, else None.
    pictures: of an npz file, uint8 (n, 3, H, W).
    classes: their names, in a run; those of a data set are known once it is open.
    """

    def __init__(self, what, device):
        self.what = what
        self.kind = self.find_kind(Path(what))
        self.run = sample.System(what, device) if self.kind == "run" else None
        self.data = what if self.kind == "data" else None
        if self.run:
            self.data = self.run.meta["data"]
            self.classes = self.run.meta["classes"]
        if self.kind == "npz":
            pictures = read_npz(what, "arr_0").get("arr_0", np.zeros(0))
            if pictures.shape[3:] != (3,) or pictures.dtype != np.uint8 or pictures.size == 0:
                raise SystemExit(f"{what}: expected an npz file with arr_0, uint8 (n, H, W, 3), or "
                                 f"mu and sigma; arr_0 is {pictures.dtype} {pictures.shape}")
            self.pictures = pictures.transpose(0, 3, 1, 2)

    def find_kind(self, path):
        if path.suffix == ".npz" and path.is_file():
            return "statistics" if read_npz(path, "mu") else "npz"
        # a run without last.pt is refused, its grids are not measured
        if path.is_file() or any((path / name).exists() for name in ("last.pt", "log.csv")):
            return "run"
        if self.what == "shapes":
            return "data"
        if not path.is_dir():
            raise SystemExit(f"{path}: no such run, folder, npz file or data set (shapes is one)")
        has_folders = any(inside.is_dir() for inside in path.iterdir())
        return "data" if has_folders or dataset.idx_files(path) else "folder"

    def open(self, count, size, args):
        """`count` pictures, or all of them if it is None.

        size: side to which the pictures of folders and data sets are cropped.

        Returns (n, read, note). read(numbers) gives the pictures of a list of numbers below n,
        uint8 (3, H, W) each, or the reason why one cannot be read. The note is for the report.
        """
        note = dict(source=self.what, kind=self.kind)
        if self.run:
            note |= dict(step=self.run.step, settings=self.run.settings, seed=args.seed,
                         batch_size=args.batch_size)

            # Picture i is the one that sample.py makes under this seed.
            def read(numbers):
                y = torch.tensor(numbers, device=self.run.device) % len(self.run.meta["classes"])
                return self.run.sample(args.seed, numbers, y).cpu().numpy()

            return count, read, note
        if self.kind == "npz":
            pictures = self.pictures[:count]
            return len(pictures), lambda numbers: pictures[numbers], note
        source = dataset.open_source(self.what, "test", size, count)
        self.classes = source.classes
        counts = np.bincount(source.labels, minlength=len(source.classes))
        if counts.max() > 2 * counts.min():
            print(f"{self.what} has {counts.min()} to {counts.max()} pictures per class; "
                  "a run is sampled with as many of each")
        note["split"] = "held out" if source.held_out else "all, nothing is held out"
        return len(source.labels), lambda numbers: [source.read(i) for i in numbers], note


def crop(pictures, size):
    """uint8 (B, 3, H, W) -> uint8 (B, 3, size, size), cropped as data sets are."""
    if pictures.shape[2:] == (size, size):
        return pictures
    images = [Image.fromarray(picture) for picture in pictures.permute(0, 2, 3, 1).numpy()]
    cropped = [np.asarray(dataset.center_crop(image, size)) for image in images]
    return torch.tensor(np.stack(cropped)).permute(0, 3, 1, 2).contiguous()


def reconstruct(pictures, run, kind):
    """uint8 (B, 3, H, W) -> uint8, through the "vae" or "vq" of a run, see output.reconstruct."""
    tokenizer = run.vae if kind == "vae" else run.vq
    through = partial(output.reconstruct, tokenizer, kind, device=run.device)
    return run.in_pieces(through, crop(pictures, run.size))


def load_statistics(path, extractor):
    """The statistics in an npz file, as of `measure`. SystemExit if they are of other features."""
    saved = read_npz(path, "mu", "sigma", "n", "extractor")
    with disk.reading(path, "file of statistics"):
        mu = saved["mu"]
        sigma = saved["sigma"]
        valid = np.isfinite(mu).all() and np.isfinite(sigma).all() and np.isrealobj(mu)
        valid = valid and np.allclose(sigma, sigma.T)
        # an eigenvalue just below 0 is a rounding error
        if not valid or np.linalg.eigvalsh(np.float64(sigma)).min() < -1e-3 * np.trace(sigma):
            raise ValueError("mu or sigma is not finite, or sigma is not a covariance")
        n = int(saved["n"]) if "n" in saved else "not recorded"
        name = saved["extractor"].item() if "extractor" in saved else "not recorded"
    if name not in (extractor.name, "not recorded"):
        raise SystemExit(f"{path} holds features of {name}, not of {extractor.name}")
    note = dict(source=path, kind="statistics", count=n, extractor=name)
    return dict(mu=mu, sigma=sigma, n=n, note=note)


def check_enough(n, d, source, force):
    """SystemExit if n pictures of a source are too few for a covariance of d features."""
    if n <= (1 if force else d):
        raise SystemExit(f"{source}: {n} pictures are too few for a covariance of {d} features; "
                         f"take more than {d}, or with --force at least 2")


@torch.no_grad()
def measure(one, count, extractor, args, run=None, tokenizer=None):
    """The mean mu (d,) and covariance sigma (d, d) of a PictureSet's features, n, and a note.

    count: number of pictures; None takes all, and `extractor.samples` of a run
    run, tokenizer: the "vae" or "vq" of this run reconstructs the pictures first
    Returns a dict. SystemExit if there are too few pictures for a covariance.
    """
    if one.kind == "statistics":
        return load_statistics(one.what, extractor)
    start = time.time()
    if one.run:
        count = count or extractor.samples
    n, read, note = one.open(count, run.size if run else extractor.size, args)
    if n < (count or 0):
        raise SystemExit(f"{one.what} has {n} pictures, fewer than --count {count}")
    if run:
        note["source"] += f" reconstructed by the {tokenizer} of {args.pictures}"
    check_enough(n, extractor.width, note["source"], args.force)
    rows = [np.zeros((0, extractor.width), np.float32)]
    logits = []
    skipped = []
    for first in tqdm(range(0, n, args.batch_size), note["source"], leave=False):
        found = read(range(first, min(first + args.batch_size, n)))
        skipped += [picture for picture in found if isinstance(picture, str)]
        good = [picture for picture in found if not isinstance(picture, str)]
        if good:
            pictures = torch.tensor(np.stack(good))                  # (B, 3, H, W)
            if run:
                pictures = reconstruct(pictures, run, tokenizer)
            pictures = crop(pictures, extractor.size).to(args.device)
            some_features, some_logits = extractor(pictures)         # (B, d), (B, K)
            rows.append(some_features.cpu().numpy())
            logits.append(some_logits.cpu().numpy())

    rows = np.concatenate(rows).astype(np.float64)                   # (n, d)
    n, d = rows.shape
    # unreadable ones are known only now
    if skipped:
        print(f"{note['source']}: skipped {len(skipped)} unreadable pictures:", *skipped,
              sep="\n  ")
    check_enough(n, d, note["source"], args.force)
    note |= dict(count=n, skipped=skipped, seconds=round(time.time() - start, 2))
    if n >= 10:
        note[extractor.score] = inception_score(np.concatenate(logits))
    return dict(mu=rows.mean(0), sigma=np.cov(rows, rowvar=False), n=n, note=note)


def compare(a, b):
    """The note of `a` with its distance to `b`. SystemExit if they hold different features."""
    try:
        distance = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
    except ValueError as error:
        names = f"{a['note']['source']} and {b['note']['source']}"
        raise SystemExit(f"{names} cannot be compared: {error}") from None
    to = f"{b['note']['source']} ({b['n']})"
    return dict(to=to, frechet_distance=distance) | a["note"]


def print_result(result, metric, score):
    """One line on the screen: the set, its distance and its score."""
    found = []
    if "to" in result:
        found.append(f"{metric} to {result['to']}: {result['frechet_distance']:.4g}")
    if score in result:
        name = score.replace("_", " ")
        found.append(f"{name} {result[score]['mean']:.4g} +- {result[score]['deviation']:.2g}")
    print(f"{result['source']} ({result['count']}): {'; '.join(found)}")


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count = dict(type=train.within(1, kind=int), metavar="N")
    p.add_argument("pictures", metavar="A", help="a run, a folder of pictures, an npz file with "
                   "pictures (arr_0) or with mu and sigma, or a data set")
    p.add_argument("reference", metavar="B", nargs="?", help="the same; a data set gives its "
                   "held-out pictures (None: the data set of the run A)")
    p.add_argument("--rfd", action="store_true", help="also how well vae and vq reconstruct B")
    p.add_argument("--features", default="classifier", metavar="WHICH",
                   help="inception, classifier or a file of either")
    p.add_argument("--resize", default="torch-fidelity", choices=["torch-fidelity", "pytorch-fid"],
                   help="how Inception's input is resized")
    p.add_argument("--size", **count, help="side of the pictures for Inception (None: the run's)")
    p.add_argument("--count", **count,
                   help="pictures of A (None: all; of a run 2000, with Inception 50000)")
    p.add_argument("--batch-size", **count, default=80, help="pictures at once")
    p.add_argument("--force", action="store_true", help="accept fewer pictures than features")
    p.add_argument("--save-stats", metavar="FILE.npz", help="write mu, sigma, n, extractor of A")
    p.add_argument("--json", metavar="FILE.json", help="write the report there (None: print it)")
    if torch.distributed.is_torchelastic_launched():
        p.error("this runs in one process: start it with python, not torchrun")
    return train.parse_flags(p, argv)


def write_report(measured, reference, extractor, args, start):
    """Compare what was measured with the reference, if any, and write all files of the command."""
    results = [compare(one, reference) if reference else one["note"] for one in measured]
    about_b = reference["note"] if reference else None
    for result in results:
        print_result(result, extractor.metric, extractor.score)
    if args.save_stats:
        a = measured[0]
        stats = dict(mu=a["mu"], sigma=a["sigma"], n=a["n"], extractor=extractor.name)
        disk.write_whole(args.save_stats, lambda file: np.savez(file, **stats))
    report = dict(metric=extractor.metric, extractor=extractor.about, reference=about_b,
                  results=results, device=args.device, seconds=round(time.time() - start, 1),
                  date=time.strftime("%Y-%m-%d %H:%M:%S"))
    if args.json:
        disk.write_json(args.json, report)
    else:
        print(json.dumps(report, indent=1))


def check_writable(file, suffix, inputs):
    """SystemExit, before anything is measured, if a file could not or should not be written.

    suffix: how its name must end. A file of that name must be an earlier report or statistics.
    inputs: the other files that the command names
    """
    path = Path(file)
    named_twice = path.resolve() in [Path(other or "").resolve() for other in inputs]
    allowed = path.suffix == suffix and not named_twice
    if allowed and path.exists():
        if suffix == ".npz":
            allowed = read_npz(path, "mu")
        else:
            allowed = '"metric"' in path.read_text(errors="replace")
    if not allowed:
        raise SystemExit(f"{file}: name a new {suffix} file, or one that fid.py wrote and that is "
                         "not measured here")
    path.parent.mkdir(parents=True, exist_ok=True)
    # fails now where nothing can be written
    tempfile.TemporaryFile(dir=path.parent).close()


def evaluate(args):
    """The whole program: see the head of this file."""
    start = time.time()
    for file, suffix in ((args.json, ".json"), (args.save_stats, ".npz")):
        if file:
            check_writable(file, suffix, [args.pictures, args.reference])
    a = PictureSet(args.pictures, args.device)
    if a.kind == "statistics" and args.count:
        raise SystemExit(f"{a.what} holds statistics, to which --count does not apply")
    name = args.reference or (a.run and a.data)
    b = PictureSet(name, args.device) if name else None
    if args.rfd and (not a.run or not b or b.kind == "statistics"):
        raise SystemExit("--rfd needs a run as A, whose tokenizers reconstruct the pictures of B; "
                         f"A is {args.pictures}, B {name}")
    extractor = open_extractor(args, a, b)
    reference = measure(b, None, extractor, args) if b else None
    if a.run and b and b.kind == "data" and a.classes != b.classes:
        print(f"{b.what} has other classes than {a.what}")
    measured = [measure(a, args.count, extractor, args)]
    if args.rfd:
        measured.append(measure(b, None, extractor, args, a.run, "vae"))
        measured.append(measure(b, None, extractor, args, a.run, "vq"))
    write_report(measured, reference, extractor, args, start)


def main(argv=None):
    args = parse(argv)
    train.keep_freed_memory()
    with train.end_in_one_line():
        evaluate(args)


if __name__ == "__main__":
    main()
