"""The diffusion head: Eq. (5), section 3.1 of the paper, as MAR defines it.

A small MLP sees a token x_c^i with noise added, the timestep t and the backbone's z^i. It predicts
the noise, which `denoising_loss` trains by Eq. (5), and the variance of a step backwards, which
`variational_term` trains.
`DiffusionHead.sample` runs the process backwards, from noise to a token.

The process is MAR's: cosine schedule, 1000 timesteps, evenly respaced for sampling.

Reads nothing. Feeds backbone.py, whose MAR holds a head. train.py calls its loss, sample.py its
sampler. Read backbone.py next.
Try: python -m pytest -q -k eq05

M rows (tokens to predict), C = d_c channels, D width of z, W width of the head, T = 1000 timesteps.
A process over n timesteps numbers them k = 0 .. n - 1. With all 1000, k is t. As in the paper, i is
the position of a token.
"""
import functools
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import layer_norm, silu
from torch.utils.checkpoint import checkpoint

T = 1000                                                             # [MAR]


# The diffusion process

def cosine_betas():
    """The betas of the cosine schedule, (1000,) float64, at most 0.999.   [MAR]"""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def respace(n):
    """n of the 1000 timesteps, evenly spaced, and the betas of a process over these alone.   [MAR]

    Position j is a sum of j strides, not j times the stride, to be rounded as MAR's sums are.

    n: int in 2 .. 1000
    Returns timesteps (n,) int64, ascending, and betas (n,) float64. ValueError on any other n.
    """
    if not 2 <= n <= T:
        raise ValueError(f"diffusion steps must lie in 2..{T}, got {n}")
    stride = (T - 1) / (n - 1)
    position = 0.0
    kept = []
    for _ in range(n):
        kept.append(round(position))
        position += stride
    abar = np.cumprod(1 - cosine_betas())[kept]
    return np.array(kept), 1 - abar / np.append(1.0, abar[:-1])


@functools.cache
def coefficients(n, device="cpu"):
    """The coefficients of the n-step process, (n,) float32, computed in float64.   [MAR]

    t: the timesteps on the original scale 0 .. 999, int64
    sqrt_abar, sqrt_1m_abar: x_t = sqrt_abar x_0 + sqrt_1m_abar eps
    sqrt_recip, sqrt_recip_m1: solved for x_0, x_0 = sqrt_recip x_t - sqrt_recip_m1 eps
    mean_x0, mean_xt: the posterior q(x_{t-1} | x_t, x_0) has the mean mean_x0 x_0 + mean_xt x_t
    log_var: its log variance, the lower bound of the learned one
    log_beta: the upper bound of the learned log variance
    """
    timesteps, betas = respace(n)
    abar = np.cumprod(1 - betas)
    abar_prev = np.append(1.0, abar[:-1])
    variance = betas * (1 - abar_prev) / (1 - abar)
    # at index 0 the variance is 0; its logarithm is taken from index 1
    variance[0] = variance[1]

    def tensor(values):
        return torch.tensor(values).float().to(device)

    return SimpleNamespace(
        t=torch.tensor(timesteps).to(device),
        sqrt_abar=tensor(np.sqrt(abar)),
        sqrt_1m_abar=tensor(np.sqrt(1 - abar)),
        sqrt_recip=tensor(np.sqrt(1 / abar)),
        sqrt_recip_m1=tensor(np.sqrt(1 / abar - 1)),
        mean_x0=tensor(betas * np.sqrt(abar_prev) / (1 - abar)),
        mean_xt=tensor((1 - abar_prev) * np.sqrt(1 - betas) / (1 - abar)),
        log_beta=tensor(np.log(betas)),
        log_var=tensor(np.log(variance)),
    )


def at(coefficient, k):
    """The values of a coefficient at the indices k (...), shaped (..., 1) for tokens (..., C)."""
    return coefficient[k][..., None]


def add_noise(x, noise, k, c):
    """x^t = sqrt(abar_t) x + sqrt(1 - abar_t) noise, the noised token of Eq. (5).

    x, noise: (..., C)
    k: (...) int, indices of the timesteps t
    c: the coefficients of the process
    Returns (..., C).
    """
    return at(c.sqrt_abar, k) * x + at(c.sqrt_1m_abar, k) * noise


