"""Inference: X_d ~ p_phi(X_d), then X_c ~ p_theta(X_c | X_d), then pixels. Eqs. (4) and (6), Fig. 3 (right).

`sample_prior` is MaskBit's sampler (Eq. 4), `generate` MAR's loop over Eq. (6), `System` all models of a run together. Image
number i of seed s is the same picture at any batch size and number of processes: its random numbers are a function of (s, i).

Reads the checkpoints of train.py, feeds fid.py and train.py, which draws pictures, too. Read fid.py next.
Try: python sample.py runs/shapes-dcmix --out samples.png

B batch, N tokens, S bit groups of e bits, C = d_c channels; m True = still to predict.
"""
import argparse
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import backbone
import mixing
import tokenizers
import train

# tiny [ours], chosen on validation pictures; the others [MAR]
SAMPLING = {
    "tiny": dict(ar_steps=8, diffusion_steps=10, cfg=2.5, cfg_schedule="linear", temperature=0.5, bound=5.0,
                 prior_steps=16, prior_cfg=1.0, prior_power=1.0, prior_temperature=1.5),
    "base": dict(ar_steps=256, diffusion_steps=100, cfg=2.9, cfg_schedule="linear", temperature=1.0, bound=None),
}
SAMPLING["large"] = SAMPLING["base"] | dict(cfg=3.0)
SAMPLING["huge"] = SAMPLING["base"] | dict(cfg=3.2)
# the released generators' bits: guidance, its power, temperature; 64 steps                     [MaskBit]
MASKBIT = {10: (6.4, 2.5, 10.5), 12: (7.1, 3.0, 8.2), 14: (7.1, 3.0, 7.8), 16: (6.5, 2.5, 7.5), 18: (5.7, 2.5, 8.5)}


def sampling(preset, bits):
    """The sampling settings a run of this preset starts with, its prior's as MaskBit released them for so many bits (else for 14)."""
    cfg, power, temperature = MASKBIT.get(bits, MASKBIT[14])
    return dict(prior_steps=64, prior_cfg=cfg, prior_power=power, prior_temperature=temperature) | SAMPLING[preset]


def draws(seed, indices, stream, device="cpu"):
    """Random numbers of each image of a batch: draw(f) stacks f(generator) of all, each generator a function of (seed, image index, stream)."""
    generators = [np.random.Generator(np.random.Philox(key=[seed, 2 * int(i) + stream])) for i in indices]
    return lambda f: torch.tensor(np.stack([f(generator) for generator in generators])).to(device)


def prior_guidance(g, power, i, steps):
    """MaskBit's cosine guidance in step i of `steps`: 0 in the first, never quite g in the last."""
    return g * (1 - math.cos(math.pi * (i / steps) ** power)) / 2


def least_certain(score, known, r):
    """Eq. (4) after the share r of the steps: True where a code goes back behind the mask, the k of lowest score in each image.   [MaskBit]

    score (B, N, S), known (B, N, S) bool: codes kept before, equally many in each image; they stay. -> (B, N, S) bool.
    """
    score = score.masked_fill(known, math.inf)
    ratio = min(max(math.acos(r) / (math.pi / 2), 1e-6), 1)
    k = min(max(math.floor(ratio * known[0].numel()), 1), int((~known[0]).sum()) - 1)
    return score <= score.flatten(1).sort(dim=1).values[:, k - 1, None, None]


