"""Pictures and the token cache of tokenizers.py: every way in, and what is said if it is wrong."""
import gzip
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import disk
import tokenizers
from backbone import PRESETS


def picture(path, mode="RGB", size=(40, 50), colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def write_idx(path, array, opener=open):
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    with opener(path, "wb") as file:
        file.write(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def open_folder(folder, split="train"):
    return dataset.open_source(str(folder), split, 32, None)


def shapes(count):
    return dataset.open_source("shapes", "train", 32, count)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    picture(root / "cat" / "rgb.png")
    picture(root / "cat" / "grey.png", "L", (33, 200))
    picture(root / "dog" / "cmyk.jpg", "CMYK", (301, 187))
    picture(root / "dog" / "palette.png", "P", (16, 12))
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    clear.paste((10, 200, 10, 255), (0, 0, 32, 64))
    clear.save(root / "dog" / "rgba.png")
    return root


def test_shapes_are_a_function_of_split_and_index():
    few = shapes(20)
    many = shapes(5000)
    assert all((few.read(i) == many.read(i)).all() for i in range(20))
    assert few.labels.tolist() == [i % 10 for i in range(20)]
    test = dataset.open_source("shapes", "test", 32, 20)
    assert not any((few.read(i) == test.read(i)).all() for i in range(20))


@pytest.mark.parametrize("name", dataset.Shapes.classes)
def test_shapes_outlines_are_inside_at_negative_distance(name):
    """The figure covers a sensible part of the square, and the rim of [-1, 1]^2 is outside."""
    axis = np.linspace(-1, 1, 81)
    label = dataset.Shapes.classes.index(name)
    distance = dataset.Shapes.distances(axis[None, :], -axis[:, None])[label]
    assert 0.1 < (distance < 0).mean() < 0.65
    rim = (distance[0], distance[-1], distance[:, 0], distance[:, -1])
    assert all((edge > 0).mean() > 0.8 for edge in rim)


def test_folder_reads_every_mode_as_rgb(folder):
    source = open_folder(folder)
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    pictures = [source.read(i) for i in range(5)]
    assert all(p.shape == (3, 32, 32) and p.dtype == np.uint8 for p in pictures)
    grey, rgb, cmyk, _, rgba = [p.astype(int) for p in pictures]
    assert (abs(rgb[:, 16, 16] - [200, 30, 30]) <= 1).all()
    assert (abs(cmyk[:, 16, 16] - [200, 30, 30]) <= 12).all()
    assert len(set(grey[:, 16, 16].tolist())) == 1
    assert (rgba[:, 16, 28] > 250).all(), "transparent pixels are laid on white"


def test_sixteen_bit_grey_is_scaled(tmp_path):
    Image.fromarray(np.full((32, 32), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    image = dataset.read_rgb(tmp_path / "deep.png")
    assert np.asarray(image)[0, 0].tolist() == [100, 100, 100]


def test_corrupt_picture_among_good_ones_is_counted_named_and_skipped(folder, tmp_path, capsys):
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    data = (folder / "dog" / "rgba.png").read_bytes()
    (folder / "dog" / "short.png").write_bytes(data[:len(data) // 2])
    source = open_folder(folder)
    pixels, labels = dataset.read_all(source)
    out = capsys.readouterr().out
    assert "skipped 2 unreadable of 7" in out and "broken.png" in out and "short.png" in out
    assert pixels.shape == (5, 3, 32, 32)
    assert labels.tolist() == [0, 0, 1, 1, 1]
    assert (pixels[4] == source.read(5)).all()

    dataset.cache_tokens(tmp_path / "out", source, *tiny_tokenizers(), "cpu")
    assert "skipped 2 unreadable of 7" in capsys.readouterr().out
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["skipped"] == ["cat/broken.png 10", f"dog/short.png {len(data) // 2}"]
    assert dataset.Tokens(tmp_path / "out").rows.tolist() == [1, 2, 3, 4, 5]


def test_a_cache_that_lost_pictures_is_not_trained_on(tmp_path):
    dataset.cache_tokens(tmp_path, shapes(6), *tiny_tokenizers(), "cpu")
    status = np.load(tmp_path / "status.npy", mmap_mode="r+")
    status[4:] = 0
    status.flush()
    words = "not a complete token cache.*4 of its 6 pictures are there"
    with pytest.raises(SystemExit, match=words):
        dataset.Tokens(tmp_path)


def test_only_corrupt_pictures_is_an_error(tmp_path):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="none of its 1 pictures"):
        dataset.read_all(open_folder(tmp_path / "in"))


def test_a_repaired_picture_is_taken_by_the_next_start(tmp_path, monkeypatch):
    """An unreadable picture is tried again as long as the cache is not complete."""
    source = shapes(20)
    read = source.read
    write_json = disk.write_json

    def broken_disk(i):
        return "a broken disk" if i == 7 else read(i)

    def write_unless_complete(path, meta):
        if "mean" not in meta:
            write_json(path, meta)

    source.read = broken_disk
    monkeypatch.setattr(disk, "write_json", write_unless_complete)
    vae, vq = tiny_tokenizers()
    dataset.cache_tokens(tmp_path, source, vae, vq, "cpu")
    assert np.load(tmp_path / "status.npy")[7] == 0
    dataset.cache_tokens(tmp_path, shapes(20), vae, vq, "cpu")
    assert np.load(tmp_path / "status.npy")[7] == 1


def test_empty_class_folder_wrong_path_and_empty_folder_are_one_line(folder, tmp_path):
    (folder / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty: 0 of its 0 files are pictures"):
        open_folder(folder)
    # the figures of a run are no data set
    Image.new("RGB", (9, 9)).save(folder / "empty" / "samples.png")
    (folder / "empty" / "last.pt").touch()
    with pytest.raises(SystemExit, match="1 of its 2 files are pictures; .* no last.pt of a run"):
        open_folder(folder)
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        open_folder(tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(SystemExit, match="void: 0 of its 0 files are pictures"):
        open_folder(tmp_path / "void")


def test_train_and_val_folders_are_the_splits(folder, tmp_path):
    """Where nothing is held out, the test split is the other one, and says so."""
    root = tmp_path / "set"
    picture(root / "train" / "cat" / "a.png")
    training = open_folder(root)
    test = open_folder(root, "test")
    assert test.files == training.files and not test.held_out
    picture(root / "val" / "cat" / "b.png", colour=(0, 0, 255))
    test = open_folder(root, "test")
    assert test.held_out and len(test.files) == 1
    assert test.read(0)[2, 5, 5] == 255
    assert open_folder(root).files == training.files
    test = open_folder(folder, "test")
    assert test.files == open_folder(folder).files and not test.held_out


def make(root, *names):
    for name in names:
        picture(root / name / "a.png")
    return open_folder(root)


def test_a_class_may_be_called_train(tmp_path):
    """A split needs a folder for training and one held out, or only such folders."""
    assert make(tmp_path / "vehicles", "bus", "car", "train").classes == ["bus", "car", "train"]
    assert make(tmp_path / "one", "train/bus").classes == ["bus"]
    assert make(tmp_path / "two", "train/bus", "val/bus", "notes").classes == ["bus"]


@pytest.mark.parametrize("train", ["train", "training", "Train"])
@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "dev", "test", "testing"])
def test_usual_names_of_splits_are_known(tmp_path, train, held_out):
    source = make(tmp_path, f"{train}/0", f"{held_out}/0", f"{held_out}/1")
    assert source.classes == ["0"] and not source.held_out
    test = open_folder(tmp_path, "test")
    assert test.classes == ["0", "1"] and test.held_out


def test_loose_pictures_beside_class_folders_are_one_line(tmp_path):
    picture(tmp_path / "flat" / "a.png")
    picture(tmp_path / "flat" / "b.png")
    picture(tmp_path / "flat" / "thumbs" / "c.png")
    with pytest.raises(SystemExit, match="flat: 2 pictures, such as ..png, lie beside the folder"):
        open_folder(tmp_path / "flat")


def test_files_of_operating_systems_are_no_pictures_and_no_classes(tmp_path):
    """__MACOSX, @eaDir, checkpoints of notebooks and ._ files are skipped at every depth."""
    root = tmp_path / "zoo"
    make(root, "cat", "cat/sub", "__MACOSX/cat", "lost+found", "cat/@eaDir", ".ipynb_checkpoints",
         "cat/.ipynb_checkpoints")
    picture(root / "cat" / "._0.png")
    source = open_folder(root)
    assert source.classes == ["cat"]
    assert [str(path.relative_to(root)) for path in source.files] == ["cat/a.png", "cat/sub/a.png"]


def test_links_in_a_circle_are_followed_once(tmp_path):
    """A class may be a link, and keeps its own name."""
    picture(tmp_path / "all" / "cats" / "a.png")
    (tmp_path / "all" / "cats" / "self").symlink_to(tmp_path / "all" / "cats")
    (tmp_path / "all" / "cats" / "up").symlink_to(tmp_path / "all")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "all" / "cats")
    source = open_folder(tmp_path / "set")
    assert source.classes == ["cat"]
    assert [str(path.relative_to(tmp_path)) for path in source.files] == ["set/cat/a.png"]


def test_class_folders_that_are_numbers_are_sorted_as_numbers(tmp_path):
    """Class 2 of a prior must not be the folder 10."""
    names = [str(k) for k in range(12)]
    assert make(tmp_path, *reversed(names)).classes == names
    assert make(tmp_path, "b", "a").classes == [*names, "a", "b"]


def test_every_ending_that_pillow_opens_counts_and_others_are_counted(tmp_path, capsys):
    for name in ("a.ppm", "b.PGM", "c.jfif", "d.AVIF", "e.JPG"):
        (tmp_path / "cat").mkdir(exist_ok=True)
        image = Image.new("RGB", (20, 20), (100, 100, 100))
        image.convert("L" if name == "b.PGM" else "RGB").save(tmp_path / "cat" / name)
    (tmp_path / "cat" / "notes.txt").write_text("fluffy")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "moved.png")
    source = open_folder(tmp_path)
    assert "3 files that are not pictures are left out" in capsys.readouterr().out
    pixels, _ = dataset.read_all(source)
    assert len(pixels) == 5 and abs(pixels.astype(int) - 100).max() <= 2


def test_pictures_keep_their_identity_when_the_folder_moves(folder, tmp_path):
    """Another spelling of the path, another place, an unreadable picture less: the same set.

    A picture more, or one of another size in its place, is another set.
    """
    broken = folder / "cat" / "broken.png"
    broken.write_bytes(b"no picture")
    source = open_folder(folder)
    dataset.read_all(source)
    before = dataset.describe(source, source.skipped)
    assert before == dataset.describe(open_folder(folder / ".." / folder.name), source.skipped)
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(folder, moved)
    (moved / "cat" / "broken.png").unlink()
    assert before == dataset.describe(open_folder(moved), source.skipped)
    picture(moved / "cat" / "rgb.png", size=(60, 60), colour=(0, 0, 0))
    assert before != dataset.describe(open_folder(moved), source.skipped)
    picture(folder / "cat" / "new.png")
    assert before != dataset.describe(open_folder(folder), source.skipped)


def test_a_cache_goes_with_its_pictures_when_their_folder_moves(folder, tmp_path):
    tokenizers_of_test = tiny_tokenizers()
    dataset.cache_tokens(tmp_path / "out", open_folder(folder), *tokenizers_of_test, "cpu")
    made = (tmp_path / "out" / "meta.json").read_bytes()
    folder.rename(tmp_path / "moved")
    source = open_folder(tmp_path / "moved")
    dataset.cache_tokens(tmp_path / "out", source, *tokenizers_of_test, "cpu")
    assert (tmp_path / "out" / "meta.json").read_bytes() == made
    # made anew there, it is what a prior and a MixAR run were made from before
    dataset.cache_tokens(tmp_path / "new", source, *tokenizers_of_test, "cpu")
    caches = [dataset.Tokens(tmp_path / name) for name in ("out", "new")]
    assert caches[0].made_from == caches[1].made_from


def test_a_name_that_is_not_utf8_is_trained_on(tmp_path, capsys):
    path = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(path)
    Image.new("RGB", (32, 32)).save(os.fsdecode(path + b"/\xe9.png"))
    (tmp_path / os.fsdecode(b"caf\xe9") / "broken.png").write_bytes(b"no picture")
    source = open_folder(tmp_path)
    assert source.classes == ["caf\\xe9"]
    assert [name.rsplit(" ")[0] for name in source.names] == ["caf\\xe9/broken.png",
                                                             "caf\\xe9/\\xe9.png"]
    dataset.cache_tokens(tmp_path / ".cache", source, *tiny_tokenizers(), "cpu")
    assert dataset.Tokens(tmp_path / ".cache").n == 1


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    """A phone held upright stores the picture on its side, and orientation 6."""
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (0, 0, 40, 20))
    exif = image.getexif()
    exif[0x112] = 6
    image.save(tmp_path / "phone.png", exif=exif)
    image.save(tmp_path / "broken.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    turned = np.asarray(dataset.read_rgb(tmp_path / "phone.png"))
    assert turned[:, 35].min() == 255 and turned[:, 5].max() == 0
    assert dataset.read_rgb(tmp_path / "broken.jpg").size == (40, 40)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_of_unknown_range_are_unreadable_not_black(tmp_path, kind):
    Image.fromarray(np.full((32, 32), 0.5, kind)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="32-bit values have no known range"):
        dataset.read_rgb(tmp_path / "deep.tif")


def test_a_strip_of_pixels_is_unreadable(tmp_path):
    """Its centre crop would first make it larger than the memory."""
    Image.new("L", (1, 300_000)).save(tmp_path / "strip.png")
    source = open_folder(tmp_path)
    assert "a strip of 1 x 300000 pixels" in source.read(0)


def test_a_folder_of_pictures_alone_is_one_class(tmp_path):
    for name in ("b.png", "a.png"):
        picture(tmp_path / "set" / name)
    source = open_folder(tmp_path / "set")
    assert source.classes == ["set"]
    assert source.labels.tolist() == [0, 0]
    assert [file.name for file in source.files] == ["a.png", "b.png"]


def test_a_count_chooses_the_same_pictures_with_their_labels(folder):
    """Some of the pictures, each with its own label; the same ones every time."""
    everything = open_folder(folder)
    few = dataset.open_source(str(folder), "train", 32, 3)
    again = dataset.open_source(str(folder), "train", 32, 3)
    assert len(set(few.files)) == 3 and few.files == again.files
    for i, file in enumerate(few.files):
        there = everything.files.index(file)
        assert few.labels[i] == everything.labels[there]
        assert (few.read(i) == everything.read(there)).all()


@pytest.mark.parametrize("opener, ending", [(open, ""), (gzip.open, ".gz")])
def test_idx_files_gz_or_not(tmp_path, opener, ending):
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    labels = np.array([2, 0, 1], np.uint8)
    write_idx(tmp_path / f"train-images-idx3-ubyte{ending}", images, opener)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{ending}", labels, opener)
    source = open_folder(tmp_path)
    same = open_folder(tmp_path, "test")
    assert source.labels.tolist() == same.labels.tolist() == [2, 0, 1]
    assert not source.mirror and not same.held_out
    assert (source.read(1)[:, 2:30, 2:30] == images[1]).all()
    assert source.read(1)[:, :2].max() == 0
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{ending}", images[::-1], opener)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{ending}", labels[::-1], opener)
    source = open_folder(tmp_path)
    test = open_folder(tmp_path, "test")
    assert source.labels.tolist() == [2, 0, 1] and not source.held_out
    assert test.labels.tolist() == [1, 0, 2] and test.held_out
    assert (source.read(0) == test.read(2)).all()
    assert (source.read(0) != test.read(0)).any()


def write_set(folder, prefix, labels):
    folder.mkdir(parents=True, exist_ok=True)
    images = np.zeros((len(labels), 28, 28), np.uint8)
    write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
    write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.array(labels, np.uint8))


def test_classes_are_the_labels_that_there_are(tmp_path):
    """The letters of EMNIST are numbered from 1. Its files have a prefix, its test set is "test".
    """
    write_set(tmp_path, "emnist-letters-train", [1, 3, 26])
    write_set(tmp_path, "emnist-letters-test", [26, 1])
    source = open_folder(tmp_path)
    assert source.classes == ["1", "3", "26"] and source.labels.tolist() == [0, 1, 2]
    test = open_folder(tmp_path, "test")
    assert test.labels.tolist() == [2, 0] and test.held_out
    write_set(tmp_path, "emnist-digits-train", [0, 1])
    with pytest.raises(SystemExit, match="one file ...train-images-idx3-ubyte.* emnist-letters"):
        open_folder(tmp_path)


def test_names_of_clothes_come_from_the_labels_not_from_the_path(tmp_path):
    write_set(tmp_path / "old-fashioned" / "digits", "train", [5, 0, 4, 1, 9, 2, 1, 3, 1, 4])
    digits = open_folder(tmp_path / "old-fashioned" / "digits")
    assert digits.classes == ["0", "1", "2", "3", "4", "5", "9"]
    write_set(tmp_path / "clothes", "train", [9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 1, 4, 6, 8])
    assert open_folder(tmp_path / "clothes").classes[9] == "boot"


def test_kaggle_and_torchvision_layouts(tmp_path):
    """A dotted file beside a folder of its name is read. Files in raw/ are pointed at."""
    write_set(tmp_path, "train", [0, 1])
    for name in ("images-idx3", "labels-idx1"):
        path = tmp_path / f"train-{name}-ubyte"
        path.rename(tmp_path / f"train-{name.replace('-', '.')}-ubyte")
        path.mkdir()
    assert open_folder(tmp_path).classes == ["0", "1"]
    write_set(tmp_path / "MNIST" / "raw", "train", [0, 1])
    with pytest.raises(SystemExit, match="its files lie in .*raw; give that folder"):
        open_folder(tmp_path / "MNIST")


def test_a_set_without_pictures_is_one_line(tmp_path):
    write_set(tmp_path, "train", [])
    with pytest.raises(SystemExit, match="no pictures"):
        open_folder(tmp_path)


def test_pictures_and_labels_that_do_not_fit_are_one_line(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((3, 28, 28), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(2, np.uint8))
    with pytest.raises(SystemExit, match="3 pictures do not fit 2 labels"):
        open_folder(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 28, 28, 3), np.uint8))
    with pytest.raises(SystemExit, match="does not hold bytes along 3 axes"):
        open_folder(tmp_path)


