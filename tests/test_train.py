"""train.py as a user runs it: stages, resuming, signals, processes, recipes, flags.

The models are hardly trained. Only the machinery counts. test_losses.py tests the losses.
"""
import csv
import os
import shutil
import signal
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import backbone
import checkpoint
import dataset
import disk
import golden
import running
import output
import sample
import stages
import train
from running import SMALL, mixar, same_weights, sampling, weights

CPU = torch.device("cpu")


def log_rows(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def copy_run(runs, folder):
    """A copy of the fixture's MixAR run, for tests that train it on."""
    shutil.copytree(runs / "shapes-dcmix", folder)
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """Without the pictures at the end of a run, where a test does not need them."""
    monkeypatch.setattr(output, "save_figures", lambda system, folder, seed: None)


@pytest.fixture
def one_thread():
    """Sums in another order would differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# one command, and the ways to train

def test_one_command_leaves_every_stage_and_both_pictures(runs):
    for stage in ("vae", "vq", "prior"):
        assert (runs / "shapes" / stage / "last.pt").is_file()
        assert (runs / "shapes" / stage / "log.csv").is_file()
    # ten classes of 64 pixels beside 90 for the names; two rows (here), or two pairs, below 20
    assert Image.open(runs / "shapes-dcmix" / "samples.png").size == (730, 148)
    assert Image.open(runs / "shapes-dcmix" / "compare.png").size == (730, 276)
    # ten originals above ten reconstructions
    for stage in ("vae", "vq"):
        assert Image.open(runs / "shapes" / stage / "reconstructions.png").size == (730, 148)


WAYS = [
    ["--guidance", "none"],
    ["--guidance", "dcmix"],
    ["--guidance", "dcsa"],
    ["--guidance", "dcca"],
    ["--ti-mix"],
    ["--mix-at", "encoder"],
]


@pytest.mark.parametrize("flags", WAYS, ids=" ".join)
def test_every_guidance_trains_and_samples(runs, tmp_path, flags):
    prior = runs / "shapes" / "prior" / "last.pt"
    before = prior.stat().st_mtime_ns
    train.main(mixar(runs, tmp_path / "run", "--steps", 2, *flags))
    assert prior.stat().st_mtime_ns == before, "the shared stages are trained once"
    flags = ["--count", 4, "--ar-steps", 3, "--diffusion-steps", 4]
    sample.main(sampling(tmp_path / "run", tmp_path / "s.npz", *flags))
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (4, 32, 32, 3)


def test_a_stage_ends_the_command(runs, tmp_path):
    """--stage vae: this stage is made, and none after it."""
    train.main(["--runs", str(tmp_path), *SMALL, "--stage", "vae"])
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert [path.name for path in (tmp_path / "shapes").iterdir()] == ["vae"]
    assert same_weights(weights(tmp_path / "shapes" / "vae"), weights(runs / "shapes" / "vae"))


def test_init_keeps_the_rate_at_which_the_other_run_ended(runs, tmp_path, monkeypatch, no_pictures):
    """An annealed rate stays at its tenth, however long this run is."""
    monkeypatch.setattr(checkpoint, "LOG_EVERY", 1)
    monkeypatch.setitem(train.RECIPES["tiny"]["mixar"], "warmup", 1)
    train.main(mixar(runs, tmp_path / "run", "--init", runs / "shapes-dcmix", "--steps", 4))
    rate = 0.1 * train.RECIPES["tiny"]["mixar"]["lr"]
    assert [float(row["lr"]) for row in log_rows(tmp_path / "run")] == pytest.approx([rate] * 4)


def test_ti_mix_starts_from_a_dcmix_checkpoint(runs, tmp_path, no_pictures):
    before = runs / "shapes-dcmix"
    flags = ["--ti-mix", "--init", before / "last.pt", "--steps", 1, "--lr", 0]
    train.main(mixar(runs, tmp_path / "run", *flags))
    assert same_weights(weights(before), weights(tmp_path / "run"))
    assert weights(tmp_path / "run", "ema_start") == 2


def test_init_goes_on_as_if_the_run_had_been_longer(runs, tmp_path, monkeypatch, no_pictures):
    """Two steps and, with --init, two more end as four steps do.

    Optimiser, moving average, data order and random numbers go on. The averages are also counted
    on after a resume.
    """
    counts = []
    shipped = checkpoint.update_ema

    def count(ema, model, n):
        counts.append(n)
        shipped(ema, model, n)

    # an annealed rate depends on the length of its run
    monkeypatch.setitem(train.RECIPES["tiny"]["mixar"], "anneal", False)
    train.main(mixar(runs, tmp_path / "first", "--steps", 2))
    monkeypatch.setattr(checkpoint, "update_ema", count)
    train.main(mixar(runs, tmp_path / "four", "--steps", 4))
    init = ["--init", tmp_path / "first"]
    train.main(mixar(runs, tmp_path / "two", *init, "--steps", 2))
    assert weights(tmp_path / "two", "step") == 2
    for key in ("model", "ema"):
        four = weights(tmp_path / "four", key)
        assert same_weights(four, weights(tmp_path / "two", key)), key
        assert not same_weights(four, weights(tmp_path / "first", key)), key
    train.main(mixar(runs, tmp_path / "two", *init, "--steps", 3))
    assert counts == [0, 1, 2, 3] + [2, 3] + [4]


# rates and averages

def test_rate_warms_up_then_stays_or_anneals_to_a_tenth():
    recipe = dict(lr=2.0, warmup=4, steps=100, anneal=False)
    rates = [train.learning_rate(recipe, step) for step in (0, 1, 3, 99)]
    assert rates == [0.5, 1.0, 2.0, 2.0]
    share = recipe | dict(warmup=0.1)
    assert train.learning_rate(share, 4) == 1.0, "a warm-up below 1 is a share of all steps"
    annealed = recipe | dict(anneal=True)
    assert train.learning_rate(annealed, 50) == pytest.approx(1.1)
    assert train.learning_rate(annealed, 100) == pytest.approx(0.2)


@pytest.mark.parametrize("n, expected", [(0, 0.1), (8, 0.5), (10 ** 6, 0.75)])
def test_moving_average_warms_up(n, expected):
    """Decay min(decay, (1 + n) / (10 + n)): 0.1 at first, 0.5 at n = 8, then the given one."""
    ema = torch.nn.Linear(1, 1)
    model = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(ema.weight)
    torch.nn.init.zeros_(model.weight)
    checkpoint.update_ema(ema, model, n, 0.75)
    assert abs(float(ema.weight.detach()) - expected) < 1e-6


def test_golden_moving_average():
    """MaskBit's decays and average, from its second update on.

    MaskBit's first update copies the weights. Ours keeps a tenth of the start.
    """
    g = golden.load("maskbit_generator_tiny")
    ema = torch.nn.Linear(2, 1, bias=False)
    model = torch.nn.Linear(2, 1, bias=False)
    # both after the first update
    ema.weight.data[0] = g["ema_trace"][0]
    model.weight.data[0] = torch.tensor([1.5, -1.5])
    for n in range(1, 12):
        model.weight.data += 0.5
        checkpoint.update_ema(ema, model, n, 0.999)
        assert golden.difference(ema.weight.detach()[0], g["ema_trace"][n]) < 1e-6
    decays = dict(zip(g["ema_decay_at_step"].tolist(), g["ema_decay_at"].tolist()))
    decays.pop(1, None)
    for n, decay in decays.items():
        ema.weight.data.fill_(1)
        model.weight.data.zero_()
        checkpoint.update_ema(ema, model, n - 1, 0.999)
        assert ema.weight.detach()[0, 0].item() == pytest.approx(decay, abs=1e-6)


def test_the_optimiser_follows_the_recipe(runs):
    """The optimiser has the rate of the last step, here in the warm-up.

    This holds for the annealed VAE and for MixAR.
    """
    for folder, kind in ((runs / "shapes" / "vae", "vae"), (runs / "shapes-dcmix", "mixar")):
        rate = train.learning_rate(train.RECIPES["tiny"][kind] | dict(steps=2), 1)
        for group in weights(folder, "optimizer")["param_groups"]:
            assert group["lr"] == pytest.approx(rate)


# resuming

def test_data_order_and_dropout_are_functions_of_seed_and_step():
    """20 pictures in batches of 8 are two batches an epoch.

    No picture comes twice in an epoch. The next epoch has another order.
    """
    args = train.parse(["--device", "cpu"])

    def get_batch(pictures, rng):
        return (torch.tensor(pictures),)

    def numbers(step):
        (batch, _), = train.step_batches(args, get_batch, 20, 8, step, 1)
        return batch[0].tolist(), torch.rand(1).item()

    found = [numbers(step) for step in range(4)]
    assert found == [numbers(step) for step in range(4)]
    pictures, dropout = zip(*found)
    assert len(set(dropout)) == 4
    assert len({*pictures[0], *pictures[1]}) == 16
    assert len({*pictures[2], *pictures[3]}) == 16
    assert pictures[0] != pictures[2]


def test_dropout_is_apart_from_the_noise_of_the_data():
    args = train.parse(["--device", "cpu"])
    (_, rng), = train.step_batches(args, lambda pictures, rng: (), 64, 8, 3, 1)
    assert not torch.equal(torch.randn(8, 5), rng(torch.randn, 5))


def wait_for_rows(process, folder, rows):
    """Wait until the log of a started program has so many rows."""
    log = folder / "log.csv"
    while not log.is_file() or len(log.read_text().splitlines()) <= rows:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def test_killed_run_ends_bit_identical_to_an_uninterrupted_one(
        runs, tmp_path, monkeypatch, no_pictures, one_thread):
    whole = tmp_path / "whole"
    resumed = tmp_path / "killed"
    flags = ["--steps", 14, "--save-every", 4]
    undisturbed = running.start("tests/quick_train.py", *mixar(runs, whole, *flags))
    killed = running.start("tests/quick_train.py", *mixar(runs, resumed, *flags))
    wait_for_rows(killed, resumed, 6)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 4 <= weights(resumed, "step") < 14

    monkeypatch.setattr(checkpoint, "LOG_EVERY", 1)
    train.main(mixar(runs, resumed, *flags))
    undisturbed.communicate()
    for key in ("model", "ema"):
        same = same_weights(weights(whole, key), weights(resumed, key))
        assert same, f"{key} differs after the resume"
    losses = [[(row["step"], row["loss"]) for row in log_rows(run)] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 14


def test_sigterm_saves_and_names_the_checkpoint(runs, tmp_path):
    out = tmp_path / "run"
    flags = ["--steps", 100000, "--save-every", 100000]
    process = running.start("tests/quick_train.py", *mixar(runs, out, *flags))
    wait_for_rows(process, out, 2)
    process.send_signal(signal.SIGTERM)
    said, err = process.communicate(timeout=30)
    step = weights(out, "step")
    assert process.returncode == 128 + signal.SIGTERM and step >= 2
    assert f"mixar: stopped by a signal at step {step}, saved in {out / 'last.pt'}\n" in said
    assert "Traceback" not in err


def interrupt_after_first_step(monkeypatch):
    """Ctrl-C comes when the first step has been made."""
    shipped = checkpoint.update_ema

    def interrupt(ema, model, n):
        shipped(ema, model, n)
        if n == 0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoint, "update_ema", interrupt)


def test_ctrl_c_saves_and_the_run_goes_on(runs, tmp_path, monkeypatch, capsys, no_pictures):
    """The second step sees that Ctrl-C came in the first one. It is made and saved.

    The resumed run ends as one without an interruption does.
    """
    out = tmp_path / "run"
    train.main(mixar(runs, tmp_path / "whole", "--steps", 3))
    interrupt_after_first_step(monkeypatch)
    with pytest.raises(SystemExit) as end:
        train.main(mixar(runs, out, "--steps", 3))
    assert end.value.code == 128 + signal.SIGINT
    line = f"mixar: stopped by a signal at step 2, saved in {out / 'last.pt'}\n"
    assert line in capsys.readouterr().out
    assert weights(out, "step") == 2
    train.main(mixar(runs, out, "--steps", 3))
    for key in ("model", "ema"):
        assert same_weights(weights(out, key), weights(tmp_path / "whole", key))


def test_ctrl_c_in_the_last_step_ends_the_program(runs, tmp_path, monkeypatch, no_pictures):
    out = tmp_path / "run"
    interrupt_after_first_step(monkeypatch)
    with pytest.raises(SystemExit) as end:
        train.main(mixar(runs, out, "--steps", 1))
    assert end.value.code == 128 + signal.SIGINT
    assert weights(out, "step") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_the_loop_ends_the_program(runs, tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(backbone, "load_model", lambda *given: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as end:
        train.main(mixar(runs, tmp_path / "run", "--steps", 1))
    assert end.value.code == 128 + number
    assert f"stopped by {number.name}\n" in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_in_place_of_a_checkpoint_stops_before_training(runs, tmp_path):
    (tmp_path / "run" / "last.pt").mkdir(parents=True)
    with pytest.raises(SystemExit, match="last.pt/last.pt: no such file; expected a mixar"):
        train.main(mixar(runs, tmp_path / "run", "--steps", 1))


def test_another_init_is_said(runs, tmp_path, capsys, no_pictures):
    """A resumed run has begun from the first one that was named."""
    before = runs / "shapes-dcmix"
    train.main(mixar(runs, tmp_path / "run", "--init", before, "--steps", 1))
    train.main(mixar(runs, tmp_path / "run", "--init", before / "last.pt", "--steps", 1))
    said = capsys.readouterr().out
    assert f"mixar: 1 of 1 steps are done (saved with init {before}, not {before}/last.pt)" in said


def test_resuming_with_another_seed_is_refused(runs, tmp_path):
    run = copy_run(runs, tmp_path / "run")
    with pytest.raises(SystemExit, match="last.pt was made with seed 0, not 1"):
        train.main(mixar(runs, run, "--steps", 3, "--seed", 1))
    assert weights(run, "step") == 2


def test_truncated_last_checkpoint_stops_the_resume_and_is_kept(runs, tmp_path):
    run = copy_run(runs, tmp_path / "run")
    path = run / "last.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="last.pt: not a mixar checkpoint") as error:
        train.main(mixar(runs, run, "--steps", 3))
    assert "\n" not in str(error.value)
    assert path.stat().st_size == 1000


def test_the_log_is_never_empty_between_a_resume_and_its_next_row(tmp_path):
    args = train.parse(["--steps", "20"])
    stage = checkpoint.Stage("mixar", tmp_path, {}, {}, None)
    log = checkpoint.Log(args, stage, 0)
    for step in range(1, 11):
        log.write(step, 1.0, 1e-3, 1.0)
    with (tmp_path / "log.csv").open("a") as file:
        # what killed processes left
        file.write("15,0.5\n16,0.5,0.001,1.0,9.9,")
    resumed = checkpoint.Log(args, stage, 18)
    assert resumed
    assert [row["step"] for row in log_rows(tmp_path)] == [str(checkpoint.LOG_EVERY)] == ["10"]


def test_the_log_needs_no_progress_bar(tmp_path, monkeypatch):
    """TQDM_DISABLE=1 hides all bars. A bar that is off keeps neither its start nor the time."""
    monkeypatch.setattr(checkpoint, "tqdm", partial(checkpoint.tqdm, disable=True))
    args = train.parse(["--steps", "14", "--batch-size", "6"])
    log = checkpoint.Log(args, checkpoint.Stage("mixar", tmp_path, {}, {}, None), 4)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: log.start + 1.5)
    for step in range(5, 15):
        log.write(step, 1.0, 1e-3, 1.0)
    speeds = [(row["step"], row["images_per_second"], row["seconds"]) for row in log_rows(tmp_path)]
    assert speeds == [("10", "24.0", "1.50"), ("14", "40.0", "1.50")]


# several processes

KINDS = ["vae", "vq", "prior", "mixar"]


def batch_of(kind, rows):
    """These rows of a batch of 8."""
    g = torch.Generator().manual_seed(0)
    x_d = torch.randint(0, 2, (8, 64, 8), generator=g).float() * 2 - 1
    mean = torch.randn(8, 64, 8, generator=g)
    std = torch.rand(8, 64, 8, generator=g)
    pictures = torch.rand(8, 3, 32, 32, generator=g)
    latents = [mean, std, x_d, torch.arange(8)]
    batch = latents if kind in ("prior", "mixar") else [pictures]
    return [a[rows] for a in batch]


def show_gradients(model):
    """The head starts at zero, which would hide most gradients of MixAR."""
    for p in model.diffloss.parameters():
        torch.nn.init.normal_(p, std=0.1)


def fresh_model(kind):
    torch.manual_seed(0)
    preset = backbone.PRESETS["tiny"]
    if kind == "mixar":
        model = backbone.MAR(N=64, d_c=8, d_d=8, classes=10, **preset["mar"])
        show_gradients(model)
        return model
    if kind == "prior":
        return backbone.MaskBitPrior(N=64, bits=8, classes=10, **preset["prior"])
    return backbone.KINDS[kind](**preset[kind])


def loss_of(kind):
    mixar_loss = partial(train.mixar_loss, prior=None, args=train.parse([]))
    losses = dict(vae=stages.vae_loss, vq=stages.vq_loss, prior=train.prior_loss, mixar=mixar_loss)
    return losses[kind]


def gradients(kind):
    """One step's gradients on the global batch of 8, as train.fit computes them."""
    model = fresh_model(kind)
    module = train.Loss(model, loss_of(kind))
    if dist.is_initialized():
        module = DistributedDataParallel(module)
    rng = train.Rng(0, 5, 8, CPU)
    module(batch_of(kind, rng.rows), rng, 5).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def save_gradients(rank, folder):
    """One of two processes: the gradients of every model."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found = {kind: gradients(kind) for kind in KINDS}
    if rank == 0:
        torch.save(found, folder / "two.pt")
    # nobody leaves while another still talks
    dist.barrier()
    train.gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gradients_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    torch.multiprocessing.spawn(save_gradients, (folder,), nprocs=2)
    return torch.load(folder / "two.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_gradients_of_one(gradients_of_two, kind):
    one = gradients(kind)
    two = gradients_of_two[kind]
    largest = max(float(g.abs().max()) for g in one.values())
    assert largest > 1e-4
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-5 * largest, name


def test_torchrun_with_two_processes_trains_the_same_weights(runs, tmp_path, no_pictures):
    """Each process takes its share in two parts, between which the processes do not talk.

    What all processes know is printed once.
    """
    arguments = mixar(runs, tmp_path / "two", "--steps", 3, "--accumulate", 2)
    processes = running.start("tests/quick_train.py", *arguments, processes=2)
    train.main(mixar(runs, tmp_path / "one", "--steps", 3))
    said, err = processes.communicate()
    assert processes.returncode == 0, err
    assert said.count("data: 64 pictures") == 1
    one = weights(tmp_path / "one")
    two = weights(tmp_path / "two")
    for key in one:
        assert torch.allclose(one[key], two[key], atol=2e-5), key


def test_each_process_takes_its_own_gpu(monkeypatch):
    """The GPU of the process's number on its machine."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **more: None)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with train.process_group():
        assert taken == [1]


def test_a_batch_that_does_not_divide_is_one_line(runs, tmp_path):
    words = r"--batch-size 8 \(stage vae\) is not a multiple of 3, the processes times"
    with pytest.raises(SystemExit, match=words):
        train.main(mixar(runs, tmp_path / "run", "--steps", 1, "--accumulate", 3))


# less memory, same gradients

@pytest.mark.parametrize("kind", ["vae", "prior", "mixar"])
def test_accumulation_gives_the_gradients_of_the_undivided_batch(monkeypatch, kind):
    """--accumulate: each of four parts takes its own rows of the same random numbers."""
    monkeypatch.setattr(train, "CLIP", 1e9)
    args = train.parse(["--amp", "fp32"])
    model = fresh_model(kind)
    ddp = train.Loss(model, loss_of(kind))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step(parts):
        rngs = [train.Rng(0, 5, 8, CPU, part, parts) for part in range(parts)]
        assert [i for rng in rngs for i in range(8)[rng.rows]] == list(range(8))
        batches = [(batch_of(kind, rng.rows), rng) for rng in rngs]
        state = SimpleNamespace(model=model, optimizer=optimizer, step=5)
        loss, _, _ = train.update(args, ddp, state, batches)
        return loss, [p.grad.clone() for p in model.parameters()]

    loss, whole = step(1)
    loss_of_parts, in_parts = step(4)
    assert loss == pytest.approx(loss_of_parts, rel=1e-5)
    largest = max(float(g.abs().max()) for g in whole)
    assert largest > 1e-4
    for one, four in zip(whole, in_parts):
        assert (one - four).abs().max() <= 1e-5 * largest


def test_processes_talk_once_a_step():
    """--accumulate: gradients are averaged over processes after the last part alone.

    DistributedDataParallel averages those of a forward call if require_backward_grad_sync is True.
    """
    talks = []

    def mean_output(model, batch, rng, step):
        talks.append(loss_module.require_backward_grad_sync)
        return model(*batch).mean()

    args = train.parse(["--amp", "fp32"])
    model = torch.nn.Linear(2, 1)
    loss_module = train.Loss(model, mean_output)
    parts = [((torch.ones(1, 2),), train.Rng(0, 0, 1, CPU)) for _ in range(3)]
    state = SimpleNamespace(model=model, step=0,
                            optimizer=torch.optim.SGD(model.parameters(), 0.0))
    for _ in range(2):
        train.update(args, loss_module, state, parts)
    assert talks == [False, False, True] * 2
    assert model.weight.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("guidance", backbone.GUIDANCES)
def test_recomputed_activations_give_the_same_gradients(guidance):
    """--checkpoint-activations, with dropout: the second pass drops the same."""
    torch.manual_seed(0)
    config = backbone.PRESETS["tiny"]["mar"] | dict(dropout=0.1)
    model = backbone.MAR(N=64, d_c=8, d_d=8, classes=10, guidance=guidance, **config).train()
    show_gradients(model)
    loss = loss_of("mixar")
    found = []
    for recompute in (False, True):
        for blocks in (model.encoder_blocks, model.decoder_blocks, model.diffloss.net.res_blocks):
            blocks.recompute = recompute
        torch.manual_seed(1)
        rng = train.Rng(0, 5, 8, CPU)
        model.zero_grad()
        loss(model, batch_of("mixar", rng.rows), rng, 5).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*found))


