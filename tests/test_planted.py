"""Planted mistakes: wrong versions of every equation that still run and train.

Each wrong version takes the place of the right function. Then all tests that are named after an
equation are run. Exactly the tests of the mistaken equation may fail, so that a red test names the
equation to look at. Where two equations share a function, the tests of both fail.

The name of a wrong version says what is wrong in it.
"""
import math
import re
from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

import backbone
import diffusion_head
import mixing
import sample
import test_backbone
import test_diffusion_head
import test_mixing
import test_tokenizers
import tokenizers
import train

MISTAKES = []


def mistake(equation, owner, name, also=()):
    """A decorator that adds a wrong version of `owner.name` to MISTAKES.

    equation  the equation that `owner.name` belongs to
    also      other equations that use `owner.name`, so that their tests fail too
    """
    def note(wrong):
        red = {equation, *also}
        test_id = f"eq{equation:02d}-{wrong.__name__}"
        MISTAKES.append(pytest.param(equation, owner, name, wrong, red, id=test_id))
        return wrong
    return note


def passes(test):
    """Whether this test function passes."""
    try:
        test()
    except (Exception, pytest.fail.Exception):
        return False
    return True


def red_equations():
    """The equations of which at least one test fails."""
    red = set()
    for module in (test_mixing, test_tokenizers, test_diffusion_head, test_backbone):
        for name, test in vars(module).items():
            numbered = re.match(r"test_eq(\d\d)_", name)
            if numbered and not passes(test):
                red.add(int(numbered[1]))
    return red


# Eq. (3)

@mistake(3, train, "masked_loss")
def without_label_smoothing(logits, codes):
    return cross_entropy(logits.flatten(0, 2), codes.flatten())


@mistake(3, train, "masked_loss")
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


@mistake(4, sample, "prior_guidance")
def constant_guidance(g, power, i, steps):
    return g


@mistake(4, sample, "prior_guidance")
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
                                    scale=1.0):
    return backwards(self, z, noise, steps, temperature, z_uncond, 1 + scale)


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
def guidance_constant(model, x_d, y, order, noise, ar_steps, diffusion_steps, cfg):
    return generate(model, x_d, y, order, noise, ar_steps, diffusion_steps, cfg, "constant")


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


@mistake(6, backbone.MAR, "forward", also=[9])
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


@mistake(7, tokenizers, "bits_to_codes", also=[4])
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


@mistake(11, tokenizers, "codes_to_bits", also=[4])
def most_significant_bit_first(codes, e):
    bits = (codes[..., None] >> torch.arange(e).flip(0) & 1).float() * 2 - 1
    return torch.where(codes[..., None] == 2 ** e, 0.0, bits).flatten(-2)


@mistake(11, tokenizers, "codes_to_bits", also=[4])
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


# the verdict

def test_without_a_mistake_every_equation_is_green():
    """The right versions pass, so that what turns red below is due to the mistake."""
    assert red_equations() == set()


@pytest.fixture(scope="module")
def sound():
    """A mistake can be planted only where all equations are right."""
    red = red_equations()
    if red:
        pytest.skip(f"Eqs. {sorted(red)} are red before any mistake is planted")


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("equation, owner, name, wrong, red", MISTAKES)
def test_a_mistake_turns_exactly_its_own_equation_red(monkeypatch, equation, owner, name, wrong,
                                                      red):
    """Exactly the equation of the mistake turns red.

    A failure here means that the tests miss this mistake, or that they blame another equation.
    """
    monkeypatch.setattr(owner, name, wrong)
    assert red_equations() == red


def test_every_equation_has_at_least_five_mistakes():
    """Each of Eqs. (3) to (12) has five planted mistakes or more."""
    planted = Counter(param.values[0] for param in MISTAKES)
    assert set(planted) == set(range(3, 13))
    assert min(planted.values()) >= 5
