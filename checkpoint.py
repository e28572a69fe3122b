"""A model in training: its stage, optimiser, moving average, checkpoint and log.

`Stage` says what is trained, and on which data. `State` is what a checkpoint holds. A stopped run
continues from it, bit for bit. `make_optimizer` is MAR's AdamW, or Muon for the matrices in blocks:
those of MAR, of its head and of the prior, and the residual blocks of the VAE.

Reads disk.py and backbone.py. Feeds train.py and stages.py.
Not needed to follow the paper.
Try: head runs/shapes-dcmix/log.csv
"""
import copy
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import backbone
import disk

EMA_DECAY = 0.9999           # of the moving average from update 89,990 on     [MAR]
LOG_EVERY = 10               # steps between rows of log.csv


def orthogonal(g):
    """Roughly U V^T for each matrix g = U S V^T of a stack, by five Newton-Schulz steps.   [Muon]

    A step is x <- 3.4445 x - 4.775 G x + 2.0315 G^2 x with G = x x^T. It brings the singular values
    closer to 1. Wide matrices have the smaller G, so tall ones are transposed.

    g: (k, rows, columns)
    Returns the same shape; under autocast it is computed in bf16.
    """
    wide = g if g.shape[1] <= g.shape[2] else g.mT
    x = nn.functional.normalize(wide, dim=(1, 2))
    for _ in range(5):
        gram = x @ x.mT
        p = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)       # -4.775 G + 2.0315 G^2
        x = torch.baddbmm(x, p, x, beta=3.4445)                              # 3.4445 x + p x
    return x if wide is g else x.mT


class Muon(torch.optim.AdamW):
    """AdamW, but the updates of some parameters are their momentum, made orthogonal.   [Muon]

    The entries of such an update are about 0.2, like those of AdamW's. So both take the same rate.
    torch.optim.Muon takes one matrix at a time, which is slower here, and no convolutions.

    matrices: the set of these parameters; kernels of convolutions are taken as matrices
    """

    def __init__(self, groups, matrices, **settings):
        super().__init__(groups, **settings)
        self.matrices = matrices

    def nesterov(self, p):
        """Update the momentum of p. Returns 0.05 gradient + 0.95 momentum, as a matrix."""
        if p not in self.state:
            # the names that AdamW's state has
            self.state[p] = dict(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
        momentum = self.state[p]["exp_avg"].lerp_(p.grad, 0.05)
        return p.grad.lerp(momentum, 0.95).flatten(1)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p in self.matrices:
                    same_shape[p.shape].append(p)
            for parameters in same_shape.values():
                directions = orthogonal(torch.stack([self.nesterov(p) for p in parameters]))
                size = 0.2 * max(directions[0].shape) ** 0.5
                for p, direction in zip(parameters, directions):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(direction.view_as(p), alpha=group["lr"] * size)
                    # AdamW then leaves it alone
                    p.grad = None
        super().step()


def make_optimizer(model, recipe):
    """AdamW, with decay only for matrices and tables outside the diffusion head.   [MAR]

    With `muon`, the matrices of the blocks get Muon's updates, also those of the head. The betas of
    the recipe are then those of all other parameters.   [ours]
    """
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and "diffloss" not in name]
    others = [p for name, p in named if p.ndim <= 1 or "diffloss" in name]
    groups = [dict(params=decayed, weight_decay=recipe["decay"]),
              dict(params=others, weight_decay=0.0)]
    settings = dict(lr=recipe["lr"], betas=recipe["betas"], fused=True)
    if not recipe["muon"]:
        return torch.optim.AdamW(groups, **settings)
    # of MAR and the head, of the prior, of the VAE (but for its attention)
    blocks = ("blocks.", "layers.", "block.")
    matrices = {p for name, p in named if p.ndim > 1 and any(part in name for part in blocks)}
    return Muon(groups, matrices, **settings)


def update_ema(ema, model, n, decay=EMA_DECAY):
    """The n-th update (from 0) of the moving average.

    Its decay is (1 + n) / (10 + n) at first, so that the initial weights fade sooner.   [ours]
    """
    average = get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))
    average(list(ema.parameters()), list(model.parameters()), n)


