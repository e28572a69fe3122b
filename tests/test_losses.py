"""The training steps by value: what train.py's losses give the models, in which order, and what they make of the answers."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import backbone
import mixing
import sample
import tokenizers
import train


class Given:
    """Random numbers in the order in which a step asks for them, (B, *shape) each."""

    device = torch.device("cpu")

    def __init__(self, *numbers):
        self.numbers = [torch.tensor(x) for x in numbers]

    def shared(self, f, *shape):
        number = self.numbers.pop(0)
        assert number.shape == shape, f"{tuple(number.shape)} given, {shape} asked for"
        return number

    def __call__(self, f, *shape):
        return self.shared(f, len(self.numbers[0]), *shape)


# MixAR's step

class Recorder:
    """A MAR that notes its inputs; z of a token is ten times its x_c, the loss of a row its t."""

    def __init__(self):
        self.diffloss = SimpleNamespace(loss=self.loss)

    def __call__(self, x_c, x_g, m, y, drop):
        self.x_c, self.x_g, self.m, self.drop = x_c, x_g, m, drop
        return 10 * x_c

    def loss(self, z, x, t, noise):
        self.z, self.x, self.t, self.noise = z, x, t, noise
        return t.float()


def mixar_step(step=0, *flags):
    """One step on two images of four tokens, two of them hidden; x_d is all +1, the prior is sure of -1."""
    model, args = Recorder(), train.parse(["--min-mask", "0.5", "--steps", "3", "--draws", "2", *flags])
    prior = lambda x, y: torch.tensor([1.0, 0.0]).log().expand(2, 4, 1, 2)
    prior.splits = 1
    mean, std, y = torch.tensor([1.0, 2.0]).expand(2, 4, 2), torch.tensor([0.5, 3.0]).expand(2, 4, 2), torch.tensor([0, 1])
    more = [[[[0.5]] * 4] * 2, [[0.1, 0.9, 0.6, 0.4]] * 2] if "--ti-mix" in flags else []
    draw = Given([[[1.0, -1.0]] * 4, [[2.0, 0.0]] * 4],                      # of x_c's posterior
                 [0.0],                                                      # quantile of the mask ratio: the smallest
                 [[0.1, 0.9, 0.2, 0.8], [0.9, 0.1, 0.8, 0.2]],               # order of the tokens: 0, 2 and 1, 3 come first
                 [0.05, 0.5],                                                # label drop
                 *more,                                                      # of g_M's prediction, and rho
                 [[[0.0, 0.5], [0.9999, 0.25]], [[0.125, 0.75], [0.001, 0.002]]],                # t
                 [[[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]], [[[9.0, 10], [11, 12]], [[13, 14], [15, 16]]]])          # noise
    loss = train.mixar_loss(model, (mean, std, torch.ones(2, 4, 1), y), draw, step, prior, args)
    return model, loss


def test_eq07_the_step_draws_x_c_from_the_cached_moments():
    """x_c = mean + deviation times noise."""
    model, _ = mixar_step()
    assert model.x_c[:, 0].tolist() == [[1.5, -1.0], [2.0, 2.0]]


def test_eq08_the_step_hides_the_first_of_a_random_order():
    """--min-mask is the smallest ratio; every image has an order of its own."""
    assert mixar_step()[0].m.tolist() == [[True, False, True, False], [False, True, False, True]]


def test_the_step_withholds_the_class_where_its_draw_is_below_label_drop():
    assert mixar_step()[0].drop.tolist() == [True, False]


def test_eq05_the_step_takes_the_loss_on_hidden_tokens_alone():
    """z and x_c of the same hidden tokens meet; t and noise of an image lie in its rows, one line a draw; the mean is the loss."""
    model, loss = mixar_step()
    assert torch.equal(model.z, 10 * model.x) and torch.equal(model.x, model.x_c[model.m])
    assert model.t.tolist() == [[0, 500, 125, 750], [999, 250, 1, 2]] and loss == model.t.float().mean()
    assert model.noise[:, :, 0].tolist() == [[1, 3, 9, 11], [5, 7, 13, 15]]


def test_eq12_the_step_guides_by_the_mixed_tokens():
    """Without --ti-mix the model is given x_d; with it x~_d, of which lambda = 1, 0.5, 0 of three steps keep the truth below rho."""
    assert (mixar_step()[0].x_g == 1).all()
    for step, expected in ((0, [[1, 1, 1, 1], [1, 1, 1, 1]]), (1, [[1, 1, -1, 1], [1, -1, 1, 1]]), (2, [[-1, 1, -1, 1], [1, -1, 1, -1]])):
        assert mixar_step(step, "--ti-mix")[0].x_g[..., 0].tolist() == expected, f"step {step}"


# the other three

def test_eq03_the_step_hides_codes_and_withholds_classes():
    """Of the first image every code is hidden (u = 0), of the second none (u = 1); the smoothed cross-entropy is over all codes."""
    seen = {}

    def model(x, y, drop):
        seen.update(x=x, drop=drop)
        return torch.tensor([0.0, 2.0]).expand(2, 3, 2, 2)                   # code 1 is e^2 times as likely
    model.splits, model.codes, model.bits = 2, 2, 2
    x_d = torch.tensor([[[1.0, 1]] * 3, [[1, -1.0]] * 3])                    # codes 1, 1 and 1, 0
    loss = train.prior_loss(model, (None, None, x_d, torch.tensor([0, 1])), Given([0.0, 1.0], [[[0.5] * 2] * 3] * 2, [0.05, 0.5]), 0)
    assert (seen["x"][0] == 0).all() and torch.equal(seen["x"][1], x_d[1]) and seen["drop"].tolist() == [True, False]
    log_p = torch.tensor([0.0, 2.0]).log_softmax(0)
    likely, unlikely = 0.95 * log_p[1] + 0.05 * log_p[0], 0.95 * log_p[0] + 0.05 * log_p[1]
    assert loss.item() == pytest.approx(-(0.75 * likely + 0.25 * unlikely).item())


def test_eq07_the_vae_learns_to_reconstruct_a_sample_of_its_posterior():
    """Pictures go in as [-1, 1]; squared error per value plus 1e-4 times the KL per latent value."""
    class VAE:
        def encode(self, x):
            assert (x == 0.5).all()
            return torch.full((1, 2, 1, 1), 2.0), torch.full((1, 2, 1, 1), math.log(4))

        def decode(self, z):
            return z.mean().expand(1, 3, 2, 2)
    loss = train.vae_loss(VAE(), (torch.full((1, 3, 2, 2), 0.75),), Given([[[[0.5]], [[0.5]]]]), 0)
    assert loss.item() == pytest.approx((0.5 - 3) ** 2 + 1e-4 * 0.5 * (4 + 4 - 1 - math.log(4)))


def test_eq07_the_bit_tokenizer_learns_straight_through_its_bits():
    """4 times the squared error, commitment, 0.02 (entropy of a token - entropy of all); the error's gradient reaches z as if it were the bits."""
    z, codebook = torch.tensor([0.003, -0.002, -0.004, 0.001]).view(1, 2, 1, 2).requires_grad_(), tokenizers.codes_to_bits(torch.arange(4)[:, None], 2)
    model = SimpleNamespace(encode=lambda x: z, decode=lambda bits: (bits.sum() + 1).expand(1, 3, 2, 2), quantize=SimpleNamespace(codebook=codebook))
    loss = train.vq_loss(model, (torch.full((1, 3, 2, 2), 0.25),), None, 0)
    grad, = torch.autograd.grad(loss, z)
    commitment, per_sample, average = tokenizers.quantiser_losses(z, codebook)
    rest = commitment + 0.02 * (per_sample - average)
    assert abs(per_sample - average) > 0.1                                   # two tokens between bits, each of its own
    assert loss.item() == pytest.approx(4 * 0.75 ** 2 + rest.item())
    torch.testing.assert_close(grad, 4 * 2 * 0.75 + torch.autograd.grad(rest, z)[0])


