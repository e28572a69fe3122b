"""Tests of Eq. (4) and of Eqs. (8) to (12), sections 3.1 to 3.4 of the paper.

Every test is named after its equation and works on literals. If it fails, its docstring says what
the equation asks for. Tokens are written as nested lists of shape (B, N, d). Most tests have one
image (B = 1), so that a row can be read off.
"""
import math

import pytest
import torch

import golden
import mixing
import sample
import tokenizers

T = True
F = False


def bools(*rows):
    """A mask m (B, N) from one list of booleans per image."""
    return torch.tensor(rows)


# Eq. (4): which codes the prior hides again

def hidden_again(score, known, r):
    """The places of the codes that are hidden again, in one image of 4 tokens with 2 codes each.

    score  8 numbers: how certain each code is
    known  8 numbers: 1 for a code that was kept in an earlier step
    r      float: the share of the steps that are done
    """
    score = torch.tensor(score).view(1, 4, 2)
    known = torch.tensor(known, dtype=torch.bool).view(1, 4, 2)
    hidden = sample.least_certain(score, known, r)
    return hidden.flatten().nonzero().flatten().tolist()


def test_eq04_hides_the_least_certain_codes_again():
    """Eq. (4): after a share r of the steps, acos(r) / (pi / 2) of all codes are hidden again.

    Their number is rounded down. They are the least certain codes among those that were not kept
    in an earlier step.
    """
    score = [.8, .1, .7, .2, .6, .3, .5, .4]
    nothing_known = [0] * 8

    hidden = hidden_again(score, nothing_known, 0.5)
    assert hidden == [1, 3, 5, 6, 7], "2/3 of 8 codes are 5: the five of the lowest score"

    hidden = hidden_again(score, nothing_known, 0.9)
    assert hidden == [1, 3], "0.287 of 8 codes are 2"

    hidden = hidden_again(score, [0, 1, 0, 1, 0, 0, 0, 0], 0.5)
    assert hidden == [2, 4, 5, 6, 7], "a code that was kept before stays, however uncertain"

    hidden = hidden_again(score, [0, 1, 0, 1, 0, 1, 1, 1], 0.5)
    assert hidden == [2, 4], "every step keeps at least one more code"

    hidden = hidden_again(score, nothing_known, 0.9999)
    assert hidden == [1], "at least one code is left for the next step"


def test_eq04_every_image_keeps_its_own_codes():
    """Eq. (4): each image decides by itself which of its codes are certain."""
    score = torch.tensor([
        [[.1], [.2], [.3], [.4]],
        [[40.], [30.], [20.], [10.]],
    ])
    known = torch.zeros(2, 4, 1, dtype=torch.bool)
    hidden = sample.least_certain(score, known, 0.5)
    assert hidden[..., 0].tolist() == [[T, T, F, F], [F, F, T, T]]


class Unsure:
    """A prior of four tokens of one bit that finds code 1 this likely. It notes what it sees."""

    N = 4
    splits = 1
    bits = 1

    def __init__(self, *likely):
        p = torch.tensor(likely)
        self.logits = torch.stack([1 - p, p], dim=-1).log().view(1, 4, 1, 2)
        self.seen = []

    def __call__(self, x, y):
        self.seen.append(x.flatten().tolist())
        return self.logits


def test_eq04_certain_is_what_the_prior_finds_likely():
    """Eq. (4): how certain a code is, is the log probability of the code that was CHOSEN.

    It is not that of the likeliest code. Code 1 is chosen here everywhere. After one of two steps
    2/3 of 4 codes, rounded down, are hidden again.
    """
    def choose(logits):
        return torch.ones(1, 4, 1, dtype=torch.long)

    def no_gumbel():
        return torch.zeros(1, 4, 1)

    prior = Unsure(0.9, 0.2, 0.6, 0.4)
    bits = sample.sample_prior(prior, torch.tensor([0]), choose, no_gumbel, 2, 0.0, 1.0, 1.0)
    assert prior.seen == [[0, 0, 0, 0], [1, 0, 1, 0]]
    assert bits.flatten().tolist() == [1, 1, 1, 1]


# Eq. (8): the mask

