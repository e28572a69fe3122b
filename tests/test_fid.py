"""fid.py: the measures against literals, closed forms and reference numbers; every kind of input end to end; every error as one line.

`golden_data/fid.npz` holds what torch-fidelity and pytorch-fid compute for the features and logits stored with it,
`golden_data/inception.npz` what their Inception does under the weights of golden.py.
"""
import functools
import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import backbone
import fid
import golden
import sample
import tokenizers

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = np.load(golden.FOLDER / "fid.npz")


def moments(x):
    return np.mean(x, 0, dtype=np.float64), np.cov(x, rowvar=False)


def two(found):
    """The numbers of a score or of a kernel distance, without its settings."""
    return found["mean"], found["deviation"]


# the Frechet distance

def test_frechet_distance_of_two_normals_on_a_line():
    """In one dimension it is (mu1 - mu2)^2 + (s1 - s2)^2 with the DEVIATIONS s: here 2^2 + (2 - 3)^2."""
    assert fid.frechet_distance([1], [[4]], [3], [[9]]) == pytest.approx(5, abs=1e-12)


def test_frechet_distance_golden():
    """The number torch-fidelity gives for these statistics, and for those of the stored features."""
    given = fid.frechet_distance(*(GOLDEN[k] for k in ("mu1", "sigma1", "mu2", "sigma2")))
    assert given == pytest.approx(float(GOLDEN["fid_torch_fidelity"]), rel=1e-6)
    computed = fid.frechet_distance(*moments(GOLDEN["feat1"]), *moments(GOLDEN["feat2"]))
    assert computed == pytest.approx(float(GOLDEN["fid_pytorch_fid"]), rel=1e-6)


def test_frechet_distance_of_singular_covariances_golden():
    """Fewer rows than features: the trace term must not take the root of a rounding error below zero."""
    found = fid.frechet_distance(*moments(GOLDEN["feat3"]), *moments(GOLDEN["feat4"]))
    assert found == pytest.approx(float(GOLDEN["fid_torch_fidelity_deficient"]), rel=1e-6)


def test_frechet_distance_of_unequal_rotated_covariances():
    """Against SciPy's sqrtm, with covariances that do not commute: the order of the product and the root both show."""
    random = np.random.RandomState(0)
    turn = lambda: np.linalg.qr(random.randn(6, 6))[0]
    (q1, q2), mu1, mu2 = (turn(), turn()), random.randn(6), random.randn(6)
    s1, s2 = q1 @ np.diag([9, 4, 1, .5, .1, .01]) @ q1.T, q2 @ np.diag([.2, 7, 3, .05, 2, 1]) @ q2.T
    expected = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(mu2, s2, mu1, s1) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_refuses_what_does_not_fit():
    one, two = (np.zeros(1), np.eye(1)), (np.zeros(2), np.eye(2))
    for bad in ((*one, *two), (*two, two[0], one[1]), (two[1], two[0], *two), (*two, np.zeros(2), np.full((2, 2), np.nan))):
        with pytest.raises(ValueError):
            fid.frechet_distance(*bad)


# statistics

def merged(batches):
    """Mean and covariance of batches that come one after the other."""
    n, mean, scatter = functools.reduce(fid.merge, map(fid.moments, batches))
    return n, mean, scatter / (n - 1)


@pytest.mark.parametrize("cuts", [[], [1], [3, 4, 250], list(range(7, 500, 7))], ids=["one", "two", "uneven", "many"])
def test_statistics_do_not_depend_on_the_batches(cuts):
    """Mean and covariance (n - 1) of NumPy, however the rows arrive and in whatever order the batches come."""
    x = np.float64(GOLDEN["feat1"]) * np.arange(1, 33) + 1000
    before = x.copy()
    for batches in (np.split(x, cuts), np.split(x, cuts)[::-1]):
        n, mean, covariance = merged(batches)
        assert n == 500 and (x == before).all()
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


def test_statistics_survive_a_large_mean():
    """sum(x^2) - n mean^2 loses all digits here: the sums must be centred, and in float64."""
    x = np.random.RandomState(0).randn(1000, 3) + [1e8, -1e8, 0]
    np.testing.assert_allclose(merged(np.split(x, 10))[2], np.cov(x, rowvar=False), atol=1e-6)
    x = np.float32(np.random.RandomState(0).randn(1000, 3) + 1000)
    np.testing.assert_allclose(merged(np.split(x, 10))[2], np.cov(np.float64(x), rowvar=False), rtol=1e-9)


def test_statistics_of_parts_merge_to_those_of_the_whole():
    """Parts of unequal sizes and means, empty ones on either side; merging leaves the parts as they are."""
    x, nothing = np.float64(GOLDEN["feat1"]) + np.arange(500)[:, None], (0, np.zeros(32), np.zeros((32, 32)))
    parts = [nothing, nothing, fid.moments(x[:30]), fid.moments(x[30:31]), fid.moments(x[31:]), nothing]
    before = [a.copy() for part in parts for a in part[1:]]
    n, mean, scatter = functools.reduce(fid.merge, parts)
    assert n == 500 and all((a == b).all() for a, b in zip(before, (a for part in parts for a in part[1:]), strict=True))
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scatter / 499, np.cov(x, rowvar=False), rtol=1e-9)


# the kernel distance