@dataclass
class Stage:
    """A model to train, and the data to train it on."""

    kind: str                          # "vae", "vq", "prior" or "mixar"
    folder: Path                       # where its checkpoint lies, last.pt
    config: dict                       # the arguments of its model
    made_from: dict                    # its pictures or tokens: the same in a resumed run
    loss: Callable                     # loss(model, batch, rng, step)
    n: int = 0                         # how many pictures there are
    get_batch: Callable = None         # get_batch(pictures, rng) gives the tensors of a batch
    preview: Callable = None           # preview(ema) makes pictures, after a save
    meta: dict = None                  # what its checkpoint says beside the model

    @property
    def path(self):
        return self.folder / "last.pt"


def finished(saved):
    """Whether a checkpoint has made all the steps that its last command asked for.

    A finished tokenizer or prior is not trained again; more steps are an error, see read_stage.
    """
    return saved["step"] >= saved["args"]["recipe"][saved["kind"]]["steps"]


def outdated(saved, stage, steps):
    """Whether a checkpoint that needs no more steps is to be saved again.

    It is if its run was stopped and --steps is now shorter, or if its data have moved: --truth and
    fid.py take their folder from it.
    """
    moved = stage.kind == "mixar" and saved["meta"]["data"] != stage.meta["data"]
    return saved["step"] >= steps and (moved or not finished(saved))


def read_stage(args, stage):
    """The checkpoint of a stage, and a text on how this command differs from the one that saved it.

    Returns (None, "") if there is none. SystemExit if it is damaged, and in three cases:
        it was begun with another config or made from something else
        it was begun with another seed or batch, and is not a finished tokenizer or prior
        it is a finished tokenizer or prior, on which tokens and runs may depend, and this command
            asks for more steps
    """
    kind = stage.kind
    if not stage.path.exists():
        return None, ""
    recipe = args.recipe[kind]
    saved = disk.load_checkpoint(stage.path, kind)
    may_not_change = stage.made_from | dict(config=stage.config)
    with disk.reading(stage.path, f"{kind} checkpoint that fits this run"):
        step = int(saved["step"])
        used_by_others = finished(saved) and kind != "mixar"
        if not used_by_others:
            # seed and batch decide which pictures the next steps see
            may_not_change |= dict(seed=args.seed, batch=recipe["batch"])
        disk.check_same(stage.path, saved["settings"], may_not_change)
        # All else may change, and is printed. What is not in `was` is not compared.
        was = dict(saved["args"]["recipe"][kind], amp=saved["args"]["amp"])
        was["seed"] = saved["settings"]["seed"]
        if kind == "mixar":
            was["init"] = saved["args"]["init"]
    if used_by_others and step < recipe["steps"]:
        raise SystemExit(f"{stage.path} is finished after {step} steps, not {recipe['steps']}, and "
                         "is not trained further: choose another --runs, or "
                         f"--{kind}-steps {step}")
    now = dict(recipe, amp=args.amp, seed=args.seed, init=args.init)
    changes = ", ".join(disk.differences(was, now))
    return saved, f" (saved with {changes})" if changes else ""


def skipped_before(folder, kind):
    """The names of the unreadable pictures that the tokenizer in `folder` was trained without."""
    path = folder / "last.pt"
    if not path.is_file():
        return []
    saved = disk.load_checkpoint(path, kind)
    with disk.reading(path, f"{kind} checkpoint"):
        return list(saved["meta"].get("skipped", []))