def test_eq08_hides_the_ceiling_of_r_times_N():
    """Eq. (8): N' = ceil(r N), rounded up.

    r = 0.3 of 5 tokens hides 2. The smallest r > 0 hides 1.
    """
    order = torch.arange(5)[None]
    for ratio, count in [(0.3, 2), (0.4, 2), (0.41, 3), (0.01, 1), (0.99, 5)]:
        m = mixing.sample_mask(order, ratio)
        assert int(m.sum()) == count, f"r = {ratio}"


def test_eq08_hides_the_first_entries_of_the_order():
    """Eq. (8): m^i = 1 exactly at k_1 ... k_N', the positions that stand FIRST in the order."""
    # k_1 = 2, k_2 = 4
    order = torch.tensor([[2, 4, 1, 0, 3]])
    assert mixing.sample_mask(order, 0.4).tolist() == [[F, F, T, F, T]]


def test_eq08_every_image_has_its_own_order():
    """Eq. (8): row b of the mask follows row b of the order. All rows hide equally many tokens."""
    order = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]])
    assert mixing.sample_mask(order, 0.5).tolist() == [[T, T, F, F], [F, T, F, T]]


def test_eq08_ratio_0_hides_nothing_and_ratio_1_everything():
    """Eq. (8): r = 0 gives an all-zero mask, r = 1 an all-one mask."""
    order = torch.tensor([[2, 0, 1]])
    assert mixing.sample_mask(order, 0.0).tolist() == [[F, F, F]]
    assert mixing.sample_mask(order, 1.0).tolist() == [[T, T, T]]


def test_eq08_refuses_a_ratio_outside_0_to_1():
    """Eq. (8): r is a share of the tokens.

    An r outside [0, 1] is a ValueError. It is not clipped.
    """
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError):
            mixing.sample_mask(torch.tensor([[0, 1]]), ratio)


def test_eq08_gives_a_bool_mask_and_leaves_the_order_unchanged():
    """Eq. (8): the mask is (B, N) bool. The function does not write into the order it is given."""
    order = torch.tensor([[2, 0, 1]])
    m = mixing.sample_mask(order, 0.5)
    assert m.dtype == torch.bool
    assert m.shape == (1, 3)
    assert order.tolist() == [[2, 0, 1]]


def test_eq08_the_ratio_follows_mars_truncated_normal():
    """The r of Eq. (8) follows MAR's distribution: the normal (1, 0.25), cut to [0.7, 1].

    mask_ratio(u) is the quantile u of that distribution.
    """
    g = golden.load("mar_tiny")
    for u, r in zip(g["mask_rate_cdf_p"].tolist(), g["mask_rate_quantiles"].tolist()):
        assert mixing.mask_ratio(u) == pytest.approx(r, abs=1e-9), f"u = {u}"
    mean = sum(mixing.mask_ratio((i + 0.5) / 1000) for i in range(1000)) / 1000
    assert mean == pytest.approx(float(g["mask_rate_mean"]), abs=1e-5)


def test_eq08_the_ratio_stays_between_its_bounds():
    """The r of Eq. (8): u = 0 gives the lower bound and u = 1 gives 1, for any lower bound."""
    for low in (0.0, 0.5, 0.7, 1.0):
        assert mixing.mask_ratio(0.0, low) == pytest.approx(low, abs=1e-9)
        assert mixing.mask_ratio(1.0, low) == pytest.approx(1.0, abs=1e-9)


# Eq. (9): DC-Mix

def test_eq09_takes_x_d_where_m_is_1_and_x_c_elsewhere():
    """Eq. (9): x~^i = x_d^i where m^i = 1 (hidden), and x_c^i where m^i = 0 (visible)."""
    x_c = torch.tensor([[[1., 2.], [3., 4.], [5., 6.]]])
    x_d = torch.tensor([[[-1., 0.], [-3., 0.], [-5., 0.]]])
    mixed = mixing.dc_mix(x_c, x_d, bools([T, F, T]))
    assert mixed.tolist() == [[[-1, 0], [3, 4], [-5, 0]]]


def test_eq09_with_nothing_or_everything_hidden():
    """Eq. (9): an empty mask gives X_c back, a full mask gives X_d."""
    x_c = torch.tensor([[[1.], [2.]]])
    x_d = torch.tensor([[[-1.], [-2.]]])
    assert mixing.dc_mix(x_c, x_d, bools([F, F])).tolist() == [[[1], [2]]]
    assert mixing.dc_mix(x_c, x_d, bools([T, T])).tolist() == [[[-1], [-2]]]


