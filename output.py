"""How pictures are written: grids with names, a gif, folders of png files, npz files.

`to_bytes` rounds and `truncate` rounds down, as the official programs do. `sample_folder` continues
a stopped command. `system` is always a `sample.System`.

Reads disk.py, tokenizers.py and train.py (its processes). Feeds sample, stages and fid.py.
Not needed to follow the paper.
Try: python sample.py runs/shapes-dcmix --out fill.gif
"""
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import disk
import tokenizers
import train

ROWS = 8                     # of samples.png


def to_bytes(x):
    """Pictures in [-1, 1] to uint8, rounded.   [MAR]"""
    check_finite(x)
    return ((x + 1) * 127.5).clamp(0, 255).round().byte()


def truncate(x):
    """Pictures in [0, 1] to uint8, rounded down.   [MaskBit]"""
    check_finite(x)
    return (x.clamp(0, 1) * 255).byte()


def check_finite(x):
    """SystemExit if x, which a model made, holds NaN or inf."""
    if not x.isfinite().all():
        raise SystemExit("a model gave values that are not finite; try a lower --cfg, --prior-cfg "
                         "or --temperature, or --amp fp32")


def tile(images, columns):
    """uint8 (n, 3, H, W) -> one Pillow image, row by row; what the last row lacks is black."""
    black = images.new_zeros(-len(images) % columns, *images.shape[1:])
    rows = torch.cat([images, black]).unflatten(0, (-1, columns))            # (rows, columns, ...)
    page = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)           # (H', W', 3)
    return Image.fromarray(page.cpu().numpy())


def save_png(image, path):
    disk.write_whole(path, lambda file: image.save(file, "png"))


def save_named_grid(images, path, columns, rows):
    """A png of uint8 images (rows * columns, 3, H, W) at twice their size, with names beside."""
    grid = ImageOps.scale(tile(images, len(columns)), 2, Image.NEAREST)
    page = Image.new("RGB", (90 + grid.width, 20 + grid.height), "white")
    page.paste(grid, (90, 20))
    draw = ImageDraw.Draw(page)
    for k, name in enumerate(columns):
        x = 90 + (k + 0.5) * grid.width / len(columns)
        draw.text((x, 10), name[:10], "black", anchor="mm")
    for k, name in enumerate(rows):
        y = 20 + (k + 0.5) * grid.height / len(rows)
        draw.text((6, y), name, "black", anchor="lm")
    save_png(page, path)


@torch.no_grad()
def reconstruct(tokenizer, kind, pictures, device):
    """uint8 (B, 3, H, W) -> uint8, through a "vae" (its posterior mean) or a "vq"."""
    x = pictures.to(device).float() / 255
    if kind == "vae":
        mean, _ = tokenizer.encode(x * 2 - 1)
        return to_bytes(tokenizer.decode(mean)).cpu()
    return truncate(tokenizer.decode(tokenizers.quantise(tokenizer.encode(x)))).cpu()


def save_figures(system, folder, seed):
    """samples.png, and compare.png: X_d decoded above MixAR from the same X_d, as in Fig. 2."""
    classes = system.meta["classes"][:10]
    indices = np.arange(ROWS * len(classes))
    labels = indices % len(classes)
    y = torch.tensor(labels, device=system.device)
    x_d = system.sample_discrete(seed, indices, y)
    mixed = system.decode_continuous(system.sample_continuous(seed, indices, y, x_d))
    save_named_grid(mixed, Path(folder) / "samples.png", classes, [""] * ROWS)
    discrete = system.decode_discrete(x_d).unflatten(0, (ROWS, len(classes)))
    pairs = torch.stack([discrete, mixed.unflatten(0, discrete.shape[:2])], dim=1)[:2]
    # plain MAR does not see X_d
    name = "plain MAR" if system.model.guidance == "none" else "MixAR"
    save_named_grid(pairs.flatten(0, 2), Path(folder) / "compare.png", classes,
                    ["X_d decoded", name] * 2)


