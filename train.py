"""Training: one loop for the four models, in the order of the paper's Fig. 3 (left).

    images -> KL-VAE, bit tokenizer (Eq. 7) -> token cache -> prior p_phi(X_d) (Eq. 3) -> MixAR (Eqs. 5, 6, 8 to 12)

What a data set needs once lies in runs/DATA/ (vae, vq, tokens, prior) and is shared by every guidance;
the run itself lies in runs/DATA-GUIDANCE[-ti]/. A stopped run started again goes on where it was.

Reads every other file but fid.py, writes runs/. `mixar_loss` is the step of the paper. Read sample.py next.
Try: torchrun train.py --guidance dcmix

B global batch, N tokens, N' = ceil(r N) masked ones, R diffusion draws per token; m True = to predict.
"""
import argparse
import copy
import csv
import ctypes
import gc
import math
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import backbone
import mixing
import tokenizers


# length, batch and rates of each model; a warm-up below 1 is a share of the length. tiny [ours]; the others: MixAR's alone,
# lr for `per` images [MAR]; their vae, vq and prior come as files.
LARGE = dict(mixar=dict(epochs=400, batch=2048, draws=4, lr=1e-4, per=256, betas=(0.9, 0.95), decay=0.02, warmup=0.25, anneal=False))


RECIPES = {
    "tiny": dict(vae=dict(steps=1000, batch=16, lr=4e-4, betas=(0.9, 0.95), decay=0.0, warmup=20, anneal=True),
                 vq=dict(steps=600, batch=16, lr=3e-4, betas=(0.9, 0.95), decay=0.0, warmup=20, anneal=True),
                 prior=dict(steps=2000, batch=32, lr=1e-3, betas=(0.9, 0.96), decay=0.045, warmup=50, anneal=True),
                 mixar=dict(steps=2200, batch=32, draws=1, lr=6e-4, betas=(0.9, 0.95), decay=0.02, warmup=50, anneal=False)),
    "base": LARGE, "large": LARGE, "huge": LARGE,
}


def learning_rate(recipe, step):
    """Linear warm-up, then constant [MAR] or, with anneal, a cosine down to 10 % [MaskBit]."""
    warmup = recipe["warmup"] * (recipe["steps"] if recipe["warmup"] < 1 else 1)
    rate = recipe["lr"] * min(1, (step + 1) / max(warmup, 1))
    return rate * (0.55 + 0.45 * math.cos(math.pi * step / recipe["steps"])) if recipe["anneal"] else rate


def world():
    """This process's rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def autocast(amp, device):
    """The context of `--amp`: auto is bf16 on CUDA and on CPUs with bf16 instructions, else fp32."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp), enabled=amp != "fp32")


