"""Eqs. (4) and (8) to (12), sections 3.1 to 3.4: every test is named after its equation and works on literals.

A failing test's docstring says what the equation asks for. Tokens are written as (B, N, d) lists; most have one
image (B = 1), so that a row can be read off.
"""
import math
from unittest.mock import patch

import pytest
import torch

import golden
import mixing
import sample
import tokenizers

T, F = True, False


def bools(*rows):
    return torch.tensor(rows)


# Eq. (4): what the prior draws again

def drawn_again(score, known, r):
    """One image of 4 tokens with 2 codes each: the scores in order -> the places of the codes that go back behind the mask."""
    score, known = torch.tensor(score).view(1, 4, 2), torch.tensor(known, dtype=torch.bool).view(1, 4, 2)
    return sample.least_certain(score, known, r).flatten().nonzero().flatten().tolist()


def test_eq04_hides_the_least_certain_codes_again():
    """Eq. (4): after the share r of the steps acos(r) / (pi / 2) of all codes, rounded down, are hidden again: the least certain of those not kept before."""
    score = [.8, .1, .7, .2, .6, .3, .5, .4]
    assert drawn_again(score, [0] * 8, 0.5) == [1, 3, 5, 6, 7], "2/3 of 8 codes are 5, those of the lowest score"
    assert drawn_again(score, [0] * 8, 0.9) == [1, 3], "0.287 of 8 codes are 2"
    assert drawn_again(score, [0, 1, 0, 1, 0, 0, 0, 0], 0.5) == [2, 4, 5, 6, 7], "a code kept before stays, uncertain as it was"
    assert drawn_again(score, [0, 1, 0, 1, 0, 1, 1, 1], 0.5) == [2, 4], "every step keeps at least one more"


def test_eq04_every_image_keeps_its_own_codes():
    """Eq. (4): which codes are certain is decided in each image by itself."""
    score = torch.tensor([[[.1], [.2], [.3], [.4]], [[40.], [30.], [20.], [10.]]])
    assert sample.least_certain(score, torch.zeros(2, 4, 1, dtype=torch.bool), 0.5)[..., 0].tolist() == [[T, T, F, F], [F, F, T, T]]


# Eq. (8): the mask

def test_eq08_hides_the_ceiling_of_r_times_N():
    """Eq. (8): N' = ceil(r N), rounded up: r = 0.3 of 5 tokens hides 2, the smallest r > 0 hides 1."""
    order = torch.arange(5)[None]
    for ratio, count in [(0.3, 2), (0.4, 2), (0.41, 3), (0.01, 1), (0.99, 5)]:
        assert int(mixing.sample_mask(order, ratio).sum()) == count, f"r = {ratio}"


def test_eq08_hides_the_first_entries_of_the_order():
    """Eq. (8): m^i = 1 exactly at k_1 ... k_N', the positions that stand FIRST in the order."""
    order = torch.tensor([[2, 4, 1, 0, 3]])                                  # k_1 = 2, k_2 = 4
    assert mixing.sample_mask(order, 0.4).tolist() == [[F, F, T, F, T]]


def test_eq08_every_image_has_its_own_order():
    """Eq. (8): row b of the mask follows row b of the order; all rows hide equally many tokens."""
    order = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]])
    assert mixing.sample_mask(order, 0.5).tolist() == [[T, T, F, F], [F, T, F, T]]


def test_eq08_ratio_0_hides_nothing_and_ratio_1_everything():
    """Eq. (8): r = 0 gives an all-zero mask, r = 1 an all-one mask."""
    order = torch.tensor([[2, 0, 1]])
    assert mixing.sample_mask(order, 0.0).tolist() == [[F, F, F]]
    assert mixing.sample_mask(order, 1.0).tolist() == [[T, T, T]]


def test_eq08_refuses_a_ratio_outside_0_to_1():
    """Eq. (8): r is a share of the tokens; anything outside [0, 1] is a ValueError, not a clipped mask."""
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError):
            mixing.sample_mask(torch.tensor([[0, 1]]), ratio)


def test_eq08_gives_a_bool_mask_and_leaves_the_order_unchanged():
    """Eq. (8): the mask is (B, N) bool, and the order given in is not written to."""
    order = torch.tensor([[2, 0, 1]])
    m = mixing.sample_mask(order, 0.5)
    assert m.dtype == torch.bool and m.shape == (1, 3)
    assert order.tolist() == [[2, 0, 1]]


