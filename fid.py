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
    """A small convolutional network; its features are the channel means after its last two stages, d = 64 + 96.   [ours]"""

    def __init__(self, classes, size):
        super().__init__()
        block = lambda a, b, stride: nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.fine = nn.Sequential(block(3, 32, 1), block(32, 64, 2), block(64, 64, 1))
        self.coarse = nn.Sequential(block(64, 96, 2), block(96, 96, 1))
        self.size, self.width, self.head = size, 160, nn.Linear(160, classes)

    def forward(self, images):
        """uint8 (B, 3, size, size) -> features (B, d), logits (B, K)."""
        fine = self.fine(images.float() / 127.5 - 1)                         # (B, 64, size / 2, size / 2)
        features = torch.cat([fine.mean((2, 3)), self.coarse(fine).mean((2, 3))], dim=1)
        return features, self.head(features)


def read_all(source, rows):
    """pixels uint8 (n, 3, size, size) and labels (n,) of the readable pictures among `rows`."""
    read = [(source.read(i), source.labels[i]) for i in tqdm(rows, desc="pictures", unit="img", leave=False, disable=None)]
    pictures, labels = zip(*[pair for pair in read if not isinstance(pair[0], str)])
    return torch.tensor(np.stack(pictures)), torch.tensor(np.array(labels))


def training_pictures(data, size, most=60000):
    """Train and held-out pixels and labels, and the class names; without a test split a tenth is held out."""
    train = tokenizers.open_source(data, "train", size, None if data == "shapes" else most)
    rows = np.arange(len(train.labels))
    try:
        test = tokenizers.open_source(data, "test", size, 10000)
        return read_all(train, rows), read_all(test, range(len(test.labels))), train.classes
    except LookupError:
        return read_all(train, rows[rows % 10 > 0]), read_all(train, rows[::10]), train.classes


def train_classifier(path, data, size, device, steps=800, B=128):
    """Train the classifier on the train split and save it, with its held-out accuracy, as `path`; the same seed every time."""
    (pixels, labels), (test_pixels, test_labels), classes = training_pictures(data, size)
    if len(classes) < 2:
        raise SystemExit(f"{data}: has one class only, so no classifier can be trained; give --features CKPT of another data set")
    torch.manual_seed(0)
    random, model = np.random.RandomState(0), Classifier(len(classes), size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    order = np.concatenate([random.permutation(len(labels)) for _ in range(math.ceil(steps * B / len(labels)))])
    for step in (bar := tqdm(range(steps), desc="classifier", unit="step", disable=None)):
        rows = order[step * B:(step + 1) * B]
        x = pixels[rows].to(device).roll(tuple(random.randint(-2, 3, 2)), (2, 3))        # a little shift of the whole batch
        loss = cross_entropy(model(x)[1], labels[rows].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
    with torch.no_grad():
        right = sum(int((model(test_pixels[i:i + 500].to(device))[1].argmax(1).cpu() == test_labels[i:i + 500]).sum()) for i in range(0, len(test_labels), 500))
    meta = dict(data=data if data == "shapes" else str(Path(data).resolve()), accuracy=right / len(test_labels), steps=steps, pictures=len(labels))
    saved = dict(kind="classifier", config=dict(classes=len(classes), size=size), model=model.state_dict(), meta=meta)
    tokenizers.write_whole(path, lambda file: torch.save(saved, file))


def load_classifier(path, device):
    """The classifier saved at `path`, with attributes `name` and `about` for the report."""
    saved = sample.load_checkpoint(path, "classifier")
    model = Classifier(**saved["config"])
    sample.load_weights(model, saved["model"], path)
    digits = tokenizers.fingerprint(model)
    model.name = f"small classifier {digits} trained on {saved['meta']['data']}"
    model.about = dict(name=model.name, sha256=digits, file=str(path), width=model.width, size=model.size) | saved["meta"]
    return model.eval().requires_grad_(False).to(device)
