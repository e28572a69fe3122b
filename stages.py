"""The stages: what each of the four models is trained on, and in which order. Section 4.

    vae      pixels -> the continuous tokenizer, Eq. (7)
    vq       pixels -> the bit tokenizer, Eq. (7)
    cache    the posterior of x_c, and x_d, of every picture
    prior    X_d -> p_phi(X_d)
    mixar    X_c and X_d -> p_theta(X_c | X_d)

`train_stages` is what `torchrun train.py` does. A stage that is done is used, not trained again.

Reads train.py (the paper's losses, `fit`), the models, dataset, checkpoint, sample and output.py.
Feeds train.py, whose `main` calls it. Not needed to follow the paper.
Try: python train.py --stage vae
"""
import os
from contextlib import nullcontext
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import backbone
import checkpoint
import dataset
import disk
import output
import sample
import tokenizers
import train


def vae_loss(model, batch, rng, step):
    """Squared error, a mean over pixels, plus 1e-4 KL, a mean over x_c's numbers.   [ours]"""
    x = batch[0] * 2 - 1                                                     # [0, 1] -> [-1, 1]
    mean, logvar = (a.float() for a in model.encode(x))
    noise = rng(torch.randn, *mean.shape[1:])
    decoded = model.decode(tokenizers.reparameterize(mean, (0.5 * logvar).exp(), noise))
    kl = tokenizers.kl_to_normal(mean, logvar).mean() / mean[0].numel()
    return (x - decoded).square().mean() + 1e-4 * kl


def vq_loss(model, batch, rng, step):
    """4 times the squared error, and the quantiser's losses [MaskBit], without its other terms."""
    x = batch[0]
    z = model.encode(x).float()
    decoded = model.decode(z + (tokenizers.quantise(z) - z).detach())        # straight through
    codebook = model.quantize.codebook
    commitment, per_token, of_mean = tokenizers.quantiser_losses(z, codebook, train.mean_over_ranks)
    return 4 * (x - decoded).square().mean() + commitment + 0.02 * (per_token - of_mean)


def is_done(args, stage):
    """Whether a vae, vq or prior is finished. If so, a line says so."""
    saved, changes = checkpoint.read_stage(args, stage)
    done = saved and checkpoint.finished(saved)
    if done:
        steps = args.recipe[stage.kind]["steps"]
        print(f"{stage.kind}: {saved['step']} of {steps} steps are done{changes}")
    return done


def train_tokenizer(args, shared, kind, source):
    """Stage vae or vq, with a picture of originals above their reconstructions."""
    folder = shared / kind
    figure = folder / "reconstructions.png"
    # Unreadable pictures do not count in `made_from`. They are known only when all have been read,
    # so a stage that may be done takes their names from its checkpoint.
    stage = checkpoint.Stage(
        kind=kind,
        folder=folder,
        config=backbone.PRESETS[args.preset][kind],
        made_from=dict(pictures=dataset.describe(source, checkpoint.skipped_before(folder, kind))),
        loss=vae_loss if kind == "vae" else vq_loss,
    )
    # a stage that is done but has no figure goes through `fit`, which takes no step and draws it
    if figure.is_file() and is_done(args, stage):
        return
    pixels, _ = dataset.read_all(source)

    def get_batch(pictures, rng):
        x = torch.tensor(pixels[pictures]).float() / 255
        if source.mirror:
            flip = rng(torch.rand).cpu() < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
        return (x.contiguous(memory_format=torch.channels_last),)

    def preview(ema):
        originals = torch.tensor(pixels[:10])
        decoded = output.reconstruct(ema, kind, originals, args.device)
        output.save_named_grid(torch.cat([originals, decoded]), figure, [""] * len(originals),
                               ["original", "decoded"])

    # now it is known which pictures cannot be read
    stage.made_from = dict(pictures=dataset.describe(source, source.skipped))
    stage.meta = dict(skipped=source.skipped)
    stage.n = len(pixels)
    stage.get_batch = get_batch
    stage.preview = preview
    train.fit(args, stage)


