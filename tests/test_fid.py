"""fid.py: its measures, its networks, every kind of input from end to end, and its errors.

The measures are tested against literals, closed forms and reference numbers.
`golden_data/fid.npz` holds what torch-fidelity and pytorch-fid compute from the features and logits
stored with it, `golden_data/inception.npz` what their Inception does with the weights of golden.py.
"""
import functools
import gzip
import hashlib
import json
import shutil
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import backbone
import dataset
import disk
import features
import fid
import golden
import sample
import train

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = np.load(golden.FOLDER / "fid.npz")


def moments(x):
    return np.mean(x, 0, dtype=np.float64), np.cov(x, rowvar=False)


def numbers_of(score):
    """Mean and deviation of an inception score, without its settings."""
    return score["mean"], score["deviation"]


# the Frechet distance

def test_frechet_distance_of_two_normals_on_a_line():
    """In one dimension it is (mu1 - mu2)^2 + (s1 - s2)^2. Here it is 2^2 + (2 - 3)^2.

    s1 and s2 are the standard DEVIATIONS.
    """
    assert fid.frechet_distance([1], [[4]], [3], [[9]]) == pytest.approx(5, abs=1e-12)


def test_frechet_distance_golden():
    """It is torch-fidelity's number for these statistics, and for those of the stored features."""
    given = [GOLDEN[key] for key in ("mu1", "sigma1", "mu2", "sigma2")]
    expected = float(GOLDEN["fid_torch_fidelity"])
    assert fid.frechet_distance(*given) == pytest.approx(expected, rel=1e-6)
    computed = fid.frechet_distance(*moments(GOLDEN["feat1"]), *moments(GOLDEN["feat2"]))
    assert computed == pytest.approx(float(GOLDEN["fid_pytorch_fid"]), rel=1e-6)


def test_frechet_distance_of_singular_covariances_golden():
    """With fewer rows than features, a rounding error below zero must not reach the root."""
    found = fid.frechet_distance(*moments(GOLDEN["feat3"]), *moments(GOLDEN["feat4"]))
    assert found == pytest.approx(float(GOLDEN["fid_torch_fidelity_deficient"]), rel=1e-6)


def test_frechet_distance_of_unequal_rotated_covariances():
    """It agrees with SciPy's sqrtm for covariances that do not commute.

    For such covariances a wrong order of the product or of the root shows.
    """
    rng = np.random.RandomState(0)
    q1 = np.linalg.qr(rng.randn(6, 6))[0]
    q2 = np.linalg.qr(rng.randn(6, 6))[0]
    mu1 = rng.randn(6)
    mu2 = rng.randn(6)
    s1 = q1 @ np.diag([9, 4, 1, .5, .1, .01]) @ q1.T
    s2 = q2 @ np.diag([.2, 7, 3, .05, 2, 1]) @ q2.T
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * root)
    assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(mu2, s2, mu1, s1) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_refuses_what_does_not_fit():
    one = (np.zeros(1), np.eye(1))
    two = (np.zeros(2), np.eye(2))
    for bad in (
        (*one, *two),
        (*two, two[0], one[1]),
        (two[1], two[0], *two),
    ):
        with pytest.raises(ValueError):
            fid.frechet_distance(*bad)


# the inception score

@pytest.mark.parametrize("key, splits, shuffle", [
    ("isc_splits10_noshuffle", 10, None),
    ("isc_splits10_shuffle2020", 10, 2020),
    ("isc_splits1", 1, None),
    ("isc_splits7_noshuffle", 7, None),
])
def test_inception_score_golden(key, splits, shuffle):
    found = numbers_of(fid.inception_score(GOLDEN["isc_logits"], splits, shuffle))
    assert found == pytest.approx(tuple(GOLDEN[key]), rel=1e-9, abs=1e-9)


def test_inception_score_shuffles_by_default():
    found = numbers_of(fid.inception_score(GOLDEN["isc_logits"]))
    assert found == pytest.approx(tuple(GOLDEN["isc_splits10_shuffle2020"]), rel=1e-9)


def test_inception_score_counts_certain_and_balanced_classes():
    """It is K for K classes, each certain and equally frequent, and 1 for undecided logits.

    A class that never occurs and underflows does not change it.
    """
    certain = np.tile(5000 * np.eye(4, 5), (10, 1))
    assert numbers_of(fid.inception_score(certain, 1)) == pytest.approx((4, 0))
    assert numbers_of(fid.inception_score(np.zeros((20, 4)), 2)) == pytest.approx((1, 0))
    with pytest.raises(ValueError):
        fid.inception_score(np.zeros((9, 4)), 10)


# Inception

@pytest.fixture(scope="module")
def inception():
    return golden.fill(features.Inception()).requires_grad_(False)


