"""Two sets of pictures compared: FID, inception score and rFID. Section 4, Tables 1 and 2.

`main` is the whole program. A set is measured by mean and covariance of its features. Features of
the released Inception network make the distance FID; those of a small classifier of the data set
never do. A run is sampled with its own settings; sample.py makes files of pictures at any others.

Reads runs through sample.py and data sets through tokenizers.py. Read tests/ next.
Try: python fid.py runs/shapes-dcmix shapes
B batch, n pictures, d features, K classes. All statistics are float64.
"""
import argparse
import hashlib
import json
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.special import log_softmax
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, pad
from tqdm import tqdm

import backbone
import sample
import tokenizers
import train

# the weights of FID, and how the sha256 of their file begins   [pytorch-fid]
URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
HASH = "6726825d"


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)) of two normals.   [Heusel 2017]

    mu1 and mu2 (d,) are their means, sigma1 and sigma2 (d, d) their covariances S1 and S2.
    Raises ValueError if the shapes do not fit together or a value is not finite.
    """
    # S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2); rounding puts some below 0
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T           # S1^(1/2)
    trace = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    between = np.square(np.subtract(mu1, mu2)).sum()
    distance = between + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    if not np.isfinite(distance):
        raise ValueError("the statistics are not finite")
    return distance


def inception_score(logits, splits=10, shuffle=2020):
    """exp(mean KL(p(y|x) || p(y))) of `splits` parts of the logits (n, K).   [Salimans 2016]

    shuffle: seed of a permutation of the rows; None keeps their order
    """
    n = len(logits)
    if n < splits:
        raise ValueError(f"{n} pictures cannot fill {splits} parts")
    rows = np.arange(n) if shuffle is None else np.random.RandomState(shuffle).permutation(n)
    log_p = log_softmax(np.float64(logits)[rows], axis=1)
    scores = []
    for part in np.split(log_p, [i * n // splits for i in range(1, splits)]):
        p = np.exp(part)                                             # (n / splits, K)   p(y|x)
        marginal = p.mean(0).clip(np.finfo(float).tiny)              # (K,)              p(y)
        scores.append(np.exp((p * (part - np.log(marginal))).sum(1).mean()))
    return dict(mean=np.mean(scores), deviation=np.std(scores), splits=splits, shuffle=shuffle)


def conv(c_in, c_out, kernel, stride=1, padding="same"):
    """Convolution, batch norm and ReLU."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU(inplace=True)))


class Branches(nn.Module):
    """Rows of convolutions side by side, whose outputs are joined.

    rows: the layers of each row, (c_out, kernel, ...) as in `conv`; LINES are two side by side
    pool, pooled: one more row is `pool` and, if not 0, a 1 x 1 convolution to `pooled` channels
    """

    def __init__(self, c, pool, pooled, **rows):
        super().__init__()
        self.rows = []
        rows["branch_pool"] = [(pooled, 1)] if pooled else []
        for name, layers in rows.items():
            row = [[pool]] if name == "branch_pool" else []
            c_in = c
            for i, (c_out, kernel, *how) in enumerate(layers, 1):
                # the released file's names: branch1x1, branch5x5_1, branch5x5_2, branch3x3_2a
                number = f"_{i}" if len(layers) > 1 else ""
                kernels = LINES if kernel is LINES else {"": kernel}
                row.append([conv(c_in, c_out, size, *how) for size in kernels.values()])
                for letter, layer in zip(kernels, row[-1]):
                    self.add_module(f"{name}{number}{letter}", layer)
                c_in = c_out
            self.rows.append(row)

    def forward(self, x):
        joined = []
        for row in self.rows:
            outputs = [x]
            for layers in row:
                outputs = [layer(outputs[0]) for layer in layers]
            joined += outputs
        return torch.cat(joined, dim=1)


AVERAGE = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
HALVE = nn.MaxPool2d(3, 2)
LINES = dict(a=(1, 3), b=(3, 1))


def block_a(c, pooled):
    """c -> 224 + pooled channels."""
    return Branches(c, AVERAGE, pooled, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                    branch3x3dbl=[(64, 1), (96, 3), (96, 3)])


