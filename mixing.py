"""Discrete-continuous mixing: Eqs. (8) to (12), sections 3.3 and 3.4 of the paper.

    Eq. (8)   sample_mask      which positions are masked
    Eq. (9)   dc_mix           x_d at masked positions, x_c elsewhere              DC-Mix
    Eq. (10)  mask_discrete    the discrete tokens with the mask token t_m
    Eq. (11)  predict_masked   g_M predicts the masked discrete tokens
    Eq. (12)  ti_mix           part ground truth, part predicted                   TI-Mix

All functions are pure. Their random numbers are arguments, and no argument is changed.

Reads tokenizers.py (bits and codes). Feeds backbone.py, train.py and sample.py.
Read diffusion_head.py next.
Try: python -m pytest -q -k "eq08 or eq09 or eq10 or eq11 or eq12"

B batch, N tokens, d_c and d_d channels of x_c and x_d. m is the mask: True means "to predict".
A token's d_d bits form S groups of e bits, each predicted by itself: a softmax over the 2^14
values of a whole token would be large. The value of a group is its code.   [MaskBit]
"""
import math

import torch
from scipy.special import ndtr, ndtri

import tokenizers


def check_mask(m, *tokens):
    """Check that the mask fits the tokens.

    m: (B, N) bool
    tokens: tensors (B, N, d), all of one shape
    ValueError otherwise.
    """
    fit = [x.shape[:-1] == m.shape and x.shape == tokens[0].shape for x in tokens]
    if m.dtype != torch.bool or m.dim() != 2 or not all(fit):
        shapes = [tuple(x.shape) for x in tokens]
        raise ValueError(f"tokens {shapes} and the mask {tuple(m.shape)} {m.dtype} do not fit: "
                         "expected (B, N, d), all of one shape, and (B, N) bool")


def mask_ratio(u, low=0.7):
    """The mask ratio r of Eq. (8): the inverse of p(r)'s cumulative distribution at u.   [MAR]

    p(r) is a normal distribution of mean 1 and deviation 0.25, truncated to [low, 1]. The paper
    leaves it open (section 3.1). One r serves a whole batch: all images hide equally many tokens.

    u: float in [0, 1]
    Returns a float in [low, 1].
    """
    # ndtr is the cumulative distribution of the standard normal, ndtri its inverse
    at_low = ndtr((low - 1) / 0.25)
    at_one = 0.5
    return float(1 + 0.25 * ndtri(at_low + u * (at_one - at_low)))


def hide(order, count):
    """The mask that hides the first `count` positions of each row's order.

    order: (B, N) int, a permutation in each row
    Returns (B, N) bool.
    """
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :count], True)


def sample_mask(order, ratio):
    """Eq. (8): m^i = 1 at N' = ceil(r N) randomly selected positions, 0 elsewhere.   [paper 3.3]

    The selected positions are the first N' of a random order.   [MAR]

    order: (B, N) int, a random permutation for each image
    ratio: r, float in [0, 1]
    Returns m (B, N) bool. ValueError if r lies outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the mask ratio must lie in [0, 1], got {ratio}")
    return hide(order, math.ceil(ratio * order.shape[1]))


def pad(x_d, d_c):
    """x_d with zeros appended, up to d_c channels: section 4.2's "padded discrete tokens".

    The paper pads their embeddings from the codebook. MaskBit's codebook holds the bits themselves.

    x_d: (B, N, d_d)
    Returns (B, N, d_c). ValueError if d_d > d_c, since Eq. (9) needs room for every bit.
    """
    d_d = x_d.shape[-1]
    if d_d > d_c:
        raise ValueError(f"Eq. (9) needs d_d <= d_c: {d_d} bits do not fit into {d_c} channels")
    return torch.nn.functional.pad(x_d, (0, d_c - d_d))


def dc_mix(x_c, x_d, m):
    """Eq. (9): x~^i = x_d^i where m^i = 1, x_c^i where m^i = 0.   [paper 3.3]

    x_c, x_d: (B, N, d_c), x_c normalised, x_d padded by `pad`
    m: (B, N) bool
    Returns x~ (B, N, d_c). ValueError on any other shapes.
    """
    check_mask(m, x_c, x_d)
    return torch.where(m[..., None], x_d, x_c)


def mask_discrete(x_d, m):
    """Eq. (10): x'_d^i = t_m where m^i = 1, x_d^i where m^i = 0.   [paper 3.4]

    The mask token t_m has all bits 0 [MaskBit]; the paper calls it learned. The paper prints
    x_d^{i*} for x'_d^i.   [erratum]

    x_d: (B, N, d_d) bits in {-1, +1}
    m: (B, N) bool
    Returns x'_d (B, N, d_d) in {-1, 0, +1}. ValueError on any other shapes.
    """
    check_mask(m, x_d)
    return torch.where(m[..., None], 0.0, x_d)


def sample_codes(logits, u):
    """A code of each group, sampled from its logits by inverting the cumulative distribution.

    logits: (..., 2^e)
    u: (...) uniform in [0, 1)
    Returns int64 (...) in 0 .. 2^e - 1. It is computed in float64.
    """
    cdf = logits.double().softmax(-1).cumsum(-1)
    codes = torch.searchsorted(cdf, u.double()[..., None], right=True)[..., 0]
    return codes.clamp(max=logits.shape[-1] - 1)


def predict_masked(g_M, x_d, m, y, u):
    """Eqs. (10) and (11): x_hat = g_M(x'_d) where m^i = 1, x_d^i where m^i = 0.   [paper 3.4]

    The prediction is sampled, in one forward pass and without gradient. g_M sees the class, too
    [ours]. Whole tokens are masked here; in its training, by Eq. (3), groups of bits were.

    g_M: maps x'_d (B, N, d_d) and y to logits (B, N, S, 2^e)
    x_d: (B, N, d_d) bits in {-1, +1}
    m: (B, N) bool
    y: (B,) int, the classes
    u: (B, N, S) uniform in [0, 1)
    Returns x_hat (B, N, d_d).
    """
    with torch.no_grad():
        logits = g_M(mask_discrete(x_d, m), y)                       # (B, N, S, 2^e)
    e = x_d.shape[-1] // logits.shape[2]
    x_hat = tokenizers.codes_to_bits(sample_codes(logits, u), e)     # (B, N, d_d)
    return torch.where(m[..., None], x_hat, x_d)


def ti_mix(x_d, x_hat, m, rho, lam):
    """Eq. (12): where m^i = 1, x_d^i if rho^i < lambda, else x_hat^i; where m^i = 0, x_d^i.

    The paper prints x~_d on both sides of the first case. It is x_d (Fig. 5).   [erratum]

    x_d, x_hat: (B, N, d_d) bits
    m: (B, N) bool
    rho: (B, N) uniform in [0, 1)
    lam: lambda, float in [0, 1], the share of ground truth
    Returns x~_d (B, N, d_d). ValueError on any other shapes or lambda.
    """
    check_mask(m, x_d, x_hat)
    check_mask(m, rho[..., None])                                    # rho must be (B, N), too
    if not 0 <= lam <= 1:
        raise ValueError(f"lambda must lie in [0, 1], got {lam}")
    generated = m & (rho >= lam)
    return torch.where(generated[..., None], x_hat, x_d)


def ti_lambda(step, steps):
    """lambda of Eq. (12), falling linearly from 1 at the first step to 0 at the last.   [ours]

    The paper only says that it falls (section 3.4). A run of one step takes 1.

    step: int in 0 .. steps - 1, of this run: steps before --init do not count
    """
    return 1 - step / max(steps - 1, 1)
