"""Eq. (5), section 3.1: the diffusion loss on literals; then schedule, head and sampler against MAR's own numbers."""
import math
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

import diffusion_head
import golden

# Eq. (5)

# x^t of a process with three timesteps, abar = 1, 0.64, 0: no noise, some noise, noise only.
THREE = SimpleNamespace(sqrt_abar=torch.tensor([1.0, 0.8, 0.0]), sqrt_1m_abar=torch.tensor([0.0, 0.6, 1.0]))

# The head's loss has MAR's variational term beside Eq. (5). These tests take it away, to judge Eq. (5) alone.
without_variational_term = patch.object(diffusion_head, "variational_term", lambda x, x_t, eps, v, t, c: torch.zeros(t.shape))


class Predicts(nn.Module):
    """A denoiser that answers a fixed eps and notes what it was given."""

    def __init__(self, eps):
        super().__init__()
        self.eps, self.calls = eps, []

    def forward(self, x, t, z):
        self.calls.append((x, t, z))
        return self.eps.expand_as(x), torch.zeros_like(x)


def head_that_predicts(eps):
    head = diffusion_head.DiffusionHead(C=2, D=3, W=4, depth=1)
    head.net = Predicts(eps)
    return head


def abar(t):
    """Share of the signal that is left at timestep t: MAR's cosine schedule, in closed form."""
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return f((t + 1) / 1000) / f(0)


def test_eq05_is_the_squared_difference():
    """Eq. (5): the error of eps_theta is SQUARED: no absolute value and no square root."""
    assert diffusion_head.denoising_loss(torch.tensor([3.0]), torch.tensor([0.0])).item() == 9
    assert diffusion_head.denoising_loss(torch.tensor([1.0]), torch.tensor([-1.0])).item() == 4


def test_eq05_is_the_mean_over_channels():
    """Eq. (5) as MAR trains it: the squared errors of a token's channels are averaged, not summed."""
    noise, eps = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert diffusion_head.denoising_loss(noise, eps).item() == (1 + 4 + 4 + 0) / 4


def test_eq05_is_one_value_per_token():
    """Eq. (5) is a loss of one z^i and x_c^i: tokens are not averaged with each other here."""
    noise = torch.tensor([[[1.0, 1.0], [0.0, 2.0]], [[0.0, 0.0], [3.0, 1.0]]])                 # (R, M, C)
    assert diffusion_head.denoising_loss(noise, torch.zeros(2, 2, 2)).tolist() == [[1, 2], [0, 5]]


def test_eq05_x_t_is_the_token_shrunk_and_the_noise_grown():
    """Eq. (5): x_c^{i,t} = sqrt(abar_t) x + sqrt(1 - abar_t) eps, with the abar of each token's own t."""
    x, noise = torch.tensor([[10.0, 20.0]] * 3), torch.tensor([[1.0, -1.0]] * 3)
    x_t = diffusion_head.add_noise(x, noise, torch.tensor([0, 1, 2]), THREE)
    torch.testing.assert_close(x_t, torch.tensor([[10.0, 20.0], [8.6, 15.4], [1.0, -1.0]]))


def test_eq05_keeps_the_variance_of_a_standard_normal_token():
    """Eq. (5): the two factors of x_c^{i,t} are square roots: their squares add up to 1 at every timestep."""
    c, t = diffusion_head.coefficients(1000), torch.arange(1000)
    of_x = diffusion_head.add_noise(torch.ones(1000, 1), torch.zeros(1000, 1), t, c)
    of_noise = diffusion_head.add_noise(torch.zeros(1000, 1), torch.ones(1000, 1), t, c)
    torch.testing.assert_close(of_x ** 2 + of_noise ** 2, torch.ones(1000, 1))
    assert of_x[0] > 0.999 and of_x[-1] < 0.001 and (of_x.diff(dim=0) < 0).all()


@without_variational_term
def test_eq05_the_target_is_the_noise():
    """Eq. (5): the head predicts eps, the noise that was added; not the clean token x_c^i, not x_c^{i,t}."""
    noise, x = torch.tensor([[[0.5, -1.0]]]), torch.tensor([[7.0, 8.0]])
    loss = head_that_predicts(noise).loss(torch.zeros(1, 3), x, torch.tensor([[500]]), noise)
    assert loss.tolist() == [[0]]
    loss = head_that_predicts(noise + 2).loss(torch.zeros(1, 3), x, torch.tensor([[500]]), noise)
    assert loss.tolist() == [[4]]