def test_eq09_every_image_uses_its_own_mask():
    """Eq. (9): row b of the mask decides over image b only."""
    x_c = torch.tensor([[[1.], [2.]], [[3.], [4.]]])
    x_d = torch.tensor([[[-1.], [-2.]], [[-3.], [-4.]]])
    mixed = mixing.dc_mix(x_c, x_d, bools([T, F], [F, T]))
    assert mixed.tolist() == [[[-1], [2]], [[3], [-4]]]


def test_eq09_pads_the_bits_with_zeros_last():
    """Section 4.2, "padded discrete tokens": the d_d bits come first, unchanged.

    Zeros follow them up to d_c channels.
    """
    x_d = torch.tensor([[[1., -1.], [-1., 1.]]])
    assert mixing.pad(x_d, 4).tolist() == [[[1, -1, 0, 0], [-1, 1, 0, 0]]]
    assert mixing.pad(x_d, 2).tolist() == x_d.tolist()


def test_eq09_refuses_more_bits_than_channels():
    """Eq. (9): d_d > d_c is a ValueError that names both numbers. No bit is cut off silently."""
    with pytest.raises(ValueError, match=r"(?s)3.*2"):
        mixing.pad(torch.ones(1, 2, 3), 2)


def test_eq09_refuses_shapes_that_do_not_fit():
    """Eq. (9): x_c and x_d are (B, N, d_c), m is (B, N) bool.

    Any other shapes are a ValueError. They are never broadcast.
    """
    x = torch.zeros(2, 3, 4)
    m = torch.zeros(2, 3, dtype=torch.bool)
    unfit = [
        (x, torch.zeros(2, 3, 1), m),
        (x, torch.zeros(1, 3, 4), m),
        (x, torch.zeros(2, 1, 4), m),
        (x, x, m[:1]),
        (x, x, m[:, :1]),
        (x, x, m[..., None]),
        (x, x, m.float()),
    ]
    for x_c, x_d, mask in unfit:
        with pytest.raises(ValueError):
            mixing.dc_mix(x_c, x_d, mask)


def test_eq09_leaves_its_inputs_unchanged():
    """Eq. (9): after mixing, x_c is still the target of Eq. (5).

    So neither x_c nor x_d may be written to.
    """
    x_c = torch.tensor([[[1.], [2.]]])
    x_d = torch.tensor([[[-1.], [-2.]]])
    m = bools([T, F])
    mixing.dc_mix(x_c, mixing.pad(x_d, 1), m)
    assert x_c.tolist() == [[[1], [2]]]
    assert x_d.tolist() == [[[-1], [-2]]]
    assert m.tolist() == [[T, F]]


# Eq. (10): the input of g_M

def test_eq10_puts_the_mask_token_where_m_is_1():
    """Eq. (10): x_d'^i = t_m where m^i = 1. Where m^i = 0, the true bits stay."""
    x_d = torch.tensor([[[1., -1.], [-1., 1.], [1., 1.]]])
    masked = mixing.mask_discrete(x_d, bools([T, F, T]))
    assert masked.tolist() == [[[0, 0], [-1, 1], [0, 0]]]
    assert masked.dtype == torch.float32, "g_M projects its input, which must stay float"


def test_eq10_the_mask_token_is_all_zeros():
    """Eq. (10): MaskBit's mask token t_m sets EVERY bit to 0.

    0 is neither -1 nor +1, so it is no bit's value.
    """
    x_d = torch.tensor([[[1., -1., 1., -1.]]])
    assert mixing.mask_discrete(x_d, bools([T])).tolist() == [[[0, 0, 0, 0]]]


def test_eq10_with_nothing_or_everything_hidden():
    """Eq. (10): an empty mask gives X_d back, a full mask gives mask tokens only."""
    x_d = torch.tensor([[[1.], [-1.]]])
    assert mixing.mask_discrete(x_d, bools([F, F])).tolist() == [[[1], [-1]]]
    assert mixing.mask_discrete(x_d, bools([T, T])).tolist() == [[[0], [0]]]