def on_device(device):
    """The argparse type of --device: "cuda" is the GPU of this process, which is made the current one. SystemExit on what is not there."""
    if device == "cpu":
        return device
    name, there = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device, [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in there:
        raise SystemExit(f"--device {device}: no such device here; use {', '.join(['cpu', *there])}")
    torch.cuda.set_device(name)
    return name


@contextmanager
def processes():
    """Inside, what torchrun started is one group, and glibc keeps freed memory: fresh pages took a fifth of a training step on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)                                                  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, -1)                                                 # M_TRIM_THRESHOLD: nothing goes back to the system
    if "LOCAL_RANK" in os.environ:                                           # one process may wait long for another
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=1))
    yield
    if dist.is_initialized():
        gc.collect()                                                         # DistributedDataParallel lies in reference cycles and must go before its group
        dist.destroy_process_group()                                         # without it a process may abort at its end


def within(low, high=math.inf, kind=float):
    """The argparse type of a number in [low, high]: within(0, 1) takes "0.7", within(1, kind=int) no 0."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:                                         # nor nan
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value
    return number


def mixar_loss(model, batch, draw, step, prior, args):
    """Eqs. (7) to (12), (6), (5) on one batch -> mean loss per masked token.

    batch: mean, deviation of x_c (B, N, d_c), x_d (B, N, d_d), y (B,); draw(f, *shape): f's random numbers (B, *shape).
    """
    mean, std, x_d, y = batch
    (N, d_c), recipe = mean.shape[1:], args.recipe["mixar"]
    x_c = tokenizers.reparameterize(mean, std, draw(torch.randn, N, d_c))    # (B, N, d_c)   Eq. (7)
    ratio = mixing.mask_ratio(float(draw.shared(torch.rand, 1)), args.min_mask)
    m = mixing.sample_mask(draw(torch.rand, N).argsort(1), ratio)            # (B, N)        Eq. (8)
    drop = draw(torch.rand) < args.label_drop
    x_g = x_d
    if args.ti_mix:
        x_hat = mixing.predict_masked(prior, x_d, m, y, draw(torch.rand, N, prior.splits))   # Eqs. (10), (11)
        lam = mixing.ti_lambda(step, recipe["steps"])
        x_g = mixing.ti_mix(x_d, x_hat, m, draw(torch.rand, N), lam)         # Eq. (12)
    z = model(x_c, x_g, m, y, drop)                                          # (B, N, D)     Eqs. (6), (9)
    R, N_masked = recipe["draws"], int(m[0].sum())                           # drawn per image, then laid out as the rows of z[m]
    t = (draw(torch.rand, R, N_masked) * 1000).long().transpose(0, 1).flatten(1)         # (R, B N')
    noise = draw(torch.randn, R, N_masked, d_c).transpose(0, 1).flatten(1, 2)            # (R, B N', d_c)
    return model.diffloss.loss(z[m], x_c[m], t, noise).mean()                # Eq. (5)


def training_mask(u_ratio, u_code):
    """MaskBit's training mask: each code hidden with probability acos(u) / (pi/2), u one draw per image.

    u_ratio (B,), u_code (B, N, S), uniform -> (B, N, S) bool.
    """
    return u_code < (torch.acos(u_ratio) / (math.pi / 2))[:, None, None]


def masked_loss(logits, codes):
    """Eq. (3) as MaskBit trains it: cross-entropy with label smoothing 0.1, over all codes.   [MaskBit]

    logits (B, N, S, 2^e), codes (B, N, S) int -> scalar. The paper's sum is over the hidden codes alone.
    """
    return cross_entropy(logits.flatten(0, 2), codes.flatten(), label_smoothing=0.1)


def prior_loss(model, batch, draw, step, label_drop=0.1):
    """Eq. (3): predict the codes behind a random mask."""
    _, _, x_d, y = batch
    codes = tokenizers.bits_to_codes(x_d.unflatten(-1, (model.splits, -1)))     # (B, N, S)
    mask = training_mask(draw(torch.rand), draw(torch.rand, *codes.shape[1:]))
    x = tokenizers.codes_to_bits(torch.where(mask, model.codes, codes), model.bits // model.splits)
    return masked_loss(model(x, y, draw(torch.rand) < label_drop), codes)


def vae_loss(model, batch, draw, step):
    """Reconstruction (MSE) and KL of the continuous tokenizer.   [ours]; the released VAE has perceptual and GAN terms"""
    x = batch[0] * 2 - 1
    mean, logvar = (a.float() for a in model.encode(x))
    y = model.decode(tokenizers.reparameterize(mean, (0.5 * logvar).exp(), draw(torch.randn, *mean.shape[1:])))
    return (x - y).square().mean() + 1e-4 * tokenizers.kl_to_normal(mean, logvar).mean() / mean[0].numel()


def vq_loss(model, batch, draw, step):
    """Reconstruction (MSE, weight 4) and quantiser losses of the bit tokenizer.   [MaskBit], but for perceptual, GAN and early entropy weights [ours]"""
    x = batch[0]
    z = model.encode(x).float()
    y = model.decode(z + (tokenizers.quantise(z) - z).detach())              # straight-through
    commitment, per_sample, average = tokenizers.quantiser_losses(z, model.quantize.codebook, mean_over_ranks)
    return 4 * (x - y).square().mean() + commitment + 0.02 * (per_sample - average)


def mean_over_ranks(q):
    """The value is the mean over ranks; the gradient flows through this rank's own q, which DDP then averages."""
    if not dist.is_initialized():
        return q
    total = q.detach().clone()
    dist.all_reduce(total)
    return q + (total / dist.get_world_size() - q).detach()


class Draw:
    """The random numbers of one step for the global batch, a function of (seed, step); each part of each rank's share keeps its rows."""

    def __init__(self, seed, step, B, device, part=0, parts=1):
        rank, ranks = world()
        k, of = rank * parts + part, ranks * parts
        self.B, self.device, self.rows = B, device, slice(k * B // of, (k + 1) * B // of)
        self.generator = torch.Generator(device).manual_seed(seed * 10_000_019 + step)           # a prime: no two seeds share steps below it

    def shared(self, f, *shape):
        return f(shape, generator=self.generator, device=self.device)

    def __call__(self, f, *shape):
        return self.shared(f, self.B, *shape)[self.rows]


def draw_batches(args, get_batch, n, B, step, parts):
    """This rank's share of step `step` in `parts` parts -> [(batch, draw)]; seeds dropout, the one thing not drawn by `draw`.

    The order of the n pictures is a function of (seed, epoch); every epoch leaves out its last n mod B.
    """
    (rank, ranks), (epoch, k) = world(), divmod(step, max(n // B, 1))
    torch.manual_seed(2 ** 31 + (args.seed * 10_000_019 + step) * ranks + rank)                  # apart from the seeds of `Draw`
    order = np.random.RandomState([args.seed, epoch]).permutation(n)
    rows = np.resize(order, max(n, B))[k * B:(k + 1) * B]
    draws = [Draw(args.seed, step, B, torch.device(args.device), part, parts) for part in range(parts)]
    return [(tuple(a.to(args.device) for a in get_batch(rows[draw.rows], draw)), draw) for draw in draws]


class Loss(nn.Module):
    """A loss as a module, so that DistributedDataParallel sees one forward call."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch):
        return self.loss(self.model, *batch)


def make_optimizer(model, recipe):
    """AdamW; decay only on matrices and tables outside the diffusion head.   [MAR]"""
    decays = lambda name, p: p.ndim > 1 and "diffloss" not in name
    groups = [dict(params=[p for n, p in model.named_parameters() if decays(n, p) == flag], weight_decay=recipe["decay"] * flag) for flag in (True, False)]
    return torch.optim.AdamW(groups, lr=recipe["lr"], betas=recipe["betas"], fused=True)


@torch.no_grad()
def update_ema(ema, model, n, decay):
    """The n-th moving average (n from 0), decay min(decay, (1 + n) / (10 + n))."""
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - min(decay, (1 + n) / (10 + n)))


class Log:
    """Progress bar, log.csv (rows after the resumed step are dropped) and, with --tensorboard, an event file beside it."""

    def __init__(self, folder, kind, step, steps, B, args):
        folder.mkdir(parents=True, exist_ok=True)
        path, self.B, self.every, self.board = folder / "log.csv", B, args.log_every, None
        rows = [row for row in csv.reader(path.open()) if len(row) == 6 and row[0].isdigit() and row[5] and int(row[0]) <= step] if path.is_file() else []
        self.before, self.writer = float(rows[-1][-1]) if rows else 0.0, csv.writer(path.open("w", newline="", buffering=1))         # row by row
        self.writer.writerows([["step", "loss", "lr", "grad_norm", "images_per_second", "seconds"], *rows])
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise SystemExit("--tensorboard needs the package tensorboard: pip install tensorboard") from None
            self.board = SummaryWriter(folder)
        self.bar = tqdm(desc=f"{kind:6}", unit="step", initial=step, total=steps, mininterval=1)

    def write(self, step, loss, lr, grad_norm):
        self.bar.update()
        if step % self.every and step < self.bar.total:
            return
        seconds, done = self.bar.format_dict["elapsed"], step - self.bar.initial
        self.bar.set_postfix(loss=f"{loss:.4f}")
        self.writer.writerow([step, round(loss, 6), f"{lr:.4g}", round(grad_norm, 4), round(done * self.B / seconds, 1), round(self.before + seconds, 2)])
        if self.board:
            for name, value in (("loss", loss), ("lr", lr), ("grad_norm", grad_norm)):
                self.board.add_scalar(name, value, step)


class State:
    """What last.pt holds: model, moving average, optimiser and scaler after `step` steps; ema_start averages were before them.

    From folder/last.pt, else with the weights of another checkpoint or run, `init`, else new. SystemExit on a file that is
    damaged, foreign or of other settings, and if there is no model of this configuration.
    """

    def __init__(self, args, kind, folder, config, meta, init):
        settings = dict(config=config, seed=args.seed, batch=args.recipe[kind]["batch"], tokens=meta.get("tokens"))
        self.about = dict(kind=kind, config=config, settings=settings, meta=meta, args=vars(args))
        self.path, self.step, self.ema_start = folder / "last.pt", 0, 0
        torch.manual_seed(args.seed)
        try:
            self.model = backbone.KINDS[kind](**config).to(args.device, memory_format=torch.channels_last)         # convolutions run faster so
        except ValueError as error:                                          # more bits than channels
            raise SystemExit(str(error)) from None
        self.model.recompute = args.checkpoint_activations                   # which only MixAR does
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, args.recipe[kind])
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.amp == "fp16")
        resumed = self.path.is_file()
        if not (resumed or init):
            return
        source = self.path if resumed else Path(init) / "last.pt" if Path(init).is_dir() else Path(init)
        saved = backbone.load_checkpoint(source, kind)
        if resumed and saved.get("settings") != settings:
            raise SystemExit(f"{source} was made with {saved.get('settings')}, not with {settings}; choose another --out or --runs folder")
        backbone.load_weights(self.model, saved["model"], source)
        backbone.load_weights(self.ema, saved["ema"], source)
        self.ema_start = saved["ema_start"] + (0 if resumed else saved["step"])
        if resumed:
            self.step = saved["step"]
            self.optimizer.load_state_dict(saved["optimizer"])
            if saved["scaler"]:                                              # empty but after fp16
                self.scaler.load_state_dict(saved["scaler"])

    def save(self):
        parts = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer", "scaler")}
        saved = self.about | dict(step=self.step, ema_start=self.ema_start) | parts
        tokenizers.write_whole(self.path, lambda file: torch.save(saved, file))


def update(args, ddp, model, optimizer, scaler, parts, step):
    """One step of the optimiser on `parts` [(batch, draw)] of one batch -> loss over all ranks, gradient norm, whether taken: both are finite."""
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=parts[0][1].device)
    for batch, draw in parts:
        ddp.require_backward_grad_sync = batch is parts[-1][0]               # ranks talk once a step
        with autocast(args.amp, draw.device):
            loss = ddp(batch, draw, step) / len(parts)
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), args.clip))
    loss = float(mean_over_ranks(total))
    taken = math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())         # fp16's scaler leaves out overflows itself
    if taken:
        scaler.step(optimizer)
    scaler.update()
    return loss, norm, taken


def fit(args, kind, folder, config, loss, n, get_batch, preview=None, meta={}, init=None):
    """Train the model `config` of this kind with `loss` on n pictures to the end of its recipe, going on from folder/last.pt; all is saved there.

    get_batch(rows, draw) -> tensors; preview(ema) draws pictures of what is saved. SystemExit as of State, on 5 non-finite losses in a row, after SIGTERM.
    """
    (rank, ranks), recipe, stop, bad = world(), args.recipe[kind], [], 0
    B, steps, parts = recipe["batch"], recipe["steps"], 1 if kind == "vq" else args.accumulate           # vq's entropy is not a mean over images
    if B % (ranks * parts):
        raise SystemExit(f"--batch-size {B} is not a multiple of {ranks} processes times --accumulate {parts}")
    state = State(args, kind, folder, config, meta, init)
    ddp = Loss(state.model.train(), loss)
    ddp = nn.parallel.DistributedDataParallel(ddp) if ranks > 1 else ddp
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    log = Log(folder, kind, state.step, steps, B, args) if rank == 0 else None
    while state.step < steps:
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, state.step)
        batches = draw_batches(args, get_batch, n, B, state.step, parts)
        value, norm, taken = update(args, ddp, state.model, state.optimizer, state.scaler, batches, state.step)
        bad = 0 if taken else bad + 1
        if bad == 5:
            raise SystemExit(f"{kind}: the loss was not finite ({value}) in 5 steps running, at step {state.step}; none of them was kept. "
                             f"Lower --lr and start again from {state.path if state.path.is_file() else 'the beginning'}")
        if taken:
            update_ema(state.ema, state.model, state.ema_start + state.step, args.ema)
        state.step += 1
        stopping = mean_over_ranks(torch.tensor(float(len(stop)), device=args.device)) > 0
        pictured = preview and args.sample_every and state.step % args.sample_every == 0 and state.step < steps
        if rank == 0:
            log.write(state.step, value, state.optimizer.param_groups[0]["lr"], norm)
            if state.step % args.save_every == 0 or state.step == steps or stopping or pictured:
                state.save()
        if stopping:
            raise SystemExit(f"{kind}: stopped by SIGTERM at step {state.step}, saved in {state.path}; start again to go on")
        if rank == 0 and pictured:
            preview(state.ema.eval())
    if rank == 0:
        log.bar.close()
    signal.signal(signal.SIGTERM, previous)
    if rank == 0 and preview:
        preview(state.ema.eval())
    barrier()


def done(path, kind, steps):
    """Whether `path` is a file given with --vae, --vq or --prior, or the folder of a stage with `steps` steps behind it (None: those it was begun for)."""
    if path.is_file() or not (path / "last.pt").is_file():
        return path.is_file()
    saved = backbone.load_checkpoint(path / "last.pt", kind)
    return saved["step"] >= (steps or saved["args"]["recipe"][kind]["steps"])


def cache(folder, source, make, batch, **made_with):
    """Make a cache of all pictures of `source`, by all processes together; see tokenizers.start_cache."""
    rank, ranks = world()
    if rank == 0:
        tokenizers.start_cache(folder, source, make, **made_with)
    barrier()
    if not tokenizers.read_json(folder / "meta.json").get("complete"):
        tokenizers.fill_cache(folder, source, make, batch, rank, ranks)
        barrier()
        if rank == 0:
            tokenizers.finish_cache(folder, source)
    barrier()


def cache_tokens(folder, source, vae, vq, device, batch=None):
    """Stage cache: Eq. (7) for every picture, and the statistics of x_c."""
    make = partial(tokenizers.encode, vae=vae, vq=vq, device=device, mirror=source.mirror)
    cache(folder, source, make, batch or 2 ** 19 // source.size ** 2, vae=tokenizers.fingerprint(vae), vq=tokenizers.fingerprint(vq))
    if world()[0] == 0 and "mean" not in tokenizers.read_json(folder / "meta.json"):
        tokenizers.write_statistics(folder, vq.quantize.codebook.shape[1])
    barrier()


def train_tokenizer(args, shared, kind, source):
    """Stage vae or vq: pixels -> tokenizer, and a picture of originals above reconstructions."""
    import sample                                                            # which imports this file
    cache(shared / "images", source, lambda pictures: {"pixels": pictures}, 64)
    pixels, readable = tokenizers.readable(shared / "images", "pixels")

    def get_batch(rows, draw):
        x = torch.tensor(pixels[readable[rows]]).float() / 255
        if source.mirror:
            x = torch.where(draw(torch.rand).cpu()[:, None, None, None] < 0.5, x.flip(3), x)
        return (x.contiguous(memory_format=torch.channels_last),)

    @torch.no_grad()
    def preview(ema):
        x = torch.tensor(pixels[readable[:10]]).to(args.device).float() / 255
        y = ema.decode(ema.encode(x * 2 - 1)[0]) if kind == "vae" else ema.decode(tokenizers.quantise(ema.encode(x))) * 2 - 1
        sample.save_grid(torch.cat([(x * 255).byte(), sample.to_bytes(y)]), shared / kind / "reconstructions.png", len(x))

    config, loss = backbone.PRESETS[args.preset][kind], vae_loss if kind == "vae" else vq_loss
    fit(args, kind, shared / kind, config, loss, len(readable), get_batch, preview)


def train_prior(args, shared, tokens):
    """Stage prior: p_phi(X_d) on the cached bits."""
    config = dict(N=tokens.indices[0, 0].size, bits=tokens.meta["bits"], classes=len(tokens.classes)) | backbone.PRESETS[args.preset]["prior"]
    meta = dict(tokens=tokens.meta["made_from"])
    fit(args, "prior", shared / "prior", config, partial(prior_loss, label_drop=args.label_drop), tokens.n, tokens.batch, meta=meta)


def train_mixar(args, shared, files, run, tokens):
    """Stage mixar: p_theta(X_c | X_d), and at the end the pictures."""
    import sample                                                            # which imports this file
    N, d_c, bits, classes, recipe = tokens.indices[0, 0].size, len(tokens.mean), tokens.meta["bits"], len(tokens.classes), args.recipe["mixar"]
    config = dict(N=N, d_c=d_c, d_d=bits, classes=classes, guidance=args.guidance, mix_at=args.mix_at) | backbone.PRESETS[args.preset]["mar"]
    recipe.setdefault("steps", max(round(recipe.get("epochs", 0) * max(tokens.n // recipe["batch"], 1)), 1))
    prior, saved = backbone.load_model(files["prior"], "prior")
    backbone.same_size(files["prior"], tokens=(prior.N, N), bits=(prior.bits, bits), classes=(prior.classes, classes))
    if not args.prior and saved["meta"].get("tokens") != tokens.meta["made_from"]:
        raise SystemExit(f"{files['prior']} was trained on other tokens than those in {shared / 'tokens'}; remove it to train it again")
    # what sample.py needs to know to draw from this run alone; a file of the user's by its full path, ours from the run's folder
    place = lambda kind: os.path.abspath(files[kind]) if getattr(args, kind) else os.path.relpath(files[kind], run)
    marks = dict(zip(("vae", "vq"), tokens.made_by), prior=tokenizers.fingerprint(prior) if args.prior else None)
    meta = dict(data=tokens.meta["made_from"]["data"], classes=tokens.classes, sampling=sample.sampling(args.preset, bits),
                tokens=tokens.meta["made_from"], latent_mean=tokens.meta["mean"], latent_std=tokens.meta["std"],
                shared=os.path.relpath(shared, run), files={kind: (place(kind), marks[kind]) for kind in files})

    preview = lambda ema: sample.draw_figures(sample.System(run, args.device, amp=args.amp), run, args.seed)
    loss = partial(mixar_loss, prior=prior.to(args.device) if args.ti_mix else None, args=args)
    fit(args, "mixar", run, config, loss, tokens.n, tokens.batch, preview, meta, args.init)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    count, number, share = (dict(type=within(*limits), metavar=name) for limits, name in (((1, math.inf, int), "N"), ((0,), "X"), ((0, 1), "X")))
    g = p.add_argument_group("what to train")
    g.add_argument("--data", default="shapes", help="shapes (drawn here), or a folder of class folders or MNIST-family files; cropped to 32 (tiny) or 256")
    g.add_argument("--guidance", default="dcmix", choices=backbone.GUIDANCES, help="how X_d guides X_c, section 3.3; none is plain MAR [paper]")
    g.add_argument("--mix-at", default="decoder", choices=["decoder", "encoder"], help="where dcmix's discrete tokens enter [ours]")
    g.add_argument("--ti-mix", action="store_true", help="TI-Mix, section 3.4, Eqs. 10 to 12 [paper]")
    g.add_argument("--init", help="start from this MixAR checkpoint or run, as TI-Mix does from DC-Mix, section 4.3 [paper]")
    g.add_argument("--stage", default="all", choices=["all", "vae", "vq", "cache", "prior", "mixar"], help="run one stage alone")
    g.add_argument("--preset", default="tiny", choices=RECIPES, help="sizes, see python backbone.py")
    g.add_argument("--images", **count, help="use at most this many pictures")
    for kind, official in (("vae", "VA-VAE or KL-16"), ("vq", "a MaskBit tokenizer"), ("prior", "a MaskBit generator")):
        g.add_argument(f"--{kind}", metavar="FILE", help=f"{official}, or a checkpoint of ours, instead of training stage {kind}")
    g = p.add_argument_group("length and rate (unset: the preset's recipe)")
    for kind in ("vae", "vq", "prior"):
        g.add_argument(f"--{kind}-steps", **count, help=f"steps of stage {kind}")
    g.add_argument("--batch-size", **count, help="global batch of every stage, whatever the number of processes")
    length = g.add_mutually_exclusive_group()
    length.add_argument("--steps", dest="mixar_steps", **count, help="steps of stage mixar")
    length.add_argument("--epochs", dest="mixar_epochs", **number, help="its length in passes over the pictures [MAR: 400; paper: 320, Fig. 7; 200 + 200]")
    g.add_argument("--lr", dest="mixar_lr", **number, help="learning rate of stage mixar, constant after the warm-up [MAR]")
    g.add_argument("--warmup", dest="mixar_warmup", **number, help="warm-up steps of stage mixar, below 1 as a share of all [MAR]")
    g = p.add_argument_group("section 3.1: mask, diffusion loss, averaging")
    g.add_argument("--min-mask", **share, default=0.7, help="smallest mask ratio r of Eq. 8 [MAR]")
    g.add_argument("--draws", dest="mixar_draws", **count, help="diffusion draws (t, eps) per token in Eq. 5 (unset: 4 [MAR], in tiny 1 [ours])")
    g.add_argument("--label-drop", **share, default=0.1, help="how often the class is withheld, for guidance [MAR]")
    g.add_argument("--clip", **number, default=3.0, help="largest gradient norm [MAR]")
    g.add_argument("--ema", **share, default=0.9999, help="decay of the moving average after its warm-up [MAR]")
    g = p.add_argument_group("running")
    g.add_argument("--runs", default="runs", help="where all runs lie")
    g.add_argument("--out", help="folder of this MixAR run (default RUNS/DATA-GUIDANCE[-ti])")
    g.add_argument("--seed", type=within(0, 2 ** 32 - 1, int), metavar="N", default=0, help="start values, data order, masks and noise")
    g.add_argument("--device", type=on_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    g.add_argument("--amp", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="auto: bf16 on CUDA and on CPUs with bf16 units")
    g.add_argument("--accumulate", **count, default=1, help="go through the batch in N parts, for memory; same gradients but for dropout (all stages but vq)")
    g.add_argument("--checkpoint-activations", action="store_true", help="compute MixAR's activations twice, for memory; same gradients")
    g.add_argument("--save-every", **count, default=500, help="steps between checkpoints")
    g.add_argument("--sample-every", type=within(0, kind=int), metavar="N", default=1000, help="steps between pictures, 0 for only at the end")
    g.add_argument("--log-every", **count, default=10, help="steps between rows of log.csv")
    g.add_argument("--tensorboard", action="store_true", help="write an event file too")
    for action in p._actions:
        action.help += " (default: %(default)s)" if action.default not in (None, False, argparse.SUPPRESS) else ""
    return settle(p.parse_args(argv))


def settle(args):
    """Add `recipe`: each stage's length and rates, the preset's where no flag says otherwise. SystemExit on contradictions."""
    args.recipe = copy.deepcopy(RECIPES[args.preset])
    for kind in ("vae", "vq", "prior"):
        given = getattr(args, kind)
        if given and (args.stage == kind or not Path(given).is_file()):
            why = f"--stage {kind} would train it; give one of them" if Path(given).is_file() else "no such file; a stage's is in its folder as last.pt"
            raise SystemExit(f"--{kind} {given}: {why}")
        if not given and kind not in args.recipe and (kind, args.stage) != ("prior", "cache"):
            raise SystemExit(f"--preset {args.preset} trains MixAR alone: give --vae, --vq and --prior, official files or ours; --{kind} is missing")
    if files := [path for path in (args.runs, args.out) if path and Path(path).is_file()]:
        raise SystemExit(f"{files[0]} is a file; name a folder for --runs and --out")
    if args.ti_mix and args.guidance == "none":
        raise SystemExit("--ti-mix mixes X_d, which --guidance none does not use")
    if args.mix_at == "encoder" and args.guidance != "dcmix":
        raise SystemExit(f"--mix-at encoder is for --guidance dcmix, not {args.guidance}")
    if args.mixar_epochs is not None:
        args.recipe["mixar"].pop("steps", None)
    for kind, recipe in args.recipe.items():
        flags = {name: getattr(args, f"{kind}_{name}", None) for name in ("steps", "epochs", "draws", "lr", "warmup")} | dict(batch=args.batch_size)
        recipe |= {name: flag for name, flag in flags.items() if flag is not None}
        if "per" in recipe and flags["lr"] is None:
            recipe["lr"] *= recipe["batch"] / recipe["per"]
    return args


def train_stages(args):
    """The stage of --stage, or all that are not done, in the order of Fig. 3."""
    data = "shapes" if args.data == "shapes" else Path(args.data).resolve().name
    shared = Path(args.runs) / data
    run = Path(args.out or f"{shared}-{args.guidance}{'-ti' if args.ti_mix else ''}")
    files, stages = {kind: Path(getattr(args, kind) or shared / kind) for kind in backbone.PARTS}, [args.stage]
    if args.stage == "all":
        stages = [kind for kind in files if not done(files[kind], kind, getattr(args, f"{kind}_steps"))] + ["cache", "mixar"]
    if args.stage in ("all", "vae", "vq", "cache"):
        source = tokenizers.open_source(args.data, "train", backbone.PRESETS[args.preset]["size"], args.images)
    elif not shared.is_dir():
        raise SystemExit(f"--data {args.data}: {shared} does not exist; run the stages vae, vq and cache first")
    for kind in ("vae", "vq"):
        if kind in stages:
            train_tokenizer(args, shared, kind, source)
    if args.stage in ("vae", "vq"):
        return
    vae, vq = (backbone.load_model(files[kind], kind)[0].to(args.device) for kind in ("vae", "vq"))
    backbone.same_size(files["vq"], levels=(len(vq.encoder.down), len(vae.encoder.down)))
    if "cache" in stages:
        cache_tokens(shared / "tokens", source, vae, vq, args.device)
    if args.stage == "cache":
        return
    tokens = tokenizers.Tokens(shared / "tokens", vae.cpu(), vq.cpu())
    if tokens.meta["made_from"]["data"] != (data if args.data == "shapes" else str(Path(args.data).resolve())):
        raise SystemExit(f"--data {args.data}: {shared / 'tokens'} was made from {tokens.meta['made_from']['data']}; choose another --runs folder")
    if "prior" in stages:
        train_prior(args, shared, tokens)
    if "mixar" in stages:
        train_mixar(args, shared, files, run, tokens)
        if world()[0] == 0:
            print(f"pictures: {run / 'samples.png'} and {run / 'compare.png'} (top: X_d alone, bottom: MixAR from the same X_d)")


@processes()
def main(argv=None):
    train_stages(parse(argv))


if __name__ == "__main__":
    main()