def test_eq08_the_ratio_follows_mars_truncated_normal():
    """The r of Eq. (8): quantiles of the normal (1, 0.25) cut to [0.7, 1], as MAR draws it."""
    g = golden.load("mar_tiny")
    for u, r in zip(g["mask_rate_cdf_p"].tolist(), g["mask_rate_quantiles"].tolist()):
        assert mixing.mask_ratio(u) == pytest.approx(r, abs=1e-9), f"u = {u}"
    mean = sum(mixing.mask_ratio((i + 0.5) / 1000) for i in range(1000)) / 1000
    assert mean == pytest.approx(float(g["mask_rate_mean"]), abs=1e-5)


def test_eq08_the_ratio_stays_between_its_bounds():
    """The r of Eq. (8): u = 0 gives the lower bound, u = 1 gives 1, for any lower bound."""
    for low in (0.0, 0.5, 0.7, 1.0):
        assert mixing.mask_ratio(0.0, low) == pytest.approx(low, abs=1e-9)
        assert mixing.mask_ratio(1.0, low) == pytest.approx(1.0, abs=1e-9)


# Eq. (9): DC-Mix

def test_eq09_takes_x_d_where_m_is_1_and_x_c_elsewhere():
    """Eq. (9): x~^i = x_d^i where m^i = 1 (hidden), x_c^i where m^i = 0 (visible)."""
    x_c = torch.tensor([[[1., 2.], [3., 4.], [5., 6.]]])
    x_d = torch.tensor([[[-1., 0.], [-3., 0.], [-5., 0.]]])
    assert mixing.dc_mix(x_c, x_d, bools([T, F, T])).tolist() == [[[-1, 0], [3, 4], [-5, 0]]]


def test_eq09_with_nothing_or_everything_hidden():
    """Eq. (9): an empty mask gives X_c back, a full mask gives X_d."""
    x_c, x_d = torch.tensor([[[1.], [2.]]]), torch.tensor([[[-1.], [-2.]]])
    assert mixing.dc_mix(x_c, x_d, bools([F, F])).tolist() == [[[1], [2]]]
    assert mixing.dc_mix(x_c, x_d, bools([T, T])).tolist() == [[[-1], [-2]]]


def test_eq09_every_image_uses_its_own_mask():
    """Eq. (9): row b of the mask decides over image b only."""
    x_c, x_d = torch.tensor([[[1.], [2.]], [[3.], [4.]]]), torch.tensor([[[-1.], [-2.]], [[-3.], [-4.]]])
    assert mixing.dc_mix(x_c, x_d, bools([T, F], [F, T])).tolist() == [[[-1], [2]], [[3], [-4]]]


def test_eq09_pads_the_bits_with_zeros_last():
    """Section 4.2, "padded discrete tokens": d_d bits come first and unchanged, then zeros up to d_c channels."""
    x_d = torch.tensor([[[1., -1.], [-1., 1.]]])
    assert mixing.pad(x_d, 4).tolist() == [[[1, -1, 0, 0], [-1, 1, 0, 0]]]
    assert mixing.pad(x_d, 2).tolist() == x_d.tolist()


def test_eq09_refuses_more_bits_than_channels():
    """Eq. (9): d_d > d_c is a ValueError that names both numbers; no bit is cut off silently."""
    with pytest.raises(ValueError, match=r"(?s)3.*2"):
        mixing.pad(torch.ones(1, 2, 3), 2)


def test_eq09_refuses_shapes_that_do_not_fit():
    """Eq. (9): x_c, x_d (B, N, d_c) and m (B, N) bool; any other shapes are a ValueError and never broadcast."""
    x, m = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
    for x_c, x_d, mask in [(x, torch.zeros(2, 3, 1), m), (x, torch.zeros(1, 3, 4), m), (x, torch.zeros(2, 1, 4), m),
                           (x, x, m[:1]), (x, x, m[:, :1]), (x, x, m[..., None]), (x, x, m.float())]:
        with pytest.raises(ValueError):
            mixing.dc_mix(x_c, x_d, mask)


def test_eq09_leaves_its_inputs_unchanged():
    """Eq. (9): x_c is still the target of Eq. (5) after mixing, so neither it nor x_d may be written to."""
    x_c, x_d, m = torch.tensor([[[1.], [2.]]]), torch.tensor([[[-1.], [-2.]]]), bools([T, F])
    mixing.dc_mix(x_c, mixing.pad(x_d, 1), m)
    assert (x_c.tolist(), x_d.tolist(), m.tolist()) == ([[[1], [2]]], [[[-1], [-2]]], [[T, F]])