def save_gif(path, system, y, seed, columns, x_d=None):
    """A gif in which patches of X_d give way to those of the finished X_c, in the order of Eq. (6).

    x_d: (B, N, d_d), used instead of the prior's
    """
    indices = range(len(y))
    masks = [torch.ones(len(y), system.model.N, dtype=torch.bool, device=system.device)]
    if x_d is None:
        x_d = system.sample_discrete(seed, indices, y)
    x_c = system.sample_continuous(seed, indices, y, x_d, on_step=masks.append)
    discrete = system.decode_discrete(x_d)
    continuous = system.decode_continuous(x_c)
    frames = []
    for m in masks:
        masked = system.grid(m[..., None].float())                           # (B, 1, h, w)
        masked = torch.nn.functional.interpolate(masked, discrete.shape[2:]) > 0
        mixed = torch.where(masked, discrete, continuous)
        frames.append(ImageOps.scale(tile(mixed, columns), 2, Image.NEAREST))
    times = [300] * (len(frames) - 1) + [2000]                               # milliseconds
    disk.write_whole(path, lambda file: frames[0].save(
        file, "gif", save_all=True, append_images=frames[1:], duration=times, loop=0))


def begin_folder(folder, system, args):
    """Write into `folder` how its pictures are made. SystemExit if it holds others."""
    note = folder / "settings.json"
    # the weights stand for the files of run, vae and prior, whose names may change
    left_out = ("out", "count", "batch_size", "run", "vae", "prior")
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    settings |= system.settings | dict(step=system.step, weights=disk.fingerprint(system.model))
    for kind, part in dict(vae=system.vae, prior=system.prior).items():
        if part is not None:
            settings[f"{kind}_weights"] = disk.fingerprint(part)
    pictures = list(folder.glob("*.png"))
    if pictures:
        earlier = disk.read_json(note)
        disk.check_equal(note, "as its weights", earlier.get("weights"), settings["weights"])
        disk.check_same(folder, earlier, settings)
    disk.write_json(note, settings)
    more = len(pictures) - args.count
    if more > 0:
        print(f"{folder} holds {more} pictures more than --count {args.count}; they stay")


def sample_folder(system, folder, labels, args, truth):
    """Write every image to `folder` as a png, by all processes; those that are there are kept.

    truth: truth(indices) is the X_d of these images, or None if the prior draws it
    SystemExit if the folder holds samples of other settings.
    """
    rank, ranks = train.world()
    if rank == 0:
        begin_folder(folder, system, args)
    train.barrier()
    # an empty file does not count
    done = {path for path in folder.glob("*.png") if path.stat().st_size > 0}
    missing = [i for i in range(rank, len(labels), ranks) if png(folder, i) not in done]
    seconds = 0.0
    starts = range(0, len(missing), args.batch_size)
    for k in tqdm(starts, "samples", disable=rank > 0 or not missing):
        indices = missing[k:k + args.batch_size]
        start = time.time()
        x_d = truth(indices) if truth else None
        y = torch.tensor(labels[indices], device=system.device)
        pictures = system.sample(args.seed, indices, y, args.decode, x_d)
        seconds += time.time() - start
        for i, picture in zip(indices, pictures):
            save_png(tile(picture[None], 1), png(folder, i))
    if missing:
        s = system.settings
        print(f"{seconds / len(missing):.4f} s/image on each of {ranks} process(es), "
              f"{ranks * len(missing) / seconds:.3g} images/s in all, "
              f"{system.prior_seconds / seconds:.0%} of it the prior; {len(missing)} images here, "
              f"batch {min(args.batch_size, len(missing))}, {args.device}, {s['ar_steps']} AR x "
              f"{s['diffusion_steps']} diffusion steps, cfg {s['cfg']}, amp {args.amp}")
    train.barrier()


def png(folder, i):
    return folder / f"{i:06d}.png"


def pack(folder, count, out, columns):
    """Move the pictures 0 .. count - 1 of `folder` into a grid, or an npz: arr_0 uint8 NHWC."""
    files = [png(folder, i) for i in range(count)]
    pictures = []
    for file in files:
        with disk.reading(file, "picture; remove it to make it again"):
            pictures.append(np.asarray(Image.open(file)))
    with disk.reading(folder, "folder of samples of one size; remove it"):
        pictures = np.stack(pictures)
    if out.suffix == ".npz":
        disk.write_whole(out, lambda file: np.savez(file, arr_0=pictures))
    else:
        save_png(tile(torch.tensor(pictures).permute(0, 3, 1, 2), columns), out)
    for file in files:
        file.unlink()
    # pictures of an earlier, longer command may be there
    if {path.name for path in folder.iterdir()} == {"settings.json", ".lock"}:
        (folder / "settings.json").unlink()
        (folder / ".lock").unlink()
        folder.rmdir()
