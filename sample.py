"""Inference: X_d ~ p_phi(X_d), X_c ~ p_theta(X_c | X_d), then pixels. Eqs. (4) and (6), Fig. 3.

`sample_prior` is MaskBit's sampler (Eq. 4), `generate` MAR's loop over Eq. (6), and `System` holds
all models of a run. The random numbers of image i are a function of (seed, i). So it is the same,
but for rounding, at any batch size and number of processes. A CPU and a GPU draw different ones.

Reads disk, the models, mixing, train (processes, AMP), dataset and output.py. Feeds stages.py and
fid.py. It is the last of the paper's files.
Try: python sample.py runs/shapes-dcmix --out samples.png

B batch, N tokens, n_now tokens of this AR step, S bit groups of e bits, C = d_c channels.
m True: still to predict.
"""
import argparse
import math
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

import backbone
import dataset
import disk
import mixing
import output
import tokenizers
import train

# The settings of a run's samples. tiny [ours] was chosen on validation pictures, small is a guess.
# The others are [MAR]'s, and for the prior those of the 14-bit generator [MaskBit]. Class guidance:
#     MixAR  eps = eps_u + cfg (eps_c - eps_u)        cfg = 1 is no guidance
#     prior  l = l_c + prior_cfg (l_c - l_u)          prior_cfg = 0 is no guidance
TINY_SAMPLING = dict(
    ar_steps=8, diffusion_steps=10, cfg=2.5, cfg_schedule="linear", temperature=0.5, bound=5.0,
    prior_steps=16, prior_cfg=1.0, prior_power=1.0, prior_temperature=1.5)
SMALL_SAMPLING = TINY_SAMPLING | dict(ar_steps=32, diffusion_steps=25, prior_steps=32)
LARGE_SAMPLING = dict(
    ar_steps=256, diffusion_steps=100, cfg=2.9, cfg_schedule="linear", temperature=1.0, bound=None,
    prior_steps=64, prior_cfg=7.1, prior_power=3.0, prior_temperature=7.8)
SAMPLING = dict(tiny=TINY_SAMPLING, small=SMALL_SAMPLING, base=LARGE_SAMPLING,
                large=LARGE_SAMPLING | dict(cfg=3.0), huge=LARGE_SAMPLING | dict(cfg=3.2))


def image_rng(seed, indices, stream, device="cpu"):
    """The random numbers of the images `indices`: each is a function of (seed, i, stream).

    stream: 0 for X_d, 1 for X_c
    Returns rng: rng(f, *shape) gives f's numbers (B, *shape), drawn on the device.
    """
    first = seed * train.SEED_DISTANCE + stream
    generators = [torch.Generator(device).manual_seed(first + 2 * int(i)) for i in indices]

    def rng(f, *shape):
        return torch.stack([f(shape, generator=g, device=device) for g in generators])

    return rng


def prior_cfg_at(cfg, power, i, steps):
    """The scale of guidance in step i: it rises along a cosine from 0 towards cfg.   [MaskBit]"""
    return cfg * (1 - math.cos(math.pi * (i / steps) ** power)) / 2


def least_certain(score, known, done):
    """Eq. (4): which codes are hidden again after a step that is not the last.   [MaskBit]

    They are the k codes of lowest score in each image. k is at least 1, and smaller than the number
    of codes that were hidden before. Such a k exists, as open_run allows no more steps than codes.

    score: (B, N, S), high where the prior is certain
    known: (B, N, S) bool, codes kept in earlier steps, equally many in each image; they stay
    done: the share of the steps that have been made
    Returns (B, N, S) bool.
    """
    score = score.masked_fill(known, math.inf)
    ratio = math.acos(done) / (math.pi / 2)
    k = max(math.floor(ratio * known[0].numel()), 1)
    k = min(k, int((~known[0]).sum()) - 1)
    ascending, _ = score.flatten(1).sort(dim=1)
    threshold = ascending[:, k - 1]                                          # (B,)
    return score <= threshold[:, None, None]


