"""The two feature networks on which sets of pictures are compared: Inception and a classifier.

`Inception` is the network of FID. `Classifier` is small and is trained here, on the pictures of a
data set; a distance on its features is never called FID. `load_extractor` opens either.

Reads dataset.py and disk.py. Feeds fid.py.
Not needed to follow the paper.
Try: python fid.py runs/shapes-dcmix shapes

B batch, d features, K classes. Pictures are uint8.
"""
import hashlib
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate, max_pool2d, pad
from tqdm import tqdm

import dataset
import disk

# The weights of FID. HASH is the start of the file's sha256.   [pytorch-fid]
URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
HASH = "6726825d"


def conv(c_in, c_out, kernel, stride=1, padding="same"):
    """Convolution, batch norm and ReLU."""
    layers = OrderedDict(
        conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(c_out, eps=1e-3),
        relu=nn.ReLU(inplace=True),
    )
    return nn.Sequential(layers)


def average(x):
    """The mean of each 3 x 3 neighbourhood, in which padding does not count."""
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def maximum(x):
    return max_pool2d(x, 3, 1, 1)


class InceptionA(nn.Module):
    """Convolutions of 1 x 1, of 5 x 5 and twice of 3 x 3 side by side; 224 + c_pool channels."""

    def __init__(self, c_in, c_pool):
        super().__init__()
        self.branch1x1 = conv(c_in, 64, 1)
        self.branch5x5_1 = conv(c_in, 48, 1)
        self.branch5x5_2 = conv(48, 64, 5)
        self.branch3x3dbl_1 = conv(c_in, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3)
        self.branch_pool = conv(c_in, c_pool, 1)

    def forward(self, x):
        one = self.branch1x1(x)
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([one, five, double, self.branch_pool(average(x))], dim=1)


class InceptionB(nn.Module):
    """Half the height and width, 480 channels more."""

    def __init__(self, c_in):
        super().__init__()
        self.branch3x3 = conv(c_in, 384, 3, 2, "valid")
        self.branch3x3dbl_1 = conv(c_in, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3, 2, "valid")

    def forward(self, x):
        three = self.branch3x3(x)
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([three, double, max_pool2d(x, 3, 2)], dim=1)


class InceptionC(nn.Module):
    """Convolutions of 7 x 7, as pairs of 1 x 7 and 7 x 1 that are c channels wide; 768 channels."""

    def __init__(self, c):
        super().__init__()
        self.branch1x1 = conv(768, 192, 1)
        self.branch7x7_1 = conv(768, c, 1)
        self.branch7x7_2 = conv(c, c, (1, 7))
        self.branch7x7_3 = conv(c, 192, (7, 1))
        self.branch7x7dbl_1 = conv(768, c, 1)
        self.branch7x7dbl_2 = conv(c, c, (7, 1))
        self.branch7x7dbl_3 = conv(c, c, (1, 7))
        self.branch7x7dbl_4 = conv(c, c, (7, 1))
        self.branch7x7dbl_5 = conv(c, 192, (1, 7))
        self.branch_pool = conv(768, 192, 1)

    def forward(self, x):
        one = self.branch1x1(x)
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([one, seven, double, self.branch_pool(average(x))], dim=1)


