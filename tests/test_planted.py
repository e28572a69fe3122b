"""Planted mistakes: wrong versions of every equation that still run and train.

Each wrong version takes the place of the right function. Then all tests run that are named after an
equation, in whatever file, and so do those of the Frechet distance. Exactly the tests of the
mistaken equation may fail, so that a red test names the equation to look at.

A wrong version is a function, whose name says what is wrong in it, or a row of LINES: one piece of
the right function's text, and what stands in its place.
"""
import functools
import importlib
import inspect
import math
import re
import sys
import tempfile
import textwrap
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import backbone
import diffusion_head
import fid
import mixing
import sample
import stages
import sound
import test_backbone
import tokenizers
import train

MISTAKES = []


def mistake(equation, owner, name):
    """A decorator that adds a wrong version of `owner.name`, which belongs to this equation."""
    def note(wrong):
        MISTAKES.append((equation, owner, name, wrong.__name__, wrong))
        return wrong
    return note


# the tests, and what each of them calls

def cases_of(test):
    """The arguments of each case of a test: one empty dict, unless it is parametrized."""
    cases = [{}]
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names = mark.args[0].split(", ")
            rows = [row if len(names) > 1 else [row] for row in mark.args[1]]
            cases = [before | dict(zip(names, row)) for before in cases for row in rows]
    return cases