def block_c(c):
    """768 -> 768 channels, by pairs of 1 x 7 and 7 x 1 in place of 7 x 7, c channels wide."""
    return Branches(768, AVERAGE, 192, branch1x1=[(192, 1)],
                    branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                    branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))])


def block_e(c, pool):
    """c -> 2048 channels."""
    return Branches(c, pool, 192, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, LINES)],
                    branch3x3dbl=[(448, 1), (384, 3), (384, LINES)])


class Inception(nn.Sequential):
    """The network of TensorFlow's 2015 graph, under the names of its released PyTorch file.

    resize: "torch-fidelity" or "pytorch-fid", which differ in nothing else
    size: the side to which pictures are cropped before
    """

    samples = 50000
    score = "inception_score"
    width = 2048

    def __init__(self, resize="torch-fidelity", size=None):
        super().__init__(OrderedDict(
            Conv2d_1a_3x3=conv(3, 32, 3, 2, "valid"), Conv2d_2a_3x3=conv(32, 32, 3, 1, "valid"),
            Conv2d_2b_3x3=conv(32, 64, 3), pool1=HALVE,
            Conv2d_3b_1x1=conv(64, 80, 1), Conv2d_4a_3x3=conv(80, 192, 3, 1, "valid"), pool2=HALVE,
            Mixed_5b=block_a(192, 32), Mixed_5c=block_a(256, 64), Mixed_5d=block_a(288, 64),
            Mixed_6a=Branches(288, HALVE, 0, branch3x3=[(384, 3, 2, "valid")],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, "valid")]),
            Mixed_6b=block_c(128), Mixed_6c=block_c(160),
            Mixed_6d=block_c(160), Mixed_6e=block_c(192),
            Mixed_7a=Branches(768, HALVE, 0, branch3x3=[(192, 1), (320, 3, 2, "valid")],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)),
                                           (192, 3, 2, "valid")]),
            Mixed_7b=block_e(1280, AVERAGE),
            # the graph of 2015 has the maximum here   [torch-fidelity] [pytorch-fid]
            Mixed_7c=block_e(2048, nn.MaxPool2d(3, 1, 1)),
            fc=nn.Linear(2048, 1008)))
        self.resize = resize
        self.size = size

    def forward(self, images):
        """uint8 (B, 3, H, W) -> features (B, 2048), logits without their bias (B, 1008)."""
        if self.resize == "torch-fidelity":
            # TensorFlow 1 steps H / 299 from the corner, not from half a pixel in
            wider = pad(images.float(), (0, 1, 0, 1), mode="replicate")
            x = interpolate(wider, (300, 300), mode="bilinear", align_corners=True)
            x = (x[..., :299, :299] - 128) / 128
        else:
            x = 2 * interpolate(images.float() / 255, (299, 299), mode="bilinear") - 1
        *layers, fc = self
        features = nn.Sequential(*layers)(x).mean((2, 3))
        return features, features @ fc.weight.T


def block(c_in, c_out, stride):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class Classifier(nn.Module):
    """A small network, whose features are means at two depths: texture, then shape.   [ours]"""

    samples = 2000
    score = "classifier_score"
    width = 144

    def __init__(self, classes, size):
        super().__init__()
        self.size = size
        self.fine = nn.Sequential(block(3, 32, 1), block(32, 48, 2), block(48, 48, 1))
        self.coarse = nn.Sequential(
            block(48, 96, 2), block(96, 96, 1), block(96, 96, 2), block(96, 96, 1))
        self.head = nn.Linear(self.width, classes)

    def forward(self, images):
        """uint8 (B, 3, size, size) -> features (B, d), logits (B, K)."""
        fine = self.fine(images.float() / 127.5 - 1)                 # (B, 48, size / 2, size / 2)
        coarse = self.coarse(fine)                                   # (B, 96, size / 8, size / 8)
        features = torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], dim=1)
        return features, self.head(features)