def test_recomputed_activations_are_not_kept(tmp_path):
    """--checkpoint-activations keeps less than half of the numbers for the backward pass.

    Without it the inner activations of every block stay in memory, also those of the head's blocks,
    which see each masked token R times.
    """
    mean, _, x_d, y = batch_of("mixar", slice(8))
    m = torch.arange(64).expand(8, -1) < 50
    drop = torch.zeros(8, dtype=torch.bool)
    t = torch.zeros(1, 400, dtype=torch.long)
    noise = torch.zeros(1, 400, 8)
    config = dict(N=64, d_c=8, d_d=8, classes=10) | backbone.PRESETS["tiny"]["mar"]

    stage = checkpoint.Stage("mixar", tmp_path, config, {}, None)

    def numbers_kept(*flags):
        model = checkpoint.State(train.parse(flags), stage).model.train()
        sizes = {}

        def note_size(x):
            sizes[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note_size, lambda x: x):
            z = model(mean, x_d, m, y, drop)
            backbone_alone = sum(sizes.values())
            loss = model.diffloss.loss(z[m], mean[m], t, noise)
        assert loss.requires_grad
        return np.array([backbone_alone, sum(sizes.values()) - backbone_alone])

    assert (numbers_kept("--checkpoint-activations") < 0.5 * numbers_kept()).all()