def test_eq10_every_image_uses_its_own_mask():
    """Eq. (10): row b of the mask decides over image b only."""
    x_d = torch.tensor([[[1.], [-1.]], [[1.], [-1.]]])
    masked = mixing.mask_discrete(x_d, bools([T, F], [F, T]))
    assert masked.tolist() == [[[0], [-1]], [[1], [0]]]


def test_eq10_refuses_shapes_that_do_not_fit():
    """Eq. (10): x_d is (B, N, d_d), m is (B, N) bool. Any other shapes are a ValueError."""
    x_d = torch.ones(2, 3, 4)
    unfit = [
        torch.ones(1, 3, dtype=torch.bool),
        torch.ones(2, 3, 1, dtype=torch.bool),
        torch.ones(2, 3),
    ]
    for m in unfit:
        with pytest.raises(ValueError):
            mixing.mask_discrete(x_d, m)


def test_eq10_leaves_its_inputs_unchanged():
    """Eq. (10): Eq. (12) needs the true X_d again, so X_d may not be written to."""
    x_d = torch.tensor([[[1.], [-1.]]])
    m = bools([T, F])
    mixing.mask_discrete(x_d, m)
    assert x_d.tolist() == [[[1], [-1]]]
    assert m.tolist() == [[T, F]]


# Eq. (11): the prediction of g_M

class Prediction:
    """A g_M that always answers the same probabilities (B, N, S, 2^e) and notes its calls.

    calls  one (x_d', y, whether gradients were on) per call
    """

    def __init__(self, probabilities):
        self.weight = torch.ones((), requires_grad=True)
        self.logits = torch.tensor(probabilities).log() * self.weight
        self.calls = []

    def __call__(self, x, y):
        self.calls.append((x.tolist(), y.tolist(), torch.is_grad_enabled()))
        return self.logits


def one_hot(code, size):
    """The probabilities of a prediction that is sure of this code."""
    return [float(c == code) for c in range(size)]


def certain(*codes, of):
    """(1, N, 1, of) probabilities of a g_M that is sure of these codes: one group per token."""
    return [[[one_hot(code, of)] for code in codes]]


def test_eq11_generates_where_m_is_1_and_keeps_the_truth_elsewhere():
    """Eq. (11): x_hat^i comes from g_M where m^i = 1.

    Where m^i = 0, it is the true x_d^i, even if g_M says otherwise there.
    """
    x_d = torch.tensor([[[-1.], [-1.], [1.], [1.]]])
    m = bools([T, F, T, F])
    g_M = Prediction(certain(1, 1, 0, 0, of=2))
    u = torch.full((1, 4, 1), 0.5)
    x_hat = mixing.predict_masked(g_M, x_d, m, torch.tensor([0]), u)
    assert x_hat.tolist() == [[[1], [-1], [-1], [1]]]


def test_eq11_g_M_sees_the_masked_sequence_and_the_class():
    """Eq. (11): g_M is given the class and X_d' of Eq. (10), with mask tokens where it predicts.

    It is not given X_d: it would copy.
    """
    x_d = torch.tensor([[[-1.], [1.]], [[1.], [1.]]])
    m = bools([T, F], [F, T])
    g_M = Prediction(certain(1, 1, of=2) * 2)
    u = torch.full((2, 2, 1), 0.5)
    mixing.predict_masked(g_M, x_d, m, torch.tensor([7, 5]), u)
    seen, classes, _ = g_M.calls[0]
    assert seen == [[[0], [1]], [[1], [0]]]
    assert classes == [7, 5]


def test_eq11_samples_instead_of_taking_the_likeliest():
    """Eq. (11): the code is SAMPLED from g_M's probabilities, as at inference.

    The argmax would be too sure of itself.
    """
    # ten tokens, each +1 with probability 0.3
    g_M = Prediction([[[[0.7, 0.3]]] * 10])
    u = (torch.arange(10) + 0.5).view(1, 10, 1) / 10
    x_d = torch.ones(1, 10, 1)
    x_hat = mixing.predict_masked(g_M, x_d, bools([T] * 10), torch.tensor([0]), u)
    assert x_hat.flatten().tolist() == [-1] * 7 + [1] * 3