def train_classifier(path, data, size, device, steps=700, B=128):
    """Train the classifier of `data` and save it; a tenth is held out and tells its accuracy."""
    source = tokenizers.open_source(data, "train", size, None if data == "shapes" else 60000)
    if len(source.classes) == 1:
        raise SystemExit(f"{data} has one class only to learn from; choose other --features")
    x, y = (torch.tensor(a, device=device) for a in tokenizers.read_all(source))
    n = len(y)
    torch.manual_seed(0)
    rng = np.random.RandomState(0)
    config = dict(classes=len(source.classes), size=size)
    model = Classifier(**config).to(device)
    kept, held_out = np.split(rng.permutation(n), [n - n // 10])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    order = np.concatenate([rng.permutation(kept) for _ in range(steps * B // len(kept) + 1)])
    for rows in tqdm(order[:steps * B].reshape(steps, B), "classifier"):
        with train.autocast("auto", torch.device(device)):
            _, logits = model(x[rows])
            loss = cross_entropy(logits.float(), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    logits = [model(part)[1] for part in x[held_out].split(500)]
    right = torch.cat(logits).argmax(1) == y[held_out]
    saved = dict(kind="classifier", config=config, model=model.state_dict(), meta=dict(
        data=data, pictures=len(kept), skipped=len(source.labels) - n, steps=steps,
        held_out_accuracy=right.double().mean().item()))
    tokenizers.write_whole(path, lambda file: torch.save(saved, file))


def load_extractor(path, args, size):
    """The feature network in `path`, a classifier or Inception, with `metric` and `about`."""
    saved = backbone.load_checkpoint(path, "classifier")
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    released = sha256.startswith(HASH)
    about = saved.get("meta", {})
    with tokenizers.reading(path, "file of FID's network or of a classifier"):
        if "kind" in saved:
            name = f"small classifier {sha256[:16]} of {about['data']}"
            model = tokenizers.build(Classifier, saved["config"], saved["model"])
        elif size:
            release = "of 2015-12-05" if released else f"with the weights {sha256[:16]}"
            name = f"Inception-v3 {release}, resize of {args.resize}"
            # a plain dict, to which PyTorch adds the counters of batches that the file lacks
            model = tokenizers.build(Inception, dict(resize=args.resize, size=size), dict(saved))
        else:
            raise SystemExit(f"{path}: Inception's features without a run need --size")
    model.metric = "FID" if released else f"Frechet distance ({name}, not FID)"
    model.about = dict(name=name, file=str(path), sha256=sha256, width=model.width,
                       size=model.size) | about
    return model.to(args.device, memory_format=torch.channels_last)


def open_extractor(args, home):
    """The feature network of --features, fetched or trained if missing; `home` tells the data."""
    run = home.run
    path = args.features
    if path == "inception":
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name
        with tokenizers.reading(path, f"file yet; put {URL} there, or name it by --features"):
            torch.hub.load_state_dict_from_url(URL, check_hash=True, weights_only=True)
    elif path == "classifier":
        if not home.data:
            raise SystemExit(f"nothing tells the data set of {home.what}; choose --features")
        folder = run.shared if run else Path("runs") / Path(home.data).name
        path = folder / "classifier.pt"
        if not path.is_file():
            train_classifier(path, home.data, min(run.size, 64) if run else 32, args.device)
        data = backbone.load_checkpoint(path, "classifier")["meta"]["data"]
        if data != home.data:
            raise SystemExit(f"{path} is the classifier of {data}, not {home.data}; move it away")
    return load_extractor(path, args, args.size or (run and run.size))


class PictureSet:
    """A or B: its kind, the System of a run, the data set behind it, the arrays of an npz file."""

    run = None
    data = None

    def __init__(self, what, device):
        self.what = what
        path = Path(what)
        if path.suffix == ".npz":
            with tokenizers.reading(what, "readable npz file"):
                self.arrays = dict(np.load(path))
            self.kind = "statistics" if "mu" in self.arrays else "npz"
        elif path.is_file() or (path / "last.pt").is_file():
            self.kind = "run"
            self.run = sample.System(what, device)
            self.data = self.run.meta["data"]
        elif what == "shapes" or any(p.is_dir() or "-ubyte" in p.name for p in path.glob("*")):
            self.kind = "data"
            self.data = what if what == "shapes" else str(path.resolve())
        elif path.is_dir():
            self.kind = "folder"
        else:
            raise SystemExit(f"{what}: no such run, folder, npz file or data set (shapes is one)")


def pictures_of(one, count, size, args):
    """The first `count` pictures of a PictureSet, or all if it is None: (n, read, note).

    Those of folders and data sets are cropped to `size`. read(numbers) gives each one as uint8
    (3, H, W), or a text that says why it cannot be read.
    """
    run = one.run
    note = dict(source=one.what, kind=one.kind)
    if run:
        note |= dict(step=run.step, settings=run.settings, seed=args.seed,
                     batch_size=args.batch_size)

        # picture i is the one that sample.py makes under this seed
        def read(numbers):
            y = torch.tensor(numbers, device=run.device) % len(run.meta["classes"])
            return run.sample(args.seed, numbers, y).cpu().numpy()

        return count, read, note
    if one.kind == "npz":
        with tokenizers.reading(one.what, "file of arr_0, uint8 (n, H, W, 3), or of mu and sigma"):
            pictures = one.arrays["arr_0"][:count].transpose(0, 3, 1, 2)
            if pictures.dtype != np.uint8 or pictures.shape[1] != 3:
                raise ValueError(f"arr_0 is {pictures.dtype} {one.arrays['arr_0'].shape}")
        return len(pictures), lambda numbers: pictures[numbers], note
    source = tokenizers.open_source(one.what, "test", size, count)
    note["split"] = "held out" if source.held_out else "all, nothing is held out"
    return len(source.labels), lambda numbers: [source.read(i) for i in numbers], note


def crop(pictures, size):
    """Pictures (3, H, W) uint8 -> a tensor (B, 3, size, size), cropped as data sets are."""
    images = [Image.fromarray(picture.transpose(1, 2, 0)) for picture in pictures]
    cropped = np.stack([tokenizers.center_crop(image, size) for image in images])
    return torch.tensor(cropped.transpose(0, 3, 1, 2))


def reconstruct(pictures, run, tokenizer):
    """Pictures (3, H, W) uint8 after the "vae" (its posterior mean) or the "vq" of a run."""
    x = crop(pictures, run.size).to(run.device)                      # (B, 3, size, size)
    if tokenizer == "vq":
        return run.decode_discrete(run.encode_discrete(x))
    y = run.in_pieces(lambda x: run.vae.decode(run.vae.encode(x)[0]), x.float() / 127.5 - 1)
    return sample.to_bytes(y)


@torch.no_grad()
def measure(one, extractor, args, count=None, run=None, tokenizer=None):
    """mu (d,) and sigma (d, d) of the features of a PictureSet, and a note for the report.

    count: how many pictures; None for all, or for `extractor.samples` of a run
    run, tokenizer: the "vae" or "vq" of this run reconstructs the pictures first
    """
    if one.kind == "statistics":
        missing = np.array("not recorded")
        name = one.arrays.get("extractor", missing).item()
        if name not in (extractor.about["name"], "not recorded"):
            raise SystemExit(f"{one.what} has features of {name}, not of {extractor.about['name']}")
        note = dict(source=one.what, kind=one.kind, count=one.arrays.get("n", missing).item(),
                    extractor=name)
        return np.float64(one.arrays["mu"]), np.float64(one.arrays["sigma"]), note
    start = time.time()
    if one.run:
        count = count or extractor.samples
    n, read, note = pictures_of(one, count, run.size if run else extractor.size, args)
    if run:
        note["source"] += f" reconstructed by the {tokenizer} of {args.pictures}"
    outputs = []
    skipped = []
    for numbers in tqdm(torch.arange(n).split(args.batch_size), note["source"], leave=False):
        found = read(numbers.tolist())
        good = [picture for picture in found if not isinstance(picture, str)]
        skipped += [picture for picture in found if isinstance(picture, str)]
        if good:
            if run:
                good = reconstruct(good, run, tokenizer).cpu().numpy()
            outputs.append(extractor(crop(good, extractor.size).to(args.device)))
    if skipped:
        print(f"{one.what}: skipped {len(skipped)} unreadable pictures:", *skipped, sep="\n  ")
    n -= len(skipped)
    if n <= (1 if args.force else extractor.width):
        raise SystemExit(f"{note['source']}: {n} pictures are too few for a covariance of "
                         f"{extractor.width} features; take more than that, or --force it")
    features, logits = (torch.cat(a).double().cpu().numpy() for a in zip(*outputs))
    if n >= 10:
        note[extractor.score] = inception_score(logits)
    note |= dict(count=n, skipped=skipped, seconds=round(time.time() - start, 2))
    return features.mean(0), np.cov(features, rowvar=False), note


def compare(a, b, extractor):
    """Print and return the note of `a` with its distance to `b`, both as `measure` gives them."""
    mu, sigma, note = a
    line = f"{note['source']} ({note['count']})"
    if b:
        to = f"{b[2]['source']} ({b[2]['count']})"
        with tokenizers.reading(note["source"], f"set to compare with {to}"):
            distance = frechet_distance(mu, sigma, b[0], b[1])
        note = dict(to=to, frechet_distance=distance) | note
        line += f": {extractor.metric} to {to}: {distance:.4g}"
    if extractor.score in note:
        s = note[extractor.score]
        line += f"; {extractor.score.replace('_', ' ')} {s['mean']:.4g} +- {s['deviation']:.2g}"
    print(line)
    return note


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    count = dict(type=train.within(1, kind=int))
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add("pictures", metavar="A", help="a run or its checkpoint, a folder of pictures, a data set, "
        "or an npz file with pictures (arr_0) or with mu and sigma")
    add("reference", metavar="B", nargs="?",
        help="the same; a data set gives its held-out pictures (None: that of the run A)")
    add("--rfd", action="store_true", help="also B's pictures reconstructed by A's tokenizers")
    add("--features", default="classifier", help="inception (FID's, fetched once), classifier "
        "(RUNS/DATA/classifier.pt, trained if missing) or a file of either")
    add("--resize", default="torch-fidelity", choices=["torch-fidelity", "pytorch-fid"],
        help="resizing of Inception's input")
    add("--size", **count, help="side of the pictures for Inception (None: the run's)")
    add("--count", **count, help="of A (None: all; of a run 2000, with Inception 50000)")
    add("--seed", type=train.within(0, 2 ** 32 - 1, int), default=0, help="of a run's samples")
    add("--batch-size", **count, default=80, help="pictures at once")
    add("--force", action="store_true", help="accept fewer pictures than features")
    add("--save-stats", help="write mu, sigma, n, extractor of A")
    add("--json", help="write the report there (None: print it)")
    add("--device", default=devices[-1], choices=devices, help="where to compute")
    return p.parse_args(argv)


@train.process_group()
def main(argv=None):
    start = time.time()
    args = parse(argv)
    for path in map(Path, filter(None, (args.json, args.save_stats))):
        with tokenizers.reading(path, "file that can be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError("it is a folder")
    # features are fp32 on every device
    torch.backends.cudnn.allow_tf32 = False
    a = PictureSet(args.pictures, args.device)
    name = args.reference or (a.run and a.data)
    b = PictureSet(name, args.device) if name else None
    if args.rfd and (not a.run or b.kind == "statistics"):
        raise SystemExit(f"--rfd needs a run as A and pictures as B; A is {a.what}, B {name}")
    extractor = open_extractor(args, b if b and b.data and not a.run else a)
    reference = measure(b, extractor, args) if b else None
    measured = [measure(a, extractor, args, args.count)]
    if args.rfd:
        measured += [measure(b, extractor, args, None, a.run, kind) for kind in ("vae", "vq")]
    results = [compare(one, reference, extractor) for one in measured]
    if args.save_stats:
        mu, sigma, note = measured[0]
        stats = dict(mu=mu, sigma=sigma, n=note["count"], extractor=extractor.about["name"])
        tokenizers.write_whole(args.save_stats, lambda file: np.savez(file, **stats))
    report = dict(metric=extractor.metric, extractor=extractor.about, results=results,
                  reference=reference[2] if reference else None, device=args.device,
                  seconds=round(time.time() - start, 1), date=time.strftime("%Y-%m-%d %H:%M:%S"))
    if args.json:
        tokenizers.write_json(args.json, report)
    else:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