# models from files

def test_models_from_files_are_used_and_found_again(runs, tmp_path):
    """--vae, --vq and --prior: no stage trains these models, and the run names their files.

    It refuses another prior or tokenizer in such a file, but --prior gives it another prior.
    """
    files = []
    for kind in ("vae", "vq", "prior"):
        shutil.copy(runs / "shapes" / kind / "last.pt", tmp_path / f"{kind}.pt")
        files += [f"--{kind}", str(tmp_path / f"{kind}.pt")]
    new = tmp_path / "new"
    train.main([*SMALL, *files, "--runs", str(new), "--steps", "2", "--guidance", "none"])
    assert not any((new / "shapes" / kind).exists() for kind in ("vae", "vq", "prior"))
    arguments = sampling(new / "shapes-none", tmp_path / "s.npz", "--count", 2)
    sample.main(arguments)

    shutil.copy(runs / "shapes" / "prior" / "last.pt", tmp_path / "other.pt")
    running.change_weight(tmp_path / "prior.pt", "input_proj.bias")
    with pytest.raises(SystemExit, match="was trained with the prior"):
        sample.main(arguments)
    arguments += ["--prior", str(tmp_path / "other.pt")]
    sample.main(arguments)
    running.change_weight(tmp_path / "vae.pt", "quant_conv.bias")
    with pytest.raises(SystemExit, match="was trained with the vae"):
        sample.main(arguments)


