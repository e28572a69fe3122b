"""Training: one loop for the four models. `mixar_loss` is the paper's Fig. 3 (left).

Here are the losses of MixAR and the prior, the loop (`fit`, `train_steps`), torch.distributed, AMP
and the flags. stages.py says what each model is trained on; checkpoint.py has Stage and State.

Reads disk, tokenizers, mixing, diffusion_head, backbone and checkpoint.py, writes runs/. Feeds
stages, sample, output and fid.py. Read `mixar_loss` first, then `fit`, then sample.py.
Try: torchrun train.py --guidance dcmix

B pictures of a batch (in the losses, of the part that a process computes at once), N tokens, N'
masked ones, R diffusion draws per token. m True: to predict.
"""
import argparse
import ctypes
import gc
import math
import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import backbone
import checkpoint
import disk
import mixing
import tokenizers
from diffusion_head import T

LABEL_DROP = 0.1             # how often no class is given, for class guidance [MAR] [MaskBit]
CLIP = 3.0                   # largest norm of the gradient                    [MAR]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SEED_DISTANCE = 10_000_019   # neighbouring seeds share no random numbers for this many steps

# The recipe of each stage. A warm-up below 1 is a share of the length. With `anneal` the rate falls
# along a cosine, with `muon` the matrices in blocks get Muon's updates. `draws` is R. Betas and
# decay are those of [MAR] for mixar and of [MaskBit] for the prior; all else is [ours].
COMMON = dict(anneal=True, muon=True, betas=(0.9, 0.95))
TINY_RECIPE = dict(
    vae=COMMON | dict(steps=400, batch=16, lr=3e-3, warmup=20, decay=0.0),
    vq=COMMON | dict(steps=600, batch=16, lr=3e-4, warmup=20, decay=0.0, muon=False),
    prior=COMMON | dict(steps=600, batch=32, lr=5e-3, warmup=50, decay=0.045, betas=(0.9, 0.96)),
    mixar=COMMON | dict(steps=1000, batch=32, lr=5e-3, warmup=50, decay=0.02, draws=1))
# For one GPU and an evening. It was tried for a few steps only.
SMALL_RECIPE = {
    kind: recipe | dict(steps=50 * recipe["steps"], batch=4 * recipe["batch"],
                        lr=recipe["lr"] / 5, warmup=20 * recipe["warmup"])
    for kind, recipe in TINY_RECIPE.items()}
# 400 epochs of 625 steps; the first 100 epochs are warm-up [MAR]. All but mixar come as files.
LARGE_RECIPE = dict(
    mixar=COMMON | dict(steps=250_000, batch=2048, lr=8e-4, warmup=0.25, decay=0.02, draws=4,
                        anneal=False, muon=False))
RECIPES = dict(tiny=TINY_RECIPE, small=SMALL_RECIPE, base=LARGE_RECIPE, large=LARGE_RECIPE,
               huge=LARGE_RECIPE)


def mixar_loss(model, batch, rng, step, prior, args):
    """The loss of the paper's training step: a mean over a batch's masked tokens and their draws.

    batch: normalised mean and std (B, N, d_c) of the VAE's posterior, x_d (B, N, d_d), y (B,)
    rng: rng(torch.rand, *shape) gives uniform random numbers (B, *shape), a row a picture
    step: of this run, from 0, without those of --init; lambda depends on it
    prior: g_M of Eq. (11), needed with --ti-mix
    args: the flags, with the recipes
    """
    mean, std, x_d, y = batch
    _, N, d_c = mean.shape
    R = args.recipe["mixar"]["draws"]
    x_c = tokenizers.reparameterize(mean, std, rng(torch.randn, N, d_c))     # Eq. (7)
    ratio = mixing.mask_ratio(float(rng.shared(torch.rand, 1)))
    m = mixing.sample_mask(rng(torch.rand, N).argsort(1), ratio)             # Eq. (8)
    drop = rng(torch.rand) < LABEL_DROP
    # Eq. (12) comes first, so that Eq. (9) mixes x~_d. Fig. 3 has them the other way round.
    if args.ti_mix:
        u = rng(torch.rand, N, prior.splits)
        x_hat = mixing.predict_masked(prior, x_d, m, y, u)                   # Eqs. (10), (11)
        lam = mixing.ti_lambda(step, args.recipe["mixar"]["steps"])
        rho = rng(torch.rand, N)
        x_d = mixing.ti_mix(x_d, x_hat, m, rho, lam)                         # Eq. (12): x~_d
    # dcmix's masked tokens skip the encoder, unless --mix-at encoder is given; see MAR.forward
    x = model.mix(x_c, x_d, m)                                               # Eq. (9)
    z = model(x, x_d, m, y, drop)                                            # z of Eqs. (5), (6)

    n_masked = int(m[0].sum())                                               # N'
    t = as_rows((rng(torch.rand, R, n_masked) * T).long())                   # (R, B N')
    noise = as_rows(rng(torch.randn, R, n_masked, d_c))                      # (R, B N', d_c)
    return model.diffloss.loss(z[m], x_c[m], t, noise).mean()                # Eq. (5), and variance


