"""The per-token diffusion head: Eq. (5), section 3.1 of the paper, as MAR defines it.

A small MLP predicts the noise in a noised token x_c^{i,t} given the timestep t and the backbone's
z^i. `denoising_loss` is Eq. (5); `variational_term` trains the variance beside it [MAR]; `sample`
runs the reverse process. Only the diffusion that is used is here: cosine schedule, 1000 training
steps, evenly respaced sampling.

Read by backbone.py's MAR, train.py (loss) and sample.py (sample). Read train.py next.
Try: python -m pytest tests/test_diffusion_head.py -q

M rows (tokens to predict), C = d_c channels, D width of z, W width of the head, T = 1000.
"""
import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import embedding, layer_norm, silu

T = 1000                                                                     # [MAR]


def cosine_betas():
    """betas of the cosine schedule, (1000,) float64, at most 0.999.   [MAR]"""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def respace(n):
    """Keep n of the 1000 timesteps, evenly.   [MAR]

    n int in 2..1000 -> (timesteps (n,) int64 ascending, betas (n,) float64). ValueError outside.
    The stride is added repeatedly and the betas recomputed even for n = 1000, as MAR does.
    """
    if not 2 <= n <= T:
        raise ValueError(f"diffusion steps must lie in 2..{T}, got {n}")
    stride, position, kept = (T - 1) / (n - 1), 0.0, []
    for _ in range(n):
        kept.append(round(position))
        position += stride
    abar = np.cumprod(1 - cosine_betas())[kept]
    return np.array(kept), 1 - abar / np.append(1.0, abar[:-1])


def coefficients(n):
    """All coefficients of the n-step process as float32 tensors (n,), computed in float64.   [MAR]"""
    timesteps, betas = respace(n)
    abar = np.cumprod(1 - betas)
    abar_prev = np.append(1.0, abar[:-1])
    variance = betas * (1 - abar_prev) / (1 - abar)                          # of the posterior q(x_{t-1} | x_t, x_0)
    c = dict(sqrt_abar=np.sqrt(abar), sqrt_1m_abar=np.sqrt(1 - abar),
             recip=np.sqrt(1 / abar), recip_m1=np.sqrt(1 / abar - 1),
             mean_x0=betas * np.sqrt(abar_prev) / (1 - abar),
             mean_xt=(1 - abar_prev) * np.sqrt(1 - betas) / (1 - abar),
             log_beta=np.log(betas), log_var=np.log(np.append(variance[1], variance[1:])))
    return SimpleNamespace(t=torch.tensor(timesteps), **{k: torch.tensor(v).float() for k, v in c.items()})


def add_noise(x, noise, t, c):
    """x^t = sqrt(abar_t) x + sqrt(1 - abar_t) noise.   x, noise (..., C), t (...) int -> (..., C)."""
    return c.sqrt_abar[t][..., None] * x + c.sqrt_1m_abar[t][..., None] * noise


def denoising_loss(noise, eps):
    """Eq. (5): || eps - eps_theta(x_c^{i,t} | t, z^i) ||^2, as a mean over channels [MAR].

    noise (the eps that was added), eps (the head's prediction) (..., C) -> (...).
    """
    return (noise - eps).square().mean(-1)


def model_distribution(x_t, eps, v, i, c, bound=None):
    """Mean and log variance of p(x_{t-1} | x_t) at index i of the process.   [MAR]

    bound: largest |x_0|, or None for no bound as in MAR. At t = 999 an error in eps is multiplied by 20,000
    in x_0, so a head trained for minutes needs one [ours].

    x_t, eps, v (..., C), i int or (...) int -> mean, log_variance, x_0, each (..., C).
    """
    at = {k: getattr(c, k)[i][..., None] for k in ("recip", "recip_m1", "mean_x0", "mean_xt", "log_beta", "log_var")}
    x_0 = at["recip"] * x_t - at["recip_m1"] * eps
    x_0 = x_0 if bound is None else x_0.clamp(-bound, bound)
    w = (v + 1) / 2
    log_variance = w * at["log_beta"] + (1 - w) * at["log_var"]
    return at["mean_x0"] * x_0 + at["mean_xt"] * x_t, log_variance, x_0


def variational_term(x, x_t, eps, v, t, c):
    """The term that trains v alone: KL of the true posterior to the model's, in bits; at t = 0 the
    negative log-likelihood of x in bins of half-width 1/255.   [MAR]

    x, x_t, eps, v (..., C), t (...) int -> (...), mean over channels. eps gets no gradient from it.
    """
    mean, log_variance, _ = model_distribution(x_t, eps.detach(), v, t, c)
    true_mean = c.mean_x0[t][..., None] * x + c.mean_xt[t][..., None] * x_t
    true_log = c.log_var[t][..., None]
    kl = 0.5 * (log_variance - true_log - 1 + (true_log - log_variance).exp()
                + (true_mean - mean).square() * (-log_variance).exp())
    cdf = lambda y: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3)))
    inverse = (-0.5 * log_variance).exp()
    upper, lower = cdf((x - mean + 1 / 255) * inverse), cdf((x - mean - 1 / 255) * inverse)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    nll = -probability.clamp(min=1e-12).log()
    return torch.where(t[..., None] == 0, nll, kl).mean(-1) / math.log(2)