@torch.no_grad()
def sample_prior(prior, y, draw, gumbel, steps, guidance, power, temperature):
    """Eq. (4): X_d from all masked in `steps` steps, keeping the most certain codes each time.   [MaskBit]

    y (B,) int; draw(logits (B, N, S, 2^e)) -> codes (B, N, S); gumbel() -> (B, N, S) Gumbel noise, scaled by
    `temperature`, that falls to 0. -> bits (B, N, S e) in {-1, +1}.
    """
    B, N, S, e = len(y), prior.N, prior.splits, prior.bits // prior.splits
    codes = torch.full((B, N, S), 2 ** e, device=y.device)                   # 2^e: masked
    drop_none = torch.zeros(B, dtype=torch.bool, device=y.device)
    for i in range(steps):
        r, known = (i + 1) / steps, codes < 2 ** e                           # known: kept in earlier steps
        x, g = tokenizers.codes_to_bits(codes, e), prior_guidance(guidance, power, i, steps)
        if g != 0:
            logits, without_class = prior(torch.cat([x, x]), torch.cat([y, y]), torch.cat([drop_none, ~drop_none])).chunk(2)
            logits = logits + g * (logits - without_class)
        else:
            logits = prior(x, y)
        drawn = torch.where(known, codes, draw(logits))
        score = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0] + gumbel() * temperature * (1 - r)
        codes = torch.where(least_certain(score, known, r), 2 ** e, drawn)
    return tokenizers.codes_to_bits(drawn, e)


def hidden_after(s, steps, N, hidden):
    """How many of N tokens stay hidden after AR step s = 0..steps-1 if `hidden` are before it.   [MAR]"""
    return max(1, min(hidden - 1, math.floor(N * math.cos(math.pi / 2 * (s + 1) / steps))))


@torch.no_grad()
def generate(model, x_d, y, order, noise, ar_steps, diffusion_steps, cfg=1.0, schedule="linear", temperature=1.0, bound=None, on_step=None):
    """Eq. (6): fill the masked X_c in ar_steps steps, each token by the diffusion head.   [MAR]

    x_d (B, N, d_d), y (B,), order (B, N) permutations (filled from the end), diffusion_steps: of every AR step, or of the first and the last,
    linear between [ours]; noise(now (B, N) bool, n) -> (n, rows, C) standard normal for the n diffusion steps of this AR step's tokens; on_step(m)
    sees the mask left. cfg is the guidance scale, growing linearly with the tokens known or constant; bound: see diffusion_head. -> x_c (B, N, C).
    """
    B, N = order.shape
    x_c, hidden = torch.zeros(B, N, model.d_c, device=order.device), N
    drop_all = torch.ones(B, dtype=torch.bool, device=order.device)
    for s in range(ar_steps):
        m, left = mixing.hide(order, hidden), hidden_after(s, ar_steps, N, hidden)
        scale = 1 + (cfg - 1) * (N - left) / N if schedule == "linear" else cfg
        left = 0 if s == ar_steps - 1 else left
        now = m & ~mixing.hide(order, left)
        z = model(x_c, x_d, m, y, ~drop_all)[now]                            # (rows, D)
        z_uncond = model(x_c, x_d, m, y, drop_all)[now] if cfg != 1 else None
        n = round(np.interp(s, (0, max(ar_steps - 1, 1)), np.broadcast_to(diffusion_steps, 2)))
        x_c[now] = model.diffloss.sample(z, noise(now, n), n, temperature, z_uncond, scale, bound)
        hidden = left
        if on_step:
            on_step(mixing.hide(order, hidden))
    return x_c


def to_bytes(x):
    """Pictures in [-1, 1] to uint8, rounded half to even.   [MAR]"""
    return ((x + 1) * 127.5).clamp(0, 255).round().byte()


def truncate(x):
    """Pictures in [0, 1] to uint8, cut off.   [MaskBit]"""
    return (x.clamp(0, 1) * 255).byte()


def official_meta(config):
    """What the checkpoint of a run says and an official MAR does not: latents are KL-16's times 0.2325, classes are numbers.   [MAR]"""
    C, preset = config["d_c"], {768: "base", 1280: "huge"}.get(config["D"], "large")
    return dict(classes=[str(k) for k in range(config["classes"])], latent_mean=[0.0] * C, latent_std=[1 / 0.2325] * C, data=None, shared=".", files={},
                sampling=sampling(preset, 14))