def test_eq11_inverts_the_cumulative_distribution():
    """Eq. (11): every code owns a share of [0, 1), as large as its probability.

    u picks the code in whose share it falls. Shares of 0.1, 0.2, 0.3, 0.4 end at 0.1, 0.3, 0.6, 1.
    """
    # + 5, because logits are known up to a constant
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log() + 5
    expected = [
        (0.0, 0), (0.09, 0),
        (0.11, 1), (0.29, 1),
        (0.31, 2), (0.59, 2),
        (0.61, 3), (0.999, 3),
    ]
    for u, code in expected:
        assert int(mixing.sample_codes(logits, torch.tensor(u))) == code, f"u = {u}"


def test_eq11_never_draws_a_code_of_probability_zero():
    """Eq. (11): neither u = 0 nor the largest u below 1 may pick a code that g_M excludes."""
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
    assert int(mixing.sample_codes(logits, torch.tensor(0.0))) == 1
    assert int(mixing.sample_codes(logits, torch.tensor(1 - 2 ** -24))) == 2


def test_eq11_every_token_and_group_uses_its_own_draw():
    """Eq. (11): the code of image b, token i, group s depends on u[b, i, s] alone."""
    g_M = Prediction([[[[0.5, 0.5]] * 2] * 2] * 2)
    x_d = torch.ones(2, 2, 2)
    m = bools([T, T], [T, T])
    u = torch.tensor([[[.1, .9], [.9, .1]], [[.9, .9], [.1, .1]]])
    x_hat = mixing.predict_masked(g_M, x_d, m, torch.tensor([0, 0]), u)
    assert x_hat.tolist() == [[[-1, 1], [1, -1]], [[1, 1], [-1, -1]]]


def test_eq11_writes_codes_as_bits_least_significant_first():
    """Eq. (11): code 1 is the bits +1 -1 -1, code 4 is -1 -1 +1.

    The bits of the groups follow each other in order.
    """
    # one token: group 0 says 1, group 1 says 4
    g_M = Prediction([[[one_hot(1, 8), one_hot(4, 8)]]])
    x_d = torch.zeros(1, 1, 6)
    u = torch.full((1, 1, 2), 0.5)
    x_hat = mixing.predict_masked(g_M, x_d, bools([T]), torch.tensor([0]), u)
    assert x_hat.tolist() == [[[1, -1, -1, -1, -1, 1]]]


def test_eq11_the_mask_code_becomes_zeros():
    """MaskBit's mask code is 2^e, one past the last code. It stands for e zeros.

    The codes beside it keep their bits.
    """
    codes = torch.tensor([[[4, 2]], [[3, 4]]])
    assert tokenizers.codes_to_bits(codes, 2).tolist() == [[[0, 0, -1, 1]], [[1, 1, 0, 0]]]


def test_eq11_asks_g_M_once_and_without_gradient():
    """Eq. (11): the frozen g_M makes one forward pass.

    There is no iterative decoding, and nothing is kept for a backward pass.
    """
    g_M = Prediction(certain(1, 0, of=2))
    x_d = torch.ones(1, 2, 1)
    u = torch.full((1, 2, 1), 0.5)
    x_hat = mixing.predict_masked(g_M, x_d, bools([T, T]), torch.tensor([0]), u)
    assert len(g_M.calls) == 1
    _, _, gradients_on = g_M.calls[0]
    assert gradients_on is False
    assert not x_hat.requires_grad


def test_eq11_leaves_its_inputs_unchanged():
    """Eq. (11): X_d, the mask, the classes and the random numbers are only read."""
    x_d = torch.tensor([[[1.], [1.]]])
    m = bools([T, F])
    y = torch.tensor([3])
    u = torch.tensor([[[0.5], [0.5]]])
    mixing.predict_masked(Prediction(certain(0, 0, of=2)), x_d, m, y, u)
    assert x_d.tolist() == [[[1.], [1.]]]
    assert m.tolist() == [[T, F]]
    assert y.tolist() == [3]
    assert u.tolist() == [[[0.5], [0.5]]]


# Eq. (12): TI-Mix

def truth_or_generated(m, rho, lam):
    """Eq. (12) on four tokens of one image: 1 where the truth is kept, 2 where it is generated."""
    x_d = torch.tensor([[[1.], [1.], [1.], [1.]]])
    x_hat = torch.tensor([[[2.], [2.], [2.], [2.]]])
    mixed = mixing.ti_mix(x_d, x_hat, bools(m), torch.tensor([rho]), lam)
    return mixed.flatten().tolist()


