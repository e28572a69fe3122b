"""How long the models take, in seconds and in units that make machines comparable.

One unit is the time of one matrix product, 4096 x 1024 by 1024 x 4096, in the same precision.
Machines differ and drift. The ratio to a product that is timed just before and after does so less.
"Floor" is what the matrix products of a row alone would take at that rate, by PyTorch's FLOP
counter. Each figure is the fastest of a few repetitions. The weights are random: the time does not
depend on them.

Reads the models, train.py, stages.py, sample.py and features.py; docs/imagenet.md shows its tables.

Try: python tests/bench.py             (everything, some minutes on 2 cores)
     python tests/bench.py train maskbit

B batch, N tokens, d_c channels of x_c.
"""
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import backbone
import checkpoint
import features
import mixing
import sample
import stages
import train

CPU = torch.device("cpu")
# each precision with its batch
PRECISIONS = (("bf16", 8), ("fp32", 4))
N = 256
D_C = 32
BITS = 14
CLASSES = 1000
MASK_RATIO = 0.85
# floating-point operations of the product that is the unit
UNIT_FLOPS = 2 * 4096 * 1024 * 4096


# measuring

def fastest(run, repetitions):
    """The least seconds that run() took."""
    seconds = []
    for _ in range(repetitions):
        start = time.time()
        run()
        seconds.append(time.time() - start)
    return min(seconds)


def unit(amp):
    """Seconds of the product."""
    dtype = torch.bfloat16 if amp == "bf16" else torch.float32
    a = torch.randn(4096, 1024).to(dtype)
    b = torch.randn(1024, 4096).to(dtype)
    return fastest(lambda: a @ b, 10)