def test_official_tokenizers_make_the_token_cache(tmp_path):
    """A KL-VAE and a MaskBit tokenizer in their official formats, by path alone."""
    torch.save(golden.official("kl_tiny"), tmp_path / "vae.pth")
    torch.save(golden.official("maskbit_tokenizer_tiny"), tmp_path / "vq.pth")
    files = ["--vae", str(tmp_path / "vae.pth"), "--vq", str(tmp_path / "vq.pth")]
    flags = ["--images", "8", "--runs", str(tmp_path), "--stage", "cache"]
    train.main([*SMALL, *files, *flags])
    tokens = dataset.Tokens(tmp_path / "shapes" / "tokens")
    mean, _, x_d, _ = tokens.batch(np.array([0]), lambda f: torch.zeros(1))
    assert mean.shape == (1, 256, 4) and x_d.shape == (1, 256, 6)


def test_models_that_do_not_go_together_are_one_line(runs, tmp_path):
    """A tokenizer of another stride, and a prior of other tokens."""
    torch.save(golden.official("maskbit_tokenizer_tiny"), tmp_path / "vq.pth")
    torch.save(golden.official("maskbit_generator_tiny_postnorm"), tmp_path / "prior.pth")
    start = mixar(runs, tmp_path / "run", "--steps", 1)
    with pytest.raises(SystemExit, match="vq.pth has 2 levels; what it is used with has 3"):
        train.main([*start, "--vq", str(tmp_path / "vq.pth")])
    words = r"prior.pth has \(16, .*\) tokens, bits and classes; .* \(64, 8, 10\)"
    with pytest.raises(SystemExit, match=words):
        train.main([*start, "--prior", str(tmp_path / "prior.pth")])