# Eq. (10): g_M's input

def test_eq10_puts_the_mask_token_where_m_is_1():
    """Eq. (10): x_d'^i = t_m where m^i = 1; where m^i = 0 the true bits stay."""
    x_d = torch.tensor([[[1., -1.], [-1., 1.], [1., 1.]]])
    assert mixing.mask_discrete(x_d, bools([T, F, T])).tolist() == [[[0, 0], [-1, 1], [0, 0]]]


def test_eq10_the_mask_token_is_all_zeros():
    """Eq. (10): MaskBit's t_m sets EVERY bit to 0, which is no bit's value; it is neither -1 nor +1."""
    x_d = torch.tensor([[[1., -1., 1., -1.]]])
    assert mixing.mask_discrete(x_d, bools([T])).tolist() == [[[0, 0, 0, 0]]]


def test_eq10_with_nothing_or_everything_hidden():
    """Eq. (10): an empty mask gives X_d back, a full mask mask tokens only."""
    x_d = torch.tensor([[[1.], [-1.]]])
    assert mixing.mask_discrete(x_d, bools([F, F])).tolist() == [[[1], [-1]]]
    assert mixing.mask_discrete(x_d, bools([T, T])).tolist() == [[[0], [0]]]


def test_eq10_every_image_uses_its_own_mask():
    """Eq. (10): row b of the mask decides over image b only."""
    x_d = torch.tensor([[[1.], [-1.]], [[1.], [-1.]]])
    assert mixing.mask_discrete(x_d, bools([T, F], [F, T])).tolist() == [[[0], [-1]], [[1], [0]]]