@torch.no_grad()
def sample_prior(prior, y, choose, gumbel, steps, cfg, power, temperature):
    """Eq. (4): X_d from all masked in `steps` steps, each keeping the most certain codes. [MaskBit]

    y: (B,) int, the classes
    choose: choose(logits (B, N, S, 2^e)) samples codes (B, N, S)
    gumbel: gumbel() gives Gumbel noise (B, N, S)
    cfg, power: the guidance scale, see prior_cfg_at
    temperature: factor of the Gumbel noise; it falls linearly to 0 over the steps
    Returns bits (B, N, S e) in {-1, +1}.
    """
    e = prior.bits // prior.splits
    masked = 2 ** e                                                          # stands for "masked"
    codes = torch.full((len(y), prior.N, prior.splits), masked, device=y.device)
    always = torch.ones(len(y), dtype=torch.bool, device=y.device)
    never = ~always
    for i in range(steps):
        known = codes < masked
        x = tokenizers.codes_to_bits(codes, e)
        scale = prior_cfg_at(cfg, power, i, steps)
        if scale == 0:
            logits = prior(x, y)                                             # (B, N, S, 2^e)
        else:
            drop = torch.cat([never, always])
            both = prior(torch.cat([x, x]), torch.cat([y, y]), drop)
            logits, without_class = both.chunk(2)
            logits = logits + scale * (logits - without_class)
        chosen = torch.where(known, codes, choose(logits))
        if i == steps - 1:
            return tokenizers.codes_to_bits(chosen, e)
        done = (i + 1) / steps
        log_p = logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
        score = log_p + gumbel() * temperature * (1 - done)
        hidden = least_certain(score, known, done)
        codes = torch.where(hidden, masked, chosen)


def hidden_after(s, steps, N, n_hidden):
    """Eq. (6): how many of N tokens stay hidden after AR step s, of n_hidden before it.   [MAR]

    It is at least 1, also for the last step, where `generate` takes 0 instead. There are at most N
    steps, see open_run.
    """
    n = math.floor(N * math.cos(math.pi / 2 * (s + 1) / steps))
    return max(1, min(n_hidden - 1, n))


def diffusion_steps_at(s, ar_steps, diffusion_steps):
    """The diffusion steps of AR step s.   [ours]

    diffusion_steps: an int for all AR steps, or [first, last], with a straight line between
    """
    if isinstance(diffusion_steps, int):
        return diffusion_steps
    return round(np.interp(s, (0, max(ar_steps - 1, 1)), diffusion_steps))


@torch.no_grad()
def generate(model, x_d, y, order, noise, ar_steps, diffusion_steps, cfg=1.0, schedule="linear",
             temperature=1.0, bound=None, on_step=None):
    """Eq. (6): X_c given X_d, in ar_steps steps, each token by the diffusion head.   [MAR]

    x_d: (B, N, d_d) bits
    y: (B,) int, the classes
    order: (B, N), a permutation of the positions for each image; tokens are generated from its end
        to its beginning, and `hide` hides those that are left
    noise: noise(now (B, N) bool, n) gives (n, B n_now, C) for n diffusion steps of the tokens `now`
    diffusion_steps: see diffusion_steps_at
    cfg, schedule: the guidance scale; "linear" lets it grow with the tokens known after the step
    temperature, bound: see DiffusionHead.sample
    on_step: on_step(m) sees the mask after every AR step
    Returns x_c (B, N, C).
    """
    B, N = order.shape
    x_c = torch.zeros(B, N, model.d_c, device=order.device)
    always = torch.ones(B, dtype=torch.bool, device=order.device)
    never = ~always
    n_hidden = N
    for s in range(ar_steps):
        n_after = hidden_after(s, ar_steps, N, n_hidden)
        share = (N - n_after) / N if schedule == "linear" else 1
        scale = 1 + (cfg - 1) * share
        # until here n_after was at least 1, as MAR computes the scale; the last step hides nothing
        if s == ar_steps - 1:
            n_after = 0
        m = mixing.hide(order, n_hidden)
        now = m & ~mixing.hide(order, n_after)                               # this step's tokens
        x = model.mix(x_c, x_d, m)                                           # Eq. (9)
        z = model(x, x_d, m, y, drop=never)[now]                             # (B n_now, D)
        # without the class, but with X_d                                      [ours]
        z_uncond = model(x, x_d, m, y, drop=always)[now] if cfg != 1 else None
        n = diffusion_steps_at(s, ar_steps, diffusion_steps)
        x_c[now] = model.diffloss.sample(z, noise(now, n), n, temperature, z_uncond, scale, bound)
        n_hidden = n_after
        if on_step:
            on_step(mixing.hide(order, n_hidden))
    return x_c