def test_what_others_were_made_with_is_never_trained_on(runs, tmp_path):
    """A finished tokenizer or prior stays as it is; a longer one needs another folder.

    Otherwise tokens and runs made with it would be of no use any more.
    """
    shutil.copytree(runs, tmp_path / "runs")
    arguments = ["--runs", str(tmp_path / "runs"), *SMALL, "--steps", "4"]
    before = disk.fingerprint(backbone.load_model(tmp_path / "runs/shapes/vae", "vae")[0])
    for kind in ("vae", "vq", "prior"):
        words = f"{kind}/last.pt is finished after 2 steps, not 3, and is not trained further"
        with pytest.raises(SystemExit, match=words):
            train.main([*arguments, f"--{kind}-steps", "3"])
    after = disk.fingerprint(backbone.load_model(tmp_path / "runs/shapes/vae", "vae")[0])
    assert before == after
    assert weights(tmp_path / "runs" / "shapes-dcmix", "step") == 2


def test_a_stopped_tokenizer_that_was_used_is_finished(runs, tmp_path):
    """Stopped after 2 of 4 steps, then asked for 2: tokens are made with it as it is.

    From then on it is finished, and the first command no longer trains it on.
    """
    shutil.copytree(runs / "shapes", tmp_path / "shapes", ignore=shutil.ignore_patterns("tokens"))
    path = tmp_path / "shapes" / "vae" / "last.pt"
    saved = torch.load(path, weights_only=True)
    saved["args"]["recipe"]["vae"]["steps"] = 4
    torch.save(saved, path)
    train.main(["--runs", str(tmp_path), *SMALL, "--stage", "cache"])
    assert weights(path, "step") == 2
    with pytest.raises(SystemExit, match="vae/last.pt is finished after 2 steps, not 4"):
        train.main(["--runs", str(tmp_path), *SMALL, "--vae-steps", "4", "--stage", "vae"])


def test_models_of_other_tokens_are_not_gone_on_with(runs, tmp_path):
    """Another bit tokenizer makes other tokens: neither the old prior nor the old MixAR fits them.
    """
    shutil.copytree(runs, tmp_path / "runs")
    shared = tmp_path / "runs" / "shapes"
    running.change_weight(shared / "vq" / "last.pt", "decoder.conv_out.bias")
    arguments = ["--runs", str(tmp_path / "runs"), *SMALL, "--steps", "4"]
    with pytest.raises(SystemExit, match="tokens was made with vq .*, not .* remove it"):
        train.main(arguments)
    shutil.rmtree(shared / "tokens")
    with pytest.raises(SystemExit, match="prior/last.pt was made with vq .*, not .* remove it"):
        train.main(arguments)
    shutil.rmtree(shared / "prior")
    with pytest.raises(SystemExit, match="shapes-dcmix/last.pt was made with vq .*, not "):
        train.main(arguments)


def test_every_start_says_how_far_each_stage_is(runs, tmp_path, capsys, no_pictures):
    """It names what differs from the settings that a stage was begun with."""
    run = copy_run(runs, tmp_path / "run")
    flags = ["--steps", 3, "--lr", 1e-3, "--prior-steps", 1]
    train.main(mixar(runs, run, *flags))
    said = capsys.readouterr().out.splitlines()
    assert said[:5] == [
        "data: 64 pictures in 10 classes",
        "vae: 2 of 2 steps are done",
        "vq: 2 of 2 steps are done",
        "prior: 2 of 1 steps are done (saved with steps 2, not 1)",
        "mixar: 2 of 3 steps are done (saved with steps 2, not 3, lr 0.005, not 0.001)"]
    train.main(mixar(runs, tmp_path / "other", "--steps", 1, "--seed", 7, "--amp", "bf16"))
    said = capsys.readouterr().out
    assert "vae: 2 of 2 steps are done (saved with amp fp32, not bf16, seed 0, not 7)" in said


