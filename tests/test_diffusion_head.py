"""Tests of Eq. (5), section 3.1 of the paper: the diffusion loss on literals.

After them, noise schedule, head and sampler are compared with the numbers of MAR's own code.
"""
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

# A process with three timesteps, abar = 1, 0.64, 0: no noise, some noise, noise only.
THREE = SimpleNamespace(
    sqrt_abar=torch.tensor([1.0, 0.8, 0.0]),
    sqrt_1m_abar=torch.tensor([0.0, 0.6, 1.0]),
)


def no_variational_term(x, x_t, eps, v, t, c):
    """Stands in for the variational term and is 0 for every token."""
    return torch.zeros(t.shape)


# The loss of the head has MAR's variational term beside Eq. (5). These tests take it away, to
# judge Eq. (5) alone.
without_variational_term = patch.object(diffusion_head, "variational_term", no_variational_term)


class Predicts(nn.Module):
    """A denoiser that always answers the same eps and notes what it was given."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps
        self.calls = []

    def forward(self, x, t, z):
        self.calls.append((x, t, z))
        return self.eps.expand_as(x), torch.zeros_like(x)


def small_head():
    """A head for tokens of C = 2 channels and z of D = 3."""
    return diffusion_head.DiffusionHead(C=2, D=3, W=4, depth=1)


def head_that_predicts(eps):
    """A head whose denoiser always answers this eps."""
    head = small_head()
    head.net = Predicts(eps)
    return head


def squared_cosine(u):
    """MAR's cosine schedule, not yet divided by its value at u = 0."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def abar(t):
    """The share of the signal that is left at timestep t: MAR's cosine schedule in closed form."""
    return squared_cosine((t + 1) / 1000) / squared_cosine(0)


def test_eq05_is_the_squared_difference():
    """Eq. (5): the error of eps_theta is SQUARED. There is no absolute value, no square root."""
    loss = diffusion_head.denoising_loss(torch.tensor([3.0]), torch.tensor([0.0]))
    assert loss.item() == 9
    loss = diffusion_head.denoising_loss(torch.tensor([1.0]), torch.tensor([-1.0]))
    assert loss.item() == 4


def test_eq05_is_the_mean_over_channels():
    """Eq. (5) as MAR trains it: the loss of a token is the MEAN of its channels' squared errors.

    The squared errors are not summed.
    """
    noise = torch.tensor([1.0, 2.0, 3.0, 0.0])
    eps = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert diffusion_head.denoising_loss(noise, eps).item() == (1 + 4 + 4 + 0) / 4


def test_eq05_is_one_value_per_token():
    """Eq. (5) is the loss of one z^i and x_c^i: it is not averaged over tokens here."""
    noise = torch.tensor([
        [[1.0, 1.0], [0.0, 2.0]],
        [[0.0, 0.0], [3.0, 1.0]],
    ])                                                               # (R, M, C)
    loss = diffusion_head.denoising_loss(noise, torch.zeros(2, 2, 2))
    assert loss.tolist() == [[1, 2], [0, 5]]


def test_eq05_x_t_is_the_token_shrunk_and_the_noise_grown():
    """Eq. (5): x_c^{i,t} = sqrt(abar_t) x + sqrt(1 - abar_t) eps.

    abar_t belongs to each token's own t.
    """
    x = torch.tensor([[10.0, 20.0]] * 3)
    noise = torch.tensor([[1.0, -1.0]] * 3)
    t = torch.tensor([0, 1, 2])
    x_t = diffusion_head.add_noise(x, noise, t, THREE)
    torch.testing.assert_close(x_t, torch.tensor([[10.0, 20.0], [8.6, 15.4], [1.0, -1.0]]))