def count_flops(run):
    """Floating-point operations of the matrix products in run(), two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def report(name, run, amp, B, repetitions, counted=1):
    """Time run(amp, B) and print its row. Returns its seconds, and those of its floor.

    The operations are counted for `counted` images, and always in bf16: the counter does not know
    the fused attention that a CPU takes in fp32.
    """
    floor = B / counted * count_flops(lambda: run("bf16", counted)) / UNIT_FLOPS
    before = unit(amp)
    seconds = fastest(lambda: run(amp, B), repetitions)
    product = (before + unit(amp)) / 2
    units = seconds / product
    row = f"{name:34} {amp} batch {B:2}  {seconds:8.3f} s  {units:8.1f} units  floor {floor:6.1f}"
    print(f"{row}  (1 unit = {product * 1000:.2f} ms)", flush=True)
    return seconds, floor * product


# what is measured

def mar_b():
    """MAR-B with 32-channel latents."""
    torch.manual_seed(0)
    sizes = backbone.PRESETS["base"]["mar"]
    return backbone.MAR(N, D_C, BITS, CLASSES, guidance="none", **sizes)


def bench_train():
    """Forward, backward, clip, AdamW at mask ratio 0.85 with 4 diffusion draws."""
    model = mar_b().train()
    recipe = dict(lr=1e-4, betas=(0.9, 0.95), decay=0.02, muon=False)
    optimizer = checkpoint.make_optimizer(model, recipe)

    def step(amp, B):
        args = train.parse(["--amp", amp])
        args.recipe["mixar"]["draws"] = 4
        loss = train.Loss(model, partial(train.mixar_loss, prior=None, args=args))
        mean = torch.randn(B, N, D_C)
        std = torch.full((B, N, D_C), 0.1)
        batch = (mean, std, torch.ones(B, N, BITS), torch.arange(B))
        rng = train.Rng(0, 0, B, CPU)
        with mock.patch.object(mixing, "mask_ratio", return_value=MASK_RATIO):
            state = SimpleNamespace(model=model, optimizer=optimizer, step=0)
            train.update(args, loss, state, [(batch, rng)])

    for amp, B in PRECISIONS:
        report("MAR-B training step", step, amp, B, 4)


@torch.no_grad()
def bench_generate():
    """8 AR x 100 diffusion steps, without and with guidance."""
    model = mar_b().eval()

    def noise(now, n):
        return torch.randn(n, int(now.sum()), D_C)

    def generate(amp, B, cfg):
        x_d = torch.ones(B, N, BITS)
        order = torch.rand(B, N).argsort(1)
        with train.autocast(amp, CPU):
            sample.generate(model, x_d, torch.arange(B), order, noise, 8, 100, cfg)

    for amp, B in PRECISIONS:
        for cfg in (1.0, 3.0):
            name = f"MAR-B 8 x 100 steps, guidance {cfg:.0f}"
            report(name, partial(generate, cfg=cfg), amp, B, 1)


@torch.no_grad()
def bench_maskbit():
    """The 14-bit prior, 4 guided steps."""
    torch.manual_seed(0)
    sizes = backbone.PRESETS["base"]["prior"]
    model = backbone.MaskBitPrior(N=N, bits=BITS, classes=CLASSES, **sizes).eval()
    settings = sample.LARGE_SAMPLING
    guidance = settings["prior_cfg"]
    power = settings["prior_power"]
    temperature = settings["prior_temperature"]

    def sample_codes(logits):
        return mixing.sample_codes(logits, torch.rand(logits.shape[:-1]))

    def steps(amp, B):
        def gumbel():
            return torch.tensor(np.random.gumbel(size=(B, N, 2))).float()

        y = torch.arange(B)
        with train.autocast(amp, CPU):
            sample.sample_prior(model, y, sample_codes, gumbel, 4, guidance, power, temperature)

    for amp, B in PRECISIONS:
        report("MaskBit 14 bit, 4 guided steps", steps, amp, B, 2)


@torch.no_grad()
def bench_inception():
    """Features of 256 x 256 pictures."""
    model = features.Inception().eval()

    def run(amp, B):
        model(torch.randint(0, 256, (B, 3, 256, 256), dtype=torch.uint8))

    report("Inception features", run, "fp32", 16, 2)


def bench_tiny():
    """A step of each stage of the default run, with its optimiser, and all its steps together.

    Reading and caching the pictures, previews and checkpoints are left out.
    """
    args = train.parse([])
    with train.autocast("auto", CPU):
        amp = "bf16" if torch.is_autocast_enabled("cpu") else "fp32"
    sizes = backbone.PRESETS["tiny"]
    of_prior = dict(N=64, bits=8, classes=10)
    models = dict(
        vae=(sizes["vae"], stages.vae_loss),
        vq=(sizes["vq"], stages.vq_loss),
        prior=(sizes["prior"] | of_prior, train.prior_loss),
        mixar=(sizes["mar"] | dict(N=64, d_c=8, d_d=8, classes=10),
               partial(train.mixar_loss, prior=None, args=args)),
    )
    seconds = 0.0
    floor = 0.0
    for kind, (config, loss) in models.items():
        recipe = args.recipe[kind]
        state = checkpoint.State(args, checkpoint.Stage(kind, Path(), config, {}, loss))
        module = train.Loss(state.model.train(), loss)

        def step(amp, B):
            args.amp = amp
            pictures = torch.rand(B, 3, 32, 32).contiguous(memory_format=torch.channels_last)
            tokens = (torch.randn(B, 64, 8), torch.ones(B, 64, 8), torch.ones(B, 64, 8),
                      torch.arange(B) % 10)
            batch = (pictures,) if kind in ("vae", "vq") else tokens
            rng = train.Rng(0, 0, B, CPU)
            with mock.patch.object(mixing, "mask_ratio", return_value=MASK_RATIO):
                train.update(args, module, state, [(batch, rng)])

        B = recipe["batch"]
        of_step, floor_of_step = report(f"tiny, step of {kind}", step, amp, B, 20, counted=B)
        seconds += recipe["steps"] * of_step
        floor += recipe["steps"] * floor_of_step
    print(f"all steps of the default run: {seconds:.0f} s, floor {floor:.0f} s")


@torch.no_grad()
def bench_flops():
    """TFLOP of a guided picture of MixAR-L, by guidance, with 64 and with 256 AR steps.

    The blocks and the head are counted on the meta device, where they have no weights. The other
    layers are left out: they are less than 1 %.
    """
    t = torch.zeros((), dtype=torch.long, device="meta")
    with torch.device("meta"):
        sizes = backbone.PRESETS["large"]["prior"]
        prior = backbone.MaskBitPrior(N=N, bits=BITS, classes=CLASSES, **sizes).eval()
        x_d = torch.empty(1, N, BITS)
        y = torch.zeros(1, dtype=torch.long)
    # 64 steps for X_d, each with and without guidance
    of_prior = 2 * 64 * count_flops(lambda: prior(x_d, y)) / 1e12
    print(f"X_d {of_prior:.1f} TFLOP")
    for name in ("DC-Mix", "DC-SA", "DC-CA"):
        model = backbone.sized(f"MixAR-L, {name}")
        D = model.z_proj.out_features
        prefix = N if name == "DC-SA" else 0
        discrete = torch.empty(1, N, D, device="meta")

        def blocks(tokens):
            """Operations of the encoder's blocks, or of the decoder's, over so many tokens."""
            x = torch.empty(1, prefix + tokens, D, device="meta")
            first = model.encoder_blocks[0]
            return len(model.encoder_blocks) * count_flops(lambda: first(x, discrete))

        x_c = torch.empty(N, D_C, device="meta")
        head = 2 * 100 * count_flops(lambda: model.diffloss.net(x_c, t, discrete[0])) / 1e12
        for steps in (64, 256):
            hidden = N
            passes = 0
            for s in range(steps):
                passes += blocks(model.K + N - hidden) + blocks(model.K + N)
                hidden = sample.hidden_after(s, steps, N, hidden)
            transformer = 2 * passes / 1e12
            print(f"{name}, {steps} AR steps: transformer {transformer:.1f}, head {head:.1f}, "
                  f"with X_d {transformer + head + of_prior:.1f} TFLOP", flush=True)


BENCHES = dict(
    flops=bench_flops,
    tiny=bench_tiny,
    train=bench_train,
    generate=bench_generate,
    maskbit=bench_maskbit,
    inception=bench_inception,
)


def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with train.process_group():
        for name in sys.argv[1:] or BENCHES:
            BENCHES[name]()


if __name__ == "__main__":
    main()