@pytest.mark.parametrize("flags, words", [
    (["--ti-mix"], "last.pt was made with ti_mix False, not True"),
    (["--init", "RUN"], "last.pt was made with init False, not True"),
    (["--guidance", "none"], "last.pt was made with guidance dcmix, not none"),
    (["--images", "32"], "vae/last.pt was made with pictures 64, not 32; pictures of other names"),
    (["--mirror"], "vae/last.pt was made with mirror False, not True"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_run_is_not_gone_on_with_as_another_model(runs, tmp_path, flags, words):
    run = copy_run(runs, tmp_path / "run")
    flags = [str(runs / "shapes-dcmix") if flag == "RUN" else flag for flag in flags]
    with pytest.raises(SystemExit, match=words):
        train.main(mixar(runs, run, "--steps", 3, *flags))
    assert weights(run, "step") == 2


def test_a_stop_after_a_loss_that_is_not_finite_says_that_nothing_is_saved(
        runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "update", lambda *given: (float("nan"), 1.0, True))
    with pytest.raises(SystemExit):
        train.main(mixar(runs, tmp_path / "run", "--steps", 4))
    assert "stopped by a signal at step 1, not saved" in capsys.readouterr().out
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_picture_that_a_killed_stage_lacks_is_drawn(runs, tmp_path):
    """Killed between the last step and the picture: the next start draws it, and saves nothing.

    Another seed's command must not write its seed into the checkpoint.
    """
    shutil.copytree(runs / "shapes" / "vae", tmp_path / "shapes" / "vae")
    picture = tmp_path / "shapes" / "vae" / "reconstructions.png"
    picture.unlink()
    train.main(["--runs", str(tmp_path), *SMALL, "--stage", "vae", "--seed", "7"])
    for name in ("reconstructions.png", "last.pt"):
        made = tmp_path / "shapes" / "vae" / name
        assert made.read_bytes() == (runs / "shapes" / "vae" / name).read_bytes()


def test_tokenizers_of_other_pictures_are_refused(runs, tmp_path):
    """A folder of pictures called shapes has its runs where those of the embedded set are."""
    (tmp_path / "shapes").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "shapes" / "a.png")
    with pytest.raises(SystemExit, match="vae/last.pt was made with .*pictures 64, not 1"):
        train.main(mixar(runs, tmp_path / "run", "--data", tmp_path / "shapes"))


@pytest.mark.parametrize("flags", [
    ["--runs", "PLACE"], ["--runs", "PLACE/pets/cat"], ["--out", "PLACE/pets/run"],
], ids=" ".join)
def test_runs_are_never_written_into_the_data(tmp_path, flags):
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "pets" / "cat" / "a.png")
    flags = [flag.replace("PLACE", str(tmp_path)) for flag in flags]
    with pytest.raises(SystemExit, match="one lies in the other"):
        train.main(["--data", str(tmp_path / "pets"), *SMALL, "--stage", "vae", *flags])
    assert len(list(tmp_path.rglob("*"))) == 3


def test_no_process_goes_on_before_the_first_one_has_the_lock(tmp_path, monkeypatch):
    """Where the first is refused, the others end at `barrier`, not with a traceback later on."""
    done = []

    def barrier():
        with pytest.raises(SystemExit, match="another program"), disk.locked(tmp_path):
            pass
        done.append("barrier")

    def read_stage(args, stage):
        done.append("read_stage")
        raise SystemExit

    monkeypatch.setattr(train, "barrier", barrier)
    monkeypatch.setattr(checkpoint, "read_stage", read_stage)
    with pytest.raises(SystemExit):
        train.fit(train.parse([]), checkpoint.Stage("mixar", tmp_path, {}, {}, None))
    assert done == ["barrier", "read_stage"]


def test_a_second_program_on_the_same_stage_is_told_so(runs, tmp_path):
    with disk.locked(tmp_path / "run"):
        with pytest.raises(SystemExit, match="run: another program is writing into this folder"):
            train.main(mixar(runs, tmp_path / "run", "--steps", 1))


def test_programs_share_a_complete_cache_but_only_one_makes_it(runs, tmp_path, no_pictures):
    mine = tmp_path / "runs"
    shutil.copytree(runs / "shapes", mine / "shapes")
    note = mine / "shapes" / "tokens" / "meta.json"
    with disk.locked(note.parent):
        train.main(mixar(mine, tmp_path / "run", "--steps", 1))
        meta = disk.read_json(note)
        meta.pop("mean")
        disk.write_json(note, meta)
        with pytest.raises(SystemExit, match="tokens: another program is writing"):
            train.main(mixar(mine, tmp_path / "run", "--steps", 1))
    assert weights(tmp_path / "run", "step") == 1


def test_a_run_names_our_files_relative_to_itself(runs):
    """So a folder of runs may be moved or renamed."""
    meta = weights(runs / "shapes-dcmix", "meta")
    files = [file for file, _ in meta["files"].values()]
    assert files == ["../shapes/vae", "../shapes/vq", "../shapes/prior"]
    assert meta["shared"] == "../shapes"


def test_a_run_reached_through_links_samples(runs, tmp_path, no_pictures):
    """`..` leads out of where a link points to, not out of where the link lies."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    train.main(mixar(runs, tmp_path / "link" / "run", "--steps", 1))
    (tmp_path / "last.pt").symlink_to(tmp_path / "link" / "run" / "last.pt")
    for path in (tmp_path / "link" / "run", tmp_path / "last.pt"):
        system = sample.System(path)
        assert system.shared.resolve() == (runs / "shapes").resolve()


def test_optimiser_moments_of_other_shapes_are_refused(runs, tmp_path):
    """PyTorch takes them, and would read outside the array."""
    run = copy_run(runs, tmp_path / "run")
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(saved, run / "last.pt")
    with pytest.raises(SystemExit, match="last.pt: not a mixar .*moments are not finite or"):
        train.main(mixar(runs, run, "--steps", 3))


def test_pictures_for_which_memory_is_missing_do_not_end_the_run(
        runs, tmp_path, monkeypatch, capsys):
    def save_figures(system, folder, seed):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(output, "save_figures", save_figures)
    train.main(mixar(runs, tmp_path / "run", "--steps", 3, "--sample-every", 1))
    assert capsys.readouterr().out.count("out of memory: no pictures") == 3
    assert weights(tmp_path / "run", "step") == 3


@pytest.mark.parametrize("damage, words", [
    (lambda saved: saved["optimizer"]["state"][0].pop("exp_avg"), "missing 'exp_avg'"),
    (lambda saved: saved["optimizer"].update(state={}), "missing 'exp_avg'"),
    (lambda saved: saved["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan),
     "moments are not finite"),
    (lambda saved: saved.update(ema_start="x"), "invalid literal"),
    (lambda saved: saved.update(step=-3), "a mixar checkpoint of -3 steps"),
])
def test_a_damaged_state_is_one_line(runs, tmp_path, damage, words):
    run = copy_run(runs, tmp_path / "run")
    saved = torch.load(run / "last.pt", weights_only=True)
    damage(saved)
    torch.save(saved, run / "last.pt")
    with pytest.raises(SystemExit, match=words) as error:
        train.main(mixar(runs, run, "--steps", 3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag, kind", [("--vq", "vq"), ("--prior", "prior"), ("--init", "mixar")])
def test_a_file_that_does_not_fit_is_refused_before_anything_is_trained(tmp_path, flag, kind):
    torch.save(dict(a=torch.zeros(1)), tmp_path / "no.pt")
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit, match=f"no.pt: not a {kind} checkpoint: missing"):
        train.main(mixar(runs, tmp_path / "run", flag, tmp_path / "no.pt"))
    assert not runs.exists()


def test_a_run_that_cannot_be_written_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "file").touch()
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit, match="cannot go on: .* Not a directory: .*file/run"):
        train.main(mixar(runs, tmp_path / "file" / "run"))
    assert not runs.exists()


def test_a_log_that_is_no_text_does_not_stop_a_resume(runs, tmp_path, no_pictures):
    run = copy_run(runs, tmp_path / "run")
    with (run / "log.csv").open("ab") as file:
        file.write(b"\xff\xfe,\x80\n1e9,2,3,4,5,6\n1,2,3,4,5,6.6.6\n")
    train.main(mixar(runs, run, "--steps", 3))
    assert [row["step"] for row in log_rows(run)] == ["2", "3"]


def test_a_finished_run_learns_where_its_data_moved(runs, tmp_path, no_pictures):
    """A second command, with nothing left to train, notes the new folder for --truth and fid.py."""
    run = copy_run(runs, tmp_path / "run")
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["meta"]["data"] = "/moved"
    torch.save(saved, run / "last.pt")
    train.main(mixar(runs, run, "--steps", 2))
    assert weights(run, "meta")["data"] == "shapes"
    assert same_weights(weights(run), saved["model"])


def test_another_guidance_than_the_run_has_is_said_before_anything_is_trained(runs, tmp_path):
    flags = ["--guidance", "none", "--out", runs / "shapes-dcmix"]
    with pytest.raises(SystemExit, match="last.pt was made with guidance dcmix, not none"):
        train.main(mixar(tmp_path / "other", *flags[-1:], *flags[:2]))
    assert not (tmp_path / "other").exists()


def test_a_prior_of_other_bits_is_refused(runs, tmp_path):
    """Of the same shape, but trained on the tokens of another bit tokenizer."""
    saved = torch.load(runs / "shapes" / "prior" / "last.pt", weights_only=True)
    saved["settings"]["tokens"]["vq"] = "0" * 16
    torch.save(saved, tmp_path / "prior.pt")
    with pytest.raises(SystemExit, match="prior.pt has 0000000000000000 as its bit tokenizer"):
        train.main(mixar(runs, tmp_path / "run", "--prior", tmp_path / "prior.pt"))


def test_the_c_library_is_told_to_keep_memory(monkeypatch):
    """M_MMAP_MAX 0: no block is mapped by itself. M_TRIM_THRESHOLD -1: nothing is given back."""
    said = []

    class Glibc:
        def mallopt(self, parameter, value):
            said.append((parameter, value))

    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: Glibc())
    train.keep_freed_memory()
    assert said == [(-4, 0), (-1, -1)]
    # another C library has no mallopt
    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: object())
    train.keep_freed_memory()


def test_a_rank_without_torchrun_is_one_process(monkeypatch):
    """Other launchers leave LOCAL_RANK in the environment, without what a group needs."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    with train.process_group():
        assert not dist.is_initialized()


@pytest.mark.parametrize("flag, kind", [("--prior", "shapes/prior"), ("--init", "shapes-dcmix")])
def test_a_file_of_other_classes_is_refused_before_anything_is_trained(runs, tmp_path, flag, kind):
    saved = torch.load(runs / kind / "last.pt", weights_only=True)
    saved["config"]["classes"] = 7
    for state in (saved["model"], saved["ema"]):
        state["class_emb.weight"] = state["class_emb.weight"][:-3]
    torch.save(saved, tmp_path / "seven.pt")
    new = tmp_path / "runs"
    with pytest.raises(SystemExit, match="seven.pt has 7 classes; what it is used with has 10"):
        train.main(mixar(new, tmp_path / "run", flag, tmp_path / "seven.pt", "--steps", 1))
    assert not new.exists()


@pytest.mark.parametrize("flag", ["--data", "--init", "--runs", "--out"])
def test_an_empty_name_is_not_the_current_folder(flag, capsys):
    with pytest.raises(SystemExit):
        train.parse([flag, ""])
    assert f"{flag[2:]}: a name is missing" in capsys.readouterr().err


def test_an_official_mar_can_be_the_start(runs, tmp_path, no_pictures):
    """Its weights, bare in a file, are those of the first step. Only plain MAR can start so."""
    train.main(mixar(runs, tmp_path / "first", "--guidance", "none", "--steps", 1))
    official = tmp_path / "mar.pth"
    torch.save(dict(model=weights(tmp_path / "first"), model_ema=weights(tmp_path / "first")),
               official)
    flags = ["--init", official, "--steps", 1, "--lr", 0]
    train.main(mixar(runs, tmp_path / "run", "--guidance", "none", *flags))
    assert same_weights(weights(tmp_path / "first"), weights(tmp_path / "run"))
    with pytest.raises(SystemExit, match="as --guidance and --mix-at; .*'dcmix'"):
        train.main(mixar(runs, tmp_path / "other", *flags))


def test_weights_that_are_not_finite_are_never_saved(runs, tmp_path, no_pictures):
    """So high a rate breaks the weights in one step, before any loss can tell."""
    run = copy_run(runs, tmp_path / "run")
    with pytest.raises(SystemExit, match="mixar: .*not finite.* lower --lr"):
        train.main(mixar(runs, run, "--steps", 40, "--save-every", 1, "--lr", 1e38))
    assert all(value.isfinite().all() for value in weights(run).values())


def test_the_token_cache_is_made_in_fp32(runs, tmp_path):
    skipped = shutil.ignore_patterns("tokens", "prior")
    shutil.copytree(runs / "shapes", tmp_path / "shapes", ignore=skipped)
    train.main(["--runs", str(tmp_path), *SMALL, "--amp", "bf16", "--stage", "cache"])
    for name in ("moments.npy", "indices.npy"):
        made = np.load(tmp_path / "shapes" / "tokens" / name)
        assert np.array_equal(made, np.load(runs / "shapes" / "tokens" / name))


def test_a_run_knows_the_statistics_of_its_latents(runs):
    """sample.py multiplies x_c by the deviation and adds the mean that the cache holds."""
    cache = disk.read_json(runs / "shapes" / "tokens" / "meta.json")
    meta = weights(runs / "shapes-dcmix", "meta")
    assert meta["latent_mean"] == cache["mean"]
    assert meta["latent_std"] == cache["std"]
    assert len(set(cache["mean"])) == 8


# recipes

# the larger presets need these flags, whose files are opened later
FILES = ["--vae", "vae.pt", "--vq", "vq.pt", "--prior", "prior.pt"]


@pytest.mark.parametrize("preset", ["base", "large", "huge"])
def test_larger_presets_follow_mars_recipe(preset):
    """400 epochs of batch 2048; lr 1e-4 for 256 images; a quarter of the steps is warm-up."""
    recipe = train.parse(["--preset", preset, *FILES]).recipe["mixar"]
    assert recipe["steps"] == 400 * 625 and recipe["batch"] == 2048
    assert recipe["lr"] == pytest.approx(8e-4)
    smaller = train.parse(["--preset", preset, *FILES, "--batch-size", "512"])
    assert smaller.recipe["mixar"]["lr"] == pytest.approx(2e-4)
    assert recipe["betas"] == (0.9, 0.95) and recipe["decay"] == 0.02 and recipe["draws"] == 4
    assert train.CLIP == 3.0 and checkpoint.EMA_DECAY == 0.9999 and train.LABEL_DROP == 0.1
    recipe["steps"] = 1000
    assert train.learning_rate(recipe, 124) == pytest.approx(4e-4)
    assert train.learning_rate(recipe, 249) == pytest.approx(8e-4)
    assert train.learning_rate(recipe, 999) == pytest.approx(8e-4)


def test_the_preset_small_trains_all_four_models():
    """At its own rates: base's rate is scaled by the batch, and base trains MixAR alone."""
    recipes = train.parse(["--preset", "small", "--batch-size", "32"]).recipe
    assert list(recipes) == ["vae", "vq", "prior", "mixar"]
    assert recipes["mixar"]["lr"] == train.SMALL_RECIPE["mixar"]["lr"]
    assert sample.SAMPLING["small"].keys() == sample.SAMPLING["tiny"].keys()
    sizes = backbone.PRESETS["small"]
    assert sizes["size"] // 2 ** (len(sizes["vae"]["mult"]) - 1) == 16
    with torch.device("meta"):
        model = backbone.MAR(16 * 16, sizes["vae"]["z"], sizes["vq"]["bits"], 10, **sizes["mar"])
    assert 20e6 < sum(p.numel() for p in model.parameters()) < 30e6


def test_flags_win_over_the_recipe():
    def recipe(*flags):
        return train.parse(flags).recipe["mixar"]

    smaller = recipe("--preset", "base", *FILES, "--batch-size", "512", "--steps", "70")
    assert smaller["lr"] == pytest.approx(2e-4) and smaller["steps"] == 70
    assert recipe("--preset", "base", *FILES, "--lr", "0.1")["lr"] == 0.1
    assert recipe("--lr", "0")["lr"] == 0
    assert recipe() == train.RECIPES["tiny"]["mixar"]
    stages = train.parse(["--vae-steps", "3", "--vq-steps", "4", "--prior-steps", "5"]).recipe
    assert [stages[kind]["steps"] for kind in ("vae", "vq", "prior")] == [3, 4, 5]


# one clear line for what is wrong

CONTRADICTIONS = [
    (["--preset", "base"], "--preset base trains MixAR alone: give --vae, --vq and --prior"),
    (["--ti-mix", "--guidance", "none"], "--ti-mix means nothing with --guidance none"),
    (["--mix-at", "encoder", "--guidance", "dcsa"], "--mix-at encoder means nothing with"),
]


@pytest.mark.parametrize("flags, words", CONTRADICTIONS)
def test_flags_that_contradict_each_other_are_one_line(tmp_path, flags, words):
    with pytest.raises(SystemExit) as error:
        train.main(["--runs", str(tmp_path), *flags])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--vae", "--vq", "--prior", "--init"])
def test_files_that_are_not_there_are_one_line_before_anything_is_trained(tmp_path, flag):
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit, match="/no/file: no such file; expected a .* checkpoint"):
        train.main(mixar(runs, tmp_path / "run", "--steps", 1, flag, "/no/file"))
    assert not runs.exists()