def test_truncated_or_missing_idx_file_is_one_line(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, np.zeros((3, 28, 28), np.uint8))
    with pytest.raises(SystemExit, match=r"one file ...train-labels-idx1-ubyte\[.gz\] is needed"):
        open_folder(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte: not a readable idx file"):
        open_folder(tmp_path)


def test_idx_file_of_16_bit_values_is_one_line(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 28, 28), np.uint8))
    labels = b"\0\0\x0b\x01" + b"\0\0\0\x02" + bytes(4)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(SystemExit, match="train-labels-idx1-ubyte: not a readable idx file"):
        open_folder(tmp_path)


def test_other_pictures_in_a_folder_are_another_source(folder):
    """As many pictures under other names must not be taken for those in the cache."""
    before = dataset.describe(open_folder(folder), [])
    (folder / "cat" / "rgb.png").rename(folder / "cat" / "renamed.png")
    after = dataset.describe(open_folder(folder), [])
    assert before["pictures"] == after["pictures"] and before["names"] != after["names"]


@pytest.mark.parametrize("name, value", [("indices", -5), ("indices", 256), ("moments", np.nan)])
def test_values_of_a_cache_that_cannot_be_are_refused(tmp_path, name, value):
    vae, vq = tiny_tokenizers()
    dataset.cache_tokens(tmp_path, shapes(10), vae, vq, "cpu")
    np.load(tmp_path / f"{name}.npy", mmap_mode="r+")[:] = value
    tokens = dataset.Tokens(tmp_path)
    with pytest.raises(SystemExit, match="token cache is damaged"):
        tokens.batch(np.arange(4), lambda f, *shape: f(4, *shape))