def describe_official(model):
    """What stages.describe_run says of a run, for an official MAR on KL-16's latents.   [MAR]"""
    n, D = model.class_emb.weight.shape
    preset = {768: "base", 1280: "huge"}.get(D, "large")
    return dict(
        data=None,
        classes=[str(k) for k in range(n)],
        sampling=SAMPLING[preset],
        latent_mean=[0.0] * model.d_c,
        latent_std=[1 / 0.2325] * model.d_c,
        shared=".",
        files={},
    )


class System:
    """All models of a run: what it takes to sample pictures.

    run: a run folder, its checkpoint, or an official MAR file, which names no other files
    amp: precision of transformers and head; the tokenizers compute in fp32
    vae, prior: files to use instead of those that the run names
    SystemExit if a file is missing, or not the one that the run was trained with; a given prior may
    be another one.
    """

    def __init__(self, run, device="cpu", amp="auto", vae=None, prior=None):
        # the files that a run names are relative to where it is, not to a link to it
        self.path = disk.checkpoint_file(run).resolve()
        self.device = torch.device(device)
        self.amp = amp
        model, saved = backbone.load_model(self.path, "mixar")
        self.model = model.to(self.device)
        with disk.reading(self.path, "checkpoint of a run"):
            self.step = int(saved["step"])
            self.meta = saved["meta"]
            if self.meta is None:
                self.meta = describe_official(model)
            self.settings = {name: self.meta["sampling"][name] for name in TINY_SAMPLING}
            self.shared = self.path.parent / self.meta["shared"]
            # this unpacks pairs, so that it fails for a damaged checkpoint
            self.files = {kind: (file, fingerprint)
                          for kind, (file, fingerprint) in self.meta["files"].items()}
            self.mean, self.std = tokenizers.check_statistics(
                self.meta["latent_mean"], self.meta["latent_std"], model.d_c, self.device)
        self.prior_seconds = 0.0
        self.vae = self.load_part("vae", vae)
        self.vq = self.load_part("vq", None)
        self.prior = self.load_part("prior", prior)
        if self.vae is None:
            raise SystemExit(f"{run} is an official MAR file and names no VAE; add --vae FILE")
        stride = 2 ** (len(self.vae.encoder.down) - 1)
        self.size = math.isqrt(model.N) * stride                             # in pixels
        disk.check_equal(run, "channels", model.d_c, self.vae.post_quant_conv.in_channels)
        if self.prior and self.vq:
            found = (model.N, self.vq.bits, len(self.meta["classes"]))
            expected = (self.prior.N, self.prior.bits, self.prior.classes)
            disk.check_equal(run, "tokens, bits, classes", found, expected)

    def load_part(self, kind, file):
        """The vae, vq or prior: in this file, else in the one that the run names, else None."""
        named, expected = self.files.get(kind, (None, None))
        if not file and not named:
            return None
        source = file or self.path.parent / named
        part, _ = backbone.load_model(source, kind)
        found = disk.fingerprint(part)
        may_differ = expected is None or (kind == "prior" and file)
        if found != expected and not may_differ:
            raise SystemExit(f"{source}: {self.path} was trained with the {kind} {expected}, "
                             f"not with {found}")
        return part.to(self.device)

    def grid(self, tokens):
        """(B, N, C) -> (B, C, h, w)"""
        side = math.isqrt(tokens.shape[1])
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def sample_discrete(self, seed, indices, y):
        """X_d of the images `indices` with the classes y (B,) -> bits (B, N, d_d)."""
        rng = image_rng(seed, indices, 0, self.device)
        shape = (self.model.N, self.prior.splits)
        s = self.settings

        def choose(logits):
            output.check_finite(logits)
            return mixing.sample_codes(logits, rng(torch.rand, *shape))

        def gumbel():
            return -(-rng(torch.rand, *shape).log()).log()

        with train.autocast(self.amp, self.device):
            return sample_prior(self.prior, y, choose, gumbel, s["prior_steps"], s["prior_cfg"],
                                s["prior_power"], s["prior_temperature"])

    def sample_continuous(self, seed, indices, y, x_d, on_step=None):
        """X_c given X_d -> (B, N, d_c), normalised."""
        rng = image_rng(seed, indices, 1, self.device)
        s = self.settings
        order = rng(torch.rand, self.model.N).argsort(1)

        def noise(now, n):
            n_now = int(now[0].sum())
            drawn = rng(torch.randn, n, n_now, self.model.d_c)               # (B, n, n_now, C)
            return drawn.transpose(0, 1).flatten(1, 2)                       # (n, B n_now, C)

        with train.autocast(self.amp, self.device):
            return generate(self.model, x_d, y, order, noise, s["ar_steps"], s["diffusion_steps"],
                            s["cfg"], s["cfg_schedule"], s["temperature"], s["bound"], on_step)

    def in_pieces(self, f, x):
        """f(x) in pieces of half a million pixels: 64 pictures of 256 x 256 at once take 24 GB."""
        pictures = max(2 ** 19 // self.size ** 2, 1)
        return torch.cat([f(piece) for piece in x.split(pictures)])

    @torch.no_grad()
    def encode_discrete(self, pictures):
        """uint8 (B, 3, H, W) -> bits (B, N, d_d)"""
        x = torch.as_tensor(pictures).to(self.device).float() / 255
        bits = tokenizers.quantise(self.in_pieces(self.vq.encode, x))        # (B, d_d, h, w)
        return bits.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode_discrete(self, x_d):
        """bits (B, N, d_d) -> uint8 (B, 3, H, W)"""
        return output.truncate(self.in_pieces(self.vq.decode, self.grid(x_d)))

    @torch.no_grad()
    def decode_continuous(self, x_c):
        """normalised x_c (B, N, d_c) -> uint8 (B, 3, H, W)"""
        x_c = x_c * self.std + self.mean
        return output.to_bytes(self.in_pieces(self.vae.decode, self.grid(x_c)))

    def sample(self, seed, indices, y, decode="continuous", x_d=None):
        """The images `indices` with the classes y (B,) -> uint8 (B, 3, H, W).

        decode: "continuous" for MixAR's pictures, "discrete" for X_d alone, decoded
        x_d: (B, N, d_d); None lets the prior draw it and adds its time to `prior_seconds`
        """
        # Plain MAR needs no X_d. (compare.png and gifs show one anyway.)
        if x_d is None and (decode == "discrete" or self.model.guidance != "none"):
            start = time.time()
            x_d = self.sample_discrete(seed, indices, y)
            self.prior_seconds += time.time() - start
        if decode == "discrete":
            return self.decode_discrete(x_d)
        x_c = self.sample_continuous(seed, indices, y, x_d)
        return self.decode_continuous(x_c)


def wanted_classes(text, classes):
    """The numbers of the classes in `text`: "all", or names or numbers with commas between.

    SystemExit if there is no such class.
    """
    if text == "all":
        return list(range(len(classes)))
    numbers = {str(k): k for k in range(len(classes))}
    numbers |= {name.strip(): k for k, name in enumerate(classes)}
    wanted = [name.strip() for name in text.split(",")]
    for name in wanted:
        if name not in numbers:
            raise SystemExit(f"--classes {name}: unknown class; the run has {', '.join(classes)}. "
                             "A name with a comma is given by its number, counted from 0")
    return [numbers[name] for name in wanted]


def step_counts(text):
    """The argparse type of --diffusion-steps: "25" -> 25, "40:10" -> [40, 10]."""
    numbers = [train.within(2, 1000, int)(number) for number in text.split(":")]
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text}: give one number, or FIRST:LAST")
    return numbers if len(numbers) == 2 else numbers[0]


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count = dict(type=train.within(1, kind=int), metavar="N")
    scale = dict(type=train.within(0), metavar="X")
    p.add_argument("run", help="a run such as runs/shapes-dcmix, or an official MAR file")
    p.add_argument("--out", help="NAME.png, NAME.npz or NAME.gif, which is overwritten, or a "
                   "folder, which is added to (None: RUN/grid.png)")
    p.add_argument("--count", **count, default=80, help="images")
    p.add_argument("--classes", default="all", help="all, or names or numbers: star,heart,3")
    p.add_argument("--truth", action="store_true", help="X_d of held-out pictures, not the prior's")
    p.add_argument("--decode", default="continuous", choices=["continuous", "discrete"],
                   help="discrete: X_d alone, through the bit tokenizer")
    p.add_argument("--batch-size", **count, default=80, help="images at once in each process")
    p.add_argument("--amp", default="auto", choices=["auto", "fp32", "bf16"], help="precision")
    g = p.add_argument_group("other files and settings (None: the run's)")
    g.add_argument("--vae", metavar="FILE", help="KL-16, which an official MAR needs")
    g.add_argument("--prior", metavar="FILE", help="another prior, ours or MaskBit's")
    g.add_argument("--ar-steps", **count, help="AR steps of MixAR, Eq. 6")
    g.add_argument("--diffusion-steps", type=step_counts, metavar="N",
                   help="of the head; 40:10 falls from the first to the last AR step")
    g.add_argument("--cfg", **scale, help="guidance scale of MixAR; 1 is none")
    g.add_argument("--temperature", **scale, help="of the diffusion noise")
    g.add_argument("--prior-steps", **count, help="sampling steps of the prior, Eq. 4")
    g.add_argument("--prior-cfg", **scale, help="guidance scale of the prior; 0 is none")
    return train.parse_flags(p, argv)