USELESS = [
    ("--lr", "nan"),
    ("--lr", "-1"),
    ("--images", "0"),
    ("--seed", "-1"),
    ("--batch-size", "0"),
    ("--save-every", "0"),
    ("--sample-every", "-1"),
    ("--accumulate", "0"),
    ("--steps", "0"),
    ("--vae-steps", "0"),
]


@pytest.mark.parametrize("flag, value", USELESS)
def test_numbers_that_train_nothing_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit):
        train.parse([flag, value])
    assert f"argument {flag}: {value} is not in [" in capsys.readouterr().err


def test_half_a_step_is_no_whole_number(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--steps", "2.5"])
    assert "argument --steps: invalid whole number value: '2.5'" in capsys.readouterr().err


@pytest.mark.parametrize("program", [train, sample])
def test_help_says_the_defaults(program, capsys):
    with pytest.raises(SystemExit):
        program.parse(["--help"])
    assert "(default: 0)" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_folder_is_one_line_without_traceback(runs, tmp_path):
    arguments = mixar(runs, tmp_path / "run", "--steps", 1, "--data", "/no/where")
    code, _, err = running.run("tests/quick_train.py", *arguments)
    assert code == 1
    assert "/no/where: no such folder" in err and len(err.splitlines()) == 1


def test_more_bits_than_channels_is_one_line(tmp_path):
    tokens = SimpleNamespace(bits=8, d_c=4)
    with pytest.raises(SystemExit, match="dcmix: 8 bits do not fit into 4 channels") as error:
        stages.train_mixar(train.parse([]), tmp_path, tmp_path / "run", tokens)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_named(tmp_path):
    """A resume names every missing, unexpected and mis-shaped weight, in one line."""
    args = train.parse([])
    stage = checkpoint.Stage("vae", tmp_path, backbone.PRESETS["tiny"]["vae"], {}, None)
    checkpoint.State(args, stage).save()
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    del saved["model"]["quant_conv.bias"]
    saved["model"]["other"] = torch.zeros(1)
    saved["model"]["post_quant_conv.bias"] = torch.zeros(3)
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(SystemExit) as error:
        train.fit(args, stage)
    line = str(error.value)
    assert line.startswith(str(tmp_path / "last.pt")) and "\n" not in line
    assert 'Missing key(s) in state_dict: "quant_conv.bias"' in line
    assert 'Unexpected key(s) in state_dict: "other"' in line
    assert "size mismatch for post_quant_conv.bias" in line
    assert "[3]" in line and "[8]" in line


# losses that are not finite

def test_a_step_is_left_out_if_its_loss_is_not_finite():
    model = torch.nn.Linear(2, 1)
    args = train.parse(["--amp", "fp32"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rng = train.Rng(0, 0, 1, CPU)

    def loss(batch, rng, step):
        return (model(torch.ones(1, 2)) * batch).sum()

    def step(value, stop=False):
        before = model.weight.clone()
        batches = [(torch.tensor(value), rng)]
        state = SimpleNamespace(model=model, optimizer=optimizer, step=0)
        found = train.update(args, loss, state, batches, stop)
        return found, not torch.equal(before, model.weight)

    for value, taken in ((1.0, True), (float("nan"), False), (1.0, True)):
        assert step(value)[1] == taken
    (_, norm, stopping), _ = step(1.0)
    assert norm == pytest.approx(3 ** 0.5) and not stopping
    (_, _, stopping), _ = step(1.0, stop=True)
    assert stopping


def test_non_finite_losses_never_reach_the_weights_and_stop_the_run(
        runs, tmp_path, monkeypatch, no_pictures):
    run = copy_run(runs, tmp_path / "run")
    before = weights(run)
    shipped = train.mixar_loss
    # the numbers of the calls whose loss is not finite
    bad = range(1, 100)
    calls = []

    def mixar_loss(*given, **more):
        calls.append(1)
        value = shipped(*given, **more)
        return value * float("nan") if len(calls) in bad else value

    monkeypatch.setattr(train, "mixar_loss", mixar_loss)
    with pytest.raises(SystemExit, match="not finite in 5 steps.*lower --lr"):
        train.main(mixar(runs, run, "--steps", 30, "--save-every", 1))
    assert len(calls) == 5
    assert same_weights(before, weights(run))
    assert weights(run, "step") == 2, "nothing is saved after a step that was left out"

    # a single bad step is left out
    bad = [len(calls) + 2]
    train.main(mixar(runs, run, "--steps", 6))
    after = weights(run)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert weights(run, "step") == 6 and not same_weights(before, after)

    # a last step of that kind leaves nothing to go on to
    bad = [len(calls) + 2]
    with pytest.raises(SystemExit, match="not finite in 1 steps up to 7"):
        train.main(mixar(runs, run, "--steps", 8))


# what a user's disk holds

@pytest.mark.parametrize("flag", ["--runs", "--out"])
def test_a_file_cannot_be_a_folder_of_runs(runs, tmp_path, flag):
    (tmp_path / "file").touch()
    flags = mixar(runs, tmp_path / "run", "--steps", 1)
    with pytest.raises(SystemExit, match="Not a directory|File exists") as error:
        train.main([*flags, flag, str(tmp_path / "file")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["settings", "ema_start", "optimizer", "step"])
def test_a_checkpoint_without_a_field_is_one_line(runs, tmp_path, field):
    """A resume names the file and the field that it lacks."""
    run = copy_run(runs, tmp_path / "run")
    saved = torch.load(run / "last.pt", weights_only=True)
    del saved[field]
    torch.save(saved, run / "last.pt")
    with pytest.raises(SystemExit, match=f"last.pt: not a mixar checkpoint .*missing '{field}'"):
        train.main(mixar(runs, run, "--steps", 3))


def test_a_process_whose_partner_has_ended_ends_without_a_traceback(monkeypatch):
    def closed():
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "barrier", closed)
    with pytest.raises(SystemExit) as error:
        train.barrier()
    assert error.value.code == 1


def test_tensorboard_that_is_not_there_is_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        train.main(mixar(runs, tmp_path / "run", "--steps", 1, "--tensorboard"))