def test_eq12_keeps_truth_below_lambda_and_generates_at_or_above():
    """Eq. (12): inside m, keep x_d where rho < lambda and take x_hat where rho >= lambda.

    Where rho equals lambda, take x_hat.
    """
    assert truth_or_generated([T, T, T, T], [.25, .5, .75, .49], lam=0.5) == [1, 2, 2, 1]


def test_eq12_keeps_the_truth_outside_the_mask():
    """Eq. (12): where m^i = 0 the token is x_d^i, whatever rho, lambda and x_hat are."""
    for lam in (0.0, 0.5, 1.0):
        found = truth_or_generated([F, F, F, F], [.1, .9, .1, .9], lam)
        assert found == [1, 1, 1, 1], f"lambda = {lam}"


def test_eq12_lambda_is_the_share_of_truth():
    """Eq. (12): lambda = 1 keeps all of the truth. lambda = 0 keeps none, not even at rho = 0."""
    m = [T, T, T, F]
    rho = [0., .3, .6, .999]
    assert truth_or_generated(m, rho, lam=1.0) == [1, 1, 1, 1]
    assert truth_or_generated(m, rho, lam=0.0) == [2, 2, 2, 1]


def test_eq12_every_position_has_its_own_rho():
    """Eq. (12): every position of every image has its own rho^i.

    rho^i decides over the whole token, not over single bits.
    """
    x_d = torch.tensor([[[1., -1.], [1., -1.]]] * 2)
    x_hat = torch.tensor([[[-1., 1.], [-1., 1.]]] * 2)
    rho = torch.tensor([[.1, .9], [.9, .1]])
    found = mixing.ti_mix(x_d, x_hat, bools([T, T], [T, T]), rho, 0.5)
    assert found.tolist() == [[[1, -1], [-1, 1]], [[-1, 1], [1, -1]]]


def test_eq12_refuses_shapes_that_do_not_fit():
    """Eq. (12): x_d and x_hat are (B, N, d_d), m and rho are (B, N).

    Any other shapes are a ValueError. They are never broadcast.
    """
    x = torch.ones(2, 2, 4)
    m = torch.ones(2, 2, dtype=torch.bool)
    rho = torch.rand(2, 2)
    unfit = [
        (x, x[:1], m, rho),
        (x, x[..., :1], m, rho),
        (x, x, m[:1], rho),
        (x, x, m.float(), rho),
        (x, x, m, rho[:1]),
        (x, x, m, rho[:, :1]),
        (x, x, m, rho[..., None]),
    ]
    for x_d, x_hat, mask, numbers in unfit:
        with pytest.raises(ValueError):
            mixing.ti_mix(x_d, x_hat, mask, numbers, 0.5)


def test_eq12_refuses_a_lambda_outside_0_to_1():
    """Eq. (12): lambda lies in [0, 1]. Any other lambda is a ValueError."""
    for lam in (-0.1, 1.1):
        with pytest.raises(ValueError):
            truth_or_generated([T, T, T, T], [.5, .5, .5, .5], lam)


def test_eq12_leaves_its_inputs_unchanged():
    """Eq. (12): neither the true nor the generated tokens are written to."""
    x_d = torch.tensor([[[1.], [1.]]])
    x_hat = torch.tensor([[[2.], [2.]]])
    m = bools([T, F])
    rho = torch.tensor([[.75, .25]])
    mixing.ti_mix(x_d, x_hat, m, rho, 0.5)
    assert x_d.tolist() == [[[1.], [1.]]]
    assert x_hat.tolist() == [[[2.], [2.]]]
    assert m.tolist() == [[T, F]]
    assert rho.tolist() == [[.75, .25]]


def test_eq12_lambda_falls_from_1_to_0():
    """Section 3.4: training starts with the truth (lambda = 1) and ends with generated tokens (0).

    In between, lambda falls at every step.
    """
    lam = [mixing.ti_lambda(step, 5) for step in range(5)]
    assert lam == [1, 0.75, 0.5, 0.25, 0]

    long = [mixing.ti_lambda(step, 1000) for step in range(1000)]
    assert long[0] == 1
    assert long[-1] == 0
    assert all(before > after for before, after in zip(long, long[1:]))

    # a run of one step
    assert mixing.ti_lambda(0, 1) == 1