def test_eq05_keeps_the_variance_of_a_standard_normal_token():
    """Eq. (5): the two factors of x_c^{i,t} are square roots.

    Their squares add up to 1 at every timestep.
    """
    c = diffusion_head.coefficients(1000)
    t = torch.arange(1000)
    one = torch.ones(1000, 1)
    zero = torch.zeros(1000, 1)
    of_x = diffusion_head.add_noise(one, zero, t, c)
    of_noise = diffusion_head.add_noise(zero, one, t, c)
    torch.testing.assert_close(of_x ** 2 + of_noise ** 2, one)
    assert of_x[0] > 0.999
    assert of_x[-1] < 0.001
    assert (of_x.diff(dim=0) < 0).all()


@without_variational_term
def test_eq05_the_target_is_the_noise():
    """Eq. (5): the head predicts eps, the noise that was added.

    It predicts neither the clean token x_c^i nor the noised token x_c^{i,t}.
    """
    noise = torch.tensor([[[0.5, -1.0]]])
    x = torch.tensor([[7.0, 8.0]])
    z = torch.zeros(1, 3)
    t = torch.tensor([[500]])
    assert head_that_predicts(noise).loss(z, x, t, noise).tolist() == [[0]]
    assert head_that_predicts(noise + 2).loss(z, x, t, noise).tolist() == [[4]]


@without_variational_term
def test_eq05_the_head_sees_the_noised_token_its_t_and_its_z():
    """Eq. (5): eps_theta(x_c^{i,t} | t, z^i) is given three things.

    They are the NOISED token, the t by which it was noised, and the z of its position.
    """
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    noise = torch.tensor([[[1.0, -1.0], [0.5, 0.0]]])
    z = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    t = torch.tensor([[100, 900]])
    head = head_that_predicts(torch.zeros(2))
    head.loss(z, x, t, noise)
    assert len(head.net.calls) == 1
    seen_x, seen_t, seen_z = head.net.calls[0]
    for i in range(2):
        a = abar(int(t[0, i]))
        expected = math.sqrt(a) * x[i] + math.sqrt(1 - a) * noise[0, i]
        torch.testing.assert_close(seen_x[0, i], expected)
    assert seen_t.tolist() == t.tolist()
    assert seen_z.tolist() == z.tolist()


@without_variational_term
def test_eq05_every_row_and_draw_has_its_own_loss():
    """Eq. (5): the expectation over eps and t is taken by R draws per token.

    This gives (R, M) losses. Each one depends on its own draw alone.
    """
    noise = torch.tensor([
        [[1.0, 1.0], [2.0, 0.0]],
        [[0.0, 0.0], [4.0, 2.0]],
    ])                                                               # (R, M, C) = (2, 2, 2)
    t = torch.tensor([[1, 2], [3, 4]])
    head = head_that_predicts(torch.zeros(2))
    loss = head.loss(torch.zeros(2, 3), torch.zeros(2, 2), t, noise)
    assert loss.tolist() == [[1, 2], [0, 10]]


def test_eq05_the_loss_has_the_variational_term_beside_it():
    """The loss of the head is Eq. (5) PLUS the variational term, in every row and draw.

    Without that term the variance values v are never trained.
    """
    def two(x, x_t, eps, v, t, c):
        return torch.full(t.shape, 2.0)

    noise = torch.tensor([[[3.0, 3.0], [1.0, 1.0]]])
    t = torch.tensor([[0, 500]])
    head = head_that_predicts(torch.zeros(2))
    with patch.object(diffusion_head, "variational_term", two):
        loss = head.loss(torch.zeros(2, 3), torch.zeros(2, 2), t, noise)
    assert loss.tolist() == [[9 + 2, 1 + 2]]


def test_eq05_the_kl_goes_from_the_true_posterior_to_the_models():
    """The variational term is KL(true || model's), in bits, averaged over the channels.

    The true variance is 1 here. v = 1 stands for the upper bound, 4. Of two normals of equal mean
    KL = (log 4 - 1 + 1/4) / 2, and a distance of 2 between the means adds 2^2 / 4 / 2.
    """
    c = SimpleNamespace(
        sqrt_recip=torch.ones(2), sqrt_recip_m1=torch.ones(2), mean_x0=torch.ones(2),
        mean_xt=torch.zeros(2),
        log_beta=torch.tensor([4.0, 4.0]).log(), log_var=torch.zeros(2),
    )
    x_t = torch.zeros(1, 2)
    eps = torch.zeros(1, 2)
    v = torch.ones(1, 2)
    t = torch.tensor([1])
    same_mean = 0.5 * (math.log(4) - 1 + 0.25)
    for x, channels in [([0.0, 0.0], [0, 0]), ([0.0, 2.0], [0, 0.5])]:
        x = torch.tensor([x])
        found = diffusion_head.variational_term(x, x_t, eps, v, t, c)
        expected = (same_mean + sum(channels) / 2) / math.log(2)
        assert found.item() == pytest.approx(expected)