def denoising_loss(noise, eps):
    """Eq. (5): || eps - eps_theta(x_c^{i,t} | t, z^i) ||^2, as a mean over the channels.   [MAR]

    noise: (..., C), the eps that was added
    eps: (..., C), the head's prediction eps_theta of it
    Returns (...).
    """
    return (noise - eps).square().mean(-1)


def model_distribution(x_t, eps, v, k, c, bound=None):
    """The distribution p(x_{t-1} | x_t) that the head predicts.   [MAR]

    x_t, eps, v: (..., C); v = -1 stands for the smallest log variance, v = 1 for the largest
    k: int or (...) int, index of the timestep
    c: the coefficients of the process
    bound: the largest |x_0|, or None as in MAR. At t = 999 an error of eps is multiplied by 20,000
        in x_0. Heads trained as briefly as in tiny and small need a bound [ours].
    Returns its mean, its log variance, and the x_0 that eps stands for (bounded), each (..., C).
    """
    x_0 = at(c.sqrt_recip, k) * x_t - at(c.sqrt_recip_m1, k) * eps
    if bound is not None:
        x_0 = x_0.clamp(-bound, bound)
    mean = at(c.mean_x0, k) * x_0 + at(c.mean_xt, k) * x_t
    w = (v + 1) / 2
    log_variance = w * at(c.log_beta, k) + (1 - w) * at(c.log_var, k)
    return mean, log_variance, x_0


def gaussian_cdf(x):
    """The cumulative distribution of the standard normal, approximated by tanh.   [MAR]"""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def variational_term(x, x_t, eps, v, k, c):
    """The term beside Eq. (5) that trains the variance, in bits.   [MAR]

    For k > 0 it is KL(true posterior || model's). At k = 0 it is the negative log-likelihood of x
    in a bin of half-width 1/255. MAR has kept this from ADM, a model of 8-bit pixels. The mean of
    the channels is taken. eps gets no gradient from it.

    x, x_t, eps, v: (..., C)
    k: (...) int, indices of timesteps
    Returns (...).
    """
    mean, log_variance, _ = model_distribution(x_t, eps.detach(), v, k, c)
    true_mean = at(c.mean_x0, k) * x + at(c.mean_xt, k) * x_t
    true_log_variance = at(c.log_var, k)
    kl = 0.5 * (
        log_variance - true_log_variance - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )

    inverse_std = (-0.5 * log_variance).exp()
    upper = gaussian_cdf((x - mean + 1 / 255) * inverse_std)
    lower = gaussian_cdf((x - mean - 1 / 255) * inverse_std)
    # the outermost bins reach to infinity, as for pixels in [-1, 1]
    probability = torch.where(x > 0.999, 1 - lower, upper - lower)
    probability = torch.where(x < -0.999, upper, probability)
    nll = -probability.clamp(min=1e-12).log()
    return torch.where(k[..., None] == 0, nll, kl).mean(-1) / math.log(2)


# The network

def linear(d_in, d_out, std=None):
    """A linear layer initialised as MAR's: Xavier-uniform or normal weights, bias 0."""
    layer = nn.Linear(d_in, d_out)
    if std is None:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def zero_linear(d_in, d_out):
    """A linear layer that starts as zero: the last one and every adaLN_modulation.   [MAR]"""
    layer = linear(d_in, d_out)
    nn.init.zeros_(layer.weight)
    return layer


class Blocks(nn.ModuleList):
    """Blocks that are run one after the other, each with the same condition."""

    # if True, the backward pass computes the activations a second time, to save memory
    recompute = False

    def forward(self, x, condition):
        for block in self:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, use_reentrant=False)
            else:
                x = block(x, condition)
        return x


class TimeEmbed(nn.Module):
    """t (...) int in 0 .. 999 -> (..., W): 128 cosines and 128 sines, then two layers."""

    def __init__(self, W):
        super().__init__()
        self.mlp = nn.Sequential(linear(256, W, std=0.02), nn.SiLU(), linear(W, W, std=0.02))

    @staticmethod
    def frequencies(t):
        k = torch.arange(128, device=t.device)
        angle = t[..., None].float() * torch.exp(-math.log(10000) * k / 128)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t):
        return self.mlp(self.frequencies(t))


