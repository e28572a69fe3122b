"""sample.py as a user runs it: its options, its files, its figures, and what it refuses.

The models are hardly trained. Only the machinery counts. test_backbone.py tests the samplers.
"""
import json
import os
import shutil
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import backbone
import dataset
import disk
import running
import output
import sample
import tokenizers
import train
from running import mixar, sampling


def read_png(folder, i):
    return np.asarray(Image.open(folder / f"{i:06d}.png")).astype(int)


def change_run(runs, folder, **meta):
    """A copy of the shared stages and of the MixAR run, whose checkpoint says `meta` -> the run."""
    shutil.copytree(runs, folder)
    path = folder / "shapes-dcmix" / "last.pt"
    saved = torch.load(path, weights_only=True)
    saved["meta"] |= meta
    torch.save(saved, path)
    return path.parent


# the random numbers and the models of a run

def test_random_numbers_are_a_function_of_seed_image_and_stream():
    """They are the same in any batch. Another seed, another image and X_c instead of X_d differ."""
    def numbers(seed, indices, stream):
        return sample.image_rng(seed, indices, stream, "cpu")(torch.rand, 4)

    batch = numbers(3, [5, 7], 0)
    assert torch.equal(batch[1], numbers(3, [7], 0)[0])
    assert torch.equal(batch, numbers(3, [5, 7], 0))
    found = set()
    for seed in (3, 4):
        for i in (5, 6):
            for stream in (0, 1):
                found.add(tuple(numbers(seed, [i], stream)[0].tolist()))
    assert len(found) == 8


def test_pictures_go_through_the_tokenizers_a_few_at_a_time(runs):
    """Half a million pixels at once: 512 pictures of 32 x 32, or 2 of 512 x 512.

    The pictures and the bits are the same.
    """
    system = sample.System(runs / "shapes-dcmix", amp="fp32")
    generator = torch.Generator().manual_seed(0)
    bits = tokenizers.quantise(torch.randn(5, system.model.N, 8, generator=generator))
    pictures = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)
    x_c = torch.randn(5, system.model.N, 8, generator=generator)
    seen = []
    for tokenizer in (system.vq.encoder, system.vq.decoder, system.vae.decoder):
        tokenizer.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))

    def both_ways(size):
        system.size = size
        seen.clear()
        return [system.encode_discrete(pictures), system.decode_discrete(bits).int(),
                system.decode_continuous(x_c).int()]

    whole = both_ways(32)
    assert seen == 3 * [5]
    in_pieces = both_ways(512)
    assert seen == 3 * [2, 2, 1]
    for a, b in zip(whole, in_pieces):
        assert (a - b).abs().max() <= 1


def test_plain_mar_samples_no_discrete_tokens(runs, tmp_path, monkeypatch):
    """Guidance none: the prior costs nothing when sampling."""
    run = tmp_path / "run"
    train.main(mixar(runs, run, "--steps", 1, "--guidance", "none"))
    monkeypatch.setattr(sample, "sample_prior", None)
    sample.main(sampling(run, tmp_path / "s.npz", "--count", 10))
    assert len(np.load(tmp_path / "s.npz")["arr_0"]) == 10
    with pytest.raises(TypeError):
        sample.main(sampling(run, tmp_path / "d.npz", "--count", 10, "--decode", "discrete"))


# held-out X_d

def test_truth_takes_x_d_and_class_of_held_out_pictures(runs, tmp_path, monkeypatch):
    """--truth: image i has codes and class of held-out picture i. The prior is not used."""
    given = {}
    shipped = sample.System.sample_continuous

    def note(system, seed, indices, y, x_d, on_step=None):
        for i, label, bits in zip(indices, y.tolist(), x_d):
            given[int(i)] = label, bits
        return shipped(system, seed, indices, y, x_d, on_step)

    monkeypatch.setattr(sample.System, "sample_continuous", note)
    monkeypatch.setattr(sample, "sample_prior", None)
    run = runs / "shapes-dcmix"
    sample.main(sampling(run, tmp_path / "s", "--truth", "--count", 5, "--batch-size", 2))
    source = dataset.open_source("shapes", "test", 32, 5)
    vq, _ = backbone.load_model(runs / "shapes" / "vq", "vq")
    assert sorted(given) == [0, 1, 2, 3, 4]
    for i, (label, bits) in given.items():
        picture = torch.tensor(source.read(i))[None].float() / 255
        codes = tokenizers.quantise(vq.encode(picture)).flatten(2)           # (1, d_d, N)
        assert torch.equal(bits, codes[0].T) and label == source.labels[i]
        assert (tmp_path / "s" / f"{i:06d}.png").is_file()