def train_prior(args, shared, tokens):
    """Stage prior: p_phi(X_d) on the cached bits."""
    config = dict(N=tokens.N, bits=tokens.bits, classes=len(tokens.classes))
    stage = checkpoint.Stage(
        kind="prior",
        folder=shared / "prior",
        config=config | backbone.PRESETS[args.preset]["prior"],
        made_from=dict(tokens=tokens.made_from),
        loss=train.prior_loss,
        n=tokens.n,
        get_batch=tokens.batch,
    )
    if not is_done(args, stage):
        train.fit(args, stage)


def train_mixar(args, shared, run, tokens):
    """Stage mixar: p_theta(X_c | X_d), and its pictures."""
    if args.guidance == "dcmix" and tokens.bits > tokens.d_c:
        raise SystemExit(f"--guidance dcmix: {tokens.bits} bits do not fit into {tokens.d_c} "
                         "channels (Eq. 9); choose another guidance or another tokenizer")
    prior_file = args.prior or shared / "prior"
    prior, saved = backbone.load_model(prior_file, "prior")
    disk.check_equal(prior_file, "tokens, bits and classes",
                     (prior.N, prior.bits, prior.classes),
                     (tokens.N, tokens.bits, len(tokens.classes)))
    if "settings" in saved:
        with disk.reading(prior_file, "prior checkpoint"):
            vq = saved["settings"]["tokens"]["vq"]
        # it may have seen other pictures, but its bits must mean the same
        disk.check_equal(prior_file, "as its bit tokenizer", vq, tokens.made_from["vq"])
    else:
        print(f"the classes of {prior_file} have no names: its first is taken to be "
              f"{tokens.classes[0]}, its last {tokens.classes[-1]}")
    config = dict(N=tokens.N, d_c=tokens.d_c, d_d=tokens.bits, classes=len(tokens.classes),
                  guidance=args.guidance, mix_at=args.mix_at)

    def preview(ema):
        # instead of `ema`, it takes the same weights from last.pt
        system = sample.System(run, args.device, amp=args.amp)
        if args.preset != "tiny":
            # these pictures then take seconds, not minutes
            system.settings |= dict(ar_steps=16, diffusion_steps=25)
        try:
            output.save_figures(system, run, args.seed)
        except torch.OutOfMemoryError:
            print("out of memory: no pictures; sample.py makes them with a lower --batch-size")

    train.fit(args, checkpoint.Stage(
        kind="mixar",
        folder=run,
        config=config | backbone.PRESETS[args.preset]["mar"],
        # Whether --init is given may not change. Another --init is only mentioned, by read_stage.
        made_from=dict(tokens=tokens.made_from, ti_mix=args.ti_mix, init=args.init is not None),
        loss=partial(train.mixar_loss, prior=prior.to(args.device), args=args),
        n=tokens.n,
        get_batch=tokens.batch,
        preview=preview,
        meta=describe_run(args, shared, run, tokens, prior),
    ))
    print(f"pictures: {run / 'samples.png'} and {run / 'compare.png'}")


def describe_run(args, shared, run, tokens, prior):
    """What a checkpoint says beside the model: all that `sample.System` needs.

    Files that flags name are given by their full path. Those of `shared` are given relative to the
    run, so that both may be moved together.
    """
    # links are followed first, since `..` leads out of the folder that a link points to
    to_shared = os.path.relpath(os.path.realpath(shared), os.path.realpath(run))
    made_from = tokens.made_from | dict(prior=disk.fingerprint(prior))
    files = {}
    for kind, file in dict(vae=args.vae, vq=args.vq, prior=args.prior).items():
        path = os.path.realpath(file) if file else f"{to_shared}/{kind}"
        files[kind] = (path, made_from[kind])
    return dict(
        data=args.data if args.data == "shapes" else os.path.realpath(args.data),
        classes=tokens.classes,
        latent_mean=tokens.mean.tolist(),
        latent_std=tokens.std.tolist(),
        sampling=sample.SAMPLING[args.preset],
        shared=to_shared,
        files=files,
    )