def open_run(args):
    """The System of args.run, with the files and settings that flags give.

    SystemExit if flags do not go together, or for more steps than a picture has tokens or codes.
    """
    system = System(args.run, args.device, args.amp, args.vae, args.prior)
    flags = dict(
        ar_steps=args.ar_steps, diffusion_steps=args.diffusion_steps, cfg=args.cfg,
        temperature=args.temperature, prior_steps=args.prior_steps, prior_cfg=args.prior_cfg)
    system.settings |= {name: value for name, value in flags.items() if value is not None}
    if args.truth and args.classes != "all":
        raise SystemExit("--truth takes the classes of the held-out pictures; leave out --classes")
    discrete = args.decode == "discrete" or args.truth or str(args.out).endswith(".gif")
    if discrete and not system.vq:
        raise SystemExit(f"{args.run} is an official MAR, which has no discrete tokens")
    # every step draws at least one token, so there cannot be more steps than tokens
    most = dict(ar_steps=system.model.N)
    if system.prior:
        most["prior_steps"] = system.prior.N * system.prior.splits
    for name, n in most.items():
        if system.settings[name] > n:
            raise SystemExit(f"--{name.replace('_', '-')} {system.settings[name]}: more than the "
                             f"{n} tokens or codes of a picture")
    return system