def test_truth_decoded_is_what_the_bit_tokenizer_keeps_of_the_pictures(runs, tmp_path):
    """--truth --decode discrete"""
    flags = ["--truth", "--decode", "discrete", "--count", 2]
    sample.main(sampling(runs / "shapes-dcmix", tmp_path / "s", *flags))
    source = dataset.open_source("shapes", "test", 32, 2)
    vq, _ = backbone.load_model(runs / "shapes" / "vq", "vq")
    for i in range(2):
        x = torch.tensor(source.read(i))[None].float() / 255
        expected = output.truncate(vq.decode(tokenizers.quantise(vq.encode(x))))
        expected = expected[0].permute(1, 2, 0).int().numpy()                # (H, W, 3)
        assert abs(read_png(tmp_path / "s", i) - expected).max() <= 1


def test_truth_counts_for_a_gif(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "sample_prior", None)
    out = tmp_path / "s.gif"
    sample.main(sampling(runs / "shapes-dcmix", out, "--truth", "--count", 2))
    assert Image.open(out).n_frames == 3


@pytest.mark.parametrize("part, count", [("val", 3), ("train", 2)])
def test_more_pictures_than_are_held_out_is_one_line(runs, tmp_path, part, count):
    """Two pictures are held out, or none."""
    folder = tmp_path / "data" / part / "cat"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(folder / name)
    run = change_run(runs, tmp_path / "runs", data=str(tmp_path / "data"))
    with pytest.raises(SystemExit, match=f"--truth --count {count}: .* does not have that many"):
        sample.main(sampling(run, tmp_path / "s", "--truth", "--count", count))
    assert not (tmp_path / "s").exists()


def test_weights_are_cast_once_not_at_every_call(runs, monkeypatch):
    """Autocast keeps the bf16 copy of a weight for the whole of a sampling, at every step."""
    system = sample.System(runs / "shapes-dcmix", amp="bf16")
    weight = system.model.diffloss.net.final_layer.linear.weight
    y = torch.arange(2)
    casts = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, given=(), named=None):
            if "_to_copy" in str(function) and given[0].shape == weight.shape:
                casts.append(str(function))
            return function(*given, **(named or {}))

    x_d = system.sample_discrete(0, [0, 1], y)
    with Count():
        system.sample_continuous(0, [0, 1], y, x_d)
    assert len(casts) == 1


# several processes, stopped programs

SIX = ["--count", 6, "--ar-steps", 4, "--diffusion-steps", 5, "--seed", 3]


def start_three_times(rank, folder, run):
    """One of two processes that start sample.py three times.

    six: without delays
    late.png: the first process writes the settings late, the second one its pictures
    second.png: all pictures are there
    """
    torch.set_num_threads(1)
    shipped_write = disk.write_whole
    shipped_sample = sample.System.sample
    note = folder / "late.png.parts" / "settings.json"

    def write_late(path, write):
        if Path(path).name == "settings.json":
            time.sleep(2)
        shipped_write(path, write)

    def sample_late(*given):
        assert note.is_file(), "a picture before the note of its settings"
        time.sleep(2 * rank)
        return shipped_sample(*given)

    def start(name, *flags):
        group = f"file://{folder / name}.group"
        dist.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
        with (folder / f"{name}.{rank}.txt").open("w") as file, redirect_stdout(file):
            sample.main(sampling(run, folder / name, *flags))

    start("six", *SIX, "--batch-size", 2)
    disk.write_whole = write_late
    sample.System.sample = sample_late
    start("late.png", "--count", 4)
    disk.write_whole = shipped_write
    sample.System.sample = None
    start("second.png", "--count", 4)


@pytest.fixture(scope="module")
def sampled_by_two(runs, tmp_path_factory):
    """The folder of what two processes make; see start_three_times."""
    folder = tmp_path_factory.mktemp("two")
    run = runs / "shapes-dcmix"
    sample.main(sampling(run, folder / "second", "--count", 4))
    (folder / "second").rename(folder / "second.png.parts")
    torch.multiprocessing.spawn(start_three_times, (folder, run), nprocs=2)
    return folder