@functools.cache
def numbered_tests():
    """Every case of every numbered test of this folder: its equation, the test, its arguments."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if not re.search(r"^def test_(eq\d\d|frechet_distance)_", path.read_text(), re.M):
            continue
        for name, test in vars(importlib.import_module(path.stem)).items():
            numbered = re.match(r"test_(eq\d\d|frechet_distance)_", name)
            if numbered:
                for arguments in cases_of(test):
                    found.append(SimpleNamespace(of=numbered[1], test=test, arguments=arguments))
    return found


def run(case):
    """Run a case as pytest does: on sound versions of the other equations, with its fixtures."""
    # what is kept from one test to the next would hide a mistake
    diffusion_head.coefficients.cache_clear()
    test_backbone.small.cache_clear()
    wanted = inspect.signature(case.test).parameters
    with ExitStack() as stack:
        stack.enter_context(sound.others(case.test.__name__))
        fixtures = {}
        if "monkeypatch" in wanted:
            fixtures["monkeypatch"] = stack.enter_context(pytest.MonkeyPatch.context())
        if "tmp_path" in wanted:
            fixtures["tmp_path"] = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        case.test(**case.arguments, **fixtures)


def passes(case):
    try:
        run(case)
    except (Exception, pytest.fail.Exception):
        return False
    return True


def code_of(function):
    """What Python runs when the function is called, below all its decorators."""
    return inspect.unwrap(getattr(function, "__func__", function)).__code__


@functools.cache
def calls():
    """[(case, the code of all functions that it calls)], without any mistake, the quickest first.

    A mistake in a function can turn only those red that call it. So only these are run.
    """
    found = []
    seconds = []
    for case in numbered_tests():
        codes = set()

        def note(frame, event, argument):
            if event == "call":
                codes.add(frame.f_code)

        start = time.perf_counter()
        sys.setprofile(note)
        try:
            passes(case)
        finally:
            sys.setprofile(None)
        found.append((case, codes))
        seconds.append(time.perf_counter() - start)
    return [found[k] for k in np.argsort(seconds)]


@functools.cache
def red_before():
    """The equations that are red without any mistake."""
    return red_equations(numbered_tests())


def red_equations(cases):
    """The equations of which at least one of these cases fails."""
    red = set()
    for case in cases:
        if case.of not in red and not passes(case):
            red.add(case.of)
    return red


def label(equation):
    """The names of the tests of equation 5 begin with test_eq05."""
    return f"eq{equation:02d}" if isinstance(equation, int) else equation


def red_with(monkeypatch, owner, name, wrong):
    """The equations that are red with this wrong version in its place."""
    code = code_of(vars(owner)[name])
    cases = [case for case, codes in calls() if code in codes]
    monkeypatch.setattr(owner, name, wrong)
    return red_equations(cases)


# Eq. (3)

@mistake(3, train, "code_loss")
def without_label_smoothing(logits, codes):
    return cross_entropy(logits.flatten(0, 2), codes.flatten())


@mistake(3, train, "code_loss")
def sum_over_codes(logits, codes):
    flat = logits.flatten(0, 2)
    return cross_entropy(flat, codes.flatten(), label_smoothing=0.1, reduction="sum")


@mistake(3, train, "training_mask")
def shown_instead_of_hidden(u_ratio, u_code):
    return u_code >= (torch.acos(u_ratio) / (math.pi / 2))[:, None, None]


@mistake(3, train, "training_mask")
def linear_instead_of_arccos(u_ratio, u_code):
    return u_code < (1 - u_ratio)[:, None, None]


@mistake(3, train, "training_mask")
def one_ratio_for_the_batch(u_ratio, u_code):
    return u_code < torch.acos(u_ratio[0]) / (math.pi / 2)


# Eq. (4)

# the right versions, which the wrong ones call
sample_prior = sample.sample_prior
least_certain = sample.least_certain


@mistake(4, sample, "sample_prior")
def without_gumbel_noise(prior, y, draw, gumbel, steps, guidance, power, temperature):
    return sample_prior(prior, y, draw, gumbel, steps, guidance, power, 0.0)


@mistake(4, sample, "sample_prior")
def guided_away_from_the_class(prior, y, draw, gumbel, steps, guidance, power, temperature):
    return sample_prior(prior, y, draw, gumbel, steps, -guidance, power, temperature)


@mistake(4, sample, "sample_prior")
def one_step_too_few(prior, y, draw, gumbel, steps, guidance, power, temperature):
    return sample_prior(prior, y, draw, gumbel, steps - 1, guidance, power, temperature)


@mistake(4, sample, "prior_cfg_at")
def constant_guidance(g, power, i, steps):
    return g


@mistake(4, sample, "prior_cfg_at")
def power_of_the_whole_cosine(g, power, i, steps):
    return g * ((1 - math.cos(math.pi * i / steps)) / 2) ** power


@mistake(4, sample, "least_certain")
def the_most_certain_hidden(score, known, r):
    return least_certain(-score, known, r)


@mistake(4, sample, "least_certain")
def kept_codes_hidden_again(score, known, r):
    count = int(least_certain(score, known, r)[0].sum())
    largest_hidden = score.flatten(1).sort(dim=1).values[:, count - 1]
    return score <= largest_hidden[:, None, None]


@mistake(4, sample, "least_certain")
def linear_schedule(score, known, r):
    return least_certain(score, known, math.cos(math.pi / 2 * (1 - r)))


@mistake(4, sample, "least_certain")
def one_threshold_for_the_batch(score, known, r):
    score = score.masked_fill(known, math.inf)
    return score <= score[least_certain(score, known, r)].max()


# Eq. (5)

@mistake(5, diffusion_head, "denoising_loss")
def sum_over_channels(noise, eps):
    return (noise - eps).square().sum(-1)


@mistake(5, diffusion_head, "denoising_loss")
def mean_over_all_tokens(noise, eps):
    return (noise - eps).square().mean()


@mistake(5, diffusion_head, "denoising_loss")
def absolute_instead_of_squared(noise, eps):
    return (noise - eps).abs().mean(-1)


@mistake(5, diffusion_head, "denoising_loss")
def norm_without_the_square(noise, eps):
    return (noise - eps).norm(dim=-1)


@mistake(5, diffusion_head, "add_noise")
def no_square_roots(x, noise, t, c):
    abar = c.sqrt_abar[t][..., None] ** 2
    return abar * x + (1 - abar) * noise


@mistake(5, diffusion_head, "add_noise")
def signal_and_noise_swapped(x, noise, t, c):
    return c.sqrt_1m_abar[t][..., None] * x + c.sqrt_abar[t][..., None] * noise


@mistake(5, diffusion_head, "add_noise")
def signal_not_shrunk(x, noise, t, c):
    return x + c.sqrt_1m_abar[t][..., None] * noise


# the right versions, which the wrong ones call
right_loss = diffusion_head.DiffusionHead.loss
backwards = diffusion_head.DiffusionHead.sample


def noised(x, t, noise):
    """x_c^{i,t}, the noised token."""
    return diffusion_head.add_noise(x, noise, t, diffusion_head.coefficients(1000))


def loss_of(head, z, x, t, noise, seen, target):
    """DiffusionHead.loss if the head is given `seen` and has to predict `target`.

    The right `seen` is the noised token, the right `target` is the noise.
    """
    c = diffusion_head.coefficients(1000)
    x_t = noised(x, t, noise)
    eps, v = head.net(seen, t, z)
    denoising = diffusion_head.denoising_loss(target, eps)
    return denoising + diffusion_head.variational_term(x, x_t, eps, v, t, c)


@mistake(5, diffusion_head.DiffusionHead, "loss")
def clean_token_as_target(self, z, x, t, noise):
    x_t = noised(x, t, noise)
    return loss_of(self, z, x, t, noise, seen=x_t, target=x.expand_as(noise))


@mistake(5, diffusion_head.DiffusionHead, "loss")
def noised_token_as_target(self, z, x, t, noise):
    x_t = noised(x, t, noise)
    return loss_of(self, z, x, t, noise, seen=x_t, target=x_t)


@mistake(5, diffusion_head.DiffusionHead, "loss")
def clean_token_into_the_head(self, z, x, t, noise):
    return loss_of(self, z, x, t, noise, seen=x.expand_as(noise), target=noise)


@mistake(5, diffusion_head.DiffusionHead, "loss")
def draws_averaged_away(self, z, x, t, noise):
    return right_loss(self, z, x, t, noise).mean(0)


@mistake(5, diffusion_head, "variational_term")
def eps_not_detached(x, x_t, eps, v, t, c):
    mean, log_variance, _ = diffusion_head.model_distribution(x_t, eps, v, t, c)
    true_mean = c.mean_x0[t][..., None] * x + c.mean_xt[t][..., None] * x_t
    true_log_variance = c.log_var[t][..., None]
    error = true_log_variance.exp() + (true_mean - mean).square()
    kl = 0.5 * (log_variance - true_log_variance - 1 + error / log_variance.exp())
    return kl.mean(-1) / math.log(2)


@mistake(5, diffusion_head.DiffusionHead, "sample")
def noise_at_the_last_step(self, z, noise, steps, *how, **guidance):
    deviation = (0.5 * diffusion_head.coefficients(steps).log_var[0]).exp()
    return backwards(self, z, noise, steps, *how, **guidance) + deviation * noise[-1]


@mistake(5, diffusion_head.DiffusionHead, "sample")
def first_noise_scaled_by_the_temperature(self, z, noise, steps, temperature=1.0, **guidance):
    scaled = torch.cat([temperature * noise[:1], noise[1:]])
    return backwards(self, z, scaled, steps, temperature, **guidance)


@mistake(5, diffusion_head.DiffusionHead, "sample")
def temperature_ignored(self, z, noise, steps, temperature=1.0, **guidance):
    return backwards(self, z, noise, steps, 1.0, **guidance)


@mistake(5, diffusion_head.DiffusionHead, "sample")
def guidance_counted_from_the_class(self, z, noise, steps, temperature=1.0, z_uncond=None,
                                    scale=1.0, bound=None):
    return backwards(self, z, noise, steps, temperature, z_uncond, 1 + scale, bound)


# Eq. (6)

# the right versions, which the wrong ones call
generate = sample.generate
discrete = backbone.MAR.embed_discrete
forward = backbone.MAR.forward


def at_least_one_fewer(left, hidden):
    """The number of tokens left, limited as in the right hidden_after."""
    return max(1, min(hidden - 1, math.floor(left)))


@mistake(6, sample, "hidden_after")
def tokens_drawn_evenly(s, steps, N, hidden):
    return at_least_one_fewer(N * (1 - (s + 1) / steps), hidden)


@mistake(6, sample, "hidden_after")
def sine_for_cosine(s, steps, N, hidden):
    return at_least_one_fewer(N * (1 - math.sin(math.pi / 2 * (s + 1) / steps)), hidden)


@mistake(6, sample, "hidden_after")
def steps_counted_from_zero(s, steps, N, hidden):
    return at_least_one_fewer(N * math.cos(math.pi / 2 * s / steps), hidden)


@mistake(6, sample, "generate")
def order_used_from_its_start(model, x_d, y, order, *more):
    return generate(model, x_d, y, order.flip(1), *more)


@mistake(6, sample, "generate")
def guidance_constant(model, x_d, y, order, noise, ar_steps, diffusion_steps, cfg=1.0,
                      schedule="linear", *more):
    return generate(model, x_d, y, order, noise, ar_steps, diffusion_steps, cfg, "constant",
                    *more)


class Blind:
    """The model given, which sees zeros in place of every x_c."""

    def __init__(self, model):
        self.model = model
        self.d_c = model.d_c
        self.diffloss = model.diffloss

    def mix(self, x_c, x_d, m):
        return self.model.mix(torch.zeros_like(x_c), x_d, m)

    def __call__(self, *inputs):
        return self.model(*inputs)


@mistake(6, sample, "generate")
def earlier_tokens_not_seen(model, x_d, y, order, *more):
    return generate(Blind(model), x_d, y, order, *more)


@mistake(6, backbone.MAR, "embed_discrete")
def discrete_tokens_without_positions(self, x_d):
    return self.z_proj_ln(self.discrete_emb(tokenizers.bits_to_codes(x_d)))


@mistake(6, backbone.MAR, "embed_discrete")
def first_discrete_token_everywhere(self, x_d):
    return discrete(self, x_d[:, :1].expand_as(x_d))


@mistake(6, backbone.MAR, "forward")
def without_the_class(self, x, x_d, m, y, drop):
    return forward(self, x, x_d, m, y, torch.ones_like(drop))


# Eq. (7)

# the right version, which a wrong one calls
encode = tokenizers.KLVAE.encode


@mistake(7, tokenizers, "reparameterize")
def variance_for_deviation(mean, std, noise):
    return mean + std.square() * noise


@mistake(7, tokenizers, "reparameterize")
def logarithm_for_deviation(mean, std, noise):
    return mean + 2 * std.log() * noise


@mistake(7, tokenizers, "reparameterize")
def mean_alone(mean, std, noise):
    return mean


@mistake(7, tokenizers, "quantise")
def zero_is_a_plus(z):
    return torch.where(z >= 0, 1.0, -1.0)


@mistake(7, tokenizers, "quantise")
def zero_stays_zero(z):
    return z.sign()


@mistake(7, tokenizers, "quantise")
def bits_of_0_and_1(z):
    return (z > 0).float()


@mistake(7, tokenizers, "bits_to_codes")
def first_bit_counts_most(bits):
    return ((bits.flip(-1) > 0).long() << torch.arange(bits.shape[-1])).sum(-1)


@mistake(7, tokenizers, "kl_to_normal")
def kl_averaged(mean, logvar):
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(dim=(1, 2, 3))


@mistake(7, tokenizers.KLVAE, "encode")
def log_variance_first(self, images):
    mean, log_variance = encode(self, images)
    return log_variance, mean


# Eq. (8)

def check_ratio(ratio):
    """The wrong versions below refuse what the right one refuses: each has one mistake."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio {ratio}")