def blocks_and_noise(seed, S):
    """The pictures of inception.npz, uint8 (2, 3, S, S)."""
    rng = np.random.RandomState(seed)
    blocks = rng.randint(0, 256, (2, 3, 8, 8))
    noise = rng.randint(0, 256, (2, 3, S, S))
    return torch.tensor(np.uint8((3 * blocks.repeat(S // 8, 2).repeat(S // 8, 3) + noise) // 4))


def watched(model, resize, images):
    """What the model computes from images, by name.

    "input" is the prepared pictures. The output of a layer is its mean over the picture.
    """
    seen = {}
    model.resize = resize

    def see_input(_, given):
        seen["input"] = given[0]

    def see(name):
        def hook(_, given, out):
            seen[name] = out.mean((2, 3))
        return hook

    hooks = [model.Conv2d_1a_3x3.register_forward_pre_hook(see_input)]
    for name in ("pool1", "pool2", "Mixed_6e"):
        hooks.append(model.get_submodule(name).register_forward_hook(see(name)))
    seen["features"], seen["logits"] = model(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_inception_golden(inception):
    """Both programs' resized pictures, features at four depths and logits: the file's arrays."""
    expected = golden.load("inception")
    found = {}
    for S in (64, 256):
        found[f"image{S}_seed"] = expected[f"image{S}_seed"]
        images = blocks_and_noise(int(found[f"image{S}_seed"]), S)
        before = images.clone()
        found[f"image{S}_corner"] = images[..., :4, :4]
        found[f"image{S}_sum"] = images.long().sum((1, 2, 3))

        tf = watched(inception, "torch-fidelity", images)
        x = tf["input"] * 128 + 128
        found[f"resized{S}_mean"] = x.double().mean((2, 3))
        found[f"resized{S}_std"] = x.double().flatten(2).std(2)
        found[f"resized{S}_corner_top_left"] = x[..., :8, :8]
        found[f"resized{S}_corner_bottom_right"] = x[..., -8:, -8:]
        found[f"tf_64_{S}"] = tf["pool1"]
        found[f"tf_192_{S}"] = tf["pool2"]
        found[f"tf_768_{S}"] = tf["Mixed_6e"]
        found[f"tf_2048_{S}"] = tf["features"]
        found[f"tf_logits_unbiased_{S}"] = tf["logits"]
        found[f"tf_logits_{S}"] = inception.fc(tf["features"])

        pf = watched(inception, "pytorch-fid", images)
        found[f"pf_resized{S}_corner_top_left"] = ((pf["input"] + 1) / 2)[..., :8, :8]
        found[f"pf_768_{S}"] = pf["Mixed_6e"]
        found[f"pf_2048_{S}"] = pf["features"]
        assert (images == before).all()
    assert set(found) == set(expected)
    for key, value in expected.items():
        if value.is_floating_point():
            assert golden.difference(found[key], value) < 1e-5, key
        else:
            assert (found[key] == value).all(), key


def test_tf1_resize_by_hand(inception):
    """Two columns become 299 without an offset of half a pixel, and rows are another axis.

    Column j lies at 2 j / 299, or at the last column if that is beyond it.
    """
    at = (2 * torch.arange(299) / 299).clamp(max=1)
    images = torch.tensor([[0, 100], [10, 110]], dtype=torch.uint8).expand(1, 3, 2, 2)
    expected = (100 * at[None, :] + 10 * at[:, None] - 128) / 128
    found = watched(inception, "torch-fidelity", images)["input"][0, 1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_shrinking_does_not_smooth(inception):
    """From twice the size both programs look at direct neighbours only.

    torch-fidelity takes every second pixel, pytorch-fid the mean of 2 x 2.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 598, 598), dtype=torch.uint8, generator=generator)
    tf = watched(inception, "torch-fidelity", images)["input"]
    pf = watched(inception, "pytorch-fid", images)["input"]
    assert torch.equal(tf, (images[..., ::2, ::2] - 128.0) / 128)
    expected = torch.nn.functional.avg_pool2d(images / 255.0, 2) * 2 - 1
    torch.testing.assert_close(pf, expected, atol=1e-5, rtol=0)


def small_file(path, layout):
    """A file of that layout, {key: shape}. It is small because every entry repeats one number."""
    torch.save({key: torch.ones(()).expand(shape) for key, shape in layout.items()}, path)
    return path


@pytest.mark.parametrize(
    "name", ["inception_fid", "inception_torch_fidelity", "inception_released_file"]
)
def test_inception_loads_the_official_layouts(tmp_path, name):
    """Files with and without num_batches_tracked give the model all its other parameters."""
    layout = golden.layout(name, "layouts")
    path = small_file(tmp_path / "w.pth", layout)
    model = features.load_extractor(path, "torch-fidelity", 299, "cpu")
    state = model.state_dict()
    assert {k: list(v.shape) for k, v in state.items() if k in layout} == layout
    assert all((v == 1).all() for k, v in state.items() if not k.endswith("num_batches_tracked"))
    assert set(golden.layout("inception_fid", "layouts")) == set(state)
    assert not model.training


def test_other_files_than_inception_are_refused_in_one_line(tmp_path):
    layout = golden.layout("inception_released_file", "layouts")
    cut = {k: v for k, v in layout.items() if k != "Mixed_7c.branch_pool.bn.bias"}
    other_head = {"fc.weight": [1000, 2048], "fc.bias": [1000], "AuxLogits.fc.bias": [1000]}
    torchvision = layout | other_head
    (tmp_path / "text.pth").write_text("no weights")
    cases = [
        (small_file(tmp_path / "cut.pth", cut),
         "cut.pth: not a feature network: .*Missing.*Mixed_7c.branch_pool.bn.bias"),
        (small_file(tmp_path / "tv.pth", torchvision),
         r"Unexpected.*AuxLogits.fc.bias.*fc.weight.*\[1000, 2048\].*\[1008, 2048\]"),
        (small_file(tmp_path / "other.pth", {"conv1.weight": [64, 3, 7, 7]}),
         "other.pth: not a feature network: .*Missing key.* [.]{3}$"),
        (tmp_path / "text.pth", "text.pth: not a classifier checkpoint"),
        (tmp_path / "none.pth", "none.pth: no such file"),
    ]
    for path, line in cases:
        with pytest.raises(SystemExit, match=line) as error:
            features.load_extractor(path, "torch-fidelity", 299, "cpu")
        assert "\n" not in str(error.value)


def test_only_the_released_file_gives_fid(tmp_path, monkeypatch):
    """Its hash makes a distance FID, with either program's resize."""
    layout = golden.layout("inception_released_file", "layouts")
    path = small_file(tmp_path / "w.pth", layout)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()
    other = features.load_extractor(path, "torch-fidelity", 299, "cpu").metric
    assert "not FID" in other
    assert digits[:16] in other
    monkeypatch.setattr(features, "HASH", digits[:8])
    for resize in ("torch-fidelity", "pytorch-fid"):
        assert features.load_extractor(path, resize, 299, "cpu").metric == "FID"


def test_released_weights_are_fetched_once_and_checked(tmp_path, monkeypatch):
    """They go to torch.hub's folder and are checked by the hash in their name.

    Without network one line says what to put where.
    """
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    calls = []

    def fetch(url, file, hash_prefix):
        calls.append((url.rsplit("/", 1)[-1], hash_prefix))
        Path(file).write_text("weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert features.released_weights() == features.released_weights() == path
    assert calls == [(path.name, "6726825d")]
    path.unlink()
    for error in (urllib.error.URLError("no route"), RuntimeError("invalid hash value")):
        def fail(url, file, hash_prefix):
            raise error

        monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
        line = f"{path}: no such file, and https://.*(no route|invalid hash).*--features"
        with pytest.raises(SystemExit, match=line) as found:
            features.released_weights()
        assert "\n" not in str(found.value)


# a world of small pictures, a classifier and a run

SIZE = 8
VAE = dict(width=32, mult=(1, 2), blocks=1, z=4, groups=4)
VQ = dict(width=32, mult=(1, 2), blocks=1, bits=4, groups=4)
PRIOR = dict(N=16, bits=4, classes=3, D=16, depth=1, heads=2, mlp=32)
MAR = dict(
    N=16, d_c=4, d_d=4, classes=3, D=16, depth=1, heads=2, K=2,
    head_depth=1, head_width=16, dropout=0.0,
)
MODELS = dict(vae=VAE, vq=VQ, prior=PRIOR, mixar=MAR)
SETTINGS = dict(
    ar_steps=2, diffusion_steps=3, cfg=1.0, cfg_schedule="linear", temperature=1.0, bound=5.0,
    prior_steps=2, prior_cfg=0.0, prior_power=1.0, prior_temperature=1.0,
)
RUN = "runs/colours-dcmix"


def blobs(n, seed=0, size=SIZE):
    """uint8 (n, size, size, 3): picture i has mostly the colour channel i mod 3."""
    pictures = np.random.RandomState(seed).randint(0, 120, (n, size, size, 3))
    pictures[np.arange(n), :, :, np.arange(n) % 3] += 130
    return np.uint8(pictures)


def channels_first(pictures):
    """uint8 (n, H, W, 3) -> a tensor (n, 3, H, W)."""
    return torch.tensor(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


def write_pngs(pictures, folder, name="{0:04d}.png"):
    for i, picture in enumerate(pictures):
        path = folder / name.format(i, "abc"[i % 3])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return folder


def write_idx(folder):
    """A data set in the files of MNIST: 50 pictures to train, 160 held out."""
    folder.mkdir()
    for prefix, n in (("train", 50), ("t10k", 160)):
        arrays = {"images-idx3": blobs(n)[..., 0], "labels-idx1": np.uint8(np.arange(n) % 3)}
        for what, data in arrays.items():
            header = bytes([0, 0, 8, data.ndim]) + np.array(data.shape, ">u4").tobytes()
            content = gzip.compress(header + data.tobytes())
            (folder / f"{prefix}-{what}-ubyte.gz").write_bytes(content)


def write_run(root):
    """An untrained run of all four models. Its raw weights are the negative of the average."""
    models = {kind: backbone.KINDS[kind](**config) for kind, config in MODELS.items()}
    # New weights have zeros in the head, which would hide class and X_d.
    for model in models.values():
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    files = {}
    for kind in ("vae", "vq", "prior"):
        files[kind] = (f"../colours/{kind}", disk.fingerprint(models[kind]))
    meta = dict(shared="../colours", classes=list("abc"), data=str(root / "colours"), files=files,
                latent_mean=[0.0] * 4, latent_std=[1.0] * 4, sampling=SETTINGS)
    for kind, model in models.items():
        name = "colours-dcmix" if kind == "mixar" else f"colours/{kind}"
        path = root / "runs" / name / "last.pt"
        path.parent.mkdir(parents=True)
        ema = model.state_dict()
        raw = {key: -value for key, value in ema.items()}
        saved = dict(kind=kind, config=MODELS[kind], step=7, meta=meta, ema=ema, model=raw)
        torch.save(saved, path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with every kind of input, an untrained classifier and an untrained run."""
    root = tmp_path_factory.mktemp("fid")
    write_pngs(blobs(60), root / "colours" / "train", "{1}/{0}.png")
    write_pngs(blobs(200, 1), root / "colours" / "val", "{1}/{0}.png")
    write_pngs(blobs(200, 1), root / "unsplit", "{1}/{0}.png")
    write_pngs(blobs(200, 1), root / "flat")
    np.savez(root / "samples.npz", arr_0=blobs(200, 1))
    write_idx(root / "idx")
    torch.manual_seed(0)
    model = features.Classifier(3, SIZE).state_dict()
    config = dict(classes=3, size=SIZE)
    saved = dict(kind="classifier", config=config, model=model, meta=dict(data="colours"))
    torch.save(saved, root / "features.pt")
    write_run(root)
    return root


@pytest.fixture
def measured(world, tmp_path):
    """measured(A, B, flags...) gives the report.

    Names are those of the world, and the features are those of its classifier.
    """
    def call(*args, features=True):
        args = [str(world / a) if (world / a).exists() else a for a in args]
        if features:
            args += ["--features", str(world / "features.pt")]
        fid.main([*args, "--json", str(tmp_path / "report.json")])
        return json.loads((tmp_path / "report.json").read_text())
    return call


# every kind of input

@pytest.mark.parametrize("kind, what, split", [
    ("npz", "samples.npz", None),
    ("folder", "flat", "all, nothing is held out"),
    ("data", "colours", "held out"),
    ("data", "unsplit", "all, nothing is held out"),
])
def test_the_same_pictures_from_another_place_are_at_distance_zero(measured, kind, what, split):
    """An npz, a flat folder and class folders with and without val hold the same 200 pictures."""
    report = measured("samples.npz", what)
    result = report["results"][0]
    reference = report["reference"]
    assert (reference["kind"], reference.get("split"), reference["count"]) == (kind, split, 200)
    assert result["count"] == 200
    assert result["frechet_distance"] < 1e-8
    expected = reference["classifier_score"]["mean"]
    assert result["classifier_score"]["mean"] == pytest.approx(expected, abs=0.05)


def test_other_pictures_are_at_a_distance(measured):
    result = measured("shapes", "flat", "--count", "150")["results"][0]
    assert result["frechet_distance"] > 1e-3


def test_the_embedded_set_and_idx_files_give_their_held_out_pictures(measured):
    report = measured("shapes", "idx", "--count", "150")
    for side, count in ((report["results"][0], 150), (report["reference"], 160)):
        assert side["split"] == "held out"
        assert side["count"] == count


def test_distance_and_score_are_those_of_the_features_of_all_pictures(world, measured):
    """The whole path agrees with plain NumPy; the batch size does not divide the pictures."""
    result = measured("samples.npz", "idx", "--batch-size", "64")["results"][0]
    model = features.load_extractor(world / "features.pt", "torch-fidelity", None, "cpu")
    test = dataset.open_source(str(world / "idx"), "test", SIZE, None)
    ours, logits = model(channels_first(blobs(200, 1)))
    others, _ = model(torch.tensor(np.stack([test.read(i) for i in range(160)])))
    expected = fid.frechet_distance(*moments(ours.numpy()), *moments(others.numpy()))
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    score = fid.inception_score(logits.numpy())
    assert result["classifier_score"] == pytest.approx(score, rel=1e-6)


def test_too_few_pictures_are_refused_before_any_is_drawn(world, measured, monkeypatch):
    """A run takes minutes to sample: that 144 features need more than 100 is known before."""
    monkeypatch.setattr(sample.System, "sample", None)
    with pytest.raises(SystemExit, match="100 pictures are too few for a covariance of 144"):
        measured(RUN, "idx", "--count", "100")


def test_statistics_are_saved_and_read_back(measured, tmp_path):
    """Saved statistics stand for their pictures. Those of other features are refused."""
    file = tmp_path / "flat.npz"
    report = measured("samples.npz", "idx", "--save-stats", str(file))
    direct = report["results"][0]["frechet_distance"]
    saved = np.load(file)
    assert saved["mu"].shape == (144,)
    assert saved["sigma"].shape == (144, 144)
    assert int(saved["n"]) == 200
    assert "classifier" in str(saved["extractor"])
    again = measured(str(file), "idx")["results"][0]["frechet_distance"]
    assert again == pytest.approx(direct, rel=1e-9)
    assert measured("samples.npz", str(file))["results"][0]["frechet_distance"] < 1e-8

    foreign = {**saved, "extractor": "small classifier 0000 of elsewhere"}
    np.savez(tmp_path / "foreign.npz", **foreign)
    with pytest.raises(SystemExit, match="0000 of elsewhere"):
        measured("samples.npz", str(tmp_path / "foreign.npz"))
    # before the other pictures are measured
    with pytest.raises(SystemExit, match="to which --count does not apply"):
        measured(str(file), "nowhere.npz", "--count", "3")
    # the last one has a positive diagonal and the eigenvalue -1
    for number, wrong in enumerate([-saved["sigma"], np.triu(saved["sigma"]), 2 - np.eye(144)]):
        np.savez(tmp_path / f"wrong{number}.npz", mu=saved["mu"], sigma=wrong)
        words = f"wrong{number}.npz: not a .*, or sigma is not a covariance"
        with pytest.raises(SystemExit, match=words):
            measured("samples.npz", str(tmp_path / f"wrong{number}.npz"))
    np.savez(tmp_path / "plain.npz", mu=saved["mu"], sigma=saved["sigma"])
    report = measured("samples.npz", str(tmp_path / "plain.npz"))
    assert report["reference"]["extractor"] == "not recorded"


@pytest.mark.parametrize("amp, batch", [("fp32", "47"), ("bf16", "80")])
def test_a_run_gives_the_pictures_of_sample_py(world, measured, monkeypatch, tmp_path, amp, batch):
    """The same seed means the same pictures, in fp32 at another batch size.

    The report has the settings of the run. Sampling in bf16 leaves the features in fp32.
    """
    autocast = train.autocast
    monkeypatch.setattr(train, "autocast", lambda _, device: autocast(amp, device))
    pictures = str(tmp_path / "s.npz")
    sample.main([str(world / RUN), "--count", "160", "--seed", "3", "--out", pictures])
    flags = [RUN, pictures, "--count", "160", "--batch-size", batch]
    result = measured(*flags, "--seed", "3")["results"][0]
    assert result["frechet_distance"] < 1e-8
    assert result["settings"] == SETTINGS
    assert (result["seed"], result["step"], result["count"]) == (3, 7, 160)
    assert measured(*flags, "--seed", "4")["results"][0]["frechet_distance"] > 1e-5


def test_a_run_is_compared_with_the_held_out_pictures_of_its_data_by_default(world, measured):
    report = measured(f"{RUN}/last.pt", "--count", "150")
    assert report["reference"]["source"] == str(world / "colours")
    assert report["reference"]["split"] == "held out"


def test_samples_and_reconstructions_of_both_tokenizers_in_one_command(measured):
    samples, vae, vq = measured(RUN, "--rfd", "--count", "160")["results"]
    assert (samples["count"], vae["count"], vq["count"]) == (160, 200, 200)
    assert "reconstructed" not in samples["source"]
    assert "reconstructed by the vae" in vae["source"]
    assert "reconstructed by the vq" in vq["source"]
    distances = [result["frechet_distance"] for result in (samples, vae, vq)]
    assert min(distances[1:]) > 1e-4
    assert len(set(distances)) == 3
    alone = measured(RUN, "--count", "160")["results"][0]
    assert distances[0] == alone["frechet_distance"]


def test_pictures_of_another_size_can_be_reconstructed(measured, tmp_path):
    """An npz of larger pictures is cropped to the size of the run before its tokenizers see it."""
    np.savez(tmp_path / "large.npz", arr_0=blobs(150, 2, 24))
    report = measured(RUN, str(tmp_path / "large.npz"), "--rfd", "--count", "150")
    assert [result["count"] for result in report["results"]] == [150, 150, 150]


# FID's own features, end to end

@pytest.fixture
def released(inception, tmp_path, monkeypatch):
    """Weights that pass for the released file, in torch.hub's folder.

    The distance is that of the means alone, because the whole takes seconds.
    """
    def of_means(mu1, sigma1, mu2, sigma2):
        return float(np.square(mu1 - mu2).sum())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / Path(features.URL).name
    path.parent.mkdir()
    state = inception.state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    monkeypatch.setattr(features, "HASH", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    monkeypatch.setattr(fid, "frechet_distance", of_means)
    return path


def test_fid_of_a_run_and_a_reference_of_adm(
    world, inception, released, measured, tmp_path, capsys
):
    """ADM's file holds pictures and Inception's statistics; these count. The run has the size."""
    reference = tmp_path / "adm.npz"
    np.savez(reference, arr_0=blobs(200, 1), mu=np.ones(2048),
             sigma=np.eye(2048, dtype=np.float16), mu_s=np.zeros(2023), sigma_s=np.zeros(1))
    flags = ["--features", "inception", "--count", "11", "--force"]
    report = measured(RUN, str(reference), *flags, features=False)
    line = capsys.readouterr().out.splitlines()[0]
    sample.main([str(world / RUN), "--count", "11", "--out", str(tmp_path / "s.npz")])
    inception.resize = "torch-fidelity"
    features, logits = inception(channels_first(np.load(tmp_path / "s.npz")["arr_0"]))

    result = report["results"][0]
    expected = np.square(features.numpy().mean(0) - 1).sum()
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    score = fid.inception_score(logits)["mean"]
    assert result["inception_score"]["mean"] == pytest.approx(score, rel=1e-4)
    assert report["metric"] == "FID"
    assert report["extractor"]["file"] == str(released)
    assert report["extractor"]["size"] == SIZE
    assert "FID to" in line
    assert "; inception score " in line
    assert "not FID" not in line


def test_inception_takes_cropped_pictures(inception, released, measured, tmp_path):
    """Pictures are cropped to --size, which is needed where no run tells it."""
    large = blobs(3, 2, 24)[:, :16]
    np.savez(tmp_path / "large.npz", arr_0=large)
    inception.resize = "pytorch-fid"
    both = [str(tmp_path / "large.npz")] * 2
    flags = ["--features", str(released), "--resize", "pytorch-fid", "--force"]
    flags += ["--save-stats", str(tmp_path / "s.npz")]
    report = measured(*both, *flags, "--size", "8", features=False)
    cropped = [np.asarray(dataset.center_crop(Image.fromarray(p), 8)) for p in large]
    features, _ = inception(channels_first(np.stack(cropped)))
    found = np.load(tmp_path / "s.npz")["mu"]
    np.testing.assert_allclose(found, features.numpy().mean(0), rtol=1e-4, atol=1e-5)
    assert report["metric"] == "FID"
    assert report["extractor"]["name"].endswith("resize of pytorch-fid")
    with pytest.raises(SystemExit, match="without a run need --size"):
        measured(*both, *flags, features=False)


# pictures on their way

def test_reconstruction_feeds_each_tokenizer_its_own_range():
    """The VAE works in [-1, 1] on posterior means, the bit tokenizer in [0, 1] on signs.

    Ideal ones return the picture, and its bits.
    """
    same = SimpleNamespace(encode=lambda x: (x, torch.zeros_like(x)), decode=lambda z: z)
    signs = SimpleNamespace(encode=lambda x: x - 0.25, decode=lambda bits: (bits + 1) / 2)
    system = sample.System.__new__(sample.System)
    vars(system).update(vae=same, vq=signs, size=SIZE, device=torch.device("cpu"))
    pictures = channels_first(blobs(5))
    assert torch.equal(fid.reconstruct(pictures, system, "vae"), pictures)
    bits = torch.where(pictures / 255 > 0.25, 255, 0)
    assert (fid.reconstruct(pictures, system, "vq") == bits).all()


def test_pictures_of_other_sizes_are_cropped_as_data_sets_are(measured, tmp_path):
    large = blobs(150, 2, 24)[:, :16]
    np.savez(tmp_path / "large.npz", arr_0=large)
    write_pngs(large, tmp_path / "large")
    report = measured(str(tmp_path / "large.npz"), str(tmp_path / "large"))
    assert report["results"][0]["frechet_distance"] < 1e-8
    cropped = np.asarray(dataset.center_crop(Image.fromarray(large[0]), SIZE))
    expected = channels_first(cropped[None])
    assert torch.equal(fid.crop(channels_first(large[:1]), SIZE), expected)
    assert torch.equal(fid.crop(expected, SIZE), expected)


# the report

def test_numbers_never_travel_alone(world, measured, capsys):
    """The report says what was compared with what by which features.

    Features of the classifier are never called FID.
    """
    report = measured("samples.npz", "colours")
    digits = hashlib.sha256((world / "features.pt").read_bytes()).hexdigest()
    assert report["extractor"]["sha256"] == digits
    assert report["extractor"]["width"] == 144
    assert digits[:16] in report["metric"]
    assert report["metric"].startswith("Frechet distance (small classifier")
    assert report["metric"].endswith("not FID)")
    assert {"seconds", "date", "device"} <= set(report)
    assert report["results"][0]["classifier_score"]["splits"] == 10
    line = capsys.readouterr().out.strip()
    assert "\n" not in line
    assert "not FID" in line
    assert "classifier score" in line
    assert line.count("(200)") == 2


def test_unreadable_pictures_are_counted_named_and_left_out(measured, tmp_path, capsys):
    folder = write_pngs(blobs(150, 1), tmp_path / "some")
    (folder / "0000.png").write_bytes((folder / "0000.png").read_bytes()[:60])
    (folder / "0001.jpg").write_text("no picture")
    result = measured(str(folder), "idx")["results"][0]
    assert result["count"] == 149
    assert len(result["skipped"]) == 2
    assert "0000.png" in result["skipped"][0]
    printed = capsys.readouterr().out
    assert "skipped 2 unreadable" in printed
    assert "0000.png" in printed


# the classifier

def test_the_classifier_is_trained_once_beside_the_shared_models(world, measured, monkeypatch):
    """It learns three colours in 30 steps, twice alike, and is used again from RUNS/DATA/.

    The classifier of another data set of that name is refused.
    """
    short = functools.partial(features.train_classifier, steps=30, B=30)
    monkeypatch.setattr(features, "train_classifier", short)
    path = world / "runs" / "colours" / "classifier.pt"
    first = measured(RUN, "flat", "--count", "150", features=False)["extractor"]
    assert first["held_out_accuracy"] == 1
    assert first["pictures"] == 54
    assert first["file"].endswith("colours/classifier.pt")
    path.unlink()
    second = measured(RUN, "flat", "--count", "150", features=False)["extractor"]
    assert second["sha256"] == first["sha256"]
    before = path.stat().st_mtime_ns
    measured(RUN, "flat", "--count", "150", features=False)
    assert path.stat().st_mtime_ns == before
    saved = torch.load(path, weights_only=True)
    saved["meta"]["data"] = "elsewhere"
    torch.save(saved, path)
    with pytest.raises(SystemExit, match="is the classifier of elsewhere"):
        measured(RUN, "flat", features=False)


# errors are one line

def write_bad_files(world, folder):
    np.savez(folder / "other.npz", pictures=blobs(3))
    np.savez(folder / "float.npz", arr_0=np.zeros((3, 4, 4, 3)))
    np.savez(folder / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "nan.npz", mu=np.full(144, np.nan), sigma=np.eye(144))
    np.savez(folder / "complex.npz", mu=np.zeros(144, complex), sigma=np.eye(144))
    np.savez(folder / "inf.npz", mu=np.zeros(144), sigma=np.full((144, 144), np.inf))
    whole = (world / "samples.npz").read_bytes()
    flipped = bytes([whole[30000] ^ 255])
    (folder / "cut.npz").write_bytes(whole[:20000])
    (folder / "flipped.npz").write_bytes(whole[:30000] + flipped + whole[30001:])
    (folder / "text.npz").write_text("no npz file")
    (folder / "empty").mkdir()


# name: A, B and flags, and what the line must say; BAD is the folder of write_bad_files
ERRORS = {
    "no such path": (["nowhere", "flat"], "nowhere: no such run"),
    "npz without arr_0 or mu":
        (["BAD/other.npz", "flat"], "other.npz: expected an npz file with arr_0"),
    "npz of floats": (["BAD/float.npz", "flat"], "float.npz: expected .* uint8"),
    "npz cut short": (["BAD/cut.npz", "flat"], "cut.npz: not a readable npz file"),
    "npz with a flipped byte":
        (["BAD/flipped.npz", "flat"], "flipped.npz: not a readable npz file"),
    "npz that is text": (["BAD/text.npz", "flat"], "text.npz: not a .* it is damaged, cut off or"),
    "other widths": (["samples.npz", "BAD/wide.npz"], r"\(144,\), \(2048,\)"),
    "mu not finite": (["samples.npz", "BAD/nan.npz"], "nan.npz: not a .* is not finite"),
    "mu complex": (["samples.npz", "BAD/complex.npz"], "complex.npz: not a .* is not finite"),
    "sigma not finite": (["samples.npz", "BAD/inf.npz"], "inf.npz: not a .* is not finite"),
    "too few":
        (["samples.npz", "flat", "--count", "144"],
         "samples.npz: 144 pictures are too few.*--force"),
    "no pictures": (["BAD/empty", "flat"], "empty: 0 of its 0 files are pictures"),
    "checkpoint of another kind":
        (["runs/colours/vae/last.pt", "flat"], "not a mixar checkpoint: it is a vae checkpoint"),
    "features of another kind":
        (["samples.npz", "flat", "--features", f"{RUN}/last.pt"],
         "not a classifier checkpoint: it is a mixar checkpoint"),
    "no run to reconstruct by":
        (["flat", "flat", "--rfd"], "--rfd needs a run as A.*; A is .*flat, B .*flat"),
    "nothing to reconstruct": ([RUN, "BAD/wide.npz", "--rfd"], "--rfd needs .* pictures of B"),
}


def test_errors_are_one_line(world, measured, tmp_path):
    write_bad_files(world, tmp_path)
    for name, (args, line) in ERRORS.items():
        args = [a.replace("BAD", str(tmp_path)) for a in args]
        with pytest.raises(SystemExit, match=line) as error:
            measured(*args, features="--features" not in args)
        assert "\n" not in str(error.value), name


def test_without_a_data_set_the_classifier_must_be_named(measured):
    with pytest.raises(SystemExit, match="cannot tell the data set of .*--features"):
        measured("flat", "samples.npz", features=False)


def test_too_few_pictures_can_be_forced(measured):
    report = measured("samples.npz", "flat", "--count", "20", "--force")
    assert report["results"][0]["count"] == 20


def test_what_is_measured_is_not_written_over(world, measured):
    pictures = (world / "samples.npz").read_bytes()
    for flag in ("--save-stats", "--json"):
        with pytest.raises(SystemExit, match="not measured here"):
            fid.main([str(world / "samples.npz"), flag, str(world / "samples.npz")])
    assert (world / "samples.npz").read_bytes() == pictures


def test_a_classifier_needs_two_classes(tmp_path):
    write_pngs(blobs(20), tmp_path / "one" / "only")
    with pytest.raises(SystemExit, match="one has one class.*--features"):
        features.train_classifier(tmp_path / "c.pt", str(tmp_path / "one"), SIZE, "cpu")


def test_the_classifier_of_a_few_pictures_has_an_accuracy(tmp_path):
    """A tenth of four pictures is one of them. The mean over none of them would be NaN."""
    for k, name in enumerate(("one", "two")):
        write_pngs(blobs(2, seed=k), tmp_path / "few" / name)
    features.train_classifier(tmp_path / "c.pt", str(tmp_path / "few"), SIZE, "cpu", steps=2, B=2)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["meta"]["held_out_accuracy"] in (0, 1)
    assert saved["meta"]["pictures"] == 3


def test_only_an_earlier_report_is_written_over(world, runs, tmp_path):
    """A token cache's note and pictures have the right endings, but are not this program's."""
    note = runs / "shapes" / "tokens" / "meta.json"
    np.savez(tmp_path / "mine.npz", arr_0=blobs(3))
    (tmp_path / "report.json").write_text('{"metric": "FID"}')
    (tmp_path / "list.json").write_text("[1]")
    for flag, path in (("--json", note), ("--json", tmp_path / "list.json"),
                       ("--save-stats", tmp_path / "mine.npz")):
        before = path.read_bytes()
        with pytest.raises(SystemExit, match="or one that fid.py wrote"):
            fid.main([str(world / "samples.npz"), flag, str(path)])
        assert path.read_bytes() == before
    fid.check_writable(tmp_path / "report.json", ".json", [])


def test_a_distance_is_never_below_zero():
    """Rounding would give some sets a negative distance to themselves."""
    for seed in range(20):
        features = np.random.RandomState(seed).randn(200, 30)
        mu, sigma = features.mean(0), np.cov(features, rowvar=False)
        assert fid.frechet_distance(mu, sigma, mu, sigma) >= 0


def test_a_data_set_of_other_classes_than_the_run_is_told(measured, capsys):
    """The run's classes are a, b and c, those of the idx files 0, 1 and 2."""
    measured(RUN, "unsplit", "--count", "150")
    assert "other classes" not in capsys.readouterr().out
    measured(RUN, "idx", "--count", "150")
    assert "idx has other classes than" in capsys.readouterr().out


def test_it_runs_in_one_process(monkeypatch, capsys):
    """Two would measure everything twice, and write one report."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(SystemExit):
        fid.parse(["shapes"])
    assert "start it with python, not torchrun" in capsys.readouterr().err


def test_a_run_without_its_checkpoint_is_not_taken_for_pictures(runs, tmp_path):
    run = shutil.copytree(runs / "shapes-dcmix", tmp_path / "run")
    (run / "last.pt").unlink()
    with pytest.raises(SystemExit, match="run/last.pt: no such file"):
        fid.PictureSet(str(run), "cpu")


@pytest.mark.parametrize("damage, words", [
    (lambda saved: saved["model"].update({"head.weight": saved["model"]["head.weight"].int()}),
     "head.weight holds .* torch.int32"),
    (lambda saved: saved["model"]["head.bias"].fill_(torch.nan), "head.bias holds values that are"),
])
def test_a_damaged_classifier_is_one_line(world, tmp_path, damage, words):
    saved = torch.load(world / "features.pt", weights_only=True)
    damage(saved)
    torch.save(saved, tmp_path / "damaged.pt")
    with pytest.raises(SystemExit, match=f"damaged.pt: not a .*{words}") as error:
        features.load_extractor(tmp_path / "damaged.pt", "torch-fidelity", None, "cpu")
    assert "\n" not in str(error.value)


def test_a_run_is_not_written_over_by_a_report(world, runs):
    """Only a file that is named as a report is one."""
    before = (runs / "shapes-dcmix" / "last.pt").read_bytes()
    for flag in ("--save-stats", "--json"):
        with pytest.raises(SystemExit, match="name a new .(npz|json) file"):
            fid.main([str(world / "samples.npz"), flag, str(runs / "shapes-dcmix" / "last.pt")])
    assert (runs / "shapes-dcmix" / "last.pt").read_bytes() == before


def test_fewer_pictures_than_asked_for_are_one_line(world):
    command = [world / "samples.npz", world / "flat", "--features", world / "features.pt"]
    with pytest.raises(SystemExit, match="samples.npz has 200 pictures, fewer than --count 9999"):
        fid.main([*map(str, command), "--count", "9999"])