def check_flags(args):
    """SystemExit if flags contradict each other."""
    if "vae" not in args.recipe and not (args.vae and args.vq and args.prior):
        raise SystemExit(f"--preset {args.preset} trains MixAR alone: give --vae, --vq and --prior")
    useless = "--ti-mix" if args.ti_mix and args.guidance == "none" else ""
    if args.mix_at == "encoder" and args.guidance != "dcmix":
        useless = "--mix-at encoder"
    if useless:
        raise SystemExit(f"{useless} means nothing with --guidance {args.guidance}: leave it out")


def check_files(args, shared, run, classes):
    """SystemExit if a batch size, a folder or a file that a flag names does not fit."""
    _, ranks = train.world()
    pieces = ranks * args.accumulate
    for kind, recipe in args.recipe.items():
        if recipe["batch"] % pieces:
            raise SystemExit(f"--batch-size {recipe['batch']} (stage {kind}) is not a multiple of "
                             f"{pieces}, the processes times --accumulate")
    folders = [run, shared]
    if args.data != "shapes":
        folders.append(Path(args.data))
    for ours, other in combinations(folders, 2):
        a = ours.resolve()
        b = other.resolve()
        if a.is_relative_to(b) or b.is_relative_to(a):
            raise SystemExit(f"{ours}, where this run would be, and {other}: one lies in the "
                             "other; choose another --runs or --out")
    if args.stage == "mixar" and (run / "last.pt").is_file():
        config = disk.load_checkpoint(run, "mixar").get("config", {})
        disk.check_same(run / "last.pt", config, dict(guidance=args.guidance, mix_at=args.mix_at))
    named = dict(vae=args.vae, vq=args.vq, prior=args.prior, mixar=args.init)
    for kind, file in named.items():
        if not file:
            continue
        _, saved = backbone.load_model(file, kind)
        # an official file has no config
        config = saved.get("config", {})
        disk.check_equal(file, "classes", config.get("classes", classes), classes)
        if kind == "mixar":
            found = (config.get("guidance", "none"), config.get("mix_at", "decoder"))
            disk.check_equal(f"--init {file}", "as --guidance and --mix-at", found,
                             (args.guidance, args.mix_at))
    if args.stage == "mixar":
        # fails now where nothing can be written
        run.mkdir(parents=True, exist_ok=True)


def train_stages(args):
    """All stages up to --stage, but for those that are done or come as files."""
    check_flags(args)
    data = "shapes" if args.data == "shapes" else Path(args.data).resolve().name
    shared = Path(args.runs) / data
    name = f"{shared}-{args.guidance}"
    if args.ti_mix:
        name += "-ti"
    run = Path(args.out or name)
    size = backbone.PRESETS[args.preset]["size"]
    source = dataset.open_source(args.data, "train", size, args.images)
    check_files(args, shared, run, len(source.classes))
    if args.mirror is not None:
        source.mirror = args.mirror
    print(f"data: {len(source.labels)} pictures in {len(source.classes)} classes")
    without = np.flatnonzero(np.bincount(source.labels, minlength=len(source.classes)) == 0)
    if len(without):
        print(f"classes without pictures: {', '.join(source.classes[k] for k in without)}")
    for kind, file in (("vae", args.vae), ("vq", args.vq)):
        if not file:
            train_tokenizer(args, shared, kind, source)
        if args.stage == kind:
            return
    cache = shared / "tokens"
    vq_file = args.vq or shared / "vq"
    vae, _ = backbone.load_model(args.vae or shared / "vae", "vae")
    vq, _ = backbone.load_model(vq_file, "vq")
    disk.check_equal(vq_file, "levels", len(vq.encoder.down), len(vae.encoder.down))
    if train.world()[0] == 0:
        # convolutions are faster with the channels last
        for tokenizer in (vae, vq):
            tokenizer.to(args.device, memory_format=torch.channels_last)
        # several programs at once may read a complete cache; its mean is written last
        complete = "mean" in disk.read_json(cache / "meta.json")
        with nullcontext() if complete else disk.locked(cache):
            dataset.cache_tokens(cache, source, vae, vq, args.device)
    train.barrier()
    if args.stage == "cache":
        return
    tokens = dataset.Tokens(cache)
    if not args.prior:
        train_prior(args, shared, tokens)
    if args.stage != "prior":
        train_mixar(args, shared, run, tokens)