@mistake(8, mixing, "sample_mask")
def floor_for_ceil(order, ratio):
    check_ratio(ratio)
    return mixing.hide(order, math.floor(ratio * order.shape[1]))


@mistake(8, mixing, "sample_mask")
def round_for_ceil(order, ratio):
    check_ratio(ratio)
    return mixing.hide(order, round(ratio * order.shape[1]))


@mistake(8, mixing, "sample_mask")
def ratio_of_visible_tokens(order, ratio):
    check_ratio(ratio)
    return mixing.hide(order, math.ceil((1 - ratio) * order.shape[1]))


@mistake(8, mixing, "sample_mask")
def mask_reversed(order, ratio):
    check_ratio(ratio)
    return ~mixing.hide(order, math.ceil(ratio * order.shape[1]))


@mistake(8, mixing, "sample_mask")
def last_of_the_order(order, ratio):
    check_ratio(ratio)
    return mixing.hide(order.flip(1), math.ceil(ratio * order.shape[1]))


@mistake(8, mixing, "sample_mask")
def order_read_as_ranks(order, ratio):
    check_ratio(ratio)
    return order < math.ceil(ratio * order.shape[1])


@mistake(8, mixing, "sample_mask")
def first_positions_whatever_the_order(order, ratio):
    check_ratio(ratio)
    return (torch.arange(order.shape[1]) < math.ceil(ratio * order.shape[1])).expand_as(order)


@mistake(8, mixing, "sample_mask")
def one_mask_for_the_whole_batch(order, ratio):
    check_ratio(ratio)
    return mixing.hide(order[:1], math.ceil(ratio * order.shape[1])).expand_as(order)


@mistake(8, mixing, "sample_mask")
def at_least_one_hidden(order, ratio):
    check_ratio(ratio)
    return mixing.hide(order, max(1, math.ceil(ratio * order.shape[1])))


@mistake(8, mixing, "sample_mask")
def ratio_clipped_instead_of_refused(order, ratio):
    ratio = min(max(ratio, 0), 1)
    return mixing.hide(order, math.ceil(ratio * order.shape[1]))


@mistake(8, mixing, "mask_ratio")
def uniform_ratio(u, low=0.7):
    return low + (1 - low) * u


# Eq. (9)

@mistake(9, mixing, "dc_mix")
def mixed_the_wrong_way_round(x_c, x_d, m):
    mixing.check_mask(m, x_c, x_d)
    return torch.where(m[..., None], x_c, x_d)


@mistake(9, mixing, "dc_mix")
def discrete_tokens_everywhere(x_c, x_d, m):
    mixing.check_mask(m, x_c, x_d)
    return x_d.clone()


@mistake(9, mixing, "dc_mix")
def zeros_at_hidden_positions(x_c, x_d, m):
    mixing.check_mask(m, x_c, x_d)
    return torch.where(m[..., None], 0.0, x_c)


@mistake(9, mixing, "dc_mix")
def added_instead_of_replaced(x_c, x_d, m):
    mixing.check_mask(m, x_c, x_d)
    return x_c + x_d * m[..., None]


@mistake(9, mixing, "dc_mix")
def mask_of_the_first_image_for_all(x_c, x_d, m):
    mixing.check_mask(m, x_c, x_d)
    return torch.where(m[:1, :, None], x_d, x_c)


@mistake(9, mixing, "dc_mix")
def written_into_x_c(x_c, x_d, m):
    mixing.check_mask(m, x_c, x_d)
    x_c[m] = x_d[m]
    return x_c


@mistake(9, mixing, "dc_mix")
def any_shapes_that_broadcast(x_c, x_d, m):
    return torch.where(m.bool().reshape(*m.shape[:2], 1), x_d, x_c)


def check_room(x_d, d_c):
    """The first two wrong versions below refuse what the right one refuses."""
    if x_d.shape[-1] > d_c:
        raise ValueError(f"{x_d.shape[-1]} bits, {d_c} channels")


@mistake(9, mixing, "pad")
def zeros_in_front(x_d, d_c):
    check_room(x_d, d_c)
    return torch.nn.functional.pad(x_d, (d_c - x_d.shape[-1], 0))


@mistake(9, mixing, "pad")
def padded_with_minus_ones(x_d, d_c):
    check_room(x_d, d_c)
    return torch.nn.functional.pad(x_d, (0, d_c - x_d.shape[-1]), value=-1)


@mistake(9, mixing, "pad")
def bits_cut_off_silently(x_d, d_c):
    return torch.nn.functional.pad(x_d, (0, d_c - x_d.shape[-1]))


# Eq. (10)

@mistake(10, mixing, "mask_discrete")
def mask_token_at_visible_positions(x_d, m):
    mixing.check_mask(m, x_d)
    return torch.where(m[..., None], x_d, 0.0)


@mistake(10, mixing, "mask_discrete")
def mask_token_everywhere(x_d, m):
    mixing.check_mask(m, x_d)
    return torch.zeros_like(x_d)


@mistake(10, mixing, "mask_discrete")
def mask_token_is_plus_one(x_d, m):
    mixing.check_mask(m, x_d)
    return torch.where(m[..., None], 1.0, x_d)


@mistake(10, mixing, "mask_discrete")
def mask_token_is_minus_one(x_d, m):
    mixing.check_mask(m, x_d)
    return torch.where(m[..., None], -1.0, x_d)


@mistake(10, mixing, "mask_discrete")
def only_the_first_bit_group_masked(x_d, m):
    mixing.check_mask(m, x_d)
    first = torch.arange(x_d.shape[-1]) < x_d.shape[-1] / 2
    return torch.where(m[..., None] & first, 0.0, x_d)


@mistake(10, mixing, "mask_discrete")
def nothing_masked(x_d, m):
    mixing.check_mask(m, x_d)
    return x_d.clone()


@mistake(10, mixing, "mask_discrete")
def truth_overwritten(x_d, m):
    mixing.check_mask(m, x_d)
    x_d[m] = 0
    return x_d


@mistake(10, mixing, "mask_discrete")
def any_mask_that_broadcasts(x_d, m):
    return torch.where(m.bool().reshape(*m.shape[:2], 1), 0.0, x_d)


# Eq. (11)