class InceptionD(nn.Module):
    """Half the height and width; 768 channels become 1280."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = conv(768, 192, 1)
        self.branch3x3_2 = conv(192, 320, 3, 2, "valid")
        self.branch7x7x3_1 = conv(768, 192, 1)
        self.branch7x7x3_2 = conv(192, 192, (1, 7))
        self.branch7x7x3_3 = conv(192, 192, (7, 1))
        self.branch7x7x3_4 = conv(192, 192, 3, 2, "valid")

    def forward(self, x):
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), max_pool2d(x, 3, 2)], dim=1)


class InceptionE(nn.Module):
    """Convolutions of 1 x 3 and 3 x 1 side by side; 2048 channels."""

    def __init__(self, c_in, pool):
        super().__init__()
        self.branch1x1 = conv(c_in, 320, 1)
        self.branch3x3_1 = conv(c_in, 384, 1)
        self.branch3x3_2a = conv(384, 384, (1, 3))
        self.branch3x3_2b = conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = conv(c_in, 448, 1)
        self.branch3x3dbl_2 = conv(448, 384, 3)
        self.branch3x3dbl_3a = conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = conv(384, 384, (3, 1))
        self.branch_pool = conv(c_in, 192, 1)
        self.pool = pool

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        one = self.branch1x1(x)
        three = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        double = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([one, *three, *double, self.branch_pool(self.pool(x))], dim=1)


class Inception(nn.Module):
    """The network of TensorFlow's 2015 graph, under the names of its released PyTorch file.

    resize: "torch-fidelity" or "pytorch-fid", how pictures are resized and scaled.
    size: the side to which fid.py crops pictures before they come here.
    """

    samples = 50000                    # of a run, unless --count says otherwise
    score = "inception_score"          # its name in a report
    width = 2048                       # of the features

    def __init__(self, resize="torch-fidelity", size=None):
        super().__init__()
        self.Conv2d_1a_3x3 = conv(3, 32, 3, 2, "valid")
        self.Conv2d_2a_3x3 = conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = conv(32, 64, 3)
        self.pool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, padding="valid")
        self.pool2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(128)
        self.Mixed_6c = InceptionC(160)
        self.Mixed_6d = InceptionC(160)
        self.Mixed_6e = InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, average)
        # The graph of 2015 has the maximum here.   [torch-fidelity] [pytorch-fid]
        self.Mixed_7c = InceptionE(2048, maximum)
        self.fc = nn.Linear(2048, 1008)
        self.resize = resize
        self.size = size

    def forward(self, images):
        """uint8 (B, 3, H, W) -> features (B, 2048), logits (B, 1008), no bias. [torch-fidelity]"""
        if self.resize == "torch-fidelity":
            # TensorFlow 1 steps H / 299 from the corner, not from half a pixel in.
            wider = pad(images.float(), (0, 1, 0, 1), mode="replicate")
            x = interpolate(wider, (300, 300), mode="bilinear", align_corners=True)
            x = (x[..., :299, :299] - 128) / 128
        else:
            x = interpolate(images.float() / 255, (299, 299), mode="bilinear")
            x = 2 * x - 1
        # in the order of __init__; `fc` is the last
        *layers, fc = self.children()
        for layer in layers:
            x = layer(x)
        features = x.mean((2, 3))
        return features, features @ fc.weight.T


class Classifier(nn.Module):
    """A small network that classifies pictures of a data set.   [ours]

    Its features are channel means at two depths: texture and colour, then shape.
    """

    samples = 2000
    score = "classifier_score"
    width = 48 + 96

    def __init__(self, classes, size):
        super().__init__()
        self.fine = nn.Sequential(self.block(3, 32, 1), self.block(32, 48, 2),
                                  self.block(48, 48, 1))
        self.coarse = nn.Sequential(self.block(48, 96, 2), self.block(96, 96, 1),
                                    self.block(96, 96, 2), self.block(96, 96, 1))
        self.head = nn.Linear(self.width, classes)
        self.size = size

    @staticmethod
    def block(c_in, c_out, stride):
        convolution = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU())

    def forward(self, images):
        """uint8 (B, 3, size, size) -> features (B, d), logits (B, K)."""
        fine = self.fine(images.float() / 127.5 - 1)                 # (B, 48, size / 2, size / 2)
        coarse = self.coarse(fine)                                   # (B, 96, size / 8, size / 8)
        features = torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], dim=1)
        return features, self.head(features)


def train_classifier(path, data, size, device, steps=700, B=128):
    """Train the classifier on nine tenths of the train split, and save it with its accuracy.

    A random tenth is held out for the accuracy. The seed is fixed, and the precision is fp32. Of a
    large data set 60,000 pictures are enough.
    """
    source = dataset.open_source(data, "train", size, None if data == "shapes" else 60000)
    if len(source.classes) == 1:
        raise SystemExit(f"{data} has one class, which no classifier can tell from others; "
                         "choose other --features")
    pictures, labels = dataset.read_all(source)
    x = torch.tensor(pictures)                                       # (n, 3, size, size)
    y = torch.tensor(labels)                                         # (n,)
    torch.manual_seed(0)
    rng = np.random.RandomState(0)
    model = Classifier(len(source.classes), size).to(device)
    kept, held_out = np.split(rng.permutation(len(y)), [len(y) - max(len(y) // 10, 1)])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    epochs = math.ceil(steps * B / len(kept))
    order = np.concatenate([rng.permutation(kept) for _ in range(epochs)])
    batches = order[:steps * B].reshape(steps, B)
    for rows in tqdm(batches, desc="classifier", unit="step", disable=None):
        _, logits = model(x[rows].to(device))
        loss = cross_entropy(logits, y[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    model.eval()
    with torch.no_grad():
        logits = [model(part.to(device))[1].cpu() for part in x[held_out].split(500)]
    right = torch.cat(logits).argmax(1) == y[held_out]
    meta = dict(data=data, pictures=len(kept), skipped=len(source.labels) - len(y), steps=steps,
                held_out_accuracy=right.double().mean().item())
    saved = dict(kind="classifier", config=dict(classes=len(source.classes), size=size),
                 model=model.state_dict(), meta=meta)
    disk.write_whole(path, lambda file: torch.save(saved, file))


def released_weights():
    """The path of FID's weights, which are fetched once.   [pytorch-fid]"""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=HASH)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{path}: no such file, and {URL} cannot be fetched ({error}); put it "
                         "there, or name it by --features") from None
    return path


def load_extractor(path, resize, size, device):
    """The feature network in `path`: a classifier saved here, or Inception.

    resize: of Inception's input, "torch-fidelity" or "pytorch-fid".
    size: side to which pictures are cropped before Inception; a classifier has its own.

    Returns the model with three more attributes: name, metric (what its distance is called) and
    about (for the report).
    """
    saved = disk.load_checkpoint(path, "classifier")
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    released = sha256.startswith(HASH)
    with disk.reading(path, "feature network"):
        if "kind" in saved:
            model = Classifier(**saved["config"])
            weights = saved["model"]
            disk.check_weights(model, weights)
            about = saved["meta"]
            model.name = f"small classifier {sha256[:16]} of {about['data']}"
        else:
            if not size:
                raise SystemExit(f"{path}: Inception's features without a run need --size")
            model = Inception(resize, size)
            # The released file lacks the batch norms' num_batches_tracked, which load_state_dict
            # asks for unless it is given a plain dict.
            weights = dict(saved)
            about = {}
            release = "of 2015-12-05" if released else f"with the weights {sha256[:16]}"
            model.name = f"Inception-v3 {release}, resize of {resize}"
        model.load_state_dict(weights)
    model.metric = "FID" if released else f"Frechet distance ({model.name}, not FID)"
    model.about = dict(name=model.name, file=str(path), sha256=sha256, width=model.width,
                       size=model.size) | about
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