def test_eq10_refuses_shapes_that_do_not_fit():
    """Eq. (10): x_d (B, N, d_d) and m (B, N) bool; any other shapes are a ValueError."""
    x_d = torch.ones(2, 3, 4)
    for m in (torch.ones(1, 3, dtype=torch.bool), torch.ones(2, 3, 1, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(ValueError):
            mixing.mask_discrete(x_d, m)


def test_eq10_leaves_its_inputs_unchanged():
    """Eq. (10): the true X_d is needed again in Eq. (12) and may not be written to."""
    x_d, m = torch.tensor([[[1.], [-1.]]]), bools([T, F])
    mixing.mask_discrete(x_d, m)
    assert (x_d.tolist(), m.tolist()) == ([[[1], [-1]]], [[T, F]])


# Eq. (11): g_M's prediction

# Eq. (11) builds on Eq. (10). These tests put a sound Eq. (10) under it, so that they judge Eq. (11) alone.
on_sound_eq10 = patch.object(mixing, "mask_discrete", lambda x_d, m: torch.where(m[..., None], 0.0, x_d))


class Prediction:
    """A g_M that answers fixed probabilities (B, N, S, 2^e), whatever it is given, and notes how it was called."""

    def __init__(self, probabilities):
        self.weight = torch.ones((), requires_grad=True)
        self.logits, self.calls = torch.tensor(probabilities).log() * self.weight, []

    def __call__(self, x, y):
        self.calls.append((x.tolist(), y.tolist(), torch.is_grad_enabled()))
        return self.logits


def certain(*codes, of):
    """Probabilities of a g_M that is sure of these codes, one token of one group each: (1, N, 1, of)."""
    return [[[[float(c == code) for c in range(of)]] for code in codes]]


@on_sound_eq10
def test_eq11_generates_where_m_is_1_and_keeps_the_truth_elsewhere():
    """Eq. (11): x_hat^i is g_M's where m^i = 1 and the true x_d^i where m^i = 0, even if g_M says otherwise there."""
    x_d, g_M = torch.tensor([[[-1.], [-1.], [1.], [1.]]]), Prediction(certain(1, 1, 0, 0, of=2))
    x_hat = mixing.predict_masked(g_M, x_d, bools([T, F, T, F]), torch.tensor([0]), torch.full((1, 4, 1), 0.5))
    assert x_hat.tolist() == [[[1], [-1], [-1], [1]]]


@on_sound_eq10
def test_eq11_g_M_sees_the_masked_sequence_and_the_class():
    """Eq. (11): g_M is given X_d' of Eq. (10), with mask tokens where it has to predict, and the class. Not X_d: it would copy."""
    x_d, g_M = torch.tensor([[[-1.], [1.]], [[1.], [1.]]]), Prediction(certain(1, 1, of=2) * 2)
    mixing.predict_masked(g_M, x_d, bools([T, F], [F, T]), torch.tensor([7, 5]), torch.full((2, 2, 1), 0.5))
    seen, classes, _ = g_M.calls[0]
    assert seen == [[[0], [1]], [[1], [0]]]
    assert classes == [7, 5]


@on_sound_eq10
def test_eq11_samples_instead_of_taking_the_likeliest():
    """Eq. (11): the code is DRAWN from g_M's probabilities, as at inference; argmax would be too sure of itself."""
    g_M = Prediction([[[[0.7, 0.3]]] * 10])                                  # ten tokens, each +1 with probability 0.3
    u = (torch.arange(10) + 0.5).view(1, 10, 1) / 10
    x_hat = mixing.predict_masked(g_M, torch.ones(1, 10, 1), bools([T] * 10), torch.tensor([0]), u)
    assert x_hat.flatten().tolist() == [-1] * 7 + [1] * 3


def test_eq11_inverts_the_cumulative_distribution():
    """Eq. (11): u picks the code in whose share of [0, 1) it falls: shares 0.1, 0.2, 0.3, 0.4 end at 0.1, 0.3, 0.6, 1."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log() + 5                    # logits are known up to a constant
    for u, code in [(0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.59, 2), (0.61, 3), (0.999, 3)]:
        assert int(mixing.sample_codes(logits, torch.tensor(u))) == code, f"u = {u}"


def test_eq11_never_draws_a_code_of_probability_zero():
    """Eq. (11): neither u = 0 nor the largest u below 1 may pick a code that g_M excludes."""
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
    assert int(mixing.sample_codes(logits, torch.tensor(0.0))) == 1
    assert int(mixing.sample_codes(logits, torch.tensor(1 - 2 ** -24))) == 2


@on_sound_eq10
def test_eq11_every_token_and_group_uses_its_own_draw():
    """Eq. (11): the code of image b, token i, group s depends on u[b, i, s] alone."""
    g_M = Prediction([[[[0.5, 0.5]] * 2] * 2] * 2)
    u = torch.tensor([[[.1, .9], [.9, .1]], [[.9, .9], [.1, .1]]])
    x_hat = mixing.predict_masked(g_M, torch.ones(2, 2, 2), bools([T, T], [T, T]), torch.tensor([0, 0]), u)
    assert x_hat.tolist() == [[[-1, 1], [1, -1]], [[1, 1], [-1, -1]]]


@on_sound_eq10
def test_eq11_writes_codes_as_bits_least_significant_first():
    """Eq. (11): code 1 = +1 -1 -1, code 4 = -1 -1 +1; the groups' bits follow each other in order."""
    g_M = Prediction([[certain(1, of=8)[0][0] + certain(4, of=8)[0][0]]])    # one token, group 0 says 1, group 1 says 4
    x_hat = mixing.predict_masked(g_M, torch.zeros(1, 1, 6), bools([T]), torch.tensor([0]), torch.full((1, 1, 2), 0.5))
    assert x_hat.tolist() == [[[1, -1, -1, -1, -1, 1]]]


def test_eq11_the_mask_code_becomes_zeros():
    """MaskBit's mask code, one past the last (2^e), stands for e zeros; the codes beside it keep their bits."""
    assert tokenizers.codes_to_bits(torch.tensor([[[4, 2]], [[3, 4]]]), 2).tolist() == [[[0, 0, -1, 1]], [[1, 1, 0, 0]]]


@on_sound_eq10
def test_eq11_asks_g_M_once_and_without_gradient():
    """Eq. (11): one forward pass of the frozen g_M: no iterative decoding, nothing kept for backward."""
    g_M = Prediction(certain(1, 0, of=2))
    x_hat = mixing.predict_masked(g_M, torch.ones(1, 2, 1), bools([T, T]), torch.tensor([0]), torch.full((1, 2, 1), 0.5))
    assert len(g_M.calls) == 1
    assert g_M.calls[0][2] is False and not x_hat.requires_grad


@on_sound_eq10
def test_eq11_leaves_its_inputs_unchanged():
    """Eq. (11): X_d, the mask, the classes and the draws are only read."""
    inputs = (torch.tensor([[[1.], [1.]]]), bools([T, F]), torch.tensor([3]), torch.tensor([[[0.5], [0.5]]]))
    before = [x.tolist() for x in inputs]
    mixing.predict_masked(Prediction(certain(0, 0, of=2)), *inputs)
    assert [x.tolist() for x in inputs] == before


# Eq. (12): TI-Mix

def truth_or_generated(m, rho, lam):
    """Eq. (12) on four tokens of one image: 1 where the truth is kept, 2 where the generated token is taken."""
    x_d, x_hat = torch.tensor([[[1.], [1.], [1.], [1.]]]), torch.tensor([[[2.], [2.], [2.], [2.]]])
    return mixing.ti_mix(x_d, x_hat, bools(m), torch.tensor([rho]), lam).flatten().tolist()


def test_eq12_keeps_truth_below_lambda_and_generates_at_or_above():
    """Eq. (12): inside m keep x_d where rho < lambda, take x_hat where rho >= lambda, also where they are equal."""
    assert truth_or_generated([T, T, T, T], [.25, .5, .75, .49], lam=0.5) == [1, 2, 2, 1]


def test_eq12_keeps_the_truth_outside_the_mask():
    """Eq. (12): where m^i = 0 the token is x_d^i, whatever rho, lambda and x_hat are."""
    for lam in (0.0, 0.5, 1.0):
        assert truth_or_generated([F, F, F, F], [.1, .9, .1, .9], lam) == [1, 1, 1, 1], f"lambda = {lam}"


def test_eq12_lambda_is_the_share_of_truth():
    """Eq. (12): lambda = 1 keeps all of the truth, lambda = 0 none of it, not even at rho = 0."""
    assert truth_or_generated([T, T, T, F], [0., .3, .6, .999], lam=1.0) == [1, 1, 1, 1]
    assert truth_or_generated([T, T, T, F], [0., .3, .6, .999], lam=0.0) == [2, 2, 2, 1]


def test_eq12_every_position_has_its_own_rho():
    """Eq. (12): rho^i is drawn per image and position and decides over the whole token, not over single bits."""
    x_d, x_hat = torch.tensor([[[1., -1.], [1., -1.]]] * 2), torch.tensor([[[-1., 1.], [-1., 1.]]] * 2)
    rho = torch.tensor([[.1, .9], [.9, .1]])
    found = mixing.ti_mix(x_d, x_hat, bools([T, T], [T, T]), rho, 0.5)
    assert found.tolist() == [[[1, -1], [-1, 1]], [[-1, 1], [1, -1]]]


def test_eq12_refuses_shapes_that_do_not_fit():
    """Eq. (12): x_d, x_hat (B, N, d_d), m and rho (B, N); any other shapes are a ValueError and never broadcast."""
    x, m, rho = torch.ones(2, 2, 4), torch.ones(2, 2, dtype=torch.bool), torch.rand(2, 2)
    for x_d, x_hat, mask, draws in [(x, x[:1], m, rho), (x, x[..., :1], m, rho), (x, x, m[:1], rho), (x, x, m.float(), rho),
                                    (x, x, m, rho[:1]), (x, x, m, rho[:, :1]), (x, x, m, rho[..., None])]:
        with pytest.raises(ValueError):
            mixing.ti_mix(x_d, x_hat, mask, draws, 0.5)


def test_eq12_refuses_a_lambda_outside_0_to_1():
    """Eq. (12): lambda is in [0, 1]."""
    for lam in (-0.1, 1.1):
        with pytest.raises(ValueError):
            truth_or_generated([T, T, T, T], [.5, .5, .5, .5], lam)


def test_eq12_leaves_its_inputs_unchanged():
    """Eq. (12): neither the true nor the generated tokens are written to."""
    inputs = torch.tensor([[[1.], [1.]]]), torch.tensor([[[2.], [2.]]]), bools([T, F]), torch.tensor([[.75, .25]])
    before = [x.tolist() for x in inputs]
    mixing.ti_mix(*inputs, 0.5)
    assert [x.tolist() for x in inputs] == before


def test_eq12_lambda_falls_from_1_to_0():
    """Section 3.4: training starts with the truth (lambda = 1), ends with generated tokens (0) and never turns back."""
    lam = [mixing.ti_lambda(step, 5) for step in range(5)]
    assert lam == [1, 0.75, 0.5, 0.25, 0]
    long = [mixing.ti_lambda(step, 1000) for step in range(1000)]
    assert long[0] == 1 and long[-1] == 0 and all(a > b for a, b in zip(long, long[1:]))
    assert mixing.ti_lambda(0, 1) == 1                                       # a run of one step
