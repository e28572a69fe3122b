"""How long the large models take: seconds, and matmul units, the time of one 4096 x 1024 by 1024 x 4096 product in the same precision.

Machines differ and drift; the ratio to a product timed just before and after does so less. Each figure is the fastest of
a few repetitions. Random weights: the time does not depend on them.

Try: python tests/bench.py              (all, some minutes on 2 cores; or some: python tests/bench.py train maskbit)
"""
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import backbone
import fid
import mixing
import sample
import train

PRECISIONS = (("bf16", 8), ("fp32", 4))                                      # with the batch of each


def fastest(run, repetitions):
    seconds = []
    for _ in range(repetitions):
        start = time.time()
        run()
        seconds.append(time.time() - start)
    return min(seconds)


def unit(amp):
    """Seconds of the product."""
    a, b = torch.randn(4096, 1024), torch.randn(1024, 4096)
    if amp == "bf16":
        a, b = a.bfloat16(), b.bfloat16()
    return fastest(lambda: a @ b, 10)


def report(name, amp, B, run, repetitions):
    before = unit(amp)
    seconds = fastest(run, repetitions)
    product = (before + unit(amp)) / 2
    print(f"{name:34} {amp} batch {B}  {seconds:8.3f} s  {seconds / product:7.0f} units   (1 unit = {product * 1000:.2f} ms)", flush=True)


def mar():
    """MAR-B with 32-channel latents."""
    torch.manual_seed(0)
    return backbone.MAR(256, 32, 14, 1000, guidance="none", **backbone.PRESETS["base"]["mar"])


def bench_train():
    """Forward, backward, clip, AdamW at mask ratio 0.85 with 4 diffusion draws."""
    model = mar().train()
    optimizer = train.make_optimizer(model, dict(lr=1e-4, betas=(0.9, 0.95), decay=0.02))
    shipped, mixing.mask_ratio = mixing.mask_ratio, lambda u, low: 0.85
    for amp, B in PRECISIONS:
        args = train.parse(["--amp", amp, "--draws", "4"])
        loss = train.Loss(model, partial(train.mixar_loss, prior=None, args=args))
        batch = (torch.randn(B, 256, 32), torch.full((B, 256, 32), 0.1), torch.ones(B, 256, 14), torch.arange(B))
        draw, scaler = train.Draw(0, 0, B, torch.device("cpu")), torch.amp.GradScaler("cpu", enabled=False)
        report("MAR-B training step", amp, B, lambda: train.update(args, loss, model, optimizer, scaler, [(batch, draw)], 0), 4)
    mixing.mask_ratio = shipped


@torch.no_grad()
def bench_generate():
    """8 AR x 100 diffusion steps, without and with guidance."""
    model = mar().eval()
    for amp, B in PRECISIONS:
        for cfg in (1.0, 3.0):
            def run():
                draw = sample.draws(0, range(B), 1)
                noise = lambda now, n: draw(lambda g: g.standard_normal((n, int(now[0].sum()), 32), np.float32)).transpose(0, 1).flatten(1, 2)
                with train.autocast(amp, torch.device("cpu")):
                    sample.generate(model, torch.ones(B, 256, 14), torch.arange(B), draw(lambda g: g.permutation(256)), noise, 8, 100, cfg)
            report(f"MAR-B 8 x 100 steps, guidance {cfg:.0f}", amp, B, run, 1)


@torch.no_grad()
def bench_maskbit():
    """The 14-bit prior, 4 guided steps."""
    torch.manual_seed(0)
    model = backbone.MaskBitPrior(N=256, bits=14, classes=1000, **backbone.PRESETS["base"]["prior"]).eval()
    for amp, B in PRECISIONS:
        def run():
            draw = sample.draws(0, range(B), 0)
            with train.autocast(amp, torch.device("cpu")):
                sample.sample_prior(model, torch.arange(B), lambda logits: mixing.sample_codes(logits, draw(lambda g: g.random((256, 2), np.float32))),
                                    lambda: draw(lambda g: g.gumbel(size=(256, 2))).float(), 4, 7.1, 3.0, 7.8)
        report("MaskBit 14 bit, 4 guided steps", amp, B, run, 2)


@torch.no_grad()
def bench_inception():
    """Features of 256 x 256 pictures."""
    model = fid.Inception().eval()
    pictures = torch.randint(0, 256, (16, 3, 256, 256), dtype=torch.uint8)
    report("Inception features", "fp32", 16, lambda: model(pictures), 2)


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["train", "generate", "maskbit", "inception"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with train.processes():
        for name in chosen:
            globals()[f"bench_{name}"]()