def test_an_image_does_not_depend_on_batch_size_or_processes(runs, tmp_path, sampled_by_two):
    run = runs / "shapes-dcmix"
    sample.main(sampling(run, tmp_path / "a", *SIX, "--batch-size", 6))
    sample.main(sampling(run, tmp_path / "b", *SIX, "--batch-size", 1))
    for i in range(6):
        image = read_png(tmp_path / "a", i)
        assert abs(image - read_png(tmp_path / "b", i)).max() <= 1
        assert abs(image - read_png(sampled_by_two / "six", i)).max() <= 1
    assert abs(read_png(tmp_path / "a", 0) - read_png(tmp_path / "a", 1)).max() > 1


def test_one_of_two_processes_tells_the_time(sampled_by_two):
    first, second = ((sampled_by_two / f"six.{rank}.txt").read_text() for rank in (0, 1))
    assert "s/image on each of 2 process(es)" in first and str(sampled_by_two / "six") in first
    assert second == ""


@pytest.mark.parametrize("name", ["late.png", "second.png"])
def test_processes_wait_for_each_other_and_sample_nothing_twice(sampled_by_two, name):
    """No picture before the note that says how it was made; no grid before the last picture.

    A second start that finds all pictures of a stopped program samples nothing: it makes the grid
    of them, and the folder of parts is gone.
    """
    assert (sampled_by_two / name).is_file()
    assert not (sampled_by_two / f"{name}.parts").exists()
    late = np.asarray(Image.open(sampled_by_two / "late.png")).astype(int)
    second = np.asarray(Image.open(sampled_by_two / "second.png")).astype(int)
    assert abs(late - second).max() <= 1
    said = (sampled_by_two / f"{name}.0.txt").read_text()
    assert ("s/image" in said) == (name == "late.png")


def test_sampling_resumes_and_refuses_other_settings(runs, tmp_path):
    folder = tmp_path / "s"

    def start(*flags):
        sample.main(sampling(runs / "shapes-dcmix", folder, *flags))
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}

    before = start("--count", 3)
    after = start("--count", 5)
    assert len(before) == 3 and len(after) == 5
    assert all(after[name] == before[name] for name in before)
    # a disk that was full may leave an empty one
    (folder / "000001.png").write_bytes(b"")
    again = start("--count", 5)
    assert (folder / "000001.png").stat().st_size > 0
    assert all(again[name] == after[name] for name in after if name != "000001.png")
    with pytest.raises(SystemExit, match="s was made with seed 0, not 1: choose"):
        start("--count", 5, "--seed", 1)
    # a CPU and a GPU draw different pictures, and a precision rounds in its own way
    note = json.loads((folder / "settings.json").read_text())
    for name, value in (("device", "cuda"), ("amp", "bf16")):
        (folder / "settings.json").write_text(json.dumps(note | {name: value}))
        with pytest.raises(SystemExit, match=f"s was made with {name} {value}, not {note[name]}"):
            start("--count", 5)
    (folder / "settings.json").write_text("{")
    with pytest.raises(SystemExit, match="settings.json: not a") as error:
        start("--count", 5)
    assert "\n" not in str(error.value)


def test_a_folder_of_samples_knows_its_weights_not_their_paths(runs, tmp_path):
    """Another path to the same run goes on; another prior in the place of the old one does not."""
    prior = tmp_path / "prior.pt"
    shutil.copy(runs / "shapes" / "prior" / "last.pt", prior)
    folder = tmp_path / "s"
    run = runs / "shapes-dcmix"
    sample.main(running.sampling(run, folder, "--count", 1, "--prior", prior))
    sample.main(running.sampling(run / "last.pt", folder, "--count", 2, "--prior", prior))
    assert len(list(folder.glob("*.png"))) == 2
    running.change_weight(prior, "prediction_layer.bias")
    with pytest.raises(SystemExit, match="s was made with prior_weights"):
        sample.main(running.sampling(run, folder, "--count", 3, "--prior", prior))


def test_files_of_others_are_never_taken_for_samples_or_removed(runs, tmp_path):
    """A folder without a note of its settings holds somebody's files: a run, pictures, a home."""
    (tmp_path / "own").mkdir()
    (tmp_path / "s.png.parts").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "own" / "000000.png")
    (tmp_path / "s.png.parts" / "mine.txt").write_text("x")
    run = runs / "shapes-dcmix"
    for out in (tmp_path / "own", tmp_path / "s.png", run, tmp_path):
        with pytest.raises(SystemExit, match="holds files that are not samples, such as"):
            sample.main(sampling(run, out, "--count", 2))
    assert (tmp_path / "s.png.parts" / "mine.txt").read_text() == "x"
    assert not (run / "000000.png").exists()