def predict(g_M, x_d, m, y, u, seen=None, keep=None):
    """The right prediction, unless a wrong version changes one of these.

    seen  what g_M is given; the right one is X_d' of Eq. (10)
    keep  where the generated token is taken; the right one is m
    """
    if seen is None:
        seen = mixing.mask_discrete(x_d, m)
    if keep is None:
        keep = m
    with torch.no_grad():
        logits = g_M(seen, y)
    return take_generated(logits, u, keep, x_d)


def take_generated(logits, u, keep, x_d):
    """Tokens sampled from the logits where `keep` is set, x_d elsewhere."""
    codes = mixing.sample_codes(logits, u)
    x_hat = tokenizers.codes_to_bits(codes, x_d.shape[-1] // logits.shape[2])
    return torch.where(keep[..., None], x_hat, x_d)


def code_at(cdf, u, right):
    """The code in whose share of the cumulative distribution u falls.

    right  whether a u on the border of two shares belongs to the later one, as it should
    """
    code = torch.searchsorted(cdf, u.double()[..., None], right=right)[..., 0]
    return code.clamp(max=cdf.shape[-1] - 1)


@mistake(11, mixing, "sample_codes")
def argmax_instead_of_sampling(logits, u):
    return logits.argmax(-1)


@mistake(11, mixing, "sample_codes")
def logits_taken_for_probabilities(logits, u):
    cdf = logits.double().clamp(min=0).cumsum(-1)
    return code_at(cdf, u, right=True)


@mistake(11, mixing, "sample_codes")
def impossible_code_at_u_0(logits, u):
    cdf = logits.double().softmax(-1).cumsum(-1)
    return code_at(cdf, u, right=False)


@mistake(7, tokenizers, "codes_to_bits")
def most_significant_bit_first(codes, e):
    bits = (codes[..., None] >> torch.arange(e).flip(0) & 1).float() * 2 - 1
    return torch.where(codes[..., None] == 2 ** e, 0.0, bits).flatten(-2)


@mistake(7, tokenizers, "codes_to_bits")
def bits_0_and_1(codes, e):
    return (codes[..., None] >> torch.arange(e) & 1).float().flatten(-2)


@mistake(11, mixing, "predict_masked")
def g_M_sees_the_truth(g_M, x_d, m, y, u):
    return predict(g_M, x_d, m, y, u, seen=x_d)


@mistake(11, mixing, "predict_masked")
def generated_tokens_everywhere(g_M, x_d, m, y, u):
    return predict(g_M, x_d, m, y, u, keep=torch.ones_like(m))


@mistake(11, mixing, "predict_masked")
def generated_tokens_outside_the_mask(g_M, x_d, m, y, u):
    return predict(g_M, x_d, m, y, u, keep=~m)


@mistake(11, mixing, "predict_masked")
def class_withheld(g_M, x_d, m, y, u):
    return predict(g_M, x_d, m, torch.zeros_like(y), u)


@mistake(11, mixing, "predict_masked")
def one_draw_for_all_tokens(g_M, x_d, m, y, u):
    return predict(g_M, x_d, m, y, u[:, :1].expand_as(u))


@mistake(11, mixing, "predict_masked")
def two_passes(g_M, x_d, m, y, u):
    return predict(g_M, x_d, m, y, u, seen=predict(g_M, x_d, m, y, u))


@mistake(11, mixing, "predict_masked")
def gradient_through_g_M(g_M, x_d, m, y, u):
    logits = g_M(mixing.mask_discrete(x_d, m), y)
    return take_generated(logits, u, m, x_d)


@mistake(11, mixing, "predict_masked")
def groups_swapped(g_M, x_d, m, y, u):
    def swapped(x, y):
        return g_M(x, y).flip(2)

    return predict(swapped, x_d, m, y, u.flip(2))


# Eq. (12)

def check_ti_mix(x_d, x_hat, m, rho, lam):
    """The wrong versions below refuse what the right one refuses: each has one mistake."""
    mixing.check_mask(m, x_d, x_hat)
    if rho.shape != m.shape or not 0 <= lam <= 1:
        raise ValueError(f"rho {tuple(rho.shape)}, lambda {lam}")


@mistake(12, mixing, "ti_mix")
def equal_rho_keeps_the_truth(x_d, x_hat, m, rho, lam):
    check_ti_mix(x_d, x_hat, m, rho, lam)
    return torch.where((m & (rho > lam))[..., None], x_hat, x_d)


@mistake(12, mixing, "ti_mix")
def lambda_is_the_share_of_generated_tokens(x_d, x_hat, m, rho, lam):
    check_ti_mix(x_d, x_hat, m, rho, lam)
    return torch.where((m & (rho < lam))[..., None], x_hat, x_d)


@mistake(12, mixing, "ti_mix")
def generated_wherever_rho_says(x_d, x_hat, m, rho, lam):
    check_ti_mix(x_d, x_hat, m, rho, lam)
    return torch.where((rho >= lam)[..., None], x_hat, x_d)


@mistake(12, mixing, "ti_mix")
def generated_outside_the_mask(x_d, x_hat, m, rho, lam):
    check_ti_mix(x_d, x_hat, m, rho, lam)
    return torch.where((~m & (rho >= lam))[..., None], x_hat, x_d)


@mistake(12, mixing, "ti_mix")
def generated_in_the_whole_mask(x_d, x_hat, m, rho, lam):
    check_ti_mix(x_d, x_hat, m, rho, lam)
    return torch.where(m[..., None], x_hat, x_d)


@mistake(12, mixing, "ti_mix")
def one_rho_for_the_whole_image(x_d, x_hat, m, rho, lam):
    check_ti_mix(x_d, x_hat, m, rho, lam)
    return torch.where((m & (rho[:, :1] >= lam))[..., None], x_hat, x_d)


@mistake(12, mixing, "ti_mix")
def tokens_blended(x_d, x_hat, m, rho, lam):
    check_ti_mix(x_d, x_hat, m, rho, lam)
    return torch.where(m[..., None], lam * x_d + (1 - lam) * x_hat, x_d)


@mistake(12, mixing, "ti_mix")
def written_into_x_d(x_d, x_hat, m, rho, lam):
    check_ti_mix(x_d, x_hat, m, rho, lam)
    generated = m & (rho >= lam)
    x_d[generated] = x_hat[generated]
    return x_d


@mistake(12, mixing, "ti_mix")
def shapes_not_checked(x_d, x_hat, m, rho, lam):
    if not 0 <= lam <= 1:
        raise ValueError(f"lambda {lam}")
    return torch.where((m.bool() & (rho >= lam))[..., None], x_hat, x_d)


@mistake(12, mixing, "ti_mix")
def lambda_of_any_size(x_d, x_hat, m, rho, lam):
    check_ti_mix(x_d, x_hat, m, rho, min(max(lam, 0), 1))
    return torch.where((m & (rho >= lam))[..., None], x_hat, x_d)


@mistake(12, mixing, "ti_lambda")
def lambda_rises(step, steps):
    return step / max(steps - 1, 1)


@mistake(12, mixing, "ti_lambda")
def lambda_never_reaches_zero(step, steps):
    return 1 - step / steps


# Mistakes in one line

def written(owner, name, right, wrong):
    """The function `owner.name` with `wrong` in the place of `right` in its text."""
    function = inspect.unwrap(getattr(vars(owner)[name], "__func__", vars(owner)[name]))
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(right) == 1, f"{name} has not exactly one {right!r}: plant it again"
    text = text.replace(right, wrong)
    # outside its class a method has to name it
    text = text.replace("super()", f"super({owner.__name__}, self)")
    found = {}
    exec(text, function.__globals__, found)
    return found[name]


# equation, the function, a piece of its text, what stands there instead
LINES = [
    (3, train, "prior_loss", "torch.where(hidden, 2 ** e, codes)",
     "torch.where(hidden, codes, 2 ** e)"),
    (3, train, "prior_loss", "torch.where(hidden, 2 ** e, codes)", "torch.where(hidden, 0, codes)"),
    (3, train, "prior_loss", "rng(torch.rand, *codes.shape[1:])",
     "rng(torch.rand, codes.shape[1], 1)"),
    (3, train, "prior_loss", "model(x, y, drop)", "model(x, y, ~drop)"),
    (3, train, "prior_loss", "model(x, y, drop), codes", "model(x, y, drop), shown % 2 ** e"),
    (3, train, "prior_loss", "(model.splits, -1)", "(-1, model.splits)"),
    (3, train, "prior_loss", "rng(torch.rand), ", "rng(torch.rand)[:1].expand(len(y)), "),
    (3, train, "prior_loss", "2 ** e, codes)", "2 ** e, codes).where(hidden.all(-1, True), codes)"),
    (3, train, "training_mask", "torch.acos", "torch.asin"),
    (3, train, "code_loss", "codes.flatten()", "codes.transpose(1, 2).flatten()"),
    (3, backbone.MaskBitPrior, "forward", "[:, :-1]", "[:, 1:]"),
    (3, backbone.MaskBitPrior, "forward", "self.first_layer(x + self.pos_emb)",
     "self.first_layer(x)"),
    (3, backbone.MaskBitPrior, "forward", "torch.where(drop, self.classes, y)",
     "torch.where(drop, y, self.classes)"),
    (3, backbone.MaskBitPrior, "forward", "feed_forward(attend(x))", "attend(feed_forward(x))"),
    (3, backbone.MaskBitPrior, "forward", "unflatten(-1, (self.splits, -1))",
     "unflatten(-1, (-1, self.splits)).transpose(-2, -1)"),
    (3, backbone.MaskBitPrior, "forward", "self.last_layer(x)", "x"),
    (3, backbone.MaskBitPrior, "forward", "if self.norm_after_transformer is not None", "if False"),
    (3, backbone.MultiHead, "forward", "self.p if self.training else 0.0", "self.p"),
    (3, backbone.MultiHead, "forward", "q, k, v = qkv", "k, q, v = qkv"),
    (3, backbone.PriorAttention, "forward", "self.norm(x + self.dropout(self.mha(x)))",
     "self.norm(self.dropout(self.mha(x)))"),
    (3, backbone.PriorFeedForward, "forward", "if self.prenorm", "if not self.prenorm"),

    (4, sample, "sample_prior", "[never, always]", "[always, never]"),
    (4, sample, "sample_prior", "scale * (logits - without_class)", "scale * without_class"),
    (4, sample, "sample_prior", "torch.where(known, codes, choose(logits))", "choose(logits)"),
    (4, sample, "sample_prior", "temperature * (1 - done)", "temperature"),
    (4, sample, "sample_prior", "done = (i + 1) / steps", "done = i / steps"),
    (4, sample, "sample_prior", "log_p + gumbel()", "log_p.exp() + gumbel()"),
    (4, sample, "sample_prior", "torch.where(hidden, masked, chosen)",
     "torch.where(hidden, chosen, masked)"),
    (4, sample, "sample_prior", "torch.cat([y, y])", "torch.cat([y, y.flip(0)])"),
    (4, sample, "sample_prior", ".gather(-1, chosen[..., None])[..., 0]", ".max(-1).values"),
    (4, sample, "sample_prior", "codes_to_bits(chosen, e)", "codes_to_bits(codes, e)"),
    (4, sample, "sample_prior", "codes_to_bits(codes, e)",
     "codes_to_bits(torch.full_like(codes, masked), e)"),
    (4, sample, "prior_cfg_at", "(i / steps) ** power", "((i + 1) / steps) ** power"),
    (4, sample, "least_certain", "score.masked_fill(known, math.inf)", "score"),
    (4, sample, "least_certain", "known[0].numel()", "int((~known[0]).sum())"),
    (4, sample, "least_certain", "math.floor(", "math.ceil("),
    (4, sample, "least_certain", "ascending[:, k - 1]", "ascending[:, k]"),
    (4, sample.System, "sample_discrete", "-(-rng(torch.rand, *shape).log()).log()",
     "rng(torch.randn, *shape)"),
    (4, sample.System, "sample_discrete", 's["prior_cfg"]', 's["cfg"]'),

    (5, diffusion_head, "cosine_betas", " ** 2", ""),
    (5, diffusion_head, "respace", "round(position)", "int(position)"),
    (5, diffusion_head, "respace", "(T - 1) / (n - 1)", "T / n"),
    (5, diffusion_head, "respace", "1 - abar / np.append(1.0, abar[:-1])", "cosine_betas()[kept]"),
    (5, diffusion_head, "coefficients", "variance[0] = variance[1]", "variance[0] = betas[0]"),
    (5, diffusion_head, "coefficients", "np.append(1.0, abar[:-1])", "np.append(abar[1:], 0.0)"),
    (5, diffusion_head, "coefficients", "np.sqrt(1 / abar - 1)", "np.sqrt(1 / abar) - 1"),
    (5, diffusion_head, "coefficients", "betas * np.sqrt(abar_prev)", "betas * np.sqrt(abar)"),
    (5, diffusion_head, "model_distribution", "(v + 1) / 2", "v"),
    (5, diffusion_head, "model_distribution", "at(c.sqrt_recip, k) * x_t - ",
     "at(c.sqrt_recip, k) * x_t + "),
    (5, diffusion_head, "model_distribution", "x_0.clamp(-bound, bound)", "x_0.clamp(-1, 1)"),
    (5, diffusion_head, "variational_term", "(true_log_variance - log_variance).exp()",
     "(log_variance - true_log_variance).exp()"),
    (5, diffusion_head, "variational_term", "log_variance - true_log_variance - 1",
     "true_log_variance - log_variance - 1"),
    (5, diffusion_head, "variational_term", "* (-log_variance).exp()",
     "* (-true_log_variance).exp()"),
    (5, diffusion_head, "variational_term", " == 0, nll, kl", " == 0, kl, nll"),
    (5, diffusion_head, "variational_term", "torch.where(k[..., None] == 0, nll, kl)", "kl"),
    (5, diffusion_head, "variational_term", " / math.log(2)", ""),
    (5, diffusion_head.DiffusionHead, "loss", " + variational_term(x, x_t, eps, v, t, c)", ""),
    (5, diffusion_head.DiffusionHead, "loss", "self.net(x_t, t, z)", "self.net(x_t, t // 2, z)"),
    (5, diffusion_head.DiffusionHead, "sample", "self.guided(x, c.t[k],",
     "self.guided(x, torch.tensor(k),"),
    (5, diffusion_head.DiffusionHead, "sample", "reversed(range(steps))", "range(steps)"),
    (5, diffusion_head.DiffusionHead, "sample", "noise[steps - k]", "noise[0]"),
    (5, diffusion_head.DiffusionHead, "sample", "(0.5 * log_variance).exp()",
     "log_variance.exp()"),
    (5, diffusion_head.DiffusionHead, "guided", "scale * (eps - eps_uncond)", "scale * eps"),
    (5, diffusion_head.DiffusionHead, "guided", "v, _ = v", "_, v = v"),
    (5, diffusion_head.TimeEmbed, "frequencies", "[angle.cos(), angle.sin()]",
     "[angle.sin(), angle.cos()]"),
    (5, diffusion_head.TimeEmbed, "frequencies", "k / 128", "k / 127"),
    (5, diffusion_head.TimeEmbed, "forward", "frequencies(t)", "frequencies(t.flip(-1))"),
    (5, diffusion_head.Denoiser, "forward", "self.time_embed(t) + self.cond_embed(z)",
     "self.time_embed(t)"),
    (5, diffusion_head.Denoiser, "forward", "silu(self.time_embed(t) + self.cond_embed(z))",
     "self.time_embed(t) + self.cond_embed(z)"),
    (5, diffusion_head.ResBlock, "forward", "shift, scale, gate", "scale, shift, gate"),
    (5, diffusion_head.ResBlock, "forward", "h + gate", "gate"),
    (5, diffusion_head.FinalLayer, "forward", "(1 + scale)", "scale"),
    (5, train, "mixar_loss", "x_c[m], t, noise", "x[m], t, noise"),
    (5, train, "mixar_loss", "rng(torch.rand, R, n_masked)",
     "rng(torch.rand, R, 1).expand(-1, -1, n_masked)"),
    (5, train, "mixar_loss", "rng(torch.rand, R, n_masked)",
     "rng(torch.rand, 1, n_masked).expand(-1, R, -1)"),
    (5, train, "mixar_loss", "rng(torch.randn, R, n_masked, d_c)",
     "rng(torch.randn, R, 1, d_c).expand(-1, -1, n_masked, -1)"),
    (5, train, "mixar_loss", " * T).long()", " * (T - 1)).long()"),
    (5, train, "as_rows", "drawn.transpose(0, 1)",
     "drawn.reshape(drawn.shape[1], -1, *drawn.shape[2:])"),
    (5, train, "mixar_loss", "noise).mean()", "noise).sum()"),
    (5, train, "mixar_loss", "loss(z[m], x_c[m]", "loss(z[~m], x_c[~m]"),

    (5, train, "mixar_loss", "loss(z[m], ", "loss(z[m].detach(), "),
    (5, train, "mixar_loss", 'args.recipe["mixar"]["draws"]', "1"),
    (6, backbone, "attention", "q.shape[-1] ** 0.5", "(heads * q.shape[-1]) ** 0.5"),
    (6, backbone, "attention", "q / q.shape[-1] ** 0.5", "q"),
    (6, backbone, "attention", "scores.softmax(-1)", "scores.softmax(-2)"),
    (6, backbone, "attention", "scaled_dot_product_attention(q, k, v, dropout_p=p)",
     "scaled_dot_product_attention(q, k, v, dropout_p=p, scale=1.0)"),
    (6, backbone.SelfAttention, "forward", "q, k, v = ", "q, v, k = "),
    (6, backbone.CrossAttention, "forward", "self.q(layer_norm(x, x.shape[-1:], eps=1e-6))",
     "self.q(x)"),
    (6, backbone.CrossAttention, "forward", "k, v = self.kv(memory)", "v, k = self.kv(memory)"),
    (6, backbone.Block, "forward", "x + self.attn(self.norm1(x))", "self.norm1(x + self.attn(x))"),
    (6, backbone.Block, "forward", "x + self.cross(", "self.cross("),
    (6, backbone.Block, "forward", "self.cross(x, discrete)", "self.cross(x, x)"),
    (6, backbone.Block, "forward", "self.mlp(self.norm2(x))", "self.mlp(self.norm1(x))"),
    (6, backbone.Block, "__init__", "nn.GELU()", "nn.ReLU()"),
    (6, backbone.MAR, "__init__", "decoder_blocks = Blocks(Block(D, heads, dropout, cross)",
     "decoder_blocks = Blocks(Block(D, heads, dropout, False)"),
    (6, backbone.MAR, "__init__", "encoder_blocks = Blocks(Block(D, heads, dropout, cross)",
     "encoder_blocks = Blocks(Block(D, heads, dropout, False)"),
    (6, backbone.MAR, "embed", "self.z_proj_ln(x + self.encoder_pos_embed_learned)",
     "self.z_proj_ln(x) + self.encoder_pos_embed_learned"),
    (6, backbone.MAR, "embed", "[label, self.z_proj(x)]", "[self.z_proj(x), label]"),
    (6, backbone.MAR, "embed", "drop[:, None], self.fake_latent, self.class_emb(y)",
     "drop[:, None], self.class_emb(y), self.fake_latent"),
    (6, backbone.MAR, "embed_discrete", "[:, self.K:]", "[:, :self.N]"),
    (6, backbone.MAR, "embed_discrete", "self.z_proj_ln(discrete + ", "(discrete + "),
    (6, backbone.MAR, "visible_positions", "pad(m, (self.K, 0))", "pad(m, (0, self.K))"),
    (6, backbone.MAR, "visible_positions", "pad(m, (self.K, 0))", "pad(~m, (self.K, 0))"),
    (6, backbone.MAR, "encode", "[discrete, x]", "[x, discrete]"),
    (6, backbone.MAR, "encode", "x[:, self.N:]", "x[:, :-self.N]"),
    (6, backbone.MAR, "encode", "self.encoder_norm(x)", "x"),
    (6, backbone.MAR, "encode", "discrete = x[:, :self.N]", "pass"),
    (6, backbone.MAR, "decode", "x = torch.cat([discrete, x], dim=1)", "pass"),
    (6, backbone.MAR, "decode", "[:, -self.N:]", "[:, :self.N]"),
    (6, backbone.MAR, "decode", "x = x + self.decoder_pos_embed_learned", "pass"),
    (6, backbone.MAR, "decode", " + self.diffusion_pos_embed_learned", ""),
    (6, backbone.MAR, "decode", "[:, self.K:]", "[:, :self.N]"),
    (6, backbone.MAR, "forward", "placeholder = self.decoder_embed(embedded)",
     "placeholder = embedded"),
    (6, backbone.MAR, "forward", 'if self.guidance == "dcmix"', 'if self.guidance == "dcmax"'),
    (6, backbone.MAR, "forward", "full[visible] = seen.flatten(0, 1)", "pass"),
    (6, backbone.MAR, "forward", "self.encode(seen, discrete)",
     "self.encode(seen.flip(1), discrete)"),
    (6, backbone.MAR, "encode", "self.decoder_embed(self.encoder_norm(x))",
     "self.encoder_norm(self.decoder_embed(x))"),
    (6, backbone.MAR, "decode", "self.decoder_blocks(x, discrete)",
     "self.decoder_blocks(x, x)"),
    (6, backbone.MAR, "forward", "self.embed_discrete(x_d)",
     "self.embed_discrete(x_d * m[..., None])"),
    (6, backbone.MAR, "forward", "self.mask_token.expand_as(embedded)",
     "self.decoder_embed(embedded)"),
    (6, train, "mixar_loss", "rng(torch.rand) < LABEL_DROP", "rng(torch.rand) > LABEL_DROP"),
    (6, train, "mixar_loss", "model(x, x_d, m, y, drop)", "model(x, x_d, ~m, y, drop)"),
    (6, sample, "generate", "model(x, x_d, m, y, drop=always)",
     "model(model.mix(x_c, 0 * x_d, m), 0 * x_d, m, y, drop=always)"),
    (6, sample, "generate", "model(x, x_d, m, y, drop=always)[now]",
     "model(x, x_d, m, y, drop=never)[now]"),
    (6, sample, "generate", "model.mix(x_c, x_d, m)", "model.mix(x_c, x_d, now)"),
    (6, sample, "generate", "n, temperature, z_uncond", "n, 1.0, z_uncond"),
    (6, sample, "generate", "1 + (cfg - 1) * ", "cfg * "),
    (6, sample, "generate", "if cfg != 1 else None", "if cfg > 5 else None"),
    (6, sample, "generate", "now = m & ~mixing.hide(order, n_after)", "now = m"),
    (6, sample, "generate", "        n_hidden = n_after\n", "        n_hidden = n_hidden - 1\n"),
    (6, sample, "generate", "(N - n_after) / N", "n_after / N"),
    (6, sample.System, "sample_continuous", 's["temperature"]', 's["prior_temperature"]'),

    (7, tokenizers, "kl_to_normal", "- 1 - logvar", "- 1 + logvar"),
    (7, tokenizers, "kl_to_normal", "logvar.exp()", "(2 * logvar).exp()"),
    (7, tokenizers, "quantiser_losses", "(quantise(z) - z)", "(quantise(z) + z)"),
    (7, tokenizers, "quantiser_losses", "entropy(p).mean(), entropy(mean_p)",
     "entropy(mean_p), entropy(p).mean()"),
    (7, tokenizers, "quantiser_losses", "mean_over_ranks(p.mean(0))", "p[0]"),
    (7, tokenizers, "entropy", "-(p", "(p"),
    (7, tokenizers.KLVAE, "encode", "logvar.clamp(-30, 20)", "logvar"),
    (7, tokenizers.KLVAE, "decode", "self.post_quant_conv(z)", "z"),
    (7, tokenizers.ResBlock, "forward", "u if self.projects_output else x", "x"),
    (7, tokenizers.AttnBlock, "forward", "x + self.proj_out", "self.proj_out"),
    (7, tokenizers.Level, "forward", "if self.maskbit else 0", "if not self.maskbit else 0"),
    (7, train, "mixar_loss", "tokenizers.reparameterize(mean, std, rng(torch.randn, N, d_c))",
     "mean"),
    (7, train, "mixar_loss", "rng(torch.randn, N, d_c)", "rng(torch.randn, 1, d_c)"),
    (7, stages, "vae_loss", "(0.5 * logvar).exp()", "logvar.exp()"),
    (7, stages, "vae_loss", "batch[0] * 2 - 1", "batch[0]"),
    (7, stages, "vae_loss", "1e-4 * kl", "kl"),
    (7, stages, "vae_loss", "tokenizers.reparameterize(mean, (0.5 * logvar).exp(), noise)", "mean"),
    (7, stages, "vq_loss", "(tokenizers.quantise(z) - z).detach()", "0 * z"),
    (7, stages, "vq_loss", "(tokenizers.quantise(z) - z).detach()", "tokenizers.quantise(z) - z"),
    (7, stages, "vq_loss", "per_token - of_mean", "per_token + of_mean"),
    (7, sample.System, "decode_continuous", "x_c * self.std + self.mean",
     "(x_c + self.mean) * self.std"),
    (7, sample.System, "decode_continuous", "x_c * self.std + self.mean", "x_c"),
    (7, sample.System, "encode_discrete", ".float() / 255", ".float() / 127.5 - 1"),
    (7, sample.System, "grid", "tokens.transpose(1, 2)", "tokens.transpose(1, 2).flip(2)"),

    (8, mixing, "hide", ":count", ":count + 1"),
    (8, mixing, "mask_ratio", "at_low + u * (at_one - at_low)", "u"),
    (8, mixing, "mask_ratio", "at_one = 0.5", "at_one = 1.0"),
    (8, train, "mixar_loss", "rng(torch.rand, N).argsort(1)", "rng(torch.rand, N).long()"),
    (8, train, "mixar_loss", "rng(torch.rand, N).argsort(1)",
     "rng(torch.rand, N)[:1].argsort(1).expand(len(y), N)"),
    (8, train, "mixar_loss", "mixing.mask_ratio(float(rng.shared(torch.rand, 1)))",
     "float(rng.shared(torch.rand, 1))"),
    (8, train, "mixar_loss", ".argsort(1), ratio", ".argsort(1), 0.75"),

    (9, backbone.MAR, "mix", "mixing.dc_mix(x_c, mixing.pad(x_d, self.d_c), m)",
     "mixing.dc_mix(mixing.pad(x_d, self.d_c), x_c, m)"),
    (8, train, "mixar_loss", "mixing.sample_mask(rng(torch.rand, N).argsort(1), ratio)",
     "rng(torch.rand, N) < ratio"),
    (8, train, "mixar_loss", "mixing.sample_mask(", "~mixing.sample_mask("),
    (8, train, "mixar_loss", "rng.shared(torch.rand, 1)", "rng(torch.rand)[0]"),
    (8, train, "mixar_loss", "rng(torch.rand, N).argsort(1)", "rng(torch.rand, N).argsort(0)"),
    (9, backbone.MAR, "mix", "mixing.dc_mix(x_c, mixing.pad(x_d, self.d_c), m)", "x_c"),
    (9, backbone.MAR, "mix", 'if self.guidance == "dcmix"', 'if self.guidance != "none"'),
    (9, train, "mixar_loss", "model.mix(x_c, x_d, m)", "x_c"),
    (9, train, "mixar_loss", "model.mix(x_c, x_d, m)", "model.mix(x_c, x_d, ~m)"),

    (11, mixing, "predict_masked", "x_d.shape[-1] // logits.shape[2]", "x_d.shape[-1]"),
    (9, train, "mixar_loss", "model.mix(x_c, x_d, m)", "model.mix(mean, x_d, m)"),

    (10, mixing, "mask_discrete", "0.0, x_d", "-x_d, x_d"),
    (10, mixing, "mask_discrete", "0.0, x_d)", "0.0, x_d).long()"),
    (10, mixing, "mask_discrete", "0.0, x_d", "x_d.mean(), x_d"),
    (10, mixing, "mask_discrete", "m[..., None]", "m[:1, :, None]"),
    (10, mixing, "mask_discrete", "m[..., None]", "m[..., None] & (x_d > 0)"),
    (11, mixing, "predict_masked", "with torch.no_grad()", "if True"),
    (11, mixing, "sample_codes", "cumsum(-1)", "cumsum(-1).flip(-1)"),
    (11, mixing, "sample_codes", "right=True", "right=False"),
    (11, train, "mixar_loss", "rng(torch.rand, N, prior.splits)", "rng(torch.rand, 1, 1)"),
    (11, train, "mixar_loss", "(prior, x_d, m, y, u)", "(prior, x_d, ~m, y, u)"),

    (12, train, "mixar_loss", "mixing.ti_mix(x_d, x_hat, m, rho, lam)",
     "mixing.ti_mix(x_hat, x_d, m, rho, lam)"),
    (12, train, "mixar_loss", "mixing.ti_mix(x_d, x_hat, m, rho, lam)", "x_hat"),
    (12, train, "mixar_loss", "m, rho, lam", "m, rho[:, :1].expand(-1, N), lam"),
    (12, train, "mixar_loss", "rho = rng(torch.rand, N)", "rho = rng(torch.randn, N)"),
    (12, train, "mixar_loss", "rho = rng(torch.rand, N)", "rho = rng(torch.rand, 1).expand(-1, N)"),
    (12, train, "mixar_loss", "rho = rng(torch.rand, N)",
     "rho = rng.shared(torch.rand, N).expand(len(y), N)"),
    (12, train, "mixar_loss", "if args.ti_mix", "if args.ti_mix and step > 1"),
    (12, train, "mixar_loss", "model.mix(x_c, x_d, m)", "model.mix(x_c, batch[2], m)"),
    (12, mixing, "ti_mix", "rho >= lam", "rho >= 1 - lam"),
    (12, train, "mixar_loss", "mixing.ti_lambda(step, ", "1 - mixing.ti_lambda(step, "),
    (12, train, "mixar_loss", "mixing.ti_lambda(step, ", "mixing.ti_lambda(0 * step, "),

    ("frechet_distance", fid, "frechet_distance", "- 2 * trace", "- trace"),
    ("frechet_distance", fid, "frechet_distance", "np.square(mu1 - mu2).sum()",
     "np.abs(mu1 - mu2).sum()"),
    ("frechet_distance", fid, "frechet_distance", "root @ sigma2 @ root", "root @ sigma2"),
    ("frechet_distance", fid, "frechet_distance", "np.sqrt(values.clip(0))", "values.clip(0)"),
    ("frechet_distance", fid, "frechet_distance", "np.sqrt(values.clip(0))", "np.sqrt(values)"),
]


# the functions that a reader may write again
FUNCTIONS = [
    (3, train, "training_mask"), (3, train, "code_loss"), (3, train, "prior_loss"),
    (3, backbone.MaskBitPrior, "forward"),
    (4, sample, "least_certain"), (4, sample, "prior_cfg_at"), (4, sample, "sample_prior"),
    (5, diffusion_head, "add_noise"), (5, diffusion_head, "denoising_loss"),
    (5, diffusion_head, "variational_term"), (5, diffusion_head, "model_distribution"),
    (5, diffusion_head.DiffusionHead, "loss"), (5, diffusion_head.DiffusionHead, "sample"),
    (5, diffusion_head.DiffusionHead, "guided"),
    (6, backbone, "attention"), (6, backbone.Block, "forward"), (6, backbone.MAR, "embed"),
    (6, backbone.MAR, "encode"), (6, backbone.MAR, "decode"), (6, backbone.MAR, "forward"),
    (6, sample, "hidden_after"), (6, sample, "generate"),
    (7, tokenizers, "reparameterize"), (7, tokenizers, "quantise"),
    (7, tokenizers, "kl_to_normal"), (7, tokenizers.KLVAE, "encode"),
    (7, tokenizers.BitVQ, "encode"), (7, stages, "vae_loss"), (7, stages, "vq_loss"),
    (8, mixing, "mask_ratio"), (8, mixing, "hide"), (8, mixing, "sample_mask"),
    (9, mixing, "pad"), (9, mixing, "dc_mix"), (9, backbone.MAR, "mix"),
    (10, mixing, "mask_discrete"),
    (11, mixing, "sample_codes"), (11, mixing, "predict_masked"),
    (12, mixing, "ti_mix"), (12, mixing, "ti_lambda"),
    ("frechet_distance", fid, "frechet_distance"),
]


def not_written(*arguments, **named):
    """An empty function."""
    raise NotImplementedError


# the verdict

def test_without_a_mistake_every_equation_is_green():
    """The right versions pass, so that what turns red below is due to the mistake."""
    assert red_before() == set()


@pytest.fixture(scope="module")
def all_green():
    """A mistake can be planted only where all equations are right."""
    if red_before():
        pytest.skip(f"{sorted(red_before())} are red before any mistake is planted")


@pytest.mark.usefixtures("all_green")
@pytest.mark.parametrize("equation, owner, name, title, wrong", [
    pytest.param(*planted, id=f"{label(planted[0])}-{planted[3]}") for planted in MISTAKES])
def test_a_mistake_turns_exactly_its_own_equation_red(monkeypatch, equation, owner, name, title,
                                                      wrong):
    """Exactly the equation of the mistake turns red.

    A failure here means that the tests miss this mistake, or that they blame another equation.
    """
    assert red_with(monkeypatch, owner, name, wrong) == {label(equation)}


@pytest.mark.usefixtures("all_green")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("equation, owner, name, right, wrong", [
    pytest.param(*line, id=f"{label(line[0])}-{line[2]}-{k}") for k, line in enumerate(LINES)])
def test_a_wrong_line_turns_exactly_its_own_equation_red(monkeypatch, equation, owner, name, right,
                                                         wrong):
    """The same with one line of a longer function."""
    version = written(owner, name, right, wrong)
    assert red_with(monkeypatch, owner, name, version) == {label(equation)}


@pytest.mark.usefixtures("all_green")
@pytest.mark.parametrize("equation, owner, name", [
    pytest.param(*function, id=f"{label(function[0])}-{function[2]}") for function in FUNCTIONS])
def test_a_function_not_yet_written_turns_exactly_its_own_equation_red(monkeypatch, equation,
                                                                       owner, name):
    """Who begins with an empty function sees the other equations green."""
    assert red_with(monkeypatch, owner, name, not_written) == {label(equation)}


@pytest.mark.usefixtures("all_green")
@pytest.mark.parametrize("equation", range(3, 13))
def test_an_equation_is_green_while_all_others_are_not_written(monkeypatch, equation):
    """Who has solved one equation sees it green, whatever is left to do in the others."""
    for other, owner, name in FUNCTIONS:
        if other != equation:
            monkeypatch.setattr(owner, name, not_written)
    own = [case for case in numbered_tests() if case.of == label(equation)]
    assert red_equations(own) == set()
def test_the_sound_versions_are_sound(monkeypatch):
    """The functions of sound.py pass the tests of their own equations, but for refusing inputs."""
    for equation, owner, name, version in sound.VERSIONS:
        monkeypatch.setattr(owner, name, version)
    cases = [case for case in numbered_tests() if "refuses" not in case.test.__name__]
    assert red_equations(cases) == set()


def test_every_equation_has_at_least_five_mistakes():
    """Each of Eqs. (3) to (12) has five planted mistakes or more. README says how many in all."""
    planted = Counter(mistake[0] for mistake in [*MISTAKES, *LINES])
    assert min(planted[equation] for equation in range(3, 13)) >= 5
    total = sum(planted[equation] for equation in range(3, 13))
    readme = Path(__file__).resolve().parent.parent / "README.md"
    assert f"{total} plausible mistakes in Eqs. (3) to (12)" in readme.read_text()