class System:
    """Everything `run` (a run folder, its checkpoint or an official MAR file) needs to draw pictures.

    vae, vq, prior: files instead of those the run names; an official MAR names none and needs only a vae.
    Transformers compute in `amp`, tokenizers in fp32. SystemExit if a part is missing or foreign.
    """

    def __init__(self, run, device="cpu", weights="ema", amp="auto", **given):
        self.path = path = Path(run) / "last.pt" if Path(run).is_dir() else Path(run)
        self.model, checkpoint = backbone.load_model(path, "mixar", weights)
        self.meta, self.device, self.step, self.amp = checkpoint["meta"] or official_meta(checkpoint["config"]), torch.device(device), checkpoint["step"], amp
        self.settings, self.prior_seconds, self.shared = self.meta["sampling"], 0.0, path.parent / self.meta["shared"]
        for kind in backbone.PARTS:
            file, expected = self.meta["files"].get(kind, (None, None))
            source = given.get(kind) or file and path.parent / file
            part = source and backbone.load_model(source, kind)[0].to(self.device)
            if expected and not (kind == "prior" and given.get(kind)) and tokenizers.fingerprint(part) != expected:
                raise SystemExit(f"{path} was trained with the {kind} {expected}, but {source} holds {tokenizers.fingerprint(part)}")
            setattr(self, kind, part)
        if not self.vae:
            raise SystemExit(f"{path} is an official MAR file and names no VAE; add --vae FILE with KL-16")
        backbone.same_size(path, channels=(self.model.d_c, self.vae.post_quant_conv.in_channels))
        if self.prior and self.vq:
            backbone.same_size(path, tokens=(self.model.N, self.prior.N), bits=(self.vq.quantize.codebook.shape[1], self.prior.bits),
                      classes=(len(self.meta["classes"]), self.prior.classes))
        self.model.to(self.device)
        self.size = math.isqrt(self.model.N) << len(self.vae.encoder.down) - 1                   # side of the pictures
        self.mean, self.std = (torch.tensor(self.meta[k], device=self.device) for k in ("latent_mean", "latent_std"))

    def grid(self, tokens):
        """(B, N, C) -> (B, C, h, w)"""
        side = math.isqrt(tokens.shape[1])
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def draw_discrete(self, seed, indices, y):
        """X_d of the images `indices` with classes y (B,) -> bits (B, N, d_d), or None without a prior."""
        if not self.prior:
            return None
        draw, shape, s = draws(seed, indices, 0, self.device), (self.model.N, self.prior.splits), self.settings
        uniform, gumbel = lambda: draw(lambda g: g.random(shape, np.float32)), lambda: draw(lambda g: g.gumbel(size=shape)).float()
        with train.autocast(self.amp, self.device):
            return sample_prior(self.prior, y, lambda logits: mixing.sample_codes(logits, uniform()), gumbel,
                                s["prior_steps"], s["prior_cfg"], s["prior_power"], s["prior_temperature"])

    def draw_continuous(self, seed, indices, y, x_d, on_step=None):
        """X_c given X_d -> (B, N, d_c), normalised."""
        draw, C, s = draws(seed, indices, 1, self.device), self.model.d_c, self.settings
        order = draw(lambda g: g.permutation(self.model.N))
        noise = lambda now, n: draw(lambda g: g.standard_normal((n, int(now[0].sum()), C), np.float32)).transpose(0, 1).flatten(1, 2)
        with train.autocast(self.amp, self.device):
            return generate(self.model, x_d, y, order, noise, s["ar_steps"], s["diffusion_steps"], s["cfg"], s["cfg_schedule"],
                            s["temperature"], s["bound"], on_step)

    def few(self, f, x):
        """f(x), half a million pixels at a time: for 64 pictures of 256 x 256 at once the full-size tokenizers take 24 GB."""
        return torch.cat([f(part) for part in x.split(max(2 ** 19 // self.size ** 2, 1))])

    @torch.no_grad()
    def encode_discrete(self, pictures):
        """uint8 (B, 3, H, W) -> bits (B, N, d_d)"""
        return tokenizers.quantise(self.few(self.vq.encode, torch.as_tensor(pictures).to(self.device).float() / 255)).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode_discrete(self, x_d):
        """bits (B, N, d_d) -> uint8 (B, 3, H, W). SystemExit without bits or bit tokenizer."""
        if x_d is None or not self.vq:
            raise SystemExit("pictures of discrete tokens need --vq FILE and --prior FILE beside an official MAR")
        return truncate(self.few(self.vq.decode, self.grid(x_d)))

    @torch.no_grad()
    def decode_continuous(self, x_c):
        """normalised x_c (B, N, d_c) -> uint8 (B, 3, H, W)."""
        return to_bytes(self.few(self.vae.decode, self.grid(x_c * self.std + self.mean)))

    def draw(self, seed, indices, y, decode="continuous", x_d=None):
        """The images `indices` with classes y (B,), decoded from X_c or from X_d alone -> uint8 (B, 3, H, W).

        x_d (B, N, d_d): bits to take instead of the prior's, whose time adds to `prior_seconds`.
        """
        if x_d is None and (decode == "discrete" or self.model.guidance != "none"):              # plain MAR does without X_d
            start = time.time()
            x_d = self.draw_discrete(seed, indices, y)
            self.prior_seconds += time.time() - start
        return self.decode_discrete(x_d) if decode == "discrete" else self.decode_continuous(self.draw_continuous(seed, indices, y, x_d))


def open_run(run, args):
    """The System of `run` with the parts and the settings of its samples that add_options gave, by default its own."""
    system = System(run, args.device, args.weights, args.amp, **{kind: getattr(args, kind) for kind in backbone.PARTS})
    system.settings = system.settings | {k: getattr(args, k) for k in system.settings if hasattr(args, k)}
    if system.prior and system.settings["prior_steps"] > (codes := system.prior.N * system.prior.splits):
        raise SystemExit(f"--prior-steps {system.settings['prior_steps']}: more than the {codes} codes of a picture")
    return system


def tile(images, columns):
    """uint8 (n, 3, H, W), n a multiple of columns -> one picture (n / columns * H, columns * W, 3), row by row."""
    n, _, H, W = images.shape
    rows = images.cpu().numpy().reshape(n // columns, columns, 3, H, W).transpose(0, 3, 1, 4, 2)
    return rows.reshape(n // columns * H, columns * W, 3)


def save_grid(images, path, columns):
    """uint8 (n, 3, H, W), n a multiple of columns -> one png."""
    picture = Image.fromarray(tile(images, columns))
    tokenizers.write_whole(path, lambda file: picture.save(file, "png"))


def draw_figures(system, folder, seed, rows=8, columns=10):
    """samples.png (a column per class) and compare.png, in the manner of Fig. 2: X_d decoded above, MixAR from the same X_d below."""
    indices = np.arange(rows * columns)
    y = torch.tensor(indices % columns % len(system.meta["classes"]), device=system.device)
    x_d = system.draw_discrete(seed, indices, y)
    mixed, discrete = system.decode_continuous(system.draw_continuous(seed, indices, y, x_d)), system.decode_discrete(x_d)
    save_grid(mixed, Path(folder) / "samples.png", columns)
    save_grid(torch.cat([discrete[:10], mixed[:10], discrete[10:20], mixed[10:20]]), Path(folder) / "compare.png", columns)


def fill_in(path, system, y, seed, columns=10):
    """An animated gif of Eq. (9)'s mixed sequence: decoded discrete patches give way to continuous ones, AR step by AR step."""
    indices, masks = np.arange(len(y)), [torch.ones(len(y), system.model.N, dtype=torch.bool, device=system.device)]
    x_d = system.draw_discrete(seed, indices, y) if system.model.guidance != "none" else None
    mixed, frames = system.decode_continuous(system.draw_continuous(seed, indices, y, x_d, on_step=masks.append)), []
    discrete = torch.full_like(mixed, 128) if x_d is None else system.decode_discrete(x_d)                                # plain MAR's are hidden
    for m in masks:
        patch = system.grid(m[..., None].float())                            # (B, 1, h, w), 1 = still discrete
        picture = torch.where(torch.nn.functional.interpolate(patch, mixed.shape[2:]) > 0, discrete, mixed)
        frames.append(Image.fromarray(tile(picture, columns)).resize((columns * 64, len(y) // columns * 64), Image.NEAREST))
    milliseconds = [300] * (len(frames) - 1) + [2000]
    tokenizers.write_whole(path, lambda file: frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0))


def wanted_classes(text, classes):
    """"all", or comma-separated names or numbers -> list of ints. SystemExit naming an unknown class."""
    if text == "all":
        return list(range(len(classes)))
    number = {str(k): k for k in range(len(classes))} | {name: k for k, name in enumerate(classes)}
    if unknown := [name for name in text.split(",") if name not in number]:
        raise SystemExit(f"--classes {unknown[0]}: unknown class; the run has {', '.join(classes[:20])}{' ...' if len(classes) > 20 else ''}")
    return [number[name] for name in text.split(",")]


def draw_pngs(system, folder, labels, args):
    """One png per image in `folder`, in batches, skipping those that are there. SystemExit if they are samples of other settings."""
    (rank, ranks), note = train.world(), folder / "settings.json"
    made_from = dict(run=str(Path(args.run).resolve()), step=system.step, saved=system.path.stat().st_mtime, **system.settings)
    made_from |= {option: getattr(args, option) for option in ("weights", "decode", "seed", "classes", *backbone.PARTS)}
    if tokenizers.read_json(note) not in ({}, made_from):
        raise SystemExit(f"{folder} holds samples of other settings (see {note}); remove it or choose another --out")
    if rank == 0:
        tokenizers.write_json(note, made_from)
    train.barrier()                                                     # no picture before its note
    missing, seconds = [i for i in range(rank, len(labels), ranks) if not (folder / f"{i:06d}.png").is_file()], 0.0
    for k in tqdm(range(0, len(missing), args.batch_size), "samples", unit="batch", disable=rank > 0 or None):
        indices, start = missing[k:k + args.batch_size], time.time()
        y = torch.tensor(labels[indices], device=system.device)
        pictures = system.draw(args.seed, indices, y, args.decode).permute(0, 2, 3, 1).cpu().numpy()
        seconds += time.time() - start
        for i, picture in zip(indices, pictures):
            tokenizers.write_whole(folder / f"{i:06d}.png", lambda file: Image.fromarray(picture).save(file, "png"))
    if missing and rank == 0:
        print(f"{seconds / len(missing):.4f} s/image on each of {ranks} process(es), {system.prior_seconds / seconds:.0%} of it the prior; "
              f"{len(missing)} images, batch {min(args.batch_size, len(missing))}, {args.device}, "
              f"{system.settings['ar_steps']} AR x {system.settings['diffusion_steps']} diffusion steps, cfg {system.settings['cfg']}, amp {args.amp}")
    train.barrier()                                                     # every process has drawn its share


def gather(folder, count, out, columns):
    """The pngs of `folder` as one grid png or one npz (`arr_0` uint8 NHWC, as the ADM evaluator reads it)."""
    pictures = np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(count)])
    if out.suffix == ".npz":
        tokenizers.write_whole(out, lambda file: np.savez(file, arr_0=pictures))
    else:
        empty = np.zeros((-count % columns, *pictures.shape[1:]), np.uint8)
        save_grid(torch.tensor(np.concatenate([pictures, empty])).permute(0, 3, 1, 2), out, columns)


def step_counts(text):
    """"25" -> 25, "40:10" -> [40, 10]; the diffusion process takes 2 to 1000."""
    numbers = [train.within(2, 1000, int)(number) for number in text.split(":")]
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text}: give one number, or two for the first and the last AR step")
    return numbers if len(numbers) > 1 else numbers[0]


def add_options(p):
    """What the samples of a run depend on, for fid.py too; `settings` of the run stand where no option is given."""
    count = train.within(1, kind=int)
    p.add_argument("--seed", type=train.within(0, 2 ** 32 - 1, int), default=0, metavar="SEED",
                   help="image i of a seed is the same at any batch size and number of processes (default: %(default)s)")
    p.add_argument("--batch-size", type=count, metavar="N", default=80, help="images at once in each process (default: %(default)s)")
    for kind, text in zip(backbone.PARTS, ("KL-16 for an official MAR", "bit tokenizer, for --decode discrete", "another prior, ours or MaskBit's")):
        p.add_argument(f"--{kind}", metavar="FILE", help=f"{text} (default: what the run was trained with)")
    p.add_argument("--weights", default="ema", choices=["ema", "raw"], help="moving average or last weights (default: %(default)s)")
    p.add_argument("--decode", default="continuous", choices=["continuous", "discrete"],
                   help="discrete: the prior's X_d alone through the bit tokenizer (default: %(default)s)")
    for name, kind, text in (("ar-steps", count, "AR steps of MixAR, Eq. 6"),
                             ("diffusion-steps", step_counts, "steps of the diffusion head, Eq. 5; 40:10 falls from 40 in the first AR step to 10 in the last"),
                             ("cfg", train.within(0), "guidance scale of MixAR, 1 for none"), ("temperature", train.within(0), "of the diffusion noise"),
                             ("prior-steps", count, "steps of the prior, Eq. 4"), ("prior-cfg", train.within(0), "guidance scale of the prior, 0 for none"),
                             ("prior-temperature", train.within(0), "randomness of which codes the prior keeps")):
        p.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: the run's)")
    p.add_argument("--cfg-schedule", choices=["linear", "constant"], default=argparse.SUPPRESS, help="guidance over AR steps (default: the run's)")
    p.add_argument("--device", type=train.on_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--amp", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="as in train.py (default: %(default)s)")


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("run", help="a run folder such as runs/shapes-dcmix, its checkpoint, or an official MAR file (which needs --vae)")
    p.add_argument("--out", help="NAME.png: a grid; NAME.npz: arr_0; NAME.gif: the mixed sequence filling up; else a folder of pngs (default RUN/grid.png)")
    p.add_argument("--classes", default="all", help="all, or names or numbers: star,heart,3; images take them in turn (default: %(default)s)")
    p.add_argument("--count", type=train.within(1, kind=int), default=80, metavar="N", help="number of images (default: %(default)s)")
    add_options(p)
    return p.parse_args(argv)


@train.processes()
def main(argv=None):
    args = parse(argv)
    system = open_run(args.run, args)
    chosen = wanted_classes(args.classes, system.meta["classes"])
    labels = np.resize(chosen, args.count)                                   # the classes in turn
    out, columns = Path(args.out or system.path.parent / "grid.png"), min(len(chosen) if len(chosen) > 1 else 10, 10, args.count)
    folder = out.with_name(out.name + ".parts") if out.suffix in (".png", ".npz") else out
    if out.suffix == ".gif" and args.decode == "discrete":
        raise SystemExit(f"--out {out}: a gif shows discrete tokens giving way to continuous ones; leave out --decode discrete")
    if out.suffix != ".gif":
        draw_pngs(system, folder, labels, args)
    if train.world()[0] == 0:
        if out.suffix == ".gif":
            fill_in(out, system, torch.tensor(labels[:args.count // columns * columns], device=system.device), args.seed, columns)
        elif folder != out:
            gather(folder, args.count, out, columns)
            shutil.rmtree(folder)
        print(out)


if __name__ == "__main__":
    main()