# what the steps do with the gradient

def test_weight_decay_is_on_matrices_outside_the_head():
    """MAR's: no decay on biases, norms and the diffusion head."""
    model = backbone.MAR(N=4, d_c=2, d_d=2, classes=3, D=8, depth=1, heads=2, K=1, head_depth=1, head_width=8, dropout=0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ([names[id(p)] for p in group["params"]] for group in train.make_optimizer(model, dict(lr=1e-3, betas=(0.9, 0.95), decay=0.02)).param_groups)
    assert sorted(decayed + free) == sorted(names.values()) and "decoder_embed.weight" in decayed
    assert all(model.get_parameter(name).ndim > 1 and not name.startswith("diffloss") for name in decayed)
    assert all(model.get_parameter(name).ndim == 1 or name.startswith("diffloss") for name in free)


def test_the_gradient_is_clipped_to_the_norm_of_clip():
    """A gradient of 1000 becomes one of 3 before the optimiser sees it; the norm in the log is the one before."""
    model, kept = nn.Linear(1, 1, bias=False), []
    optimizer = SimpleNamespace(zero_grad=lambda set_to_none: None, step=lambda: kept.append(model.weight.grad.item()))
    loss = train.Loss(model, lambda model, batch, draw, step: 1000 * model.weight.sum())
    _, norm, taken = train.update(train.parse(["--amp", "fp32"]), loss, model, optimizer, torch.amp.GradScaler("cpu", enabled=False), [((), Given())], 0)
    assert taken and norm == pytest.approx(1000) and kept == [pytest.approx(3, rel=1e-4)]


def test_every_sampling_setting_reaches_its_sampler(monkeypatch):
    """ar_steps, diffusion_steps, cfg, its schedule, temperature and bound go to Eq. (6), the prior's four settings to Eq. (4)."""
    names = ("prior_steps", "prior_cfg", "prior_power", "prior_temperature", "ar_steps", "diffusion_steps", "cfg", "cfg_schedule", "temperature", "bound")
    system = SimpleNamespace(settings={name: name for name in names}, prior=SimpleNamespace(splits=2), model=SimpleNamespace(N=4, d_c=3), device=torch.device("cpu"), amp="fp32")
    monkeypatch.setattr(sample, "sample_prior", lambda prior, y, draw, gumbel, steps, guidance, power, temperature: (steps, guidance, power, temperature))
    monkeypatch.setattr(sample, "generate", lambda model, x_d, y, order, noise, ar_steps, diffusion_steps, cfg, schedule, temperature, bound, on_step:
                        (ar_steps, diffusion_steps, cfg, schedule, temperature, bound))
    assert sample.System.draw_discrete(system, 0, [0], torch.tensor([0])) == names[:4]
    assert sample.System.draw_continuous(system, 0, [0], torch.tensor([0]), None) == names[4:]


def test_the_samplers_get_the_random_numbers_of_each_image(monkeypatch):
    """Gumbel and uniform numbers for Eq. (4); for Eq. (6) a permutation, and normal noise for each diffusion step, image by image in the rows."""
    settings = dict.fromkeys(("prior_steps", "prior_cfg", "prior_power", "prior_temperature", "ar_steps", "diffusion_steps", "cfg", "cfg_schedule", "temperature", "bound"))
    system = SimpleNamespace(settings=settings, prior=SimpleNamespace(splits=2), model=SimpleNamespace(N=4, d_c=3), device=torch.device("cpu"), amp="fp32")
    now = torch.tensor([[True, False, True, True], [True, True, True, False]])
    monkeypatch.setattr(mixing, "sample_codes", lambda logits, u: u)
    monkeypatch.setattr(sample, "sample_prior", lambda prior, y, draw, gumbel, *more: (gumbel(), draw(None)))
    monkeypatch.setattr(sample, "generate", lambda model, x_d, y, order, noise, *more: (order, noise(now, 2)))
    gumbel, uniform = sample.System.draw_discrete(system, 7, [3, 5], None)
    order, noise = sample.System.draw_continuous(system, 7, [3, 5], None, None)
    assert noise.shape == (2, 6, 3)
    for row, image in enumerate((3, 5)):
        g, h = (np.random.Generator(np.random.Philox(key=[7, 2 * image + stream])) for stream in (0, 1))
        assert np.array_equal(gumbel[row], g.gumbel(size=(4, 2)).astype(np.float32)) and np.array_equal(uniform[row], g.random((4, 2), np.float32))
        assert np.array_equal(order[row], h.permutation(4)) and np.array_equal(noise[:, 3 * row:3 * row + 3], h.standard_normal((2, 3, 3), np.float32))