def test_images_of_another_source_are_refused(tmp_path):
    vae, vq = tiny_tokenizers()
    dataset.cache_tokens(tmp_path, shapes(10), vae, vq, "cpu")
    with pytest.raises(SystemExit, match="made with pictures 10, not 20; pictures of other names"):
        dataset.cache_tokens(tmp_path, shapes(20), vae, vq, "cpu")


def tiny_tokenizers():
    torch.manual_seed(0)
    vae = tokenizers.KLVAE(**PRESETS["tiny"]["vae"]).eval()
    # Log variances near 0, where float16 is fine.
    vae.quant_conv.bias.data[8:] = 0.0
    return vae, tokenizers.BitVQ(**PRESETS["tiny"]["vq"]).eval()


def test_eq07_cache_holds_the_tokens_of_picture_and_mirror_image(tmp_path):
    """Eq. (7): x_c and x_d of the cache are the tokenizers' own, row-major.

    x_c is normalised per channel; a uniform number of 0.5 or more gives the mirror image.
    """
    vae, vq = tiny_tokenizers()
    source = shapes(50)
    source.mirror = True
    dataset.cache_tokens(tmp_path, source, vae, vq, "cpu", batch=16)
    tokens = dataset.Tokens(tmp_path)
    assert tokens.n == 50
    assert tokens.labels.tolist() == source.labels.tolist()
    assert tokens.classes == source.classes
    numbers = np.array([3, 44])
    mean, std, x_d, y = tokens.batch(numbers, lambda f: torch.tensor([0.4, 0.5]))
    x = torch.tensor(np.stack([source.read(3), source.read(44)])).float() / 255
    x[1] = x[1].flip(2)
    with torch.no_grad():
        true_mean, logvar = vae.encode(x * 2 - 1)
        bits = tokenizers.quantise(vq.encode(x))
    assert mean.shape == (2, 64, 8) and x_d.shape == (2, 64, 8)
    assert y.tolist() == [3, 4]
    back = (mean * tokens.std + tokens.mean).transpose(1, 2).unflatten(2, (8, 8))
    assert torch.allclose(back, true_mean, atol=2e-3)
    true_std = (0.5 * logvar).exp().flatten(2).transpose(1, 2)
    assert torch.allclose(std * tokens.std, true_std, rtol=2e-3)
    assert (x_d.transpose(1, 2).unflatten(2, (8, 8)) == bits).all()


