"""The check of random_lambda.patch: lambda is random, and one for all processes. And a run.

See test_modifications.py. A failing line's message says what a wrong lambda did.
"""
import sys
from types import SimpleNamespace

import torch

import mixing
import running
import sample
import train

runs, out = sys.argv[1:]
used = []
right = mixing.ti_mix


def noted(x_d, x_hat, m, rho, lam):
    used.append(lam)
    return right(x_d, x_hat, m, rho, lam)


class Model:
    """A model that gives every token z = 0, and a prior that finds all codes equally likely."""

    splits = 1
    diffloss = SimpleNamespace(loss=lambda z, x, t, noise: z)

    def mix(self, x_c, x_d, m):
        return x_c

    def __call__(self, x, *rest):
        return torch.zeros(2, 4, 1) if len(rest) > 1 else torch.zeros(2, 4, 1, 4)


args = SimpleNamespace(ti_mix=True, recipe=dict(mixar=dict(draws=1, steps=200)))
batch = [torch.zeros(2, 4, 3), torch.ones(2, 4, 3), torch.ones(2, 4, 2), torch.tensor([0, 1])]


def lam(step, rank=0, seed=0):
    """lambda of a step in process `rank` of two, which has two pictures of four."""
    train.world = lambda: (rank, 2)
    # every process has a global generator of its own, as in train.step_batches
    torch.manual_seed(2 * (7 * step + seed) + rank)
    rng = train.Rng(seed, step, 4, torch.device("cpu"))
    train.mixar_loss(Model(), batch, rng, step, Model(), args)
    return used[-1]


world = train.world
mixing.ti_mix = noted
drawn = [lam(step) for step in range(200)]
assert len(set(drawn)) == 200, "lambda is the same in several steps"
assert all(0 <= value <= 1 for value in drawn), "lambda leaves [0, 1]"
assert abs(sum(drawn) / 200 - 0.5) < 0.08, f"the mean of lambda is {sum(drawn) / 200:.2f}"
early = sum(drawn[:100]) / 100
late = sum(drawn[100:]) / 100
assert abs(early - late) < 0.15, f"lambda still falls: from {early:.2f} to {late:.2f}"
assert [lam(step, rank=1) for step in range(20)] == drawn[:20], "processes differ in lambda"
assert [lam(step) for step in range(20)] == drawn[:20], "a step begun again has another lambda"
assert lam(0, seed=1) != drawn[0], "lambda does not depend on --seed"

train.world = world
used.clear()
train.main(running.mixar(runs, out, "--ti-mix", "--steps", 3))
assert len(set(used)) == 3, f"a run of three steps used {used}"
sample.main(running.sampling(out, f"{out}/some.npz", "--count", 4))