def test_eq05_alone_trains_eps():
    """The variational term beside Eq. (5) trains v only: it sends no gradient into eps.   [MAR]"""
    c = diffusion_head.coefficients(1000)
    x = torch.tensor([[0.3, -0.5], [1.0, 2.0]])
    eps = torch.full((2, 2), 0.1, requires_grad=True)
    v = torch.full((2, 2), 0.2, requires_grad=True)
    t = torch.tensor([0, 500])
    diffusion_head.variational_term(x, x, eps, v, t, c).sum().backward()
    assert eps.grad is None or not eps.grad.any()
    assert v.grad.all()


class Knows(nn.Module):
    """The exact denoiser if every token is z[:2]: whatever the noise, its x_0 is z[:2].

    It answers the smaller of the two variances. It notes every x and t that it is given.
    """

    def __init__(self):
        super().__init__()
        self.x = []
        self.t = []

    def forward(self, x, t, z):
        self.x.append(x)
        self.t.append(int(t))
        share = abar(int(t))
        eps = (x - math.sqrt(share) * z[:, :2]) / math.sqrt(1 - share)
        return eps, -torch.ones_like(x)


def sample_token(start, step, temperature=1.0, **guidance):
    """A token, sampled in four steps for z = (1, -2, 0), and the denoiser that was used.

    start     value of the noise that sampling starts from
    step      value of the noise of all later steps
    guidance  z_uncond and scale
    """
    head = small_head()
    head.net = Knows()
    z = torch.tensor([[1.0, -2.0, 0.0]])
    noise = torch.tensor([start, step, step, step])
    noise = noise[:, None, None].expand(4, 1, 2)                     # (steps, M, C)
    x = head.sample(z, noise, 4, temperature, **guidance)
    return x, head.net


def test_eq05_the_sampler_adds_no_noise_in_its_last_step():
    """Eq. (5) run backwards, from t = 999 to t = 0: the last step returns x_0 itself.

    So the token of an exact denoiser comes out exactly.
    """
    x, net = sample_token(1.0, 3.0)
    assert net.t == [999, 666, 333, 0]
    torch.testing.assert_close(x, torch.tensor([[1.0, -2.0]]))


def test_eq05_the_sampler_adds_noise_in_every_other_step():
    """Eq. (5) run backwards: sampling starts from the first noise as it is.

    The temperature scales only the noise of the steps.
    """
    _, quiet = sample_token(1.0, 0.0)
    _, loud = sample_token(1.0, 1.0)
    _, half = sample_token(1.0, 1.0, 0.5)
    for net in (quiet, loud, half):
        assert net.x[0].tolist() == [[1.0, 1.0]]
    for k in (1, 2, 3):
        full_noise = loud.x[k] - quiet.x[k]
        half_noise = half.x[k] - quiet.x[k]
        assert (full_noise > 0.005).all()
        torch.testing.assert_close(half_noise, full_noise / 2, rtol=0, atol=1e-4)


def test_eq05_the_sampler_is_guided_away_from_no_class():
    """Guidance of scale 3 is eps_u + 3 (eps_c - eps_u).

    Without the class x_0 is (0, 1), with it (1, -2). Guided, it is (3, -8).
    """
    x, _ = sample_token(1.0, 0.5, z_uncond=torch.tensor([[0.0, 1.0, 0.0]]), scale=3.0)
    torch.testing.assert_close(x, torch.tensor([[3.0, -8.0]]))