def test_cache_statistics_are_those_of_posterior_samples(tmp_path):
    """The deviation is that of posterior samples, unbiased, not that of their means.

    A sample normalised by it has deviation 1.
    """
    vae, vq = tiny_tokenizers()
    # Much posterior noise.
    vae.quant_conv.bias.data[8:] = 1.0
    dataset.cache_tokens(tmp_path, shapes(300), vae, vq, "cpu")
    tokens = dataset.Tokens(tmp_path)
    mean, std, _, _ = tokens.batch(np.arange(300), lambda f: torch.zeros(300))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    x_c = mean + std * noise
    assert torch.allclose(x_c.mean((0, 1)), torch.zeros(8), atol=0.03)
    assert torch.allclose(x_c.std((0, 1)), torch.ones(8), atol=0.03)


def test_cache_refuses_other_tokenizers(tmp_path):
    vae, vq = tiny_tokenizers()
    dataset.cache_tokens(tmp_path, shapes(10), vae, vq, "cpu")
    vq.decoder.conv_out.bias.data += 1
    with pytest.raises(SystemExit, match="was made with vq [0-9a-f]{16}, not [0-9a-f]{16}:"):
        dataset.cache_tokens(tmp_path, shapes(10), vae, vq, "cpu")


def cache_arrays(folder):
    names = ("moments", "indices", "labels", "status")
    return {name: np.load(folder / f"{name}.npy") for name in names}