def as_rows(drawn):
    """(B, R, N', ...) -> (R, B N', ...). Row r has the r-th numbers of all masked tokens."""
    return drawn.transpose(0, 1).flatten(1, 2)


def training_mask(u_ratio, u_code):
    """Eq. (3)'s mask (B, N, S), the prior's: hidden with probability acos(u) / (pi / 2). [MaskBit]

    u_ratio: (B,) uniform, the u of each image
    u_code: (B, N, S) uniform; codes are hidden independently, where the paper hides tokens
    """
    probability = torch.acos(u_ratio) / (math.pi / 2)
    return u_code < probability[:, None, None]


def code_loss(logits, codes):
    """Eq. (3): cross-entropy of all codes, hidden or not, with label smoothing 0.1.   [MaskBit]

    MaskBit takes the mean over all codes, where the paper has the sum over the hidden ones.

    logits: (B, N, S, 2^e)
    codes: (B, N, S) int
    """
    return nn.functional.cross_entropy(logits.flatten(0, 2), codes.flatten(), label_smoothing=0.1)


def prior_loss(model, batch, rng, step):
    """Eq. (3) on one batch: the prior predicts all codes, of which a random mask hides some."""
    _, _, x_d, y = batch
    codes = tokenizers.bits_to_codes(x_d.unflatten(-1, (model.splits, -1)))  # (B, N, S)
    hidden = training_mask(rng(torch.rand), rng(torch.rand, *codes.shape[1:]))
    e = model.bits // model.splits
    shown = torch.where(hidden, 2 ** e, codes)                               # 2^e means "masked"
    x = tokenizers.codes_to_bits(shown, e)                                   # (B, N, bits)
    drop = rng(torch.rand) < LABEL_DROP
    return code_loss(model(x, y, drop), codes)


class Loss(nn.Module):
    """A loss as a module, so that DistributedDataParallel sees one forward call."""

    def __init__(self, model, loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *batch):
        return self.loss(self.model, *batch)