def test_eq05_leaves_its_inputs_unchanged():
    """Eq. (5): tokens, noise and timesteps are only read."""
    x = torch.tensor([[1.0, 2.0]])
    noise = torch.tensor([[[3.0, 4.0]]])
    t = torch.tensor([[5]])
    small_head().loss(torch.ones(1, 3), x, t, noise)
    assert x.tolist() == [[1, 2]]
    assert noise.tolist() == [[[3, 4]]]
    assert t.tolist() == [[5]]


# the loss, against MAR

def tiny_head(probe=None):
    """The head of MAR's tiny model; probe: see golden.fill."""
    head = diffusion_head.DiffusionHead(C=8, D=32, W=48, depth=2)
    return golden.fill(head, "diffloss.", probe)


def test_parameter_names_are_mars():
    """The official files call the weights of the head diffloss.net...."""
    head = tiny_head()
    expected = {}
    for key, shape in golden.layout("mar_tiny").items():
        if key.startswith("diffloss."):
            expected[key] = shape
    found = {f"diffloss.{key}": shape for key, shape in golden.shapes(head).items()}
    assert found == expected


def test_eq05_golden_loss_terms():
    """Noised tokens, Eq. (5), variational term and the sum of both equal MAR's for 48 tokens.

    Row 0 reaches the edges of the likelihood at t = 0.
    """
    mar = golden.load("mar_tiny")
    head = tiny_head()
    c = diffusion_head.coefficients(1000)
    x = mar["loss_target"]
    noise = mar["loss_noise"]
    t = mar["loss_t"]
    z = mar["decoder_z"].flatten(0, 1)

    x_t = diffusion_head.add_noise(x, noise, t, c)
    assert golden.difference(x_t, mar["loss_x_t"]) < 1e-5

    eps, v = head.net(x_t, t, z)
    denoising = diffusion_head.denoising_loss(noise, eps)
    assert golden.difference(denoising, mar["loss_mse"]) < 1e-5

    variational = diffusion_head.variational_term(x, x_t, eps, v, t, c)
    assert golden.difference(variational, mar["loss_vb"]) < 1e-5

    total = head.loss(z, x, t[None], noise[None])[0]
    assert golden.difference(total, mar["loss_total"]) < 1e-5


def test_eq05_golden_loss_gradients():
    """The mean over hidden tokens and its gradients into z, the first and the last layer."""
    mar = golden.load("mar_tiny")
    head = tiny_head()
    z = mar["decoder_z"].flatten(0, 1).requires_grad_()
    hidden = mar["mask"].flatten().bool()
    x = mar["loss_target"][hidden]
    t = mar["loss_t"][None, hidden]
    noise = mar["loss_noise"][None, hidden]
    loss = head.loss(z[hidden], x, t, noise).mean()
    assert golden.difference(loss, mar["loss_masked_mean"]) < 1e-5

    bias = head.net.final_layer.linear.bias
    weight = head.net.input_proj.weight
    of_z, of_bias, of_weight = torch.autograd.grad(loss, [z, bias, weight])
    assert golden.difference(of_z, mar["loss_grad_z"]) < 2e-4
    assert golden.difference(of_bias, mar["loss_grad_final_bias"]) < 2e-4
    assert golden.difference(of_weight, mar["loss_grad_input_proj_weight"]) < 2e-4


def test_eq05_loss_of_several_draws_is_the_loss_of_each():
    """R draws in one call equal R calls of one draw."""
    mar = golden.load("mar_tiny")
    head = tiny_head()
    z = mar["decoder_z"].flatten(0, 1)
    x = mar["tokens"].flatten(0, 1)
    t = mar["train_t"].view(2, 48)
    noise = mar["train_noise"].view(2, 48, 8)
    both = head.loss(z, x, t, noise).detach()
    for r in range(2):
        alone = head.loss(z, x, t[r:r + 1], noise[r:r + 1])[0]
        assert golden.difference(both[r], alone) < 1e-5


# the head, against MAR