def test_pictures_beyond_the_count_stay_and_are_named(runs, tmp_path, capsys):
    """Hundreds of pictures of a stopped command survive a look at two."""
    run = runs / "shapes-dcmix"
    sample.main(sampling(run, tmp_path / "s", "--count", 4))
    (tmp_path / "s").rename(tmp_path / "s.png.parts")
    sample.main(sampling(run, tmp_path / "s.png", "--count", 2))
    assert "holds 2 pictures more than --count 2; they stay" in capsys.readouterr().out
    left = sorted(path.name for path in (tmp_path / "s.png.parts").glob("*.png"))
    assert left == ["000002.png", "000003.png"]


def test_a_damaged_picture_of_a_stopped_command_is_one_line(runs, tmp_path):
    run = runs / "shapes-dcmix"
    sample.main(sampling(run, tmp_path / "s", "--count", 2))
    (tmp_path / "s").rename(tmp_path / "s.png.parts")
    (tmp_path / "s.png.parts" / "000001.png").write_bytes(b"torn")
    with pytest.raises(SystemExit, match="000001.png: not a picture; remove it to make it again"):
        sample.main(sampling(run, tmp_path / "s.png", "--count", 2))


def test_a_second_program_on_the_same_output_is_told_so(runs, tmp_path):
    with disk.locked(tmp_path / "s.png.parts"):
        with pytest.raises(SystemExit, match="parts: another program is writing into this folder"):
            sample.main(sampling(runs / "shapes-dcmix", tmp_path / "s.png", "--count", 2))


@pytest.mark.parametrize("name, words", [
    ("s.jpg", "expected NAME.png, NAME.npz, NAME.gif or"),
    (".png", "expected NAME.png, NAME.npz, NAME.gif or"),
    ("folder.png", "for a folder, a name without an ending"),
])
def test_an_output_that_would_not_be_what_its_name_says_is_refused(runs, tmp_path, name, words):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit, match=words):
        sample.main(sampling(runs / "shapes-dcmix", tmp_path / name, "--count", 2))
    assert not (tmp_path / "s.jpg").exists()
    assert not (tmp_path / ".png").exists()


def test_a_picture_of_nan_is_an_error_never_a_black_one():
    x = torch.zeros(1, 3, 4, 4)
    x[0, 0, 0, 0] = float("nan")
    for to_pixels in (output.to_bytes, output.truncate):
        with pytest.raises(SystemExit, match="values that are not finite"):
            to_pixels(x)


def spoil_nan(saved):
    saved["ema"]["z_proj.weight"][0, 0] = float("nan")


def spoil_inf(saved):
    saved["ema"]["z_proj.bias"][0] = float("inf")


def spoil_integer(saved):
    saved["ema"]["z_proj.weight"] = saved["ema"]["z_proj.weight"].int()


def spoil_complex(saved):
    saved["ema"]["z_proj.weight"] = saved["ema"]["z_proj.weight"].cfloat()


def spoil_sparse(saved):
    saved["ema"]["z_proj.weight"] = saved["ema"]["z_proj.weight"].to_sparse()


def spoil_depth(saved):
    saved["config"]["depth"] = 10 ** 7


def spoil_heads(saved):
    saved["config"]["heads"] = 7


def spoil_files(saved):
    saved["meta"]["files"] = dict(vae=7)


def spoil_deviation(saved):
    saved["meta"]["latent_std"][3] = 0.0


def shorten_mean(saved):
    saved["meta"]["latent_mean"].pop()


def spoil_mean(saved):
    saved["meta"]["latent_mean"][3] = float("nan")


def spoil_step(saved):
    saved["step"] = "seven"