def test_kernel_distance_golden():
    """torch-fidelity's KID, with random subsets and with all rows, where only the unbiased estimate counts."""
    a, b = GOLDEN["feat1"], GOLDEN["feat2"]
    assert two(fid.kernel_distance(a, b, 10, 200)) == pytest.approx(tuple(GOLDEN["kid_poly3_10x200_seed2020"]), rel=1e-5)
    assert two(fid.kernel_distance(a, b, 1, 500)) == pytest.approx(tuple(GOLDEN["kid_poly3_1x500"]), rel=1e-5, abs=1e-9)


def test_kernel_distance_by_hand():
    """Rows 0, 1 against 1, 2 in one dimension: k = (x y + 1)^3; the self terms leave out i = j, the cross term keeps all."""
    expected = 1 + 27 - 2 * (1 + 1 + 8 + 27) / 4
    assert two(fid.kernel_distance(np.array([[0], [1]]), np.array([[1], [2]]), 3, 2)) == pytest.approx((expected, 0))


def test_kernel_distance_draws_by_its_seed_and_refuses_too_large_subsets():
    a, b = GOLDEN["feat1"], GOLDEN["feat2"]
    default, same, other = (fid.kernel_distance(a, b, 2, 50, *seed) for seed in ((), (2020,), (1,)))
    assert two(default) == two(same) != two(other)
    for size in (501, 1):
        with pytest.raises(ValueError):
            fid.kernel_distance(a, b, 2, size)


# the inception score

@pytest.mark.parametrize("key, splits, shuffle", [("isc_splits10_noshuffle", 10, None), ("isc_splits10_shuffle2020", 10, 2020),
                                                  ("isc_splits1", 1, None), ("isc_splits7_noshuffle", 7, None)])
def test_inception_score_golden(key, splits, shuffle):
    assert two(fid.inception_score(GOLDEN["isc_logits"], splits, shuffle)) == pytest.approx(tuple(GOLDEN[key]), rel=1e-9, abs=1e-9)


def test_inception_score_shuffles_by_default():
    assert two(fid.inception_score(GOLDEN["isc_logits"])) == pytest.approx(tuple(GOLDEN["isc_splits10_shuffle2020"]), rel=1e-9)


def test_inception_score_counts_certain_and_balanced_classes():
    """K classes, each certain and equally frequent, score K, even if one more never occurs and underflows; undecided ones score 1."""
    assert two(fid.inception_score(np.tile(5000 * np.eye(4, 5), (10, 1)), 1)) == pytest.approx((4, 0))
    assert two(fid.inception_score(np.zeros((20, 4)), 2)) == pytest.approx((1, 0))
    with pytest.raises(ValueError):
        fid.inception_score(np.zeros((9, 4)), 10)


# Inception

@pytest.fixture(scope="module")
def inception():
    return golden.fill(fid.Inception()).requires_grad_(False)