def test_eq05_golden_head():
    """Sinusoids of t, time embedding, and the raw output eps, v."""
    mar = golden.load("mar_tiny")
    head = tiny_head()
    x = mar["head_x"]
    t = mar["head_t"]
    z = mar["head_z"]
    # angles reach 999, where float32 is spaced by 6e-5: one rounding in exp shows
    assert golden.difference(head.net.time_embed.frequencies(t), mar["head_time_freq"]) < 7e-5
    assert golden.difference(head.net.time_embed(t), mar["head_time_emb"]) < 1e-5
    found = torch.cat(head.net(x, t, z), dim=-1)
    assert golden.difference(found, mar["head_out"]) < 1e-5


@pytest.mark.parametrize("probe", ["all", "nogain"])
def test_eq05_golden_head_norms(probe):
    """The weights are so small that a wrong epsilon in any norm of the head shows."""
    mar = golden.load("mar_tiny")
    small = tiny_head(probe)
    found = torch.cat(small.net(mar["head_x"], mar["head_t"], mar["head_z"]), dim=-1)
    expected = golden.load("eps_probe_mar")[f"head_out_{probe}"]
    assert golden.difference(found, expected) < 1e-5


def test_eq05_golden_head_block():
    """One residual block equals MAR's on an input of about 1e-3."""
    head = tiny_head()
    g = golden.load("eps_probe_mar")
    condition = torch.nn.functional.silu(g["head_block0_y"])
    found = head.net.res_blocks[0](g["head_block0_x"], condition)
    assert golden.difference(found, g["head_block0_out"]) < 1e-5


def test_eq05_a_fresh_head_predicts_zero():
    """As in MAR, the last layer of a new head is zero, so that training starts from eps = 0."""
    fresh = small_head()
    eps, v = fresh.net(torch.ones(5, 2), torch.arange(5), torch.ones(5, 3))
    assert not eps.any()
    assert not v.any()


# the process, against MAR

def assert_equal_in_float64(found, expected):
    """Every entry of an array and of a tensor differs by 1e-10 at most."""
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-10)


def test_eq05_golden_cosine_schedule():
    """The 1000 betas before respacing."""
    process = golden.load("diffusion")
    assert_equal_in_float64(diffusion_head.cosine_betas(), process["betas_raw_1000"])


@pytest.mark.parametrize("n", [10, 25, 50, 100, 250, 1000])
def test_eq05_golden_respacing(n):
    """Which of the 1000 timesteps n steps keep, and the betas between them."""
    process = golden.load("diffusion")
    timesteps, betas = diffusion_head.respace(n)
    assert timesteps.tolist() == process[f"timesteps_{n}"].tolist()
    assert_equal_in_float64(betas, process[f"betas_{n}"])
    if f"alphas_cumprod_{n}" in process:
        assert_equal_in_float64(np.cumprod(1 - betas), process[f"alphas_cumprod_{n}"])


@pytest.mark.parametrize("n", [25, 100, 1000])
def test_eq05_golden_coefficients(n):
    """Every factor of the reverse process is computed in float64.

    It equals MAR's to the last digit of float32.
    """
    process = golden.load("diffusion")
    c = diffusion_head.coefficients(n)
    factors = {
        "posterior_mean_coef1": c.mean_x0,
        "posterior_mean_coef2": c.mean_xt,
        "posterior_log_variance_clipped": c.log_var,
    }
    if n == 1000:
        factors["sqrt_alphas_cumprod"] = c.sqrt_abar
        factors["sqrt_one_minus_alphas_cumprod"] = c.sqrt_1m_abar
        factors["sqrt_recip_alphas_cumprod"] = c.sqrt_recip
        factors["sqrt_recipm1_alphas_cumprod"] = c.sqrt_recip_m1
    for name, found in factors.items():
        expected = process[f"{name}_{n}"].float()
        torch.testing.assert_close(found, expected, rtol=2e-7, atol=0, msg=name)
    assert c.t.tolist() == process[f"timesteps_{n}"].tolist()