def test_a_stopped_cache_goes_on_where_it_was(folder, tmp_path):
    """A cache stopped in the middle is not readable as a cache.

    Started again, it reads only what is missing and ends with the same arrays.
    """
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    vae, vq = tiny_tokenizers()
    dataset.cache_tokens(tmp_path / "whole", open_folder(folder), vae, vq, "cpu", batch=2)
    source = open_folder(folder)
    shipped = source.read
    numbers = []

    def stop_at_four(i):
        if i >= 4:
            raise KeyboardInterrupt
        return shipped(i)

    def noted(i):
        numbers.append(int(i))
        return shipped(i)

    source.read = stop_at_four
    with pytest.raises(KeyboardInterrupt):
        dataset.cache_tokens(tmp_path / "stopped", source, vae, vq, "cpu", batch=2)
    with pytest.raises(SystemExit, match="not a complete token cache"):
        dataset.Tokens(tmp_path / "stopped")
    source.read = noted
    dataset.cache_tokens(tmp_path / "stopped", source, vae, vq, "cpu", batch=2)
    whole = cache_arrays(tmp_path / "whole")
    resumed = cache_arrays(tmp_path / "stopped")
    assert all((whole[name] == resumed[name]).all() for name in whole)
    # Picture 0 is broken; it is read again and named at the end.
    assert sorted(set(numbers)) == [0, 4, 5]
    assert whole["status"].tolist() == [0, 1, 1, 1, 1, 1]
    tokens = dataset.Tokens(tmp_path / "stopped")
    assert tokens.n == 5
    assert tokens.labels.tolist() == [0, 0, 1, 1, 1]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def stopped(file):
        file.write(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "file"
    disk.write_whole(path, lambda file: file.write(b"whole"))
    with pytest.raises(KeyboardInterrupt):
        disk.write_whole(path, stopped)
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_locked_against_a_second_program(tmp_path):
    """The lock ends with the program, however it ends, and what a killed one left is removed."""
    leftover = tmp_path / ".last.pt.99.unfinished"
    leftover.write_bytes(b"half")
    with disk.locked(tmp_path):
        assert not leftover.exists()
        with pytest.raises(SystemExit, match="another program is writing into this folder"):
            with disk.locked(tmp_path):
                pass
    with pytest.raises(KeyboardInterrupt):
        with disk.locked(tmp_path):
            raise KeyboardInterrupt
    with disk.locked(tmp_path):
        pass


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    """A file stands where its folder should be, or torch.save finds the disk full."""
    def full_disk(file):
        raise RuntimeError("no space left")

    (tmp_path / "file").write_bytes(b"whole")
    with pytest.raises(SystemExit, match="note.json cannot be written: .*exists"):
        disk.write_json(tmp_path / "file" / "note.json", {})
    with pytest.raises(SystemExit, match="last.pt cannot be written: no space left"):
        disk.write_whole(tmp_path / "last.pt", full_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_links_are_written_through_and_devices_are_not_replaced(tmp_path):
    target = tmp_path / "target"
    (tmp_path / "link").symlink_to(target)
    disk.write_whole(tmp_path / "link", lambda file: file.write(b"whole"))
    assert target.read_bytes() == b"whole" and (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit, match="pipe cannot be written: it exists and is not a file"):
        disk.write_whole(tmp_path / "pipe", lambda file: file.write(b"whole"))
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("error, reason", [
    (ValueError("two\n  lines"), "two lines"),
    (KeyError("config"), "missing 'config'"),
    (EOFError(), "EOFError"),
    (SystemExit("its own line"), None),
])
def test_what_cannot_be_read_is_one_line(error, reason):
    with pytest.raises(SystemExit) as stopped:
        with disk.reading("last.pt", "checkpoint"):
            raise error
    line = f"last.pt: not a checkpoint: {reason}" if reason else "its own line"
    assert str(stopped.value) == line


def test_only_what_differs_is_named():
    """Dicts within dicts are compared, too. A tuple equals a list.

    What only one of them has is not compared: files of earlier versions have fewer entries.
    """
    was = dict(seed=0, batch=32, config=dict(width=8, mult=[1, 2]), tokens=None, old=1)
    now = dict(seed=0, batch=64, config=dict(width=16, mult=(1, 2)), other=None)
    assert disk.check_same("last.pt", was, dict(was)) is None
    with pytest.raises(SystemExit) as stopped:
        disk.check_same("last.pt", was, now)
    assert str(stopped.value) == (
        "last.pt was made with batch 32, not 64; width 8, not 16: "
        "choose another --runs or --out folder, or remove it")


DAMAGE = [
    ("moments.npy", lambda path: path.write_bytes(path.read_bytes()[:200]), "moments.npy: not"),
    ("indices.npy", lambda path: path.write_bytes(b""), "indices.npy: not"),
    ("status.npy", lambda path: path.unlink(), "status.npy: not .*No such file"),
    ("labels.npy", lambda path: np.save(path, np.arange(5)), r"expected int64 .* shape \(6,\)"),
    ("labels.npy", lambda path: np.save(path, np.zeros((6, 2), int)), "expected int64"),
    ("labels.npy", lambda path: np.save(path, np.ones(6)), "expected int64"),
    ("labels.npy", lambda path: np.save(path, np.full(6, 10)), "classes beyond 10"),
    ("meta.json", lambda path: path.write_text("{"), "meta.json: not .*Expecting"),
    ("meta.json", lambda path: path.write_text("7"), "meta.json: not a readable note"),
    ("meta.json", lambda path: path.write_text("null"), "meta.json: not a readable note"),
    ("meta.json", lambda path: path.write_text('{"made_from": 7}'), "not a"),
    ("meta.json", lambda path: path.write_text(path.read_text().replace('"std": [', '"std": [0,')),
     "the deviation above 0"),
]


@pytest.mark.parametrize("name, damage, words", DAMAGE)
def test_a_damaged_cache_is_one_line(tmp_path, name, damage, words):
    """It names the file, whether the cache is filled or read."""
    tokenizers_of_test = tiny_tokenizers()
    dataset.cache_tokens(tmp_path, shapes(6), *tokenizers_of_test, "cpu")
    damage(tmp_path / name)
    with pytest.raises(SystemExit, match=words) as error:
        dataset.cache_tokens(tmp_path, shapes(6), *tokenizers_of_test, "cpu")
        dataset.Tokens(tmp_path)
    assert "\n" not in str(error.value) and "remove" in str(error.value)


def test_a_cache_that_would_not_fit_is_one_line_before_it_is_begun(tmp_path, monkeypatch):
    """Files that grow as they are written would end the program with a bus error on a full disk."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit, match="tokens of 6 pictures take .* GB, but 1e-06 GB are free"):
        dataset.cache_tokens(tmp_path, shapes(6), *tiny_tokenizers(), "cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_stopped_before_its_statistics_gets_them(tmp_path):
    """All pictures may be done although the mean is still missing."""
    dataset.cache_tokens(tmp_path, shapes(6), *tiny_tokenizers(), "cpu")
    meta = disk.read_json(tmp_path / "meta.json")
    stopped = {key: meta[key] for key in ("made_from", "classes", "skipped")}
    disk.write_json(tmp_path / "meta.json", stopped)
    dataset.cache_tokens(tmp_path, shapes(6), *tiny_tokenizers(), "cpu")
    assert disk.read_json(tmp_path / "meta.json") == meta


def test_a_picture_is_done_only_when_its_rows_are_there(tmp_path, monkeypatch):
    """Stopped before a batch is written (here its rows do not fit): the batch is still to do."""
    shipped = tokenizers.encode_pictures

    def too_low(pictures, *more):
        rows = shipped(pictures, *more)
        return rows | {"indices": rows["indices"][:, :, :5]} if pictures.any() else rows

    monkeypatch.setattr(tokenizers, "encode_pictures", too_low)
    with pytest.raises(ValueError):
        dataset.cache_tokens(tmp_path, shapes(6), *tiny_tokenizers(), "cpu", batch=2)
    assert np.load(tmp_path / "status.npy").tolist() == [0] * 6


def test_indices_and_bits_are_inverse_least_significant_first():
    bits = tokenizers.codes_to_bits(torch.tensor([1, 6])[..., None], 3)
    assert bits.tolist() == [[1, -1, -1], [-1, 1, 1]]
    index = torch.arange(256)
    bits = tokenizers.codes_to_bits(index[..., None], 8)
    assert (tokenizers.bits_to_codes(bits) == index).all()
    assert tokenizers.quantise(torch.tensor([0.0, 1e-9, -3.0])).tolist() == [-1, 1, -1]