def linear(d_in, d_out, std=None, zero=False):
    """A linear layer with MAR's start values: Xavier-uniform (or normal of `std`, or zero), bias 0."""
    layer = nn.Linear(d_in, d_out)
    if std is None:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    if zero:
        nn.init.zeros_(layer.weight)
    return layer


class TimeEmbed(nn.Module):
    """t on the original 0..999 scale -> 128 cosines and 128 sines -> two layers.   t (...) -> (..., W)"""

    def __init__(self, W):
        super().__init__()
        self.mlp = nn.Sequential(linear(256, W, std=0.02), nn.SiLU(), linear(W, W, std=0.02))

    @staticmethod
    def frequencies(t):
        angle = t[..., None].float() * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t):
        if t.numel() <= T:
            return self.mlp(self.frequencies(t))
        return embedding(t, self.mlp(self.frequencies(torch.arange(T, device=t.device))))         # each t once, not each row


class ResBlock(nn.Module):
    def __init__(self, W):
        super().__init__()
        self.in_ln = nn.LayerNorm(W, eps=1e-6)
        self.mlp = nn.Sequential(linear(W, W), nn.SiLU(), linear(W, W))
        self.adaLN_modulation = nn.Sequential(nn.Identity(), linear(W, 3 * W, zero=True))         # its SiLU is in Denoiser, once for all

    def forward(self, h, condition):
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return h + gate * self.mlp(self.in_ln(h) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, W, C):
        super().__init__()
        self.linear = linear(W, 2 * C, zero=True)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), linear(W, 2 * W, zero=True))

    def forward(self, h, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class Denoiser(nn.Module):
    """eps_theta(x | t, z) of Eq. (5), with the variance values v beside it (keys as MAR's `diffloss.net`)."""

    def __init__(self, C, D, W, depth):
        super().__init__()
        self.time_embed = TimeEmbed(W)
        self.cond_embed = linear(D, W)
        self.input_proj = linear(C, W)
        self.res_blocks = nn.ModuleList(ResBlock(W) for _ in range(depth))
        self.final_layer = FinalLayer(W, C)

    def forward(self, x, t, z):
        """x (..., M, C), t (..., M) or () int 0..999, z (M, D) -> eps, v, each (..., M, C) float32."""
        condition = silu(self.time_embed(t) + self.cond_embed(z))            # (..., M, W)
        h = self.input_proj(x)
        for block in self.res_blocks:
            h = block(h, condition)
        return self.final_layer(h, condition).float().chunk(2, dim=-1)


class DiffusionHead(nn.Module):
    """MAR's `diffloss`: the denoiser with its training loss and its sampler."""

    def __init__(self, C, D, W, depth):
        super().__init__()
        self.net = Denoiser(C, D, W, depth)

    def loss(self, z, x, t, noise):
        """Eq. (5) plus the variational term, one value per row and draw.

        z (M, D), x (M, C) the true tokens, t (R, M) int 0..999, noise (R, M, C), R draws -> (R, M).
        """
        c = process(T, x.device)
        x_t = add_noise(x, noise, t, c)
        eps, v = self.net(x_t, t, z)
        return denoising_loss(noise, eps) + variational_term(x, x_t, eps, v, t, c)

    @torch.no_grad()
    def sample(self, z, noise, steps, temperature=1.0, z_uncond=None, scale=1.0, bound=None):
        """Reverse process in `steps` steps: x ~ p(x_c^i | z^i).   [MAR]

        z (M, D); noise (steps, M, C): the initial x, then one draw per step but the last; temperature
        scales only the per-step noise. With z_uncond (M, D) eps is guided, eps_u + scale (eps_c - eps_u),
        and v is the conditional one. bound: see model_distribution. -> (M, C).
        """
        c, x = process(steps, z.device), noise[0]
        for k, i in enumerate(reversed(range(steps))):
            if z_uncond is None:
                eps, v = self.net(x, c.t[i], z)
            else:
                (eps, eps_u), (v, _) = (a.chunk(2) for a in self.net(torch.cat([x, x]), c.t[i], torch.cat([z, z_uncond])))
                eps = eps_u + scale * (eps - eps_u)
            x, log_variance, _ = model_distribution(x, eps, v, i, c, bound)
            if i > 0:
                x = x + (0.5 * log_variance).exp() * noise[k + 1] * temperature
        return x


def process(n, device, _made={}):
    """`coefficients(n)` on `device`, made once."""
    if (n, device) not in _made:
        _made[n, device] = SimpleNamespace(**{k: v.to(device) for k, v in vars(coefficients(n)).items()})
    return _made[n, device]