@pytest.mark.parametrize("n", [1, 1001])
def test_eq05_respacing_refuses_steps_that_do_not_exist(n):
    """Fewer than 2 or more than 1000 steps are a ValueError."""
    with pytest.raises(ValueError):
        diffusion_head.respace(n)


def test_eq05_golden_model_distribution():
    """Mean, log variance and predicted x_0 at each of the 25 steps.

    They are compared row by row, because the rows differ widely in size.
    """
    process = golden.load("diffusion")
    head = tiny_head()
    c = diffusion_head.coefficients(25)
    i = process["pmv_t_index"]
    x_t = process["pmv_x"]
    eps, v = head.net(x_t, c.t[i], process["pmv_z"])
    distribution = diffusion_head.model_distribution(x_t, eps, v, i, c)
    for found, name in zip(distribution, ("pmv_mean", "pmv_log_variance", "pmv_pred_x0")):
        for row in range(25):
            difference = golden.difference(found[row], process[name][row])
            assert difference < 1e-5, f"{name}, step {row}"


def test_eq05_bound_limits_x_0_alone():
    """`bound` cuts the predicted x_0 to [-bound, bound] before the mean is taken.

    Without a bound nothing is cut, as in MAR.
    """
    c = diffusion_head.coefficients(25)
    x_t = torch.tensor([[0.5, -0.5, 1.0]])
    v = torch.zeros(1, 3)
    # the eps that means x_0 = 100, -100, 1
    eps = (x_t - c.sqrt_abar[24] * torch.tensor([[100.0, -100.0, 1.0]])) / c.sqrt_1m_abar[24]
    for bound, x_0 in [(None, [100, -100, 1]), (5.0, [5, -5, 1])]:
        distribution = diffusion_head.model_distribution(x_t, eps, v, 24, c, bound)
        mean, log_variance, found = distribution
        torch.testing.assert_close(found, torch.tensor([x_0]).float(), rtol=0.01, atol=0.01)
        torch.testing.assert_close(mean, c.mean_x0[24] * found + c.mean_xt[24] * x_t)
        middle = (c.log_beta[24] + c.log_var[24]).expand(1, 3) / 2
        torch.testing.assert_close(log_variance, middle)


# the sampler, against MAR

class Analytic(nn.Module):
    """The exact denoiser of independent normal tokens of mean mu and variance s2.

    It stands in for a trained head, because it is well conditioned.
    """

    def __init__(self, process):
        super().__init__()
        self.mu = process["analytic_mu"]
        self.s2 = process["analytic_s2"]
        self.abar = process["alphas_cumprod_1000"].float()

    def forward(self, x, t, z):
        a = self.abar[t]
        channel = torch.arange(8)
        eps = (1 - a).sqrt() * (x - a.sqrt() * self.mu) / (a * self.s2 + 1 - a)
        return eps, torch.sin(0.01 * t + channel).expand_as(x)


def reference_noise(process, steps):
    """(steps, 5, 8) the noise that MAR's sampler was given: in 100 steps the first noise alone."""
    first = process["noise_init"][None]
    if steps == 25:
        later = process["step_noise_25"][:24]
    else:
        later = torch.zeros(steps - 1, 5, 8)
    return torch.cat([first, later])


def trajectory(head, process, steps, **how):
    """(steps, 5, 8) x after every step: the x after a step is the input of the next one.

    how  temperature, z_uncond, scale
    """
    seen = []

    def note_x(module, inputs):
        seen.append(inputs[0][:5])

    hook = head.net.register_forward_pre_hook(note_x)
    final = head.sample(process["z"], reference_noise(process, steps), steps, **how)
    hook.remove()
    return torch.stack(seen[1:] + [final])