@pytest.mark.parametrize("spoil, words", [
    (spoil_nan, "z_proj.weight holds values that are not finite"),
    (spoil_inf, "z_proj.bias holds values that are not finite"),
    (spoil_integer, "z_proj.weight holds torch.strided torch.int32"),
    (spoil_complex, "z_proj.weight holds torch.strided torch.complex64"),
    (spoil_sparse, "z_proj.weight holds torch.sparse_coo torch.float32"),
    (spoil_depth, "no model with [0-9]+ weights has the config"),
    (spoil_heads, "no model with [0-9]+ weights has the config"),
    (spoil_files, "cannot unpack"),
    (spoil_deviation, "finite numbers, the deviation above 0"),
    (spoil_mean, "finite numbers, the deviation above 0"),
    (shorten_mean, "8 finite numbers, the deviation above 0"),
    (spoil_step, "invalid literal for int"),
])
def test_values_are_checked_once_where_they_enter(runs, tmp_path, spoil, words):
    """One line names the file and what is wrong in it. Nothing of it becomes a black picture."""
    saved = torch.load(runs / "shapes-dcmix" / "last.pt", weights_only=True)
    spoil(saved)
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(SystemExit, match=f"last.pt: not a .*{words}"):
        sample.System(tmp_path)


@pytest.mark.parametrize("text", ["expected", "step,loss", "a picture"])
def test_a_text_is_no_file_of_weights(tmp_path, text):
    (tmp_path / "last.pt").write_text(text)
    with pytest.raises(SystemExit, match="not a mixar checkpoint: it is not a file of weights"):
        sample.System(tmp_path)


# files and figures

@pytest.mark.parametrize("guidance, name", [("none", "plain MAR"), ("dcsa", "MixAR")])
def test_the_comparison_names_who_made_its_pictures(monkeypatch, tmp_path, guidance, name):
    """Plain MAR sees no X_d, so it is not called MixAR."""
    system = SimpleNamespace(
        model=SimpleNamespace(guidance=guidance),
        meta=dict(classes=["disc"]),
        device="cpu",
        sample_discrete=lambda seed, indices, y: None,
        sample_continuous=lambda seed, indices, y, x_d: None,
        decode_discrete=lambda x_d: torch.zeros(3, 3, 2, 2, dtype=torch.uint8),
        decode_continuous=lambda x_c: torch.ones(3, 3, 2, 2, dtype=torch.uint8),
    )
    grids = {}

    def save_named_grid(images, path, columns, rows):
        grids[path.name] = images[:, 0, 0, 0].tolist(), rows

    monkeypatch.setattr(output, "save_named_grid", save_named_grid)
    monkeypatch.setattr(output, "ROWS", 3)
    output.save_figures(system, tmp_path, 0)
    assert grids["compare.png"] == ([0, 1, 0, 1], ["X_d decoded", name] * 2)
    assert grids["samples.png"] == ([1] * 3, [""] * 3)


def test_a_png_is_a_grid_of_the_classes_and_a_line_tells_the_time(runs, tmp_path, capsys):
    run = runs / "shapes-dcmix"
    grid = tmp_path / "two.png"
    flags = ["--ar-steps", 3, "--diffusion-steps", 3, "--cfg", 2.5]
    sample.main(sampling(run, grid, "--count", 5, "--classes", "star,3", *flags))
    line = capsys.readouterr().out
    assert "s/image" in line and "of it the prior" in line and "5 images" in line
    assert "cpu, 3 AR x 3 diffusion steps, cfg 2.5, amp fp32" in line
    assert line.endswith(f"\n{grid}\n")
    # two columns, three rows
    assert Image.open(grid).size == (64, 96)
    assert not (tmp_path / "two.png.parts").exists()
    sample.main(sampling(run, tmp_path / "three.png", "--count", 4, "--classes", "0,1,2"))
    assert Image.open(tmp_path / "three.png").size == (96, 64)


def test_a_gif_has_a_frame_for_the_start_and_each_step(runs, tmp_path):
    run = runs / "shapes-dcmix"
    sample.main(sampling(run, tmp_path / "ten.gif", "--count", 10, "--ar-steps", 3))
    assert Image.open(tmp_path / "ten.gif").n_frames == 4
    sample.main(sampling(run, tmp_path / "five.gif", "--count", 5))
    assert Image.open(tmp_path / "five.gif").size == (320, 64)


def test_an_npz_holds_the_pictures_of_the_folder(runs, tmp_path):
    """Of one seed and one class: the third class alone, as its number says."""
    run = runs / "shapes-dcmix"
    flags = ["--count", 3, "--classes", "2"]
    sample.main(sampling(run, tmp_path / "s", *flags))
    sample.main(sampling(run, tmp_path / "s.npz", *flags))
    pictures = np.load(tmp_path / "s.npz")["arr_0"]
    assert pictures.shape == (3, 32, 32, 3) and pictures.dtype == np.uint8
    for i, picture in enumerate(pictures):
        assert (picture == read_png(tmp_path / "s", i)).all()