class State:
    """A model in training: weights, moving average and optimiser after `step` steps.

    before: how many steps the runs behind --init had made; rate, average, data order and random
        numbers go on after them

    A checkpoint, last.pt, is a dict of
        model, ema, optimizer    the weights, their moving average, the optimiser's moments
        step, ema_start          the attributes `step` and `before` (ema_start is its older name)
        kind, config             "vae", "vq", "prior" or "mixar"; the arguments of the model
        settings                 what a resumed run may not change, see read_stage
        args                     all flags, with the recipes; no random state, see train.Rng
        meta                     of "mixar" what sampling needs, such as the files of vae, vq and
                                 prior, see stages.describe_run; of a tokenizer the unreadable
                                 pictures
    """

    def __init__(self, args, stage):
        self.args = args
        self.stage = stage
        self.step = 0
        self.before = 0
        torch.manual_seed(args.seed)                                         # initial weights
        model = backbone.KINDS[stage.kind](**stage.config)
        # convolutions are faster with the channels last
        self.model = model.to(args.device, memory_format=torch.channels_last)
        if stage.kind == "mixar":
            head = model.diffloss.net
            for blocks in (model.encoder_blocks, model.decoder_blocks, head.res_blocks):
                blocks.recompute = args.checkpoint_activations
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, args.recipe[stage.kind])

    def load(self, saved):
        """Take over weights, average, optimiser and steps from a checkpoint of train.py."""
        for name, module in (("model", self.model), ("ema", self.ema)):
            disk.check_weights(module, saved[name])
            module.load_state_dict(saved[name])
        self.optimizer.load_state_dict(saved["optimizer"])
        for p in self.model.parameters():
            moments = self.optimizer.state[p]
            # Muon has only the first moment
            second = moments.get("exp_avg_sq", moments["exp_avg"])
            for moment in (moments["exp_avg"], second):
                if moment.shape != p.shape or not moment.isfinite().all():
                    raise ValueError("the optimiser's moments are not finite or do not fit")
        self.step = int(saved["step"])
        self.before = int(saved["ema_start"])

    def start_from(self, path):
        """Begin with --init: go on where another run has ended, or from an official MAR."""
        saved = disk.load_checkpoint(path, "mixar")
        with disk.reading(path, "mixar checkpoint that fits this run"):
            if "kind" in saved:
                self.load(saved)
                self.before += self.step
                self.step = 0
            else:
                official, _ = backbone.load_model(path, "mixar")
                self.model.load_state_dict(official.state_dict())
                self.ema.load_state_dict(official.state_dict())

    def set_rate(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def save(self):
        """Write last.pt. SystemExit if the weights are not finite."""
        stage = self.stage
        kind = stage.kind
        for p in self.model.parameters():
            if not p.isfinite().all():
                raise SystemExit(f"{kind}: weights are not finite after step {self.step}; lower "
                                 "--lr (of mixar) or lr in RECIPES. What was saved before is kept")
        settings = stage.made_from | dict(
            config=stage.config, seed=self.args.seed, batch=self.args.recipe[kind]["batch"])
        saved = dict(
            kind=kind, config=stage.config, settings=settings, meta=stage.meta,
            args=vars(self.args), step=self.step, ema_start=self.before,
            model=self.model.state_dict(), ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict())
        disk.write_whole(stage.path, partial(torch.save, saved))


class Log:
    """A progress bar and log.csv. Rows after `step`, which a killed run has left, are removed."""

    def __init__(self, args, stage, step):
        recipe = args.recipe[stage.kind]
        path = stage.folder / "log.csv"
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        # neither the header nor half a row
        rows = [line for line in lines if re.fullmatch(r"\d+(,[^,]+){4},\d+\.?\d*", line)]
        rows = [row for row in rows if int(row.split(",")[0]) <= step]
        header = "step,loss,lr,grad_norm,images_per_second,seconds"
        text = "\n".join([header, *rows]) + "\n"
        disk.write_whole(path, lambda file: file.write(text.encode()))
        self.file = path.open("a", buffering=1)                              # row by row
        self.seconds = float(rows[-1].split(",")[5]) if rows else 0.0
        self.board = None
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise SystemExit("--tensorboard needs: pip install tensorboard") from None
            self.board = SummaryWriter(stage.folder)
        self.B = recipe["batch"]
        self.first = step
        self.start = time.monotonic()
        self.bar = tqdm(desc=f"{stage.kind:6}", unit="step", initial=step, total=recipe["steps"],
                        mininterval=1)

    def write(self, step, loss, lr, norm):
        self.bar.update()
        if step % LOG_EVERY and step < self.bar.total:
            return
        self.bar.set_postfix(loss=f"{loss:.4f}")
        elapsed = time.monotonic() - self.start
        speed = (step - self.first) * self.B / elapsed
        seconds = self.seconds + elapsed
        self.file.write(f"{step},{loss:.6f},{lr:.4g},{norm:.4f},{speed:.1f},{seconds:.2f}\n")
        if self.board:
            self.board.add_scalars("train", dict(loss=loss, lr=lr, grad_norm=norm), step)
        if step == self.bar.total:
            self.bar.close()