@without_variational_term
def test_eq05_the_head_sees_the_noised_token_its_t_and_its_z():
    """Eq. (5): eps_theta(x_c^{i,t} | t, z^i): the NOISED token, with the t it was noised by and the z of its position."""
    x, noise = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[[1.0, -1.0], [0.5, 0.0]]])
    z, t = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[100, 900]])
    head = head_that_predicts(torch.zeros(2))
    head.loss(z, x, t, noise)
    (seen_x, seen_t, seen_z), = head.net.calls
    for i in range(2):
        a = abar(int(t[0, i]))
        torch.testing.assert_close(seen_x[0, i], math.sqrt(a) * x[i] + math.sqrt(1 - a) * noise[0, i])
    assert seen_t.tolist() == t.tolist() and seen_z.tolist() == z.tolist()


@without_variational_term
def test_eq05_every_row_and_draw_has_its_own_loss():
    """Eq. (5): the expectation over eps and t uses R draws per token: (R, M) losses, each of its own draw alone."""
    noise = torch.tensor([[[1.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [4.0, 2.0]]])                 # (R, M, C) = (2, 2, 2)
    loss = head_that_predicts(torch.zeros(2)).loss(torch.zeros(2, 3), torch.zeros(2, 2), torch.tensor([[1, 2], [3, 4]]), noise)
    assert loss.tolist() == [[1, 2], [0, 10]]


def test_eq05_alone_trains_eps():
    """The variational term beside Eq. (5) trains v only: it must send no gradient into eps [MAR]."""
    c, x = diffusion_head.coefficients(1000), torch.tensor([[0.3, -0.5], [1.0, 2.0]])
    eps, v = torch.full((2, 2), 0.1, requires_grad=True), torch.full((2, 2), 0.2, requires_grad=True)
    diffusion_head.variational_term(x, x, eps, v, torch.tensor([0, 500]), c).sum().backward()
    assert eps.grad is None or not eps.grad.any()
    assert v.grad.all()


class Knows(nn.Module):
    """The exact denoiser where every token is z[:2], with the smaller variance: its x_0 is z[:2] whatever the noise."""

    def __init__(self):
        super().__init__()
        self.x, self.t = [], []

    def forward(self, x, t, z):
        self.x.append(x)
        self.t.append(int(t))
        share = abar(int(t))
        return (x - math.sqrt(share) * z[:, :2]) / math.sqrt(1 - share), -torch.ones_like(x)


def drawn(start, step, temperature=1.0, **guidance):
    """A token drawn in four steps for z = (1, -2, 0), from these values of the first noise and of all later ones -> it, its denoiser."""
    head = diffusion_head.DiffusionHead(C=2, D=3, W=4, depth=1)
    head.net = Knows()
    noise = torch.tensor([start, step, step, step])[:, None, None].expand(4, 1, 2)
    return head.sample(torch.tensor([[1.0, -2.0, 0.0]]), noise, 4, temperature, **guidance), head.net


def test_eq05_the_sampler_adds_no_noise_in_its_last_step():
    """Eq. (5) run backwards, from t = 999 to t = 0: the last step returns x_0 itself, so an exact denoiser's token comes out exactly."""
    x, net = drawn(1.0, 3.0)
    assert net.t == [999, 666, 333, 0]
    torch.testing.assert_close(x, torch.tensor([[1.0, -2.0]]))


def test_eq05_the_sampler_adds_noise_in_every_other_step():
    """Eq. (5) run backwards: it starts from the first noise as it is; the temperature scales the noise of the steps alone."""
    (_, quiet), (_, loud), (_, half) = drawn(1.0, 0.0), drawn(1.0, 1.0), drawn(1.0, 1.0, 0.5)
    assert quiet.x[0].tolist() == loud.x[0].tolist() == half.x[0].tolist() == [[1.0, 1.0]]
    for k in (1, 2, 3):
        assert (loud.x[k] - quiet.x[k] > 0.005).all()
        torch.testing.assert_close(half.x[k] - quiet.x[k], (loud.x[k] - quiet.x[k]) / 2, rtol=0, atol=1e-4)


def test_eq05_the_sampler_is_guided_away_from_no_class():
    """eps_u + 3 (eps_c - eps_u): from x_0 = (0, 1) without the class through (1, -2) with it to (3, -8)."""
    x, _ = drawn(1.0, 0.5, z_uncond=torch.tensor([[0.0, 1.0, 0.0]]), scale=3.0)
    torch.testing.assert_close(x, torch.tensor([[3.0, -8.0]]))


def test_eq05_leaves_its_inputs_unchanged():
    """Eq. (5): tokens, noise and timesteps are only read."""
    x, noise, t = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, 4.0]]]), torch.tensor([[5]])
    diffusion_head.DiffusionHead(C=2, D=3, W=4, depth=1).loss(torch.ones(1, 3), x, t, noise)
    assert (x.tolist(), noise.tolist(), t.tolist()) == ([[1, 2]], [[[3, 4]]], [[5]])