def blocks_and_noise(seed, S):
    """The pictures of inception.npz, uint8 (2, 3, S, S)."""
    random = np.random.RandomState(seed)
    blocks, noise = random.randint(0, 256, (2, 3, 8, 8)), random.randint(0, 256, (2, 3, S, S))
    return torch.tensor(np.uint8((3 * blocks.repeat(S // 8, 2).repeat(S // 8, 3) + noise) // 4))


def watched(model, resize, images):
    """Run the model -> name of a layer: its output; input: the prepared pictures; features and logits."""
    seen, model.resize = {}, resize
    hooks = [model.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, given: seen.update(input=given[0]))]
    for name in ("pool1", "pool2", "Mixed_6e"):
        hooks.append(model.get_submodule(name).register_forward_hook(lambda _, given, out, name=name: seen.update({name: out.mean((2, 3))})))
    seen["features"], seen["logits"] = model(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_inception_golden(inception):
    """Both programs' pictures after resizing, features at four depths and logits, for small and large pictures: every array of the file."""
    expected, found = golden.load("inception"), {}
    for S in (64, 256):
        found[f"image{S}_seed"] = expected[f"image{S}_seed"]
        images = blocks_and_noise(int(found[f"image{S}_seed"]), S)
        before = images.clone()
        found |= {f"image{S}_corner": images[..., :4, :4], f"image{S}_sum": images.long().sum((1, 2, 3))}
        tf, pf = (watched(inception, resize, images) for resize in ("torch-fidelity", "pytorch-fid"))
        x, y = tf["input"] * 128 + 128, (pf["input"] + 1) / 2
        found |= {f"resized{S}_mean": x.double().mean((2, 3)), f"resized{S}_std": x.double().flatten(2).std(2),
                  f"resized{S}_corner_top_left": x[..., :8, :8], f"resized{S}_corner_bottom_right": x[..., -8:, -8:],
                  f"tf_64_{S}": tf["pool1"], f"tf_192_{S}": tf["pool2"], f"tf_768_{S}": tf["Mixed_6e"], f"tf_2048_{S}": tf["features"],
                  f"tf_logits_unbiased_{S}": tf["logits"], f"tf_logits_{S}": inception.fc(tf["features"]),
                  f"pf_resized{S}_corner_top_left": y[..., :8, :8], f"pf_768_{S}": pf["Mixed_6e"], f"pf_2048_{S}": pf["features"]}
        assert (images == before).all()
    assert set(found) == set(expected)
    for key, value in expected.items():
        if value.is_floating_point():
            assert golden.difference(found[key], value) < 1e-5, key
        else:
            assert (found[key] == value).all(), key


def test_tf1_resize_by_hand(inception):
    """Two columns to 299 without half a pixel's offset: column j lies at 2 j / 299, clamped to the last; rows are another axis."""
    at = (2 * torch.arange(299) / 299).clamp(max=1)
    images = torch.tensor([[0, 100], [10, 110]], dtype=torch.uint8).expand(1, 3, 2, 2)
    expected = (100 * at[None, :] + 10 * at[:, None] - 128) / 128
    torch.testing.assert_close(watched(inception, "torch-fidelity", images)["input"][0, 1], expected, atol=1e-5, rtol=0)


def test_shrinking_does_not_smooth(inception):
    """From twice the size both programs look at neighbours only: torch-fidelity at every second pixel, pytorch-fid at the mean of 2 x 2."""
    images = torch.randint(0, 256, (1, 3, 598, 598), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tf, pf = (watched(inception, resize, images)["input"] for resize in ("torch-fidelity", "pytorch-fid"))
    assert torch.equal(tf, (images[..., ::2, ::2] - 128.0) / 128)
    torch.testing.assert_close(pf, torch.nn.functional.avg_pool2d(images / 255.0, 2) * 2 - 1, atol=1e-5, rtol=0)


def small_file(path, layout):
    """A file of that layout, {key: shape}, that takes little room: every entry repeats one number."""
    torch.save({key: torch.ones(()).expand(shape) for key, shape in layout.items()}, path)
    return path


def options(**more):
    return SimpleNamespace(**dict(resize="torch-fidelity", device="cpu") | more)


@pytest.mark.parametrize("name", ["inception_fid", "inception_torch_fidelity", "inception_released_file"])
def test_inception_loads_the_official_layouts(tmp_path, name):
    """With and without num_batches_tracked; every other parameter of the model comes from the file."""
    layout = golden.layout(name, "layouts")
    model = fid.load_extractor(small_file(tmp_path / "w.pth", layout), options(), 299)
    assert {k: list(v.shape) for k, v in model.state_dict().items() if k in layout} == layout
    assert all((v == 1).all() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked"))
    assert set(golden.layout("inception_fid", "layouts")) == set(model.state_dict()) and not model.training


def test_other_files_than_inception_are_refused_in_one_line(tmp_path):
    layout = golden.layout("inception_released_file", "layouts")
    cut = {k: v for k, v in layout.items() if k != "Mixed_7c.branch_pool.bn.bias"}
    torchvision = layout | {"fc.weight": [1000, 2048], "fc.bias": [1000], "AuxLogits.fc.bias": [1000]}
    (tmp_path / "text.pth").write_text("no weights")
    for path, line in ((small_file(tmp_path / "cut.pth", cut), "cut.pth.*missing Mixed_7c.branch_pool.bn.bias"),
                       (small_file(tmp_path / "tv.pth", torchvision), r"unexpected AuxLogits.fc.bias; fc.weight is \(1000, 2048\), expected \(1008, 2048\)"),
                       (small_file(tmp_path / "other.pth", {"conv1.weight": [64, 3, 7, 7]}), "other.pth: .*unexpected conv1.weight"),
                       (tmp_path / "text.pth", "text.pth: expected .*no PyTorch file"), (tmp_path / "none.pth", "none.pth: no such file")):
        with pytest.raises(SystemExit, match=line) as error:
            fid.load_extractor(path, options(), 299)
        assert "\n" not in str(error.value)


def test_only_the_released_file_gives_fid(tmp_path, monkeypatch):
    """Its hash makes a distance FID, with either program's resize, which the name of the extractor tells."""
    path = small_file(tmp_path / "w.pth", golden.layout("inception_released_file", "layouts"))
    metric = lambda resize: fid.load_extractor(path, options(resize=resize), 299).metric
    assert "not FID" in metric("torch-fidelity") and hashlib.sha256(path.read_bytes()).hexdigest()[:16] in metric("torch-fidelity")
    monkeypatch.setattr(fid, "HASH", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    assert metric("torch-fidelity") == metric("pytorch-fid") == "FID"


def test_released_weights_are_fetched_once_and_checked(tmp_path, monkeypatch):
    """To torch.hub's folder, by the hash in the name; without network one line says what to put where."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    calls, path = [], tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    def fetch(url, file, hash_prefix):
        calls.append((url.rsplit("/", 1)[-1], hash_prefix))
        Path(file).write_text("weights")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert fid.released_weights() == fid.released_weights() == path and calls == [(path.name, "6726825d")]
    path.unlink()
    for error in (urllib.error.URLError("no route"), RuntimeError("invalid hash value")):
        def fail(url, file, hash_prefix):
            raise error
        monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
        with pytest.raises(SystemExit, match=f"{path}: no such file, and https://.*(no route|invalid hash).*--features") as found:
            fid.released_weights()
        assert "\n" not in str(found.value)


# a world of small pictures, classifier and run

SIZE = 8
MAR = dict(N=16, d_c=4, d_d=4, classes=3, D=16, depth=1, heads=2, K=2, head_depth=1, head_width=16, dropout=0.0)
MODELS = dict(vae=dict(width=32, mult=(1, 2), blocks=1, z=4, groups=4), vq=dict(width=32, mult=(1, 2), blocks=1, bits=4, groups=4),
              prior=dict(N=16, bits=4, classes=3, D=16, depth=1, heads=2, mlp=32), mixar=MAR)


def blobs(n, seed=0, size=SIZE):
    """uint8 (n, size, size, 3): picture i has mostly the colour channel i mod 3."""
    pictures = np.random.RandomState(seed).randint(0, 120, (n, size, size, 3))
    pictures[np.arange(n), :, :, np.arange(n) % 3] += 130
    return np.uint8(pictures)


def write_pngs(pictures, folder, name="{0:04d}.png"):
    for i, picture in enumerate(pictures):
        path = folder / name.format(i, "abc"[i % 3])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Class folders with and without val, idx files, an npz, an untrained classifier (`features`), and an untrained run."""
    root = tmp_path_factory.mktemp("fid")
    write_pngs(blobs(60), root / "colours" / "train", "{1}/{0}.png")
    write_pngs(blobs(200, 1), root / "colours" / "val", "{1}/{0}.png")
    write_pngs(blobs(200, 1), root / "unsplit", "{1}/{0}.png")
    write_pngs(blobs(200, 1), root / "flat")
    np.savez(root / "samples.npz", arr_0=blobs(200, 1))
    (root / "idx").mkdir()
    for prefix, n in (("train", 50), ("t10k", 160)):
        for what, data in (("images-idx3", blobs(n)[..., 0]), ("labels-idx1", np.uint8(np.arange(n) % 3))):
            header = bytes([0, 0, 8, data.ndim]) + np.array(data.shape, ">u4").tobytes()
            (root / "idx" / f"{prefix}-{what}-ubyte.gz").write_bytes(gzip.compress(header + data.tobytes()))
    torch.manual_seed(0)
    model = fid.Classifier(3, SIZE)
    torch.save(dict(kind="classifier", config=dict(classes=3, size=SIZE), model=model.state_dict(), meta=dict(data="colours")), root / "features.pt")
    built = {kind: backbone.KINDS[kind](**config) for kind, config in MODELS.items()}
    for parameter in (p for model in built.values() for p in model.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)                  # else the head's zeros hide class and X_d
    settings = dict(ar_steps=2, diffusion_steps=3, cfg=1.0, cfg_schedule="linear", temperature=1.0, bound=5.0,
                    prior_steps=2, prior_cfg=0.0, prior_power=1.0, prior_temperature=1.0)
    meta = dict(shared="../colours", classes=list("abc"), data=str(root / "colours"), latent_mean=[0.0] * 4, latent_std=[1.0] * 4,
                files={k: (f"../colours/{k}", tokenizers.fingerprint(built[k])) for k in ("vae", "vq", "prior")}, sampling=settings)
    for kind, model in built.items():
        path = root / "runs" / ("colours-dcmix" if kind == "mixar" else f"colours/{kind}") / "last.pt"
        path.parent.mkdir(parents=True)
        torch.save(dict(kind=kind, config=MODELS[kind], step=7, meta=meta, ema=model.state_dict(),
                        model={k: -v for k, v in model.state_dict().items()}), path)
    return root


@pytest.fixture
def measured(world, tmp_path):
    """measured(A, B, flags...) -> the json report; names are those of the world, features its classifier."""
    def call(*args, features=True):
        args = [str(world / a) if (world / a).exists() else a for a in args]
        fid.main([*args, "--json", str(tmp_path / "report.json"), "--amp", "fp32", *(["--features", str(world / "features.pt")] if features else [])])
        return json.loads((tmp_path / "report.json").read_text())
    return call


RUN = "runs/colours-dcmix"


# every kind of input

@pytest.mark.parametrize("kind, what, split", [("folder", "flat", "all, nothing is held out"), ("data", "colours", "held out"), ("data", "unsplit", "all, nothing is held out")])
def test_the_same_pictures_from_another_place_are_at_distance_zero(measured, kind, what, split):
    """npz, flat folder, class folders with and without val hold the same 200 pictures; BatchNorm's features are far from those of others."""
    report = measured("samples.npz", what)
    assert (report["reference"]["kind"], report["reference"].get("split"), report["reference"]["count"]) == (kind, split, 200)
    assert report["results"][0]["count"] == 200 and report["results"][0]["frechet_distance"] < 1e-8
    assert report["results"][0]["classifier_score"]["mean"] == pytest.approx(report["reference"]["classifier_score"]["mean"], abs=0.05)


def test_other_pictures_are_at_a_distance(measured):
    assert measured("shapes", "flat", "--count", "150")["results"][0]["frechet_distance"] > 1e-3


def test_the_embedded_set_and_idx_files_give_their_held_out_pictures(measured):
    report = measured("shapes", "idx", "--count", "150")
    for side, count in ((report["results"][0], 150), (report["reference"], 160)):
        assert side["split"] == "held out" and side["count"] == count


def test_distance_and_score_are_those_of_the_features_of_all_pictures(world, measured):
    """The whole path against plain NumPy, with a batch size that does not divide the number of pictures."""
    report = measured("samples.npz", "idx", "--batch-size", "64")
    model, test = fid.load_extractor(world / "features.pt", options(), None), tokenizers.open_source(str(world / "idx"), "test", SIZE, None)
    a, b = blobs(200, 1).transpose(0, 3, 1, 2), np.stack([test.read(i) for i in range(160)])
    (fa, la), (fb, _) = (model(torch.tensor(np.ascontiguousarray(p))) for p in (a, b))
    assert report["results"][0]["frechet_distance"] == pytest.approx(fid.frechet_distance(*moments(fa.numpy()), *moments(fb.numpy())), rel=1e-5)
    score = report["results"][0]["classifier_score"]
    assert score == pytest.approx(fid.inception_score(la.numpy()), rel=1e-6)


def test_statistics_are_saved_and_read_back(world, measured, tmp_path):
    """Saved statistics stand for their pictures, and those of other features are refused."""
    file = tmp_path / "flat.npz"
    direct = measured("samples.npz", "idx", "--save-stats", str(file))["results"][0]["frechet_distance"]
    saved = np.load(file)
    assert saved["mu"].shape == (144,) and saved["sigma"].shape == (144, 144) and int(saved["n"]) == 200 and "classifier" in str(saved["extractor"])
    assert measured(str(file), "idx")["results"][0]["frechet_distance"] == pytest.approx(direct, rel=1e-9)
    assert measured("samples.npz", str(file))["results"][0]["frechet_distance"] < 1e-8
    np.savez(tmp_path / "foreign.npz", **{**saved, "extractor": "small classifier 0000 of elsewhere"})
    with pytest.raises(SystemExit, match="0000 of elsewhere"):
        measured("samples.npz", str(tmp_path / "foreign.npz"))
    np.savez(tmp_path / "plain.npz", mu=saved["mu"], sigma=saved["sigma"])
    assert measured("samples.npz", str(tmp_path / "plain.npz"))["reference"]["extractor"] == "not recorded"


def test_a_run_gives_the_pictures_of_sample_py(world, measured, tmp_path):
    """The same seed means the same pictures, at another batch size, and its settings are in the report; bf16 sampling leaves the features in fp32."""
    for amp in ("fp32", "bf16"):
        sample.main([str(world / RUN), "--count", "160", "--seed", "3", "--ar-steps", "3", "--amp", amp, "--out", str(tmp_path / f"{amp}.npz")])
        flags = ["--count", "160", "--seed", "3", "--ar-steps", "3", "--amp", amp, "--batch-size", "80" if amp == "bf16" else "47"]
        fid.main([str(world / RUN), str(tmp_path / f"{amp}.npz"), *flags, "--features", str(world / "features.pt"), "--json", str(tmp_path / "r.json")])
        found = json.loads((tmp_path / "r.json").read_text())["results"][0]
        assert found["frechet_distance"] < 1e-8
        assert found["settings"]["ar_steps"] == 3 and found["settings"]["diffusion_steps"] == 3
        assert (found["seed"], found["weights"], found["decode"], found["step"], found["count"]) == (3, "ema", "continuous", 7, 160)
    for flag, value in (("decode", "discrete"), ("weights", "raw")):
        other = measured(RUN, str(tmp_path / "fp32.npz"), "--count", "160", "--seed", "3", "--ar-steps", "3", f"--{flag}", value)["results"][0]
        assert other["frechet_distance"] > 1e-5 and other[flag] == value


def test_true_discrete_tokens_are_those_of_the_held_out_pictures(world, measured, tmp_path):
    """--truth: decoded alone they are the bit tokenizer's reconstructions; MixAR draws each with its picture's class, other pictures than from the prior's X_d."""
    reconstructed = measured(RUN, "--rfd", "--count", "200")["results"][2]
    alone = measured(RUN, "--truth", "--decode", "discrete", "--count", "200")["results"][0]
    assert alone["frechet_distance"] == pytest.approx(reconstructed["frechet_distance"], rel=1e-6) and alone["truth"]
    args = fid.parse([str(world / RUN), "--truth", "--amp", "fp32"])
    pictures, (draw,), _ = fid.open_pictures(args.pictures, 200, SIZE // 2, args, sample.open_run(args.pictures, args))   # features of smaller pictures
    system, source = sample.System(world / RUN, amp="fp32"), tokenizers.open_source(str(world / "colours"), "test", SIZE, 200)
    x_d = system.encode_discrete(np.stack([source.read(i) for i in range(200)]))
    expected = system.draw(0, range(200), torch.tensor(source.labels), x_d=x_d)
    assert np.array_equal(draw(*map(list, zip(*pictures))), expected.numpy())
    with pytest.raises(SystemExit, match="--count 201 with --truth: .*colours holds out 200 pictures"):
        measured(RUN, "--truth", "--count", "201")
    note = sample.open_run(args.pictures, args)
    few, (draw,), _ = fid.open_pictures(args.pictures, 20, SIZE, args, note)
    note.draw = lambda seed, numbers, y, decode, x_d: y
    assert len(set(draw(*map(list, zip(*few))).tolist())) > 2, "few pictures of class folders are of all classes"
    note.meta["classes"] = note.meta["classes"][::-1]
    with pytest.raises(SystemExit, match="the held-out pictures have the classes"):
        fid.open_pictures(args.pictures, 20, SIZE, args, note)
    note.meta["data"] = str(world / "colours" / "train")                     # pictures the run was trained with are none
    with pytest.raises(SystemExit, match="train holds out 0 pictures"):
        fid.open_pictures(args.pictures, 20, SIZE, args, note)


def test_a_run_is_compared_with_the_held_out_pictures_of_its_data_by_default(world, measured):
    report = measured(f"{RUN}/last.pt", "--count", "150")
    assert report["reference"]["source"] == str(world / "colours") and report["reference"]["split"] == "held out"


def test_samples_and_reconstructions_of_both_tokenizers_in_one_command(measured):
    report = measured(RUN, "--rfd", "--count", "160")
    assert [("vae" in r["source"], "vq" in r["source"], r["count"]) for r in report["results"]] == [(False, False, 160), (True, False, 200), (False, True, 200)]
    drawn, first, second = (r["frechet_distance"] for r in report["results"])
    assert first > 1e-4 and second > 1e-4 and len({drawn, first, second}) == 3
    assert drawn == measured(RUN, "--count", "160")["results"][0]["frechet_distance"]


def test_pictures_of_another_size_can_be_reconstructed(measured, tmp_path):
    """An npz of larger pictures is cropped to the size of the run before its tokenizers see it."""
    np.savez(tmp_path / "large.npz", arr_0=blobs(150, 2, 24))
    assert [r["count"] for r in measured(RUN, str(tmp_path / "large.npz"), "--rfd", "--count", "150")["results"]] == [150, 150, 150]


def test_kernel_distance_of_the_features_of_all_pictures(world, measured):
    report = measured("samples.npz", "idx", "--kid", "--batch-size", "64")["results"][0]
    model, test = fid.load_extractor(world / "features.pt", options(), None), tokenizers.open_source(str(world / "idx"), "test", SIZE, None)
    a, b = (model(torch.tensor(p))[0].numpy() for p in (np.ascontiguousarray(blobs(200, 1).transpose(0, 3, 1, 2)), np.stack([test.read(i) for i in range(160)])))
    found = report["kernel_distance"]
    assert (found["subsets"], found["size"], found["seed"]) == (100, 160, 2020)
    assert found == pytest.approx(fid.kernel_distance(a, b, 100, 160), rel=1e-4)
    assert "kernel_distance" not in measured("samples.npz", "idx")["results"][0]


# FID's own features, end to end

@pytest.fixture
def released(inception, tmp_path_factory, tmp_path, monkeypatch):
    """Weights that pass for the released file, in torch.hub's folder; and a distance that does not take seconds, the means' alone."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / Path(fid.URL).name
    path.parent.mkdir()
    torch.save({k: v for k, v in inception.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    monkeypatch.setattr(fid, "HASH", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    monkeypatch.setattr(fid, "frechet_distance", lambda mu1, s1, mu2, s2: float(np.square(mu1 - mu2).sum()))
    return path


def test_fid_of_a_run_and_a_reference_of_adm(world, inception, released, measured, tmp_path, capsys):
    """ADM's file holds pictures and Inception's statistics: these count. The run tells the size."""
    reference = tmp_path / "adm.npz"
    np.savez(reference, arr_0=blobs(200, 1), mu=np.ones(2048), sigma=np.eye(2048, dtype=np.float16), mu_s=np.zeros(2023), sigma_s=np.zeros(1))
    report = measured(RUN, str(reference), "--features", "inception", "--count", "11", "--force", features=False)
    sample.main([str(world / RUN), "--count", "11", "--amp", "fp32", "--out", str(tmp_path / "s.npz")])
    inception.resize = "torch-fidelity"
    features, logits = inception(torch.tensor(np.load(tmp_path / "s.npz")["arr_0"]).permute(0, 3, 1, 2))
    assert report["results"][0]["frechet_distance"] == pytest.approx(np.square(features.numpy().mean(0) - 1).sum(), rel=1e-4)
    assert report["results"][0]["inception_score"]["mean"] == pytest.approx(fid.inception_score(logits)["mean"], rel=1e-4)
    assert report["metric"] == "FID" and report["extractor"]["file"] == str(released) and report["extractor"]["size"] == SIZE
    line = capsys.readouterr().out.splitlines()[0]
    assert "FID to" in line and "; inception score " in line and "not FID" not in line


def test_inception_takes_cropped_pictures(inception, released, measured, tmp_path):
    """Cropped to --size, needed where no run tells it; kernel distance and either resize are in the report."""
    large = blobs(3, 2, 24)[:, :16]
    np.savez(tmp_path / "large.npz", arr_0=large)
    inception.resize = "pytorch-fid"
    flags = ["--features", str(released), "--resize", "pytorch-fid", "--kid", "--force", "--save-stats", str(tmp_path / "s.npz")]
    report = measured(str(tmp_path / "large.npz"), str(tmp_path / "large.npz"), *flags, "--size", "8", features=False)
    expected = np.stack([np.asarray(tokenizers.center_crop(Image.fromarray(p), 8)) for p in large])
    found = inception(torch.tensor(expected).permute(0, 3, 1, 2))[0].numpy().mean(0)
    np.testing.assert_allclose(np.load(tmp_path / "s.npz")["mu"], found, rtol=1e-4, atol=1e-5)
    assert report["metric"] == "FID" and report["extractor"]["name"].endswith("resize of pytorch-fid") and report["results"][0]["kernel_distance"]["size"] == 3
    with pytest.raises(SystemExit, match="without a run need --size"):
        measured(str(tmp_path / "large.npz"), str(tmp_path / "large.npz"), *flags, features=False)


# several processes

def test_processes_share_all_pictures_between_them(world, monkeypatch):
    """Every kind of source: process r of 3 gives pictures r, r + 3, ... of the 20 wanted, and none is drawn or missed twice."""
    args = fid.parse([str(world / RUN), "--amp", "fp32"])
    run = sample.open_run(args.pictures, args)
    for what in (world / RUN, world / "samples.npz", world / "flat", world / "colours", world / "unsplit", world / "idx", "shapes"):
        def share(rank, ranks):
            monkeypatch.setattr(fid, "world", lambda: (rank, ranks))
            pictures, draw, _ = fid.open_pictures(str(what), 20, SIZE, args, run if what == world / RUN else None)
            numbers, pictures = map(list, zip(*pictures))
            assert numbers == list(range(rank, 20, ranks))
            return draw[0](numbers, pictures) if draw else pictures
        whole, parts = share(0, 1), [share(r, 3) for r in range(3)]
        for i, picture in enumerate(whole):
            assert abs(np.int16(picture) - parts[i % 3][i // 3]).max() <= (1 if "runs" in str(what) else 0), (what, i)


def test_torchrun_with_two_processes_measures_the_same(world, measured, tmp_path):
    """Samples, reconstructions, kernel distance, scores and a picture that cannot be read: only rounding depends on the number of processes."""
    folder = write_pngs(blobs(152, 1), tmp_path / "some")
    (folder / "0003.png").write_text("no picture")
    args = [str(world / RUN), str(folder), "--rfd", "--kid", "--count", "149", "--batch-size", "40"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port()}", "fid.py", *args, "--amp", "fp32",
               "--features", str(world / "features.pt"), "--json", str(tmp_path / "two.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped 1 unreadable") == 3 and done.stdout.count("not FID") == 3
    one, two = measured(*args), json.loads((tmp_path / "two.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2) and one["reference"]["count"] == two["reference"]["count"] == 151
    for a, b in zip(one["results"], two["results"], strict=True):
        assert a["count"] == b["count"] and a["to"] == b["to"] and a["skipped"] == b["skipped"]
        assert a["frechet_distance"] == pytest.approx(b["frechet_distance"], rel=1e-4)
        for key in ("classifier_score", "kernel_distance"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-7)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_reconstruction_feeds_each_tokenizer_its_own_range():
    """The VAE works in [-1, 1] on posterior means, the bit tokenizer in [0, 1] on signs: ideal ones return the picture, and its bits."""
    same = SimpleNamespace(encode=lambda x: (x, torch.zeros_like(x)), decode=lambda z: z)
    signs = SimpleNamespace(encode=lambda x: x - 0.25, decode=lambda bits: (bits + 1) / 2)
    system = sample.System.__new__(sample.System)
    vars(system).update(vae=same, vq=signs, size=SIZE, device=torch.device("cpu"))
    pictures = list(blobs(5).transpose(0, 3, 1, 2))
    assert (fid.reconstruct(system, "vae", None, pictures) == np.stack(pictures)).all()
    assert (fid.reconstruct(system, "vq", None, pictures) == np.where(np.stack(pictures) / 255 > 0.25, 255, 0)).all()


def test_pictures_of_other_sizes_are_cropped_as_data_sets_are(measured, tmp_path):
    large = blobs(150, 2, 24)
    np.savez(tmp_path / "large.npz", arr_0=large[:, :16])
    write_pngs(large[:, :16], tmp_path / "large")
    report = measured(str(tmp_path / "large.npz"), str(tmp_path / "large"))
    assert report["results"][0]["frechet_distance"] < 1e-8
    expected = np.asarray(tokenizers.center_crop(Image.fromarray(large[0, :16]), SIZE)).transpose(2, 0, 1)
    assert (fid.to_size([large[0, :16].transpose(2, 0, 1), expected], SIZE).numpy() == expected).all()


# the report

def test_numbers_never_travel_alone(world, measured, capsys):
    """The report says what, against what, measured by what; classifier features are never called FID."""
    report = measured("samples.npz", "colours")
    digits = hashlib.sha256((world / "features.pt").read_bytes()).hexdigest()
    assert report["extractor"]["sha256"] == digits and digits[:16] in report["metric"] and report["extractor"]["width"] == 144
    assert report["metric"].startswith("Frechet distance (small classifier") and report["metric"].endswith("not FID)")
    assert {"seconds", "date", "device"} <= set(report) and report["results"][0]["classifier_score"]["splits"] == 10
    line = capsys.readouterr().out.strip()
    assert "\n" not in line and "not FID" in line and "classifier score" in line and line.count("(200)") == 2


def test_unreadable_pictures_are_counted_named_and_left_out(measured, tmp_path, capsys):
    folder = write_pngs(blobs(150, 1), tmp_path / "some")
    (folder / "0000.png").write_bytes((folder / "0000.png").read_bytes()[:60])
    (folder / "0001.jpg").write_text("no picture")
    result = measured(str(folder), "idx")["results"][0]
    assert result["count"] == 149 and len(result["skipped"]) == 2 and "0000.png" in result["skipped"][0]
    assert "skipped 2 unreadable" in capsys.readouterr().out


# the classifier

def test_the_classifier_is_trained_once_beside_the_shared_models(world, measured, monkeypatch):
    """It learns three colours in 30 steps, twice alike, lies in RUNS/DATA/ and is used from there; another data set of that name is refused."""
    monkeypatch.setattr(fid, "train_classifier", functools.partial(fid.train_classifier, steps=30, B=30))
    path = world / "runs" / "colours" / "classifier.pt"
    first = measured(RUN, "flat", "--count", "150", features=False)["extractor"]
    assert first["held_out_accuracy"] == 1 and first["pictures"] == 54 and first["file"].endswith("colours/classifier.pt")
    path.unlink()
    second = measured(RUN, "flat", "--count", "150", features=False)["extractor"]
    assert second["sha256"] == first["sha256"]
    before = path.stat().st_mtime_ns
    measured(RUN, "flat", "--count", "150", features=False)
    assert path.stat().st_mtime_ns == before
    saved = torch.load(path, weights_only=True)
    torch.save(saved | dict(meta=saved["meta"] | dict(data="elsewhere")), path)
    with pytest.raises(SystemExit, match="is the classifier of elsewhere"):
        measured(RUN, "flat", features=False)


# errors are one line

def bad(world, folder):
    """name -> (arguments, what the line must say)"""
    np.savez(folder / "other.npz", pictures=blobs(3))
    np.savez(folder / "float.npz", arr_0=np.zeros((3, 4, 4, 3)))
    np.savez(folder / "fortran.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8, order="F"))
    np.savez(folder / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "nan.npz", mu=np.full(144, np.nan), sigma=np.eye(144))
    (folder / "cut.npz").write_bytes((world / "samples.npz").read_bytes()[:20000])
    whole = (world / "samples.npz").read_bytes()
    (folder / "flipped.npz").write_bytes(whole[:30000] + bytes([whole[30000] ^ 255]) + whole[30001:])
    (folder / "text.npz").write_text("no npz file")
    (folder / "empty").mkdir()
    return {"no such path": (["nowhere", "flat"], "nowhere: no such run"),
            "npz without arr_0 or mu": ([f"{folder}/other.npz", "flat"], "other.npz: expected an npz file with arr_0"),
            "npz of floats": ([f"{folder}/float.npz", "flat"], "float64.*expected uint8"),
            "npz in Fortran's order": ([f"{folder}/fortran.npz", "flat"], "in the order of Fortran"),
            "statistics into a folder": (["samples.npz", "flat", "--save-stats", str(folder)], "is a folder; name a file"),
            "npz cut short": ([f"{folder}/cut.npz", "flat"], "cut.npz: expected an npz file"),
            "npz with a flipped byte": ([f"{folder}/flipped.npz", "flat"], "flipped.npz: expected an npz file"),
            "npz that is text": ([f"{folder}/text.npz", "flat"], "text.npz: expected an npz file"),
            "other widths": (["samples.npz", f"{folder}/wide.npz"], r"\(144,\) and \(2048,\)"),
            "not finite": (["samples.npz", f"{folder}/nan.npz"], "not finite"),
            "too few": (["samples.npz", "flat", "--count", "144"], "samples.npz: 144 pictures are too few.*--force"),
            "no pictures": ([f"{folder}/empty", "flat"], "empty: no pictures in this folder"),
            "checkpoint of another kind": ([str(world / "runs/colours/vae/last.pt"), "flat"], "expected a mixar checkpoint, found vae"),
            "features of another kind": (["samples.npz", "flat", "--features", str(world / RUN / "last.pt")], "expected a classifier checkpoint, found mixar"),
            "no features for KID": (["samples.npz", f"{folder}/wide.npz", "--kid"], "--kid compares single pictures of A and of B, not statistics; A is .*samples.npz, B .*wide.npz"),
            "no run for --truth": (["flat", "flat", "--truth"], "--truth takes X_d from the data set of a run, and .*flat names none"),
            "no run to reconstruct by": (["flat", "flat", "--rfd"], "--rfd reconstructs pictures of B, not statistics, by the tokenizers of a run A; A is .*flat, B .*flat"),
            "nothing to reconstruct": ([str(world / RUN), f"{folder}/wide.npz", "--rfd"], "--rfd reconstructs pictures of B, not statistics"),
            "nothing to be near to": (["samples.npz", "--kid"], "--kid compares single pictures of A and of B, not statistics; A is .*samples.npz, B None")}


def test_errors_are_one_line(world, measured, tmp_path):
    for name, (args, line) in bad(world, tmp_path).items():
        with pytest.raises(SystemExit, match=line) as error:
            measured(*args, features="--features" not in args)
        assert "\n" not in str(error.value), name
    with pytest.raises(SystemExit, match="is a folder; name a file"):
        fid.main(["shapes", "--json", str(tmp_path)])


def test_without_a_data_set_the_classifier_must_be_named(measured):
    with pytest.raises(SystemExit, match="nothing tells the data set .*--features"):
        measured("flat", "samples.npz", features=False)


def test_too_few_pictures_can_be_forced(measured):
    assert measured("samples.npz", "flat", "--count", "20", "--force")["results"][0]["count"] == 20