@pytest.mark.parametrize("steps, temperature, name", [
    (100, 0.0, "100"),
    (25, 0.0, "25"),
    (25, 0.9, "25_temp0.9"),
])
def test_eq05_golden_sampler_with_an_analytic_denoiser(steps, temperature, name):
    """Every step of the reverse process equals MAR's, without and with noise.

    The highest timestep comes first. The last step adds no noise.
    """
    process = golden.load("diffusion")
    head = diffusion_head.DiffusionHead(C=8, D=32, W=48, depth=2)
    head.net = Analytic(process)
    found = trajectory(head, process, steps, temperature=temperature)
    assert golden.difference(found[-1], process[f"analytic_sample_{name}"]) < 1e-4
    if steps == 25:
        assert golden.difference(found, process[f"analytic_traj_{name}"]) < 2e-3


@pytest.mark.parametrize("steps, temperature, name", [
    (100, 0.0, "100_cfg1"),
    (25, 0.0, "25_cfg1"),
    (25, 0.9, "25_cfg1_temp0.9"),
])
def test_eq05_golden_sampler(steps, temperature, name):
    """The reverse process with the tiny head."""
    process = golden.load("diffusion")
    head = tiny_head()
    found = trajectory(head, process, steps, temperature=temperature)
    assert golden.difference(found[-1], process[f"head_sample_{name}"]) < 1e-5
    if name == "25_cfg1":
        assert golden.difference(found, process["head_traj_25_cfg1"]) < 1e-5


@pytest.mark.parametrize("steps, temperature, name", [
    (100, 0.0, "100_cfg3"),
    (25, 0.0, "25_cfg3"),
    (25, 0.9, "25_cfg3_temp0.9"),
])
def test_eq05_golden_guided_sampler(steps, temperature, name):
    """Guidance of scale 3 is eps_u + 3 (eps_c - eps_u) at every step.

    The variance is the conditional one. Both predictions see the same x.
    """
    process = golden.load("diffusion")
    head = tiny_head()
    if temperature:
        # the guided reference was given noise of its own
        process = process | dict(step_noise_25=process["step_noise_25_cfg"][:, :5])
    how = dict(temperature=temperature, z_uncond=process["z_uncond"], scale=3.0)
    found = trajectory(head, process, steps, **how)
    assert golden.difference(found[-1], process[f"head_sample_{name}"][:5]) < 1e-5
    if name == "25_cfg3":
        assert golden.difference(found, process["head_traj_25_cfg3"][:, :5]) < 1e-5


@pytest.mark.parametrize("guided", [False, True])
def test_eq05_bound_limits_the_sample(guided):
    """The last step returns x_0 itself, so no sampled token exceeds the bound.

    Without a bound, the tokens of the untrained head reach 1e4 and more.
    """
    process = golden.load("diffusion")
    head = tiny_head()
    noise = torch.cat([process["noise_init"][None], torch.zeros(24, 5, 8)])
    guidance = dict(scale=3.0, z_uncond=process["z_uncond"]) if guided else {}
    free = head.sample(process["z"], noise, 25, **guidance)
    assert free.abs().max() > 1e4
    bounded = head.sample(process["z"], noise, 25, bound=2.0, **guidance)
    assert bounded.abs().max() <= 2.0 + 1e-5


def test_eq05_guidance_1_is_no_guidance():
    """eps_u + 1 (eps_c - eps_u) is eps_c: at scale 1, z_uncond changes no token."""
    process = golden.load("diffusion")
    head = tiny_head()
    noise = reference_noise(process, 25)
    alone = head.sample(process["z"], noise, 25)
    guided = head.sample(process["z"], noise, 25, 1.0, process["z_uncond"], 1.0)
    assert golden.difference(guided, alone) < 1e-4


def test_eq05_the_first_step_back_is_fp32_whatever_the_others_are():
    """At t = 999 an error of eps is multiplied by 316: in bf16 the next x would be off by as much.

    Under autocast the network computes that step in fp32, and all others in bf16.
    """
    head = diffusion_head.DiffusionHead(2, 3, 8, 1)
    seen = []
    head.net.input_proj.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        for uncond in (None, torch.ones(5, 3, dtype=torch.bfloat16)):
            z = torch.zeros(5, 3, dtype=torch.bfloat16)
            head.sample(z, torch.zeros(3, 5, 2), 3, z_uncond=uncond, scale=2.0)
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16] * 2