class ResBlock(nn.Module):
    """An MLP beside a shortcut; the condition shifts and scales its input and gates its output."""

    def __init__(self, W):
        super().__init__()
        self.in_ln = nn.LayerNorm(W, eps=1e-6)
        self.mlp = nn.Sequential(linear(W, W), nn.SiLU(), linear(W, W))
        # MAR's Sequential begins with a SiLU. Ours is applied once, in Denoiser.forward. With the
        # Identity in its place, the linear layer has the same name as in MAR's files
        self.adaLN_modulation = nn.Sequential(nn.Identity(), zero_linear(W, 3 * W))

    def forward(self, h, condition):
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return h + gate * self.mlp(self.in_ln(h) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Width W to 2 C channels: eps and v. The condition shifts and scales the normalised input."""

    def __init__(self, W, C):
        super().__init__()
        self.linear = zero_linear(W, 2 * C)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), zero_linear(W, 2 * W))

    def forward(self, h, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        normed = layer_norm(h, h.shape[-1:], eps=1e-6)
        return self.linear(normed * (1 + scale) + shift)


class Denoiser(nn.Module):
    """eps_theta(x_c^{i,t} | t, z^i) of Eq. (5). Parameters are named as MAR's `diffloss.net`."""

    def __init__(self, C, D, W, depth):
        super().__init__()
        self.time_embed = TimeEmbed(W)
        self.cond_embed = linear(D, W)
        self.input_proj = linear(C, W)
        self.res_blocks = Blocks(ResBlock(W) for _ in range(depth))
        self.final_layer = FinalLayer(W, C)

    def forward(self, x, t, z):
        """The predicted noise eps and the variance values v, each (..., M, C) float32.

        x: (..., M, C), the noised tokens
        t: (..., M) or () int in 0 .. 999
        z: (M, D)
        """
        condition = silu(self.time_embed(t) + self.cond_embed(z))    # (..., M, W)
        h = self.res_blocks(self.input_proj(x), condition)           # (..., M, W)
        return self.final_layer(h, condition).float().chunk(2, dim=-1)


class DiffusionHead(nn.Module):
    """The denoiser with its training loss and its sampler: MAR's `diffloss`."""

    def __init__(self, C, D, W, depth):
        super().__init__()
        self.net = Denoiser(C, D, W, depth)

    def loss(self, z, x, t, noise):
        """Eq. (5) plus the variational term, one value for each row and draw.

        z: (M, D)
        x: (M, C), the true tokens x_c^i
        t: (R, M) int in 0 .. 999, R draws of the timestep for each token
        noise: (R, M, C)
        Returns (R, M).
        """
        c = coefficients(T, x.device)                                # all T steps: k is t
        x_t = add_noise(x, noise, t, c)                              # (R, M, C)
        eps, v = self.net(x_t, t, z)
        return denoising_loss(noise, eps) + variational_term(x, x_t, eps, v, t, c)

    def guided(self, x, t, z, z_uncond, scale):
        """The network's eps and v (M, C), with guidance; t is one timestep (). See `sample`."""
        z = z.float()
        if z_uncond is None:
            return self.net(x, t, z)
        eps, v = self.net(torch.cat([x, x]), t, torch.cat([z, z_uncond.float()]))
        eps, eps_uncond = eps.chunk(2)
        v, _ = v.chunk(2)
        return eps_uncond + scale * (eps - eps_uncond), v

    @torch.no_grad()
    def sample(self, z, noise, steps, temperature=1.0, z_uncond=None, scale=1.0, bound=None):
        """x ~ p(x_c^i | z^i), by the reverse process in `steps` steps.   [MAR]

        z: (M, D)
        noise: (steps, M, C), the initial x, then the noise of every step but the last
        temperature: factor of the noise of the steps, not of the initial x
        z_uncond: (M, D), z without the class, for guidance: eps = eps_u + scale (eps_c - eps_u)
        bound: see model_distribution
        Returns (M, C).
        """
        c = coefficients(steps, z.device)
        x = noise[0]
        fp32 = torch.autocast(z.device.type, enabled=False)
        for k in reversed(range(steps)):
            # At t = 999 an error of eps grows 20,000-fold in x_0 and, without a bound, 316-fold in
            # the next x, if there are 100 steps. So the first of them takes fp32.            [ours]
            first = k == steps - 1
            with fp32 if first else nullcontext():
                eps, v = self.guided(x, c.t[k], z, z_uncond, scale)
            x, log_variance, _ = model_distribution(x, eps, v, k, c, bound)
            if k > 0:
                # noise[0] was the initial x, so the first step, k = steps - 1, takes noise[1]
                x = x + (0.5 * log_variance).exp() * noise[steps - k] * temperature
        return x