# the loss, against MAR

@pytest.fixture(scope="module")
def mar():
    return golden.load("mar_tiny")


@pytest.fixture(scope="module")
def process():
    return golden.load("diffusion")


@pytest.fixture(scope="module")
def head():
    return golden.fill(diffusion_head.DiffusionHead(C=8, D=32, W=48, depth=2), "diffloss.")


def test_parameter_names_are_mars(head):
    """The official files name the head's weights diffloss.net...."""
    expected = {k: s for k, s in golden.layout("mar_tiny").items() if k.startswith("diffloss.")}
    assert {f"diffloss.{k}": s for k, s in golden.shapes(head).items()} == expected


def test_golden_loss_terms(mar, head):
    """Noised tokens, Eq. (5), variational term and their sum for 48 tokens; row 0 reaches the edges of the likelihood at t = 0."""
    c, x, noise, t = diffusion_head.coefficients(1000), mar["loss_target"], mar["loss_noise"], mar["loss_t"]
    z = mar["decoder_z"].flatten(0, 1)
    x_t = diffusion_head.add_noise(x, noise, t, c)
    assert golden.difference(x_t, mar["loss_x_t"]) < 1e-5
    eps, v = head.net(x_t, t, z)
    assert golden.difference(diffusion_head.denoising_loss(noise, eps), mar["loss_mse"]) < 1e-5
    assert golden.difference(diffusion_head.variational_term(x, x_t, eps, v, t, c), mar["loss_vb"]) < 1e-5
    assert golden.difference(head.loss(z, x, t[None], noise[None])[0], mar["loss_total"]) < 1e-5


def test_golden_loss_gradients(mar, head):
    """The mean over hidden tokens and its gradients into z, the first and the last layer."""
    z, hidden = mar["decoder_z"].flatten(0, 1).requires_grad_(), mar["mask"].flatten().bool()
    loss = head.loss(z[hidden], mar["loss_target"][hidden], mar["loss_t"][None, hidden], mar["loss_noise"][None, hidden]).mean()
    assert golden.difference(loss, mar["loss_masked_mean"]) < 1e-5
    of_z, of_bias, of_weight = torch.autograd.grad(loss, [z, head.net.final_layer.linear.bias, head.net.input_proj.weight])
    assert golden.difference(of_z, mar["loss_grad_z"]) < 2e-4
    assert golden.difference(of_bias, mar["loss_grad_final_bias"]) < 2e-4
    assert golden.difference(of_weight, mar["loss_grad_input_proj_weight"]) < 2e-4


def test_loss_of_several_draws_is_the_loss_of_each(mar, head):
    """R draws in one call equal R calls of one draw."""
    z, x = mar["decoder_z"].flatten(0, 1), mar["tokens"].flatten(0, 1)
    t, noise = mar["train_t"].view(2, 48), mar["train_noise"].view(2, 48, 8)
    both = head.loss(z, x, t, noise).detach()
    for r in range(2):
        assert golden.difference(both[r], head.loss(z, x, t[r:r + 1], noise[r:r + 1])[0]) < 1e-5


# the head, against MAR

def test_golden_head(mar, head):
    """Sinusoids of t, time embedding, and the raw output eps, v."""
    x, t, z = mar["head_x"], mar["head_t"], mar["head_z"]
    # angles reach 999, where float32 is spaced by 6e-5: one rounding in exp shows
    assert golden.difference(head.net.time_embed.frequencies(t), mar["head_time_freq"]) < 7e-5
    assert golden.difference(head.net.time_embed(t), mar["head_time_emb"]) < 1e-5
    assert golden.difference(torch.cat(head.net(x, t, z), dim=-1), mar["head_out"]) < 1e-5


@pytest.mark.parametrize("probe", ["all", "nogain"])
def test_golden_head_norms(mar, probe):
    """Weights so small that a wrong epsilon in any norm of the head shows."""
    small = golden.fill(diffusion_head.DiffusionHead(C=8, D=32, W=48, depth=2), "diffloss.", probe)
    found = torch.cat(small.net(mar["head_x"], mar["head_t"], mar["head_z"]), dim=-1)
    assert golden.difference(found, golden.load("eps_probe_mar")[f"head_out_{probe}"]) < 1e-5


