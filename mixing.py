"""Discrete-continuous mixing: Eqs. (8) to (12), sections 3.3 and 3.4 of the paper, and what Eqs. (3), (4), (6), (7) do to tokens.

Pure functions on tensors. Every random number is an argument; nothing here draws one and nothing
here changes its inputs.

    Eq. (3)   masked_loss      the prior's loss
    Eq. (4)   prior_guidance, least_certain   how the guidance grows while the prior draws X_d, which codes it draws again
    Eq. (6)   hidden_after     how many X_c each AR step leaves hidden
    Eq. (7)   reparameterize, quantise   x_c and x_d from what the encoders put out; losses
    Eq. (8)   sample_mask      which tokens to predict
    Eq. (9)   dc_mix           x_d where the mask is 1, x_c elsewhere      (DC-Mix)
    Eq. (10)  mask_discrete    the discrete tokens with the mask token t_m
    Eq. (11)  predict_masked   g_M fills the masked discrete tokens
    Eq. (12)  ti_mix           part truth, part generated                 (TI-Mix)

Reads nothing, feeds tokenizers.py, backbone.py, train.py and sample.py. Read backbone.py next.
Try: python -m pytest tests/test_mixing.py -q

B batch, N tokens, d_c / d_d channels of x_c / x_d, S bit groups (`splits`) of e = d_d / S bits, m True = to predict.
"""
import math

import torch
from scipy.special import ndtr, ndtri

import tokenizers


def check_mask(m, *tensors):
    """ValueError unless m is (B, N) bool and every tensor is (B, N, d) with one common d."""
    if m.dtype != torch.bool or m.dim() != 2:
        raise ValueError(f"the mask must be (B, N) bool, got {tuple(m.shape)} {m.dtype}")
    for x in tensors:
        if x.shape[:-1] != m.shape or x.shape != tensors[0].shape:
            raise ValueError(f"tokens {[tuple(x.shape) for x in tensors]} do not fit the mask {tuple(m.shape)}")


def mask_ratio(u, low=0.7):
    """Quantile u of p(r), a normal of mean 1 and deviation 0.25 cut to [low, 1].   [MAR]

    u float in [0, 1] -> float in [low, 1]. The paper leaves p(r) open (section 3.1).
    """
    bottom = ndtr((low - 1) / 0.25)
    return float(1 + 0.25 * ndtri(bottom + u * (0.5 - bottom)))


def hide(order, count):
    """The first `count` entries of each row's order are hidden.   order (B, N) permutations -> (B, N) bool."""
    hidden = torch.arange(order.shape[1], device=order.device).expand_as(order) < count
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, hidden)


def sample_mask(order, ratio):
    """Eq. (8): m^i = 1 for the N' = ceil(r N) chosen positions, 0 otherwise.   [paper 3.3]

    order (B, N) one random permutation per image, ratio float in [0, 1] -> m (B, N) bool.
    The chosen positions are the first N' of the order [MAR]. ValueError on a ratio outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the mask ratio must lie in [0, 1], got {ratio}")
    return hide(order, math.ceil(ratio * order.shape[1]))


def pad(x_d, d_c):
    """Zero-pad the bits from d_d to d_c channels, zeros last (section 4.2, "padded discrete tokens").

    x_d (B, N, d_d) -> (B, N, d_c). ValueError if d_d > d_c: Eq. (9) needs room for every bit.
    """
    d_d = x_d.shape[-1]
    if d_d > d_c:
        raise ValueError(f"d_d = {d_d} bits do not fit into d_c = {d_c} channels; Eq. (9) needs d_d <= d_c")
    return torch.nn.functional.pad(x_d, (0, d_c - d_d))


def dc_mix(x_c, x_d, m):
    """Eq. (9): x~^i = x_d^i where m^i = 1, x_c^i where m^i = 0.   [paper 3.3]

    x_c, x_d (B, N, d_c), m (B, N) bool -> (B, N, d_c). ValueError on any other shapes; pad x_d first.
    """
    check_mask(m, x_c, x_d)
    return torch.where(m[..., None], x_d, x_c)


def mask_discrete(x_d, m):
    """Eq. (10): x_d'^i = t_m where m^i = 1, x_d^i where m^i = 0; t_m is all bits 0.   [paper 3.4] [MaskBit]

    x_d (B, N, d_d) bits in {-1, +1}, m (B, N) bool -> (B, N, d_d) in {-1, 0, +1}. ValueError on other shapes.
    """
    check_mask(m, x_d)
    return torch.where(m[..., None], 0.0, x_d)


def sample_codes(logits, u):
    """Draw one code per group by inverting the cumulative distribution at u.

    logits (..., 2^e), u (...) uniform in [0, 1) -> int64 (...) in 0..2^e - 1. Computed in float64.
    """
    cdf = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, u.double()[..., None], right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


def predict_masked(g_M, x_d, m, y, u):
    """Eqs. (10), (11): x_hat = g_M(x_d'), generated where m^i = 1, equal to x_d elsewhere.   [paper 3.4]

    g_M maps (x_d' (B, N, d_d), y (B,)) to logits (B, N, S, 2^e); its prediction is sampled in one
    forward pass without gradient [ours]. u (B, N, S) uniform in [0, 1). -> x_hat (B, N, d_d).
    """
    with torch.no_grad():
        logits = g_M(mask_discrete(x_d, m), y)                               # (B, N, S, 2^e)
    x_hat = tokenizers.codes_to_bits(sample_codes(logits, u), x_d.shape[-1] // logits.shape[2])
    return torch.where(m[..., None], x_hat, x_d)


def ti_mix(x_d, x_hat, m, rho, lam):
    """Eq. (12): where m^i = 1, x_d^i if rho^i < lambda and x_hat^i if rho^i >= lambda; elsewhere x_d^i.

    x_d, x_hat (B, N, d_d), m (B, N) bool, rho (B, N) in [0, 1), lam in [0, 1] -> (B, N, d_d).
    The paper prints x~_d on both sides of the first case; it is x_d (Fig. 5) [erratum].
    """
    check_mask(m, x_d, x_hat)
    if rho.shape != m.shape:
        raise ValueError(f"rho {tuple(rho.shape)} does not fit the mask {tuple(m.shape)}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lambda must lie in [0, 1], got {lam}")
    return torch.where((m & (rho >= lam))[..., None], x_hat, x_d)


def ti_lambda(step, steps):
    """lambda falls linearly from 1 at step 0 to 0 at the last step.   [ours]; the paper says only that it falls."""
    return 1 - step / max(steps - 1, 1)

