"""The check of cifar.patch: pixels, labels and splits come back exactly. And a run.

See test_modifications.py. A failing line's message says what a wrong data set did.
"""
import sys
from pathlib import Path

import numpy as np

import dataset
import running
import sample
import train

out = Path(sys.argv[2])
data = out.parent / "cifar-10-batches-bin"
data.mkdir(parents=True)
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def write(name, seed, n=16):
    """A file of n random pictures in CIFAR-10's format -> their pixels and labels."""
    rng = np.random.RandomState(seed)
    pixels = rng.randint(0, 256, (n, 3, 32, 32)).astype(np.uint8)
    labels = rng.permutation(np.arange(n) % 10)
    rows = [bytes([label]) + picture.tobytes() for label, picture in zip(labels, pixels)]
    (data / name).write_bytes(b"".join(rows))
    return pixels, labels


first, first_labels = write("data_batch_1.bin", 1)
second, second_labels = write("data_batch_2.bin", 2)
held, held_labels = write("test_batch.bin", 3)
pixels = np.concatenate([first, second])


def opened(split="train", size=32, count=None):
    return dataset.open_source(str(data), split, size, count)


source = opened()
assert source.classes == list("0123456789"), f"without a file of names: {source.classes}"
(data / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
source = opened()
assert source.classes == NAMES, source.classes
assert source.mirror is True
found, labels = dataset.read_all(source)
assert found.dtype == np.uint8 and found.shape == (32, 3, 32, 32), (found.dtype, found.shape)
assert np.array_equal(found, pixels), "the pixels of the train split are not those of the files"
assert labels.dtype == np.int64 and np.array_equal(labels, [*first_labels, *second_labels])
assert len(set(source.names)) == 32, "the names do not tell the pictures apart"

# a red picture: 1024 red bytes come first, then green, then blue
red = bytes([3]) + bytes([255]) * 1024 + bytes(2048)
(data / "data_batch_3.bin").write_bytes(red)
picture = opened().read(32)
assert picture[0].min() == 255 and picture[1:].max() == 0, "red is not the first channel"
(data / "data_batch_3.bin").unlink()

test = opened("test")
assert test.held_out, "test_batch.bin is not held out"
found, labels = dataset.read_all(test)
assert np.array_equal(found, held) and np.array_equal(labels, held_labels)
assert not set(test.names) & set(source.names), "held-out pictures have the names of others"
assert not source.held_out

# the size of a larger preset, and fewer pictures with their own labels
large = opened(size=64, count=5)
keep = dataset.choose(32, 5)
assert large.read(0).shape == (3, 64, 64)
assert np.array_equal(large.labels, np.concatenate([first_labels, second_labels])[keep])
assert large.names == [source.names[i] for i in keep], "names depend on --images"
some = opened(count=5)
assert np.array_equal(some.read(4), pixels[keep[4]]), "--images mixes up pictures and labels"

# without held-out pictures, --truth must be refused: see sample.open_truth
(data / "test_batch.bin").rename(out.parent / "test_batch.bin")
assert not opened("test").held_out
(out.parent / "test_batch.bin").rename(data / "test_batch.bin")

# half a picture is an error, in one line
whole = (data / "data_batch_2.bin").read_bytes()
(data / "data_batch_2.bin").write_bytes(whole[:-100])
try:
    opened()
    raise AssertionError("a damaged file is read")
except SystemExit as error:
    assert "CIFAR-10" in str(error), error
(data / "data_batch_2.bin").write_bytes(whole)

train.main(["--data", str(data), *running.mixar(out.parent / "runs", out, "--steps", 2)])
moments = np.load(out.parent / "runs" / data.name / "tokens" / "moments.npy")
assert moments.shape[:2] == (32, 2), "the token cache has no mirror images"
sample.main(running.sampling(out, f"{out}/some.npz", "--count", 4, "--truth"))