def test_golden_head_block(head):
    """One residual block on an input of about 1e-3."""
    g = golden.load("eps_probe_mar")
    assert golden.difference(head.net.res_blocks[0](g["head_block0_x"], torch.nn.functional.silu(g["head_block0_y"])), g["head_block0_out"]) < 1e-5


def test_a_fresh_head_predicts_zero():
    """MAR's start values: the last layer is zero, so that training starts from eps = 0."""
    fresh = diffusion_head.DiffusionHead(C=2, D=3, W=4, depth=1)
    eps, v = fresh.net(torch.ones(5, 2), torch.arange(5), torch.ones(5, 3))
    assert not eps.any() and not v.any()


# the process, against MAR

def test_golden_cosine_schedule(process):
    """The 1000 betas before respacing."""
    np.testing.assert_allclose(diffusion_head.cosine_betas(), process["betas_raw_1000"].numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [10, 25, 50, 100, 250, 1000])
def test_golden_respacing(process, n):
    """Which of the 1000 timesteps n steps keep, and the betas between them."""
    timesteps, betas = diffusion_head.respace(n)
    assert timesteps.tolist() == process[f"timesteps_{n}"].tolist()
    np.testing.assert_allclose(betas, process[f"betas_{n}"].numpy(), rtol=0, atol=1e-10)
    if f"alphas_cumprod_{n}" in process:
        np.testing.assert_allclose(np.cumprod(1 - betas), process[f"alphas_cumprod_{n}"].numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [25, 100, 1000])
def test_golden_coefficients(process, n):
    """Every factor of the reverse process, computed in float64, equals MAR's to the last digit of float32."""
    c, names = diffusion_head.coefficients(n), dict(mean_x0="posterior_mean_coef1", mean_xt="posterior_mean_coef2",
                                                    log_var="posterior_log_variance_clipped")
    if n == 1000:
        names |= dict(sqrt_abar="sqrt_alphas_cumprod", sqrt_1m_abar="sqrt_one_minus_alphas_cumprod",
                      recip="sqrt_recip_alphas_cumprod", recip_m1="sqrt_recipm1_alphas_cumprod")
    for ours, theirs in names.items():
        torch.testing.assert_close(getattr(c, ours), process[f"{theirs}_{n}"].float(), rtol=2e-7, atol=0, msg=ours)
    assert c.t.tolist() == process[f"timesteps_{n}"].tolist()


@pytest.mark.parametrize("n", [1, 1001])
def test_respacing_refuses_steps_that_do_not_exist(n):
    """Fewer than 2 or more than 1000 steps are a ValueError."""
    with pytest.raises(ValueError):
        diffusion_head.respace(n)


def test_golden_model_distribution(process, head):
    """Mean, log variance and predicted x_0 at each of the 25 steps, row by row: the rows differ widely in size."""
    c, i = diffusion_head.coefficients(25), process["pmv_t_index"]
    eps, v = head.net(process["pmv_x"], c.t[i], process["pmv_z"])
    found = diffusion_head.model_distribution(process["pmv_x"], eps, v, i, c)
    for got, name in zip(found, ("pmv_mean", "pmv_log_variance", "pmv_pred_x0")):
        for row in range(25):
            assert golden.difference(got[row], process[name][row]) < 1e-5, f"{name}, step {row}"


def test_bound_limits_x_0_alone():
    """`bound` cuts the predicted x_0 to [-bound, bound] before the mean is taken; without it nothing is cut, as in MAR."""
    c, x_t, v = diffusion_head.coefficients(25), torch.tensor([[0.5, -0.5, 1.0]]), torch.zeros(1, 3)
    eps = (x_t - c.sqrt_abar[24] * torch.tensor([[100.0, -100.0, 1.0]])) / c.sqrt_1m_abar[24]           # x_0 = 100, -100, 1
    for bound, x_0 in [(None, [100, -100, 1]), (5.0, [5, -5, 1])]:
        mean, log_variance, found = diffusion_head.model_distribution(x_t, eps, v, 24, c, bound)
        torch.testing.assert_close(found, torch.tensor([x_0]).float(), rtol=0.01, atol=0.01)
        torch.testing.assert_close(mean, c.mean_x0[24] * found + c.mean_xt[24] * x_t)
        torch.testing.assert_close(log_variance, (c.log_beta[24] + c.log_var[24]).expand(1, 3) / 2)


