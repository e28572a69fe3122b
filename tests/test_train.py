"""train.py and sample.py as a user runs them: resuming, several processes, errors, sampling. The models are untrained; only the machinery counts."""
import csv
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import backbone
import golden
import sample
import tokenizers
import train
import quick_train  # noqa: F401, few sampling steps

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--images", "64", "--batch-size", "8", "--vae-steps", "2", "--vq-steps", "2", "--prior-steps", "2", "--amp", "fp32", "--sample-every", "0"]


def command(*args, processes=0):
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=29611"] if processes else [sys.executable]
    return [*start, *map(str, args)]


def run(*args, processes=0):
    return subprocess.run(command(*args, processes=processes), cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def weights(path, key="model"):
    return torch.load(path, weights_only=True)[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs with every stage trained for two steps; its pictures take few sampling steps, for speed."""
    folder = tmp_path_factory.mktemp("runs")
    train.main([*SMALL, "--runs", str(folder), "--steps", "2"])
    return folder


def mixar(runs, out, *more):
    return ["--runs", str(runs), "--stage", "mixar", "--out", str(out), *SMALL, *map(str, more)]


# one command, and the five ways to train

def test_one_command_leaves_every_stage_and_both_pictures(runs):
    for stage in ("vae", "vq", "prior"):
        assert (runs / "shapes" / stage / "last.pt").is_file() and (runs / "shapes" / stage / "log.csv").is_file()
    assert Image.open(runs / "shapes-dcmix" / "samples.png").size == (320, 256)
    assert Image.open(runs / "shapes-dcmix" / "compare.png").size == (320, 128)


@pytest.mark.parametrize("flags", [["--guidance", g] for g in backbone.GUIDANCES] + [["--ti-mix"], ["--mix-at", "encoder"]], ids=" ".join)
def test_every_guidance_trains_and_samples(runs, tmp_path, flags):
    before = (runs / "shapes" / "prior" / "last.pt").stat().st_mtime_ns
    train.main(mixar(runs, tmp_path / "run", "--steps", 2, *flags))
    assert (runs / "shapes" / "prior" / "last.pt").stat().st_mtime_ns == before, "the shared stages are trained once"
    sample.main([str(tmp_path / "run"), "--count", "4", "--out", str(tmp_path / "s.npz"), "--ar-steps", "3", "--diffusion-steps", "4", "--cfg", "1.5"])
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (4, 32, 32, 3)


def test_ti_mix_starts_from_a_dcmix_checkpoint(runs, tmp_path):
    train.main(mixar(runs, tmp_path / "run", "--ti-mix", "--init", runs / "shapes-dcmix" / "last.pt", "--steps", 1, "--lr", 0))
    init, now = weights(runs / "shapes-dcmix" / "last.pt"), weights(tmp_path / "run" / "last.pt")
    assert all(torch.equal(init[k], now[k]) for k in init)
    assert weights(tmp_path / "run" / "last.pt", "ema_start") == 2


def test_averages_are_counted_on_from_a_checkpoint(runs, tmp_path, monkeypatch):
    """The moving average's warm-up goes on after --init and after a resume."""
    counts, shipped = [], train.update_ema
    monkeypatch.setattr(train, "update_ema", lambda ema, model, n, decay: counts.append(n) or shipped(ema, model, n, decay))
    for steps in (2, 3):
        train.main(mixar(runs, tmp_path / "run", "--init", runs / "shapes-dcmix", "--steps", steps, "--seed", 1))
    assert counts == [2, 3, 4]


# rates and averages

def test_rate_warms_up_then_stays_or_anneals_to_a_tenth():
    recipe = dict(lr=2.0, warmup=4, steps=100, anneal=False)
    assert [train.learning_rate(recipe, step) for step in (0, 1, 3, 99)] == [0.5, 1.0, 2.0, 2.0]
    assert train.learning_rate(recipe | dict(warmup=0.1), 4) == 1.0, "a warm-up below 1 is a share of all steps"
    assert [round(train.learning_rate(recipe | dict(anneal=True), step), 9) for step in (50, 100)] == [1.1, 0.2]


def test_moving_average_warms_up():
    """Decay min(decay, (1 + n) / (10 + n)): 0.1 at first, 0.5 at n = 8, then the given one."""
    for n, expected in ((0, 0.1), (8, 0.5), (10 ** 6, 0.75)):
        ema, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        torch.nn.init.ones_(ema.weight), torch.nn.init.zeros_(model.weight)
        train.update_ema(ema, model, n, 0.75)
        assert abs(float(ema.weight.detach()) - expected) < 1e-6


def test_golden_moving_average():
    """MaskBit's decays and average, from its second update on: its first copies the weights, ours keeps a tenth of the start."""
    g = golden.load("maskbit_generator_tiny")
    ema, model = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    ema.weight.data[0] = g["ema_trace"][0]
    model.weight.data[0] = torch.tensor([1.5, -1.5])                         # after the first update
    for n in range(1, 12):
        model.weight.data += 0.5
        train.update_ema(ema, model, n, 0.999)
        assert golden.difference(ema.weight.detach()[0], g["ema_trace"][n]) < 1e-6
    for n, decay in zip(g["ema_decay_at_step"].tolist(), g["ema_decay_at"].tolist()):
        ema.weight.data.fill_(1)
        model.weight.data.zero_()
        train.update_ema(ema, model, n - 1, 0.999)
        assert n == 1 or ema.weight.detach()[0, 0].item() == pytest.approx(decay, abs=1e-6)


# resuming

def test_data_order_and_dropout_are_functions_of_seed_and_step():
    """20 pictures in batches of 8: two batches an epoch without a picture twice, another order in the next."""
    def numbers(step):
        batches = train.step_batches(train.parse(["--device", "cpu"]), lambda rows, draw: (torch.tensor(rows),), 20, 8, step, 1)
        return batches[0][0][0].tolist(), torch.rand(1).item()
    found = [numbers(step) for step in range(4)]
    assert found == [numbers(step) for step in range(4)] and len({dropout for _, dropout in found}) == 4
    assert all(len({*found[k][0], *found[k + 1][0]}) == 16 for k in (0, 2)) and found[0][0] != found[2][0]


def test_killed_run_ends_bit_identical_to_an_uninterrupted_one(runs, tmp_path):
    more = ["--steps", 24, "--save-every", 4, "--log-every", 1, "--guidance", "dcmix"]
    assert run("tests/quick_train.py", *mixar(runs, tmp_path / "whole", *more)).returncode == 0
    killed = subprocess.Popen(command("tests/quick_train.py", *mixar(runs, tmp_path / "killed", *more)), cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = tmp_path / "killed" / "log.csv"
    while not (tmp_path / "killed" / "last.pt").is_file() or len(log.read_text().splitlines()) < 7:
        assert killed.poll() is None, "the run ended before it was killed"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 4 <= weights(tmp_path / "killed" / "last.pt", "step") < 24
    assert run("tests/quick_train.py", *mixar(runs, tmp_path / "killed", *more)).returncode == 0
    for key in ("model", "ema"):
        whole, resumed = weights(tmp_path / "whole" / "last.pt", key), weights(tmp_path / "killed" / "last.pt", key)
        assert all(torch.equal(whole[k], resumed[k]) for k in whole), f"{key} differs after the resume"
    losses = [[(row["step"], row["loss"]) for row in csv.DictReader((tmp_path / name / "log.csv").open())] for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 24


def test_sigterm_saves_and_names_the_checkpoint(runs, tmp_path):
    process = subprocess.Popen(command("tests/quick_train.py", *mixar(runs, tmp_path / "run", "--steps", 100000, "--save-every", 100000, "--log-every", 1)),
                               cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (tmp_path / "run" / "log.csv").is_file() or len((tmp_path / "run" / "log.csv").read_text().splitlines()) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert "stopped by SIGTERM" in err and "last.pt" in err and "Traceback" not in err
    assert weights(tmp_path / "run" / "last.pt", "step") >= 2


def test_resuming_with_another_seed_is_refused(runs, tmp_path):
    train.main(mixar(runs, tmp_path / "run", "--steps", 1))
    with pytest.raises(SystemExit, match="was made with .*seed"):
        train.main(mixar(runs, tmp_path / "run", "--steps", 2, "--seed", 1))


# several processes

def batch_of(kind, rows):
    g = torch.Generator().manual_seed(0)
    x_d = torch.randint(0, 2, (8, 64, 8), generator=g).float() * 2 - 1
    latents = torch.randn(8, 64, 8, generator=g), torch.rand(8, 64, 8, generator=g), x_d, torch.arange(8)
    return [a[rows] for a in (latents if kind in ("prior", "mixar") else (torch.rand(8, 3, 32, 32, generator=g),))]


def fresh_model(kind):
    torch.manual_seed(0)
    sizes = dict(prior=dict(N=64, bits=8, classes=10), mixar=dict(N=64, d_c=8, d_d=8, classes=10)).get(kind, {})
    model = backbone.KINDS[kind](**sizes, **backbone.PRESETS["tiny"]["mar" if kind == "mixar" else kind])
    if kind == "mixar":                                                      # the zero start values would hide most gradients
        for p in model.diffloss.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return model


def losses(kind):
    return dict(vae=train.vae_loss, vq=train.vq_loss, prior=train.prior_loss, mixar=partial(train.mixar_loss, prior=None, args=train.parse([])))[kind]


def gradients(rank, ranks, port, kind, path):
    """One step's gradients on the global batch of 8, as train.fit computes them."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    model, loss = fresh_model(kind), losses(kind)
    draw = train.Rng(0, 5, 8, torch.device("cpu"))
    module = train.Loss(model, loss)
    module = DistributedDataParallel(module) if ranks > 1 else module
    module(batch_of(kind, draw.rows), draw, 5).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, path)
    if ranks > 1:
        dist.barrier()                                                       # nobody leaves while another still talks
        del module
        dist.destroy_process_group()


@pytest.mark.parametrize("kind, port", [("vae", 29621), ("vq", 29622), ("prior", 29623), ("mixar", 29624)])
def test_two_processes_give_the_gradients_of_one(tmp_path, kind, port):
    gradients(0, 1, port, kind, tmp_path / "one.pt")
    torch.multiprocessing.spawn(gradients, (2, port, kind, tmp_path / "two.pt"), nprocs=2)
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    largest = max(float(g.abs().max()) for g in one.values())
    assert largest > 1e-4
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-5 * largest, name


def test_torchrun_with_two_processes_trains_the_same_weights(runs, tmp_path):
    """Each process in two parts besides, between which the processes do not talk."""
    train.main(mixar(runs, tmp_path / "one", "--steps", 3))
    done = run("tests/quick_train.py", *mixar(runs, tmp_path / "two", "--steps", 3, "--accumulate", 2), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one" / "last.pt"), weights(tmp_path / "two" / "last.pt")
    for key in one:
        assert torch.allclose(one[key], two[key], atol=2e-5), key


# less memory, same gradients

@pytest.mark.parametrize("kind", ["vae", "prior", "mixar"])
def test_accumulation_gives_the_gradients_of_the_undivided_batch(tmp_path, kind):
    """--accumulate: the batch in four parts, each drawing its own rows of the same random numbers."""
    model, loss = fresh_model(kind), losses(kind)
    args, found = train.parse(["--amp", "fp32", "--clip", "1e9"]), []
    for parts in (1, 4):
        draws = [train.Rng(0, 5, 8, torch.device("cpu"), part, parts) for part in range(parts)]
        assert [i for draw in draws for i in range(8)[draw.rows]] == list(range(8))
        batches = [(batch_of(kind, draw.rows), draw) for draw in draws]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        value, norm, taken = train.update(args, train.Loss(model, loss), model, optimizer, torch.amp.GradScaler("cpu", enabled=False), batches, 5)
        found.append((value, [p.grad.clone() for p in model.parameters()]))
    largest = max(float(g.abs().max()) for g in found[0][1])
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and largest > 1e-4
    for one, four in zip(found[0][1], found[1][1]):
        assert (one - four).abs().max() <= 1e-5 * largest


def test_processes_talk_once_a_step(tmp_path):
    """--accumulate: gradients are averaged over processes after the last part alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        model, talks = torch.nn.Linear(2, 1), []
        ddp = DistributedDataParallel(train.Loss(model, lambda model, batch, draw, step: model(batch).mean()))

        def talk(talks, bucket):
            talks.append(1)
            averaged = torch.futures.Future()
            averaged.set_result(bucket.buffer())
            return averaged

        ddp.register_comm_hook(talks, talk)
        parts = [(torch.ones(1, 2), train.Rng(0, 0, 1, torch.device("cpu"))) for _ in range(3)]
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.0), torch.amp.GradScaler("cpu", enabled=False)
        for step in (1, 2):
            train.update(train.parse(["--amp", "fp32"]), ddp, model, optimizer, scaler, parts, 0)
            assert len(talks) == step
        assert model.weight.grad.tolist() == [[1.0, 1.0]]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("guidance", backbone.GUIDANCES)
def test_recomputed_activations_give_the_same_gradients(guidance):
    """--checkpoint-activations, with dropout: the second pass drops the same."""
    torch.manual_seed(0)
    config = backbone.PRESETS["tiny"]["mar"] | dict(dropout=0.1)
    model, found = backbone.MAR(N=64, d_c=8, d_d=8, classes=10, guidance=guidance, **config).train(), []
    for p in model.diffloss.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for recompute in (False, True):
        model.recompute = recompute
        torch.manual_seed(1)
        draw = train.Rng(0, 5, 8, torch.device("cpu"))
        model.zero_grad()
        train.mixar_loss(model, batch_of("mixar", draw.rows), draw, 5, None, train.parse([])).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_recomputed_activations_are_not_kept(tmp_path):
    """--checkpoint-activations: without it the inner activations of every block stay in memory until the backward pass."""
    draw, kept, config = train.Rng(0, 5, 8, torch.device("cpu")), [], dict(N=64, d_c=8, d_d=8, classes=10) | backbone.PRESETS["tiny"]["mar"]
    for flags in ([], ["--checkpoint-activations"]):
        model, sizes = train.State(train.parse(flags), "mixar", tmp_path, config, {}, None).model.train(), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.setdefault(x.data_ptr(), x.numel()) and x, lambda x: x):
            model(*batch_of("mixar", draw.rows)[0:1], batch_of("mixar", draw.rows)[2], torch.arange(64).expand(8, -1) < 50, torch.arange(8), torch.zeros(8, dtype=torch.bool))
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.5 * kept[0]


# models from files

def test_models_from_files_are_used_and_found_again(runs, tmp_path):
    """--vae, --vq, --prior: no stage trains them; the run names them, and refuses another prior or tokenizer at that place."""
    import shutil
    for kind in ("vae", "vq", "prior"):
        shutil.copy(runs / "shapes" / kind / "last.pt", tmp_path / f"{kind}.pt")
    files = [word for kind in ("vae", "vq", "prior") for word in (f"--{kind}", str(tmp_path / f"{kind}.pt"))]
    train.main([*SMALL, *files, "--runs", str(tmp_path / "new"), "--steps", "2", "--guidance", "none"])
    assert not any((tmp_path / "new" / "shapes" / kind).exists() for kind in ("vae", "vq", "prior"))
    run = tmp_path / "new" / "shapes-none"
    few = ["--count", "2", "--ar-steps", "2", "--diffusion-steps", "2", "--out", str(tmp_path / "s.npz")]
    sample.main([str(run), *few])
    shutil.copy(runs / "shapes" / "prior" / "last.pt", tmp_path / "other.pt")
    saved = torch.load(tmp_path / "prior.pt", weights_only=True)
    saved["ema"]["input_proj.bias"] += 1
    torch.save(saved, tmp_path / "prior.pt")
    with pytest.raises(SystemExit, match="was trained with the prior"):
        sample.main([str(run), *few])
    sample.main([str(run), *few, "--prior", str(tmp_path / "other.pt")])
    with pytest.raises(SystemExit, match="was trained with the vae"):
        saved = torch.load(tmp_path / "vae.pt", weights_only=True)
        saved["ema"]["quant_conv.bias"] += 1
        torch.save(saved, tmp_path / "vae.pt")
        sample.main([str(run), *few, "--prior", str(tmp_path / "other.pt")])


def test_plain_mar_draws_no_discrete_tokens(runs, tmp_path, monkeypatch):
    """Guidance none: the prior costs nothing when sampling."""
    train.main(mixar(runs, tmp_path / "run", "--steps", 1, "--guidance", "none"))
    monkeypatch.setattr(sample, "sample_prior", None)
    few = [str(tmp_path / "run"), "--count", "10", "--ar-steps", "2", "--diffusion-steps", "2"]
    sample.main([*few, "--out", str(tmp_path / "s.npz")])
    sample.main([*few, "--out", str(tmp_path / "s.gif")])
    with pytest.raises(TypeError):
        sample.main([*few, "--out", str(tmp_path / "d.npz"), "--decode", "discrete"])


def test_official_tokenizers_make_the_token_cache(tmp_path):
    """A KL-VAE and a MaskBit tokenizer in their official formats, by path alone."""
    for kind, name in (("vae", "kl_tiny"), ("vq", "maskbit_tokenizer_tiny")):
        torch.save(golden.official(name), tmp_path / f"{kind}.pth")
    files = ["--vae", str(tmp_path / "vae.pth"), "--vq", str(tmp_path / "vq.pth")]
    train.main([*SMALL, *files, "--images", "8", "--runs", str(tmp_path), "--stage", "cache"])
    vae, vq = (backbone.load_model(tmp_path / f"{kind}.pth", kind)[0] for kind in ("vae", "vq"))
    tokens = tokenizers.Tokens(tmp_path / "shapes" / "tokens", vae, vq)
    mean, _, x_d, _ = tokens.batch(np.array([0]), lambda f: torch.zeros(1))
    assert mean.shape == (1, 256, 4) and x_d.shape == (1, 256, 6)


def test_larger_presets_follow_mars_recipe():
    """400 epochs of batch 2048; lr 1e-4 for 256 images; a quarter of the steps is warm-up; --steps, --epochs, --lr and --warmup win."""
    files = [word for kind in ("vae", "vq", "prior") for word in (f"--{kind}", __file__)]
    for preset in ("base", "large", "huge"):
        args = train.parse(["--preset", preset, *files])
        assert "steps" not in args.recipe["mixar"]
        recipe = args.recipe["mixar"] | dict(steps=1000)
        assert (recipe["epochs"], recipe["batch"], args.clip, args.ema) == (400, 2048, 3.0, 0.9999)
        assert recipe["lr"] == pytest.approx(8e-4) and recipe["betas"] == (0.9, 0.95) and recipe["decay"] == 0.02
        assert train.learning_rate(recipe, 124) == pytest.approx(4e-4) and train.learning_rate(recipe, 249) == train.learning_rate(recipe, 999) == pytest.approx(8e-4)
    recipe = lambda *flags: train.parse([*flags]).recipe["mixar"]
    smaller = recipe("--preset", "base", *files, "--batch-size", "512", "--steps", "70")
    assert smaller["lr"] == pytest.approx(2e-4) and smaller["steps"] == 70
    assert recipe("--preset", "base", *files, "--lr", "0.1")["lr"] == 0.1 and recipe("--warmup", "0")["warmup"] == 0
    assert "steps" not in recipe("--epochs", "2") and recipe()["steps"] == train.RECIPES["tiny"]["mixar"]["steps"]


def test_epochs_are_passes_over_the_pictures(runs, tmp_path):
    train.main(mixar(runs, tmp_path / "run", "--epochs", 0.5))
    assert weights(tmp_path / "run" / "last.pt", "step") == 4               # 64 pictures, batch 8


@pytest.mark.parametrize("flags, words", [
    (["--preset", "base"], "--preset base trains MixAR alone: give --vae, --vq and --prior"), (["--vae", "/no/file"], "--vae /no/file: no such file"),
    (["--stage", "vae", "--vae", __file__], "--stage vae would train it")])
def test_flags_that_contradict_each_other_are_one_line(flags, words):
    with pytest.raises(SystemExit) as error:
        train.parse(flags)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_help_says_the_defaults_there_are(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "[MAR] (default: 0.7)" in text and "(default: dcmix)" in text and "(default: None)" not in text and "(default: False)" not in text


def test_steps_and_epochs_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--steps", "3", "--epochs", "1"])
    assert "argument --epochs: not allowed with argument --steps" in capsys.readouterr().err


def test_models_that_do_not_go_together_are_one_line(runs, tmp_path):
    """A tokenizer of another stride, a prior of other tokens."""
    torch.save(golden.official("maskbit_tokenizer_tiny"), tmp_path / "vq.pth")
    torch.save(golden.official("maskbit_generator_tiny_postnorm"), tmp_path / "prior.pth")
    with pytest.raises(SystemExit, match="vq.pth: 2 levels, expected the 3"):
        train.main([*mixar(runs, tmp_path / "run", "--steps", 1), "--vq", str(tmp_path / "vq.pth")])
    with pytest.raises(SystemExit, match="prior.pth: 16 tokens, expected the 64"):
        train.main([*mixar(runs, tmp_path / "run", "--steps", 1), "--prior", str(tmp_path / "prior.pth")])


# one clear line for what is wrong

class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/hostile-checkpoint-ran",)


def test_truncated_hostile_foreign_and_missing_checkpoints_are_one_line(runs, tmp_path):
    good = (runs / "shapes-dcmix" / "last.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(good[:len(good) // 2])
    torch.save({"kind": "mixar", "model": Hostile()}, tmp_path / "hostile.pt")
    for name, words in [(tmp_path / "short.pt", "truncated"), (tmp_path / "hostile.pt", "would run code"), (tmp_path / "none.pt", "no such file"),
                        (runs / "shapes" / "vae" / "last.pt", "expected a mixar checkpoint, found vae")]:
        with pytest.raises(SystemExit, match=words) as error:
            sample.main([str(name)])
        assert str(name) in str(error.value) and "\n" not in str(error.value)
    assert not Path("/tmp/hostile-checkpoint-ran").exists()


def test_truncated_last_checkpoint_stops_the_resume_and_is_kept(runs, tmp_path):
    train.main(mixar(runs, tmp_path / "run", "--steps", 1))
    path = tmp_path / "run" / "last.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="truncated"):
        train.main(mixar(runs, tmp_path / "run", "--steps", 2))
    assert path.stat().st_size == 1000


def test_weights_that_do_not_fit_are_named():
    model = torch.nn.Linear(2, 3)
    state = {"weight": torch.zeros(3, 4), "other": torch.zeros(1)}
    with pytest.raises(SystemExit, match=r"f.pt: does not fit the model: missing bias; unexpected other; weight is \(3, 4\), expected \(3, 2\)"):
        backbone.load_weights(model, state, "f.pt")


@pytest.mark.parametrize("flags, words", [(["--data", "/no/where", "--stage", "all"], "no such folder"), (["--data", "/no/where"], "run the stages vae, vq and cache first"),
                                          (["--init", "/no/file.pt"], "no such file"),
                                          (["--device", "cuda"], "--device cuda: no such device here; use cpu")])
def test_wrong_flags_are_one_line_without_traceback(runs, tmp_path, flags, words):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = run("tests/quick_train.py", *mixar(runs, tmp_path / "run", "--steps", 1, *flags))
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr


def test_more_bits_than_channels_is_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(backbone.PRESETS["tiny"], "vae", backbone.PRESETS["tiny"]["vae"] | dict(z=4))
    with pytest.raises(SystemExit, match="d_d = 8 bits do not fit into d_c = 4 channels"):
        train.main(["--runs", str(tmp_path), *SMALL, "--steps", "1"])


def test_non_finite_losses_never_reach_the_weights_and_stop_the_run(runs, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train.main(mixar(runs, out, "--steps", 3))
    before, shipped = weights(out / "last.pt"), train.mixar_loss
    monkeypatch.setattr(train, "mixar_loss", lambda *a, **k: shipped(*a, **k) * float("nan"))
    with pytest.raises(SystemExit, match="not finite.*start again from .*last.pt"):
        train.main(mixar(runs, out, "--steps", 30))
    after = weights(out / "last.pt")
    assert all(torch.equal(before[k], after[k]) for k in before)
    calls = []                                                               # a single bad step is left out
    monkeypatch.setattr(train, "mixar_loss", lambda *a, **k: shipped(*a, **k) * (float("nan") if calls.append(1) or len(calls) == 2 else 1))
    train.main(mixar(runs, out, "--steps", 8))
    assert all(torch.isfinite(v).all() for v in weights(out / "last.pt").values())


def test_fp16_goes_on_after_a_loss_that_is_not_finite():
    """The scaler is told of every step, also of those left out; a checkpoint of another precision has nothing for it."""
    model = torch.nn.Linear(2, 1)
    args, scaler = train.parse(["--amp", "fp16"]), torch.amp.GradScaler("cpu", init_scale=1024)
    ddp = lambda batch, draw, step: (model(torch.ones(1, 2)) * batch).sum()
    draw, optimizer, taken = train.Rng(0, 0, 1, torch.device("cpu")), torch.optim.SGD(model.parameters(), 0.1), []
    for value in (1.0, float("nan"), 1.0):
        taken.append(train.update(args, ddp, model, optimizer, scaler, [(torch.tensor(value), draw)], 0)[2])
    assert taken == [True, False, True] and scaler.get_scale() == 512


def test_the_log_is_never_empty_between_a_resume_and_its_next_row(tmp_path):
    args = train.parse([])
    log = train.Log(tmp_path, "mixar", 0, 20, 8, args)
    for step in range(1, 11):
        log.write(step, 1.0, 1e-3, 1.0)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("15,0.5\n16,0.5,0.001,1.0,9.9,")                          # what killed processes left
    resumed = train.Log(tmp_path, "mixar", 18, 20, 8, args)
    assert resumed and [row["step"] for row in csv.DictReader((tmp_path / "log.csv").open())] == ["10"]


def test_dropout_is_apart_from_the_noise_of_the_data():
    args = train.parse(["--device", "cpu"])
    (_, draw), = train.step_batches(args, lambda rows, draw: (), 64, 8, 3, 1)
    assert not torch.equal(torch.randn(8, 5), draw(torch.randn, 5))


def test_models_of_other_tokens_are_not_gone_on_with(runs, tmp_path):
    """Another bit tokenizer makes other tokens: neither the old prior nor the old MixAR fits them. A longer --vq-steps trains on."""
    import shutil
    shutil.copytree(runs, tmp_path / "runs")
    more = ["--runs", str(tmp_path / "runs"), *SMALL, "--steps", "4"]
    more[more.index("--vq-steps") + 1] = "3"
    with pytest.raises(SystemExit, match="tokens was made from .* remove it"):
        train.main(more)
    shutil.rmtree(tmp_path / "runs" / "shapes" / "tokens")
    with pytest.raises(SystemExit, match="prior was trained on other tokens .* remove it"):
        train.main(more)
    shutil.rmtree(tmp_path / "runs" / "shapes" / "prior")
    with pytest.raises(SystemExit, match="shapes-dcmix/last.pt was made with .* not with"):
        train.main(more)
    shutil.rmtree(tmp_path / "runs" / "shapes" / "prior")
    with pytest.raises(SystemExit, match="prior: no such file"):
        train.main([*more, "--stage", "mixar", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_the_token_cache_is_made_in_fp32(runs, tmp_path):
    import shutil
    shutil.copytree(runs / "shapes", tmp_path / "shapes", ignore=shutil.ignore_patterns("tokens", "prior"))
    train.main(["--runs", str(tmp_path), *SMALL, "--amp", "bf16", "--stage", "cache"])
    for name in ("moments", "indices"):
        assert np.array_equal(np.load(tmp_path / "shapes" / "tokens" / f"{name}.npy"), np.load(runs / "shapes" / "tokens" / f"{name}.npy"))


def test_pictures_go_through_the_tokenizers_a_few_at_a_time(runs):
    """Half a million pixels at once, so 512 pictures of 32 x 32 and 2 of 512 x 512; the pictures and bits are the same."""
    system, generator = sample.System(runs / "shapes-dcmix", amp="fp32"), torch.Generator().manual_seed(0)
    bits = tokenizers.quantise(torch.randn(5, system.model.N, 8, generator=generator))
    pictures = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)
    x_c = torch.randn(5, system.model.N, 8, generator=generator)
    found = []
    for size, pieces in ((32, [5]), (512, [2, 2, 1])):
        system.size, seen = size, []
        for tokenizer in (system.vq.encoder, system.vq.decoder, system.vae.decoder):
            tokenizer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
        found.append([system.encode_discrete(pictures), system.decode_discrete(bits).int(), system.decode_continuous(x_c).int()])
        assert seen == 3 * pieces
    assert all((a - b).abs().max() <= 1 for a, b in zip(*found))


def test_each_process_takes_its_own_gpu(monkeypatch):
    """--device cuda is the GPU of the process's number; one that is not there is named beside those that are."""
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [train.on_device(device) for device in ("cpu", "cuda", "cuda:0")] == ["cpu", *taken] == ["cpu", "cuda:1", "cuda:0"]
    for wrong in ("cuda:2", "cudaa", "mps"):
        with pytest.raises(SystemExit, match=f"--device {wrong}: no such device here; use cpu, cuda:0, cuda:1"):
            train.on_device(wrong)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit, match="--device cuda: no such device here"):
        train.on_device("cuda")


def test_a_file_is_no_place_for_runs(tmp_path):
    (tmp_path / "file").touch()
    for flag in ("--runs", "--out"):
        with pytest.raises(SystemExit, match="file is a file; name a folder"):
            train.parse([flag, str(tmp_path / "file")])


@pytest.mark.parametrize("flags, words", [(["--ti-mix", "--guidance", "none"], "--ti-mix mixes X_d"), (["--mix-at", "encoder", "--guidance", "dcsa"], "--mix-at encoder is for")])
def test_contradictions_are_one_line(flags, words):
    with pytest.raises(SystemExit, match=words):
        train.parse(flags)


def test_the_optimiser_follows_the_recipe(runs):
    """The rate of the last step, here in the warm-up, is the one in the optimiser: of the annealed VAE and of MixAR."""
    for path, kind in ((runs / "shapes" / "vae", "vae"), (runs / "shapes-dcmix", "mixar")):
        rate = train.learning_rate(train.RECIPES["tiny"][kind] | dict(steps=2), 1)
        assert all(group["lr"] == pytest.approx(rate) for group in weights(path / "last.pt", "optimizer")["param_groups"])


def test_a_run_knows_the_statistics_of_its_latents(runs):
    """sample.py multiplies x_c by the deviation and adds the mean that the cache holds."""
    cache, meta = tokenizers.read_json(runs / "shapes" / "tokens" / "meta.json"), weights(runs / "shapes-dcmix" / "last.pt", "meta")
    assert meta["latent_mean"] == cache["mean"] and meta["latent_std"] == cache["std"] and len(set(cache["mean"])) == 8


# sampling

@pytest.mark.parametrize("flags", [["--ar-steps", "0"], ["--prior-steps", "0"], ["--diffusion-steps", "1"], ["--diffusion-steps", "9:1"], ["--diffusion-steps", "9:5:2"],
                                   ["--count", "0"], ["--batch-size", "-1"]], ids=" ".join)
def test_numbers_that_draw_nothing_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        sample.parse(["run", *flags])
    assert f"argument {flags[0]}: {flags[1][-1] if flags[1] == '9:1' else flags[1]}" in capsys.readouterr().err


@pytest.mark.parametrize("flag, value", [("--min-mask", "1.2"), ("--label-drop", "5"), ("--lr", "nan"), ("--ema", "nan"), ("--clip", "-1"), ("--images", "0"),
                                         ("--seed", "-1"), ("--batch-size", "0"), ("--save-every", "0"), ("--draws", "0"), ("--steps", "0"), ("--epochs", "-1")])
def test_numbers_that_train_nothing_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit):
        train.parse([flag, value])
    assert f"argument {flag}: {value} is not in [" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [(["--device", "gpu"], "--device gpu: no such device"), (["--prior-steps", "129"], "more than the 128 codes")])
def test_settings_that_no_model_has_are_refused(runs, flags, words):
    with pytest.raises(SystemExit, match=words):
        sample.main([str(runs / "shapes-dcmix"), *flags])


def test_a_prior_of_other_classes_is_refused(runs, tmp_path):
    """One class less, and the last class of the run would be drawn as "no class"."""
    saved = torch.load(runs / "shapes" / "prior" / "last.pt", weights_only=True)
    saved["config"]["classes"] = 9
    for weights in (saved["model"], saved["ema"]):
        weights["class_emb.weight"] = weights["class_emb.weight"][:10]
    torch.save(saved, tmp_path / "prior.pt")
    with pytest.raises(SystemExit, match="10 classes, expected the 9"):
        sample.main([str(runs / "shapes-dcmix"), "--prior", str(tmp_path / "prior.pt")])


def test_tokens_of_another_data_set_are_refused(runs, tmp_path):
    """--stage mixar does not read the pictures, but it knows whose tokens it finds."""
    with pytest.raises(SystemExit, match="was made from shapes"):
        train.main(mixar(runs, tmp_path / "run", "--data", tmp_path / "shapes"))


def test_a_second_start_after_the_last_picture_draws_nothing_again(runs, tmp_path):
    """Two processes find all pictures of a stopped run: the grid is made of them and the folder of parts is gone."""
    base = ["sample.py", str(runs / "shapes-dcmix"), "--count", "4", "--amp", "fp32", "--ar-steps", "2", "--diffusion-steps", "2"]
    assert run(*base, "--out", tmp_path / "parts").returncode == 0
    (tmp_path / "parts").rename(tmp_path / "grid.png.parts")
    started = run(*base, "--out", tmp_path / "grid.png", processes=2)
    assert started.returncode == 0 and "s/image" not in started.stdout, started.stderr
    assert (tmp_path / "grid.png").is_file() and not (tmp_path / "grid.png.parts").exists()


def test_random_numbers_are_a_function_of_seed_image_and_stream():
    """The same in any batch; others for another seed, another image, and for X_c than for X_d."""
    numbers = lambda *about: sample.image_rng(*about)(lambda g: g.random(4))
    batch = numbers(3, [5, 7], 0)
    assert torch.equal(batch[1], numbers(3, [7], 0)[0]) and torch.equal(batch, numbers(3, [5, 7], 0))
    assert len({tuple(numbers(seed, [i], stream)[0].tolist()) for seed in (3, 4) for i in (5, 6) for stream in (0, 1)}) == 8


def test_classes_by_name_or_number():
    """Names first: a class may be called 1."""
    assert sample.wanted_classes("star,3,0", ["disc", "ring", "square", "triangle", "star"]) == [4, 3, 0]
    assert sample.wanted_classes("1,0", ["1", "0"]) == [0, 1] and sample.wanted_classes("all", "abc") == [0, 1, 2]


def draw_late(rank, ranks, port, arguments):
    """sample.py in two processes; the first is late with the note of its settings, the second with its pictures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    written, drawn = tokenizers.write_whole, sample.System.draw

    def write_late(path, write):
        time.sleep(2 if Path(path).name == "settings.json" else 0)
        written(path, write)

    def draw_late(*about):
        assert Path(f"{arguments[-1]}.parts/settings.json").is_file(), "a picture before the note of its settings"
        time.sleep(2 * rank)
        return drawn(*about)

    tokenizers.write_whole, sample.System.draw = write_late, draw_late
    sample.main(arguments)


def test_processes_wait_for_each_other(runs, tmp_path):
    """No picture before the note that says how it was made; no grid before the last picture."""
    few = ["--count", "4", "--amp", "fp32", "--ar-steps", "2", "--diffusion-steps", "2"]
    torch.multiprocessing.spawn(draw_late, (2, 29625, [str(runs / "shapes-dcmix"), *few, "--out", str(tmp_path / "grid.png")]), nprocs=2)
    assert (tmp_path / "grid.png").is_file() and not (tmp_path / "grid.png.parts").exists()


def test_an_image_does_not_depend_on_batch_size_or_processes(runs, tmp_path):
    base = [str(runs / "shapes-dcmix"), "--count", "6", "--amp", "fp32", "--ar-steps", "4", "--diffusion-steps", "5", "--seed", "3"]
    sample.main([*base, "--batch-size", "6", "--out", str(tmp_path / "a")])
    sample.main([*base, "--batch-size", "1", "--out", str(tmp_path / "b")])
    two = run("sample.py", *base, "--batch-size", "2", "--out", tmp_path / "c", processes=2)
    assert two.returncode == 0 and "on each of 2 process(es)" in two.stdout
    read = lambda name, i: np.asarray(Image.open(tmp_path / name / f"{i:06d}.png")).astype(int)
    for i in range(6):
        assert abs(read("a", i) - read("b", i)).max() <= 1 and abs(read("a", i) - read("c", i)).max() <= 1
    assert abs(read("a", 0) - read("a", 1)).max() > 1


def test_sampling_resumes_and_refuses_other_settings(runs, tmp_path):
    base = [str(runs / "shapes-dcmix"), "--out", str(tmp_path / "s"), "--ar-steps", "2", "--diffusion-steps", "3"]
    sample.main([*base, "--count", "3"])
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("*.png")}
    sample.main([*base, "--count", "5"])
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("*.png")}
    assert len(now) == 5 and all(now[name] == times[name] for name in times)
    with pytest.raises(SystemExit, match="other settings"):
        sample.main([*base, "--count", "5", "--seed", "1"])
    (tmp_path / "s" / "settings.json").write_text("{")
    with pytest.raises(SystemExit, match="settings.json is damaged"):
        sample.main([*base, "--count", "5"])


def test_png_gif_classes_and_the_time_line(runs, tmp_path, capsys):
    base = [str(runs / "shapes-dcmix"), "--ar-steps", "3", "--diffusion-steps", "3"]
    sample.main([*base, "--count", "5", "--classes", "star,3", "--out", str(tmp_path / "g.png")])
    line = capsys.readouterr().out
    assert "s/image" in line and "of it the prior" in line and "3 AR x 3 diffusion" in line and "cpu" in line
    assert Image.open(tmp_path / "g.png").size == (64, 96) and not (tmp_path / "g.png.parts").exists()
    sample.main([*base, "--count", "4", "--classes", "0,1,2", "--out", str(tmp_path / "three.png")])
    assert Image.open(tmp_path / "three.png").size == (96, 64)
    sample.main([*base, "--count", "10", "--out", str(tmp_path / "g.gif")])
    assert Image.open(tmp_path / "g.gif").n_frames == 4
    sample.main([*base, "--count", "5", "--out", str(tmp_path / "five.gif")])
    assert Image.open(tmp_path / "five.gif").size == (320, 64)
    with pytest.raises(SystemExit, match="leave out --decode discrete"):
        sample.main([*base, "--count", "5", "--decode", "discrete", "--out", str(tmp_path / "discrete.gif")])
    with pytest.raises(SystemExit, match="--classes zebra: unknown class"):
        sample.main([*base, "--classes", "zebra"])


def test_foreign_tokenizers_are_refused(runs, tmp_path):
    import shutil
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs" / "shapes" / "vq" / "last.pt"
    saved = torch.load(path, weights_only=True)
    saved["ema"]["decoder.conv_out.bias"] += 1
    torch.save(saved, path)
    with pytest.raises(SystemExit, match="was trained with the vq"):
        sample.main([str(tmp_path / "runs" / "shapes-dcmix")])