def open_truth(system, count):
    """The classes of the held-out pictures behind --truth, and truth(indices), which is their X_d.

    SystemExit if there are fewer than `count`, or pictures of other classes.
    """
    data = system.meta["data"]
    source = dataset.open_source(data, "test", system.size, count)
    same_classes = source.classes == system.meta["classes"]
    if len(source.labels) < count or not source.held_out or not same_classes:
        raise SystemExit(f"--truth --count {count}: {data} does not have that many held-out "
                         "pictures of the run's classes")

    def truth(indices):
        pictures = [source.read(i) for i in indices]
        for picture in pictures:
            if isinstance(picture, str):
                raise SystemExit(f"--truth needs every held-out picture; one is damaged: {picture}")
        return system.encode_discrete(np.stack(pictures))

    return source.labels, truth


def write_out(system, out, labels, columns, args):
    """Sample the pictures and write them to `out`. All processes share the work, but for a gif."""
    truth = None
    if args.truth:
        labels, truth = open_truth(system, args.count)
    rank, _ = train.world()
    if out.suffix == ".gif":
        if rank == 0:
            y = torch.tensor(labels, device=system.device)
            x_d = truth(range(args.count)) if truth else None
            output.save_gif(out, system, y, args.seed, columns, x_d)
        return
    folder = out.with_name(f"{out.name}.parts") if out.suffix else out
    files = [path.name for path in folder.glob("[!.]*")]
    if files and "settings.json" not in files:
        raise SystemExit(f"{folder} holds files that are not samples, such as {files[0]}; "
                         "choose another --out")
    with disk.locked(folder) if rank == 0 else nullcontext():
        output.sample_folder(system, folder, labels, args, truth)
        if rank == 0 and out.suffix:
            output.pack(folder, args.count, out, columns)


def main(argv=None):
    args = parse(argv)
    train.keep_freed_memory()
    with train.end_in_one_line(), train.process_group():
        system = open_run(args)
        out = Path(args.out or system.path.parent / "grid.png")
        known = out.suffix in ("", ".png", ".npz", ".gif") and not out.name.startswith(".")
        if not known or (out.suffix and out.is_dir()):
            raise SystemExit(f"--out {out}: expected NAME.png, NAME.npz, NAME.gif or, for a "
                             "folder, a name without an ending")
        chosen = wanted_classes(args.classes, system.meta["classes"])
        # a column per class, where there are several
        columns = len(chosen) if len(chosen) > 1 else 10
        columns = min(columns, 10, args.count)
        labels = np.resize(chosen, args.count)                               # in turn
        write_out(system, out, labels, columns, args)
        print(out)


if __name__ == "__main__":
    main()