class Rng:
    """The random numbers of a step, but for dropout. They follow from (seed, step) and the order
    of the calls, so a checkpoint holds no random state.

    rng(f, *shape), f being torch.rand or randn, draws (B, *shape) for the whole batch and keeps the
    rows of this process, or of its part `part` of `parts` (--accumulate). So a picture's numbers do
    not depend on the processes. rng.shared(f, *shape) is the same for all.
    """

    def __init__(self, seed, step, B, device, part=0, parts=1):
        rank, ranks = world()
        piece = rank * parts + part
        pieces = ranks * parts
        self.B = B
        self.device = device
        self.rows = slice(piece * B // pieces, (piece + 1) * B // pieces)
        self.generator = torch.Generator(device).manual_seed(seed * SEED_DISTANCE + step)

    def shared(self, f, *shape):
        return f(shape, generator=self.generator, device=self.device)

    def __call__(self, f, *shape):
        return self.shared(f, self.B, *shape)[self.rows]


@lru_cache(maxsize=1)
def data_order(seed, epoch, n):
    """The n pictures in the random order of an epoch."""
    return np.random.RandomState([seed, epoch]).permutation(n)


def step_batches(args, get_batch, n, B, total_step, parts):
    """This process's share of a step's batch, in `parts` parts (--accumulate): [(batch, rng)].

    Every epoch leaves out its last n mod B pictures; if n < B, a batch holds some more than once.
    """
    rank, ranks = world()
    # for dropout, another seed for every step and process
    torch.manual_seed(2 ** 31 + (args.seed * SEED_DISTANCE + total_step) * ranks + rank)
    epoch, k = divmod(total_step, max(n // B, 1))
    order = data_order(args.seed, epoch, n)
    if n < B:
        order = np.resize(order, B)
    pictures = order[k * B:(k + 1) * B]
    batches = []
    for part in range(parts):
        rng = Rng(args.seed, total_step, B, torch.device(args.device), part, parts)
        batch = get_batch(pictures[rng.rows], rng)
        batches.append((tuple(a.to(args.device) for a in batch), rng))
    return batches


def learning_rate(recipe, total_step, before=0):
    """Linear warm-up [MAR]; with `anneal`, times a cosine that falls from 1 to 0.1 [ours].

    before: the steps made before --init. If there are any, the cosine stays at 0.1.
    """
    warmup = recipe["warmup"]
    if warmup < 1:
        warmup *= recipe["steps"]
    rate = recipe["lr"] * min(1, (total_step + 1) / max(warmup, 1))
    if recipe["anneal"]:
        progress = 1 if before > 0 else total_step / recipe["steps"]
        rate *= 0.55 + 0.45 * math.cos(math.pi * progress)
    return rate


def update(args, loss_module, state, batches, asked_to_stop=False):
    """One step of state.optimizer on the parts [(batch, rng)] of a batch.

    loss_module: a `Loss`, in DistributedDataParallel if there are several processes
    asked_to_stop: whether a signal asked this process to stop
    Returns the loss over all processes, the gradient's norm, and whether any process has to stop.
    No step is taken if loss or norm is not finite.
    """
    state.optimizer.zero_grad(set_to_none=True)
    device = batches[0][1].device
    total = torch.zeros((), device=device)
    for k, (batch, rng) in enumerate(batches):
        # for DDP: the processes exchange gradients once a step
        loss_module.require_backward_grad_sync = k == len(batches) - 1
        with autocast(args.amp, device):
            loss = loss_module(batch, rng, state.step) / len(batches)
        loss.backward()
        total += loss.detach()
    norm = float(nn.utils.clip_grad_norm_(state.model.parameters(), CLIP))
    asked = torch.tensor(float(asked_to_stop), device=device)
    loss, stopping = mean_over_ranks(torch.stack([total, asked])).tolist()
    if math.isfinite(loss + norm):
        with autocast(args.amp, device):                                     # Muon's products
            state.optimizer.step()
    return loss, norm, stopping > 0


def fit(args, stage):
    """Train the model of a stage to the end of its recipe, starting from its last.pt, if any."""
    rank, _ = world()
    kind = stage.kind
    steps = args.recipe[kind]["steps"]
    with disk.locked(stage.folder) if rank == 0 else nullcontext():
        barrier()                                            # until the first one has the lock
        saved, changes = checkpoint.read_stage(args, stage)
        state = checkpoint.State(args, stage)
        if saved:
            with disk.reading(stage.path, f"{kind} checkpoint that fits this run"):
                state.load(saved)
            print(f"{kind}: {state.step} of {steps} steps are done{changes}")
        elif kind == "mixar" and args.init:
            state.start_from(args.init)
        train_steps(args, stage, state)
        if rank == 0 and saved and checkpoint.outdated(saved, stage, steps):
            state.save()
        if rank == 0 and stage.preview:
            stage.preview(state.ema.eval())
    barrier()


def train_steps(args, stage, state):
    """Take the remaining steps of a stage. After a signal, save and end, at most a step later."""
    rank, ranks = world()
    kind = stage.kind
    recipe = args.recipe[kind]
    steps = recipe["steps"]
    # vq's entropy loss needs the whole batch, so it is never taken in parts
    parts = 1 if kind == "vq" else args.accumulate
    loss_module = Loss(state.model.train(), stage.loss)
    if ranks > 1:
        loss_module = nn.parallel.DistributedDataParallel(loss_module)
    log = checkpoint.Log(args, stage, state.step) if rank == 0 else None
    # A signal during `update` is seen by the next step, which all processes still make and save.
    received = collect_signals()
    failed = 0
    while state.step < steps:
        # With --init RUN, rate and average go on where RUN ended, and so do data order and random
        # numbers if the seed is RUN's. Length, log and lambda take state.step, which starts at 0.
        total_step = state.before + state.step
        lr = learning_rate(recipe, total_step, state.before)
        state.set_rate(lr)
        batches = step_batches(args, stage.get_batch, stage.n, recipe["batch"], total_step, parts)
        loss, norm, stopping = update(args, loss_module, state, batches, len(received) > 0)
        last = state.step == steps - 1
        failed = 0 if math.isfinite(loss + norm) else failed + 1
        if failed == 0:
            checkpoint.update_ema(state.ema, state.model, total_step)
        else:
            print(f"\n{kind}: step {state.step} is left out, its loss is not finite")
        if failed == 5 or (failed and last):
            raise SystemExit(f"{kind}: loss not finite in {failed} steps up to {state.step}; "
                             f"lower --lr (of mixar) or lr in RECIPES, or remove {stage.path}")
        state.step += 1
        preview_due = stage.preview and args.sample_every and state.step % args.sample_every == 0
        if rank == 0:
            log.write(state.step, loss, lr, norm)
            due = last or stopping or preview_due or state.step % args.save_every == 0
            if due and failed == 0:
                state.save()
            if preview_due and failed == 0 and not (last or stopping):
                stage.preview(state.ema.eval())
        if stopping:
            end = f"saved in {stage.path}" if failed == 0 else "not saved, its loss is not finite"
            print(f"\n{kind}: stopped by a signal at step {state.step}, {end}")
            raise SystemExit(128 + (received[0] if received else signal.SIGTERM))
    end_at_once_on_signal(received)


def world():
    """The rank of this process, and how many processes there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier():
    """Wait for all processes. If one has ended, it has said why, and this one ends, too."""
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError:
            sys.exit(1)


def mean_over_ranks(q):
    """The mean of q over the processes. Its gradient is this process's: DDP averages those."""
    if not dist.is_initialized():
        return q
    total = q.detach().clone()
    dist.all_reduce(total)
    return q + (total / dist.get_world_size() - q).detach()


def end_at_once_on_signal(received=()):
    """Outside `train_steps`: from now on, one of SIGNALS ends the program at once.

    received: signals that came earlier; if there is one, it ends the program now
    """
    def stop(number, frame):
        if world()[0] == 0:
            print(f"\nstopped by {signal.Signals(number).name}", file=sys.stderr)
        raise SystemExit(128 + number)

    for number in SIGNALS:
        signal.signal(number, stop)
    if received:
        stop(received[0], None)


def collect_signals():
    """Returns a list to which SIGNALS are added from now on. `train_steps` looks at it."""
    received = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: received.append(number))
    return received


@contextmanager
def end_in_one_line():
    """Inside, a signal, or an error such as a full disk, ends the program with one line."""
    end_at_once_on_signal()
    # file names may hold what the terminal cannot show; a stream that was closed is None
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (OSError, MemoryError, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise SystemExit(f"cannot go on: {reason}; choose other folders or numbers") from None


@contextmanager
def process_group():
    """Inside, the processes that torchrun started are one group."""
    if dist.is_torchelastic_launched():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # one process may sample pictures for hours while the others wait
        dist.init_process_group(backend, timeout=timedelta(days=1))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # the first process speaks for all
    if world()[0] > 0:
        sys.stdout = open(os.devnull, "w")
    yield
    if dist.is_initialized():
        # DistributedDataParallel refers to itself, and has to be freed before its group ends
        gc.collect()
        dist.destroy_process_group()


def autocast(amp, device):
    """The precision of --amp: auto is bf16 where it is faster, on CUDA and on CPUs with AMX."""
    faster = device.type == "cuda" or torch.cpu.get_capabilities().get("amx_tile", False)
    enabled = amp == "bf16" or (amp == "auto" and faster)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def keep_freed_memory():
    """The C library keeps freed memory for the next step, so that steps on a CPU take less time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):                                             # where it is glibc
        libc.mallopt(-4, 0)                                                  # M_MMAP_MAX
        libc.mallopt(-1, -1)                                                 # M_TRIM_THRESHOLD


def within(low, high=math.inf, kind=float):
    """The argparse type of a finite number in [low, high]. Errors show its __name__."""
    def number(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):                    # nan is refused, too
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value
    number.__name__ = "whole number" if kind is int else "number"
    return number


def parse_flags(p, argv):
    """Add --device and --seed to p, and parse. Refuse an empty name, which would be this folder."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    p.add_argument("--device", default=devices[-1], choices=devices, help="where to compute")
    p.add_argument("--seed", type=within(0, 2 ** 32 - 1, int), metavar="N", default=0,
                   help="of all random numbers")
    args = p.parse_args(argv)
    for flag, value in vars(args).items():
        if value == "":
            p.error(f"{flag}: a name is missing")
    return args


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count = dict(type=within(1, kind=int), metavar="N")
    g = p.add_argument_group("what to train")
    g.add_argument("--data", default="shapes", help="shapes, drawn here, or a folder (as ./shapes)")
    g.add_argument("--images", **count, help="use at most N pictures")
    g.add_argument("--mirror", action=argparse.BooleanOptionalAction,
                   help="train on mirror images, too (None: as the data set says)")
    g.add_argument("--guidance", default="dcmix", choices=backbone.GUIDANCES,
                   help="how X_d guides X_c [paper 3.3]; none is plain MAR")
    g.add_argument("--mix-at", default="decoder", choices=["decoder", "encoder"],
                   help="where dcmix's discrete tokens enter [ours]")
    g.add_argument("--ti-mix", action="store_true", help="TI-Mix, Eqs. 10 to 12 [paper 3.4]")
    g.add_argument("--init", metavar="RUN", help="continue this run or official MAR [paper 4.3]")
    g.add_argument("--stage", default="mixar", choices=["vae", "vq", "cache", "prior", "mixar"],
                   help="stop after this stage")
    g.add_argument("--preset", default="tiny", choices=RECIPES, help="sizes, see backbone.py")
    g.add_argument("--vae", metavar="FILE", help="use this VA-VAE, KL-16 or vae of ours")
    g.add_argument("--vq", metavar="FILE", help="use this tokenizer of MaskBit or vq of ours")
    g.add_argument("--prior", metavar="FILE", help="use this generator of MaskBit or prior of ours")
    g = p.add_argument_group("length and rate (None: as in RECIPES)")
    g.add_argument("--vae-steps", **count, help="training steps of stage vae")
    g.add_argument("--vq-steps", **count, help="training steps of stage vq")
    g.add_argument("--prior-steps", **count, help="training steps of stage prior")
    g.add_argument("--steps", **count, help="training steps of stage mixar")
    g.add_argument("--batch-size", **count, help="pictures a step, over all processes")
    g.add_argument("--lr", type=within(0), metavar="X", help="learning rate of stage mixar")
    g = p.add_argument_group("running")
    g.add_argument("--runs", default="runs", help="the folder of all runs")
    g.add_argument("--out", help="the MixAR run (None: RUNS/DATA-GUIDANCE[-ti])")
    g.add_argument("--amp", default="auto", choices=["auto", "fp32", "bf16"],
                   help="precision; auto is bf16 on CUDA and on CPUs with AMX")
    g.add_argument("--accumulate", **count, default=1, help="take the batch in N parts (not vq's)")
    g.add_argument("--checkpoint-activations", action="store_true", help="MixAR's, to save memory")
    g.add_argument("--save-every", **count, default=500, help="steps between checkpoints")
    g.add_argument("--sample-every", type=within(0, kind=int), metavar="N", default=1000,
                   help="steps between pictures; 0: only at the end")
    g.add_argument("--tensorboard", action="store_true", help="write an event file, too")
    args = parse_flags(p, argv)
    add_recipe(args)
    return args


def add_recipe(args):
    """Add `recipe` to the flags: the recipe of each stage, changed as the flags say."""
    args.recipe = {kind: dict(recipe) for kind, recipe in RECIPES[args.preset].items()}
    steps = dict(vae=args.vae_steps, vq=args.vq_steps, prior=args.prior_steps, mixar=args.steps)
    for kind, recipe in args.recipe.items():
        recipe["steps"] = steps[kind] or recipe["steps"]
        recipe["batch"] = args.batch_size or recipe["batch"]
    mixar = args.recipe["mixar"]
    if RECIPES[args.preset] is LARGE_RECIPE:
        mixar["lr"] *= mixar["batch"] / 2048                                 # [MAR]
    if args.lr is not None:
        mixar["lr"] = args.lr


def main(argv=None):
    import stages                                                            # it imports train.py
    args = parse(argv)
    keep_freed_memory()
    with end_in_one_line(), process_group():
        stages.train_stages(args)


if __name__ == "__main__":
    main()