# the sampler, against MAR

class Analytic(nn.Module):
    """The exact denoiser of independent normal tokens (mean mu, variance s2): a well conditioned stand-in for a trained head."""

    def __init__(self, process):
        super().__init__()
        self.mu, self.s2, self.abar = process["analytic_mu"], process["analytic_s2"], process["alphas_cumprod_1000"].float()

    def forward(self, x, t, z):
        a, channel = self.abar[t], torch.arange(8)
        eps = (1 - a).sqrt() * (x - a.sqrt() * self.mu) / (a * self.s2 + 1 - a)
        return eps, torch.sin(0.01 * t + channel).expand_as(x)


def trajectory(head, process, steps, **how):
    """x after every step, (steps, 5, 8): each step's x is the next call's input."""
    seen = []
    hook = head.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:5]))
    noise = torch.cat([process["noise_init"][None], process["step_noise_25"][:24] if steps == 25 else torch.zeros(steps - 1, 5, 8)])
    final = head.sample(process["z"], noise, steps, **how)
    hook.remove()
    return torch.stack(seen[1:] + [final])


@pytest.mark.parametrize("steps, temperature, name", [(100, 0.0, "100"), (25, 0.0, "25"), (25, 0.9, "25_temp0.9")])
def test_golden_sampler_with_an_analytic_denoiser(process, steps, temperature, name):
    """Every step of the reverse process, without and with noise: the highest timestep first, no noise in the last step."""
    head = diffusion_head.DiffusionHead(C=8, D=32, W=48, depth=2)
    head.net = Analytic(process)
    found = trajectory(head, process, steps, temperature=temperature)
    assert golden.difference(found[-1], process[f"analytic_sample_{name}"]) < 1e-4
    if steps == 25:
        assert golden.difference(found, process[f"analytic_traj_{name}"]) < 2e-3


@pytest.mark.parametrize("steps, temperature, name", [(100, 0.0, "100_cfg1"), (25, 0.0, "25_cfg1"), (25, 0.9, "25_cfg1_temp0.9")])
def test_golden_sampler(process, head, steps, temperature, name):
    """The reverse process with the tiny head."""
    found = trajectory(head, process, steps, temperature=temperature)
    assert golden.difference(found[-1], process[f"head_sample_{name}"]) < 1e-5
    if name == "25_cfg1":
        assert golden.difference(found, process["head_traj_25_cfg1"]) < 1e-5


@pytest.mark.parametrize("steps, temperature, name", [(100, 0.0, "100_cfg3"), (25, 0.0, "25_cfg3"), (25, 0.9, "25_cfg3_temp0.9")])
def test_golden_guided_sampler(process, head, steps, temperature, name):
    """Guidance 3: eps_u + 3 (eps_c - eps_u) at every step, with the conditional variance and one x for both."""
    if temperature:                                                          # the guided run was given noise of its own
        process = process | dict(step_noise_25=process["step_noise_25_cfg"][:, :5])
    found = trajectory(head, process, steps, temperature=temperature, z_uncond=process["z_uncond"], scale=3.0)
    assert golden.difference(found[-1], process[f"head_sample_{name}"][:5]) < 1e-5
    if name == "25_cfg3":
        assert golden.difference(found, process["head_traj_25_cfg3"][:, :5]) < 1e-5


@pytest.mark.parametrize("guided", [dict(), dict(scale=3.0)])
def test_bound_limits_the_sample(process, head, guided):
    """The last step returns x_0 itself, so no sampled token exceeds the bound; without one the untrained head's reach 1e4 and more."""
    noise, guided = torch.cat([process["noise_init"][None], torch.zeros(24, 5, 8)]), guided and guided | dict(z_uncond=process["z_uncond"])
    assert head.sample(process["z"], noise, 25, **guided).abs().max() > 1e4
    assert head.sample(process["z"], noise, 25, bound=2.0, **guided).abs().max() <= 2.0 + 1e-5


def test_guidance_1_is_no_guidance(process, head):
    """eps_u + 1 (eps_c - eps_u) is eps_c: scale 1 with or without z_uncond gives the same tokens."""
    noise = torch.cat([process["noise_init"][None], process["step_noise_25"][:24]])
    alone, guided = head.sample(process["z"], noise, 25), head.sample(process["z"], noise, 25, 1.0, process["z_uncond"], 1.0)
    assert golden.difference(guided, alone) < 1e-4