def test_a_note_of_something_else_does_not_let_other_pictures_in(runs, tmp_path):
    """A folder goes on only with the settings of its pictures. A copied checkpoint changes none."""
    run = shutil.copytree(runs, tmp_path / "runs") / "shapes-dcmix"
    out = tmp_path / "set"
    sample.main([str(run), "--count", "1", "--out", str(out)])
    (run / "last.pt").touch()
    sample.main([str(run), "--count", "2", "--out", str(out)])
    assert len(list(out.glob("*.png"))) == 2
    (out / "settings.json").write_text("{}")
    with pytest.raises(SystemExit, match="settings.json has None as its weights"):
        sample.main([str(run), "--count", "3", "--out", str(out)])


def test_a_figure_is_a_grid_of_doubled_pictures_beside_their_names(tmp_path):
    """Two pictures of 32 x 32, one above the other: the grid begins at pixel (90, 20)."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    output.save_named_grid(images, tmp_path / "figure.png", ["star"], ["first", "second"])
    page = np.asarray(Image.open(tmp_path / "figure.png"))
    assert page.shape == (20 + 2 * 64, 90 + 64, 3)
    column = images.permute(0, 2, 3, 1).flatten(0, 1).numpy()                # (64, 32, 3)
    assert (page[20:, 90:] == column.repeat(2, axis=0).repeat(2, axis=1)).all()
    # each name is dark on white
    for name in (page[:20, 90:], page[20:84, :90], page[84:, :90]):
        assert name.min() < 100 and name[0, 0].tolist() == [255, 255, 255]


def test_classes_by_name_or_number():
    """Names come first: a class may be called 1."""
    shapes = ["disc", "ring", "square", "triangle", "star"]
    assert sample.wanted_classes("star, 3,0", shapes) == [4, 3, 0]
    assert sample.wanted_classes("1,0", ["1", "0"]) == [0, 1]
    assert sample.wanted_classes("cat ,dog", [" dog", "cat "]) == [1, 0]
    assert sample.wanted_classes("all", ["a", "b", "c"]) == [0, 1, 2]
    with pytest.raises(SystemExit, match="--classes zebra: unknown class; .* disc, ring"):
        sample.wanted_classes("star,zebra", shapes)


# one clear line for what is wrong

USELESS = [
    (["--ar-steps", "0"], "0 is not in [1, inf]"),
    (["--prior-steps", "0"], "0 is not in [1, inf]"),
    (["--diffusion-steps", "1"], "1 is not in [2, 1000]"),
    (["--diffusion-steps", "9:1"], "1 is not in [2, 1000]"),
    (["--diffusion-steps", "9:5:2"], "9:5:2: give one number, or FIRST:LAST"),
    (["--count", "0"], "0 is not in [1, inf]"),
    (["--batch-size", "-1"], "-1 is not in [1, inf]"),
]


@pytest.mark.parametrize("flags, words", USELESS, ids=" ".join)
def test_numbers_that_sample_nothing_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        sample.parse(["run", *flags])
    assert f"argument {flags[0]}: {words}" in capsys.readouterr().err


def test_truth_of_more_pictures_than_are_held_out_is_refused(runs, tmp_path, monkeypatch):
    three = dataset.open_source("shapes", "test", 32, 3)
    monkeypatch.setattr(dataset, "open_source", lambda *given: three)
    with pytest.raises(SystemExit, match="--truth --count 4: shapes does not have that many"):
        sample.main(sampling(runs / "shapes-dcmix", tmp_path / "s", "--truth", "--count", 4))


def test_more_prior_steps_than_codes_are_refused(runs):
    with pytest.raises(SystemExit, match="--prior-steps 129: more than the 128 "):
        sample.main([str(runs / "shapes-dcmix"), "--prior-steps", "129"])


def test_more_ar_steps_than_tokens_are_refused(runs):
    with pytest.raises(SystemExit, match="--ar-steps 65: more than the 64 "):
        sample.main([str(runs / "shapes-dcmix"), "--ar-steps", "65"])


def test_a_prior_that_gives_nan_is_an_error(runs, tmp_path):
    """A guidance that overflows would choose codes of no meaning."""
    with pytest.raises(SystemExit, match="values that are not finite"):
        flags = sampling(runs / "shapes-dcmix", tmp_path / "s.png", "--count", 2)
        sample.main([*flags, "--prior-cfg", "1e300"])


@pytest.mark.parametrize("flags", [["--truth"], ["--decode", "discrete"], ["--out", "s.gif"]],
                         ids=" ".join)
def test_an_official_mar_has_no_discrete_tokens(monkeypatch, flags):
    official = SimpleNamespace(vq=None, prior=None, settings=dict(ar_steps=1))
    official.model = SimpleNamespace(N=64)
    monkeypatch.setattr(sample, "System", lambda *given: official)
    with pytest.raises(SystemExit, match="is an official MAR, which has no discrete tokens"):
        sample.main(["mar.pth", *flags])


def test_a_prior_of_other_classes_is_refused(runs, tmp_path):
    """With one class less, the last class of the run would be sampled as "no class"."""
    saved = torch.load(runs / "shapes" / "prior" / "last.pt", weights_only=True)
    saved["config"]["classes"] = 9
    for state in (saved["model"], saved["ema"]):
        state["class_emb.weight"] = state["class_emb.weight"][:10]
    torch.save(saved, tmp_path / "prior.pt")
    words = r"\(64, 8, 10\) tokens, bits, classes; .* \(64, 8, 9\)"
    with pytest.raises(SystemExit, match=words):
        sample.main([str(runs / "shapes-dcmix"), "--prior", str(tmp_path / "prior.pt")])


def test_a_prior_of_other_bits_is_refused(runs, tmp_path):
    """Its tokens of 6 bits would mean nothing to a bit tokenizer of 8."""
    saved = torch.load(runs / "shapes" / "prior" / "last.pt", weights_only=True)
    prior = backbone.MaskBitPrior(**saved["config"] | dict(bits=6))
    saved["config"]["bits"] = 6
    saved["ema"] = prior.state_dict()
    torch.save(saved, tmp_path / "prior.pt")
    words = r"\(64, 8, 10\) tokens, bits, classes; .* \(64, 6, 10\)"
    with pytest.raises(SystemExit, match=words):
        sample.main([str(runs / "shapes-dcmix"), "--prior", str(tmp_path / "prior.pt")])


def test_foreign_tokenizers_are_refused(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    running.change_weight(tmp_path / "runs" / "shapes" / "vq" / "last.pt", "decoder.conv_out.bias")
    with pytest.raises(SystemExit, match="was trained with the vq"):
        sample.main([str(tmp_path / "runs" / "shapes-dcmix")])


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/hostile-checkpoint-ran",)


def test_truncated_hostile_foreign_and_missing_checkpoints_are_one_line(runs, tmp_path):
    def refused(path, words):
        with pytest.raises(SystemExit, match=words) as error:
            sample.main([str(path)])
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    whole = (runs / "shapes-dcmix" / "last.pt").read_bytes()
    short = tmp_path / "short.pt"
    short.write_bytes(whole[:len(whole) // 2])
    refused(short, "not a mixar checkpoint: ")
    hostile = tmp_path / "hostile.pt"
    torch.save({"kind": "mixar", "model": Hostile()}, hostile)
    refused(hostile, "not a mixar checkpoint: it holds posix.system, which could run code")
    assert not Path("/tmp/hostile-checkpoint-ran").exists()
    refused(tmp_path / "none.pt", "no such file; expected a mixar checkpoint")
    vae = runs / "shapes" / "vae" / "last.pt"
    refused(vae, "not a mixar checkpoint: it is a vae checkpoint")


@pytest.mark.parametrize("field", ["sampling", "shared", "latent_mean", "files"])
def test_a_run_that_lacks_what_sampling_needs_is_one_line(runs, tmp_path, field):
    saved = torch.load(runs / "shapes-dcmix" / "last.pt", weights_only=True)
    del saved["meta"][field]
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(SystemExit, match=f"last.pt: not a checkpoint of a run: missing '{field}'"):
        sample.System(tmp_path)


def test_truth_has_the_classes_of_the_held_out_pictures(runs, tmp_path, monkeypatch):
    """They are not those of --classes. Other classes than the run's would be drawn as the run's."""
    flags = sampling(runs / "shapes-dcmix", tmp_path / "t.png", "--truth", "--count", 4)
    with pytest.raises(SystemExit, match="leave out --classes"):
        sample.main([*flags, "--classes", "star"])
    monkeypatch.setattr(dataset.Shapes, "classes", ["dog"])
    with pytest.raises(SystemExit, match="of the run.s classes"):
        sample.main(flags)
