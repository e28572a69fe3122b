"""Tests of the training steps by value.

They check what the losses of train.py give to the models, and what the losses make of the answers.
The last tests check what sample.py gives to its samplers and tokenizers.
"""
import copy
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import backbone
import checkpoint
import mixing
import sample
import stages
import tokenizers
import train

T = True
F = False


class Given:
    """Fixed numbers in place of a step's random numbers.

    normal, uniform  tensors of the shape (B, *shape) that torch.randn and torch.rand give in turn
    shared           those for the whole batch

    A step is given the next numbers that have as many axes as it asks for. If it asks for another
    shape, they are repeated or cut off, and the last ones are given again. So one wrong draw of a
    step leaves the numbers of all other draws as they are. `given` notes every (f, numbers).
    """

    device = torch.device("cpu")

    def __init__(self, normal=(), uniform=(), shared=()):
        self.normal = [torch.tensor(x) for x in normal]
        self.uniform = [torch.tensor(x) for x in uniform]
        self.of_all = [torch.tensor(x) for x in shared]
        rows = [*self.normal, *self.uniform]
        self.B = len(rows[0]) if rows else 0
        self.given = []

    def take(self, f, numbers, shape):
        fit = [k for k, x in enumerate(numbers) if x.dim() == len(shape)] or [0]
        found = numbers[fit[0]]
        if len(fit) > 1:
            del numbers[fit[0]]
        found = torch.tensor(np.resize(found, shape))
        self.given.append((f, found))
        return found

    def shared(self, f, *shape):
        return self.take(f, self.of_all, shape)

    def __call__(self, f, *shape):
        numbers = self.normal if f is torch.randn else self.uniform
        return self.take(f, numbers, (self.B, *shape))


# the step of MixAR

class Recorder:
    """A MAR that notes its inputs.

    What it mixes is x_c + 1000. The z of a token is its number in the batch, 0 to 7. The loss of a
    row is its t.

    x_c     what the step has from Eq. (7)
    hidden  the mask of the step, from Eq. (8)
    given   the random numbers of the step, in the order of use
    """

    def __init__(self):
        self.diffloss = SimpleNamespace(loss=self.loss)
        self.x_c = None
        self.mixed_with = None

    def mix(self, x_c, x_d, m):
        if self.x_c is None:
            # a step that does not sample x_c
            self.x_c = x_c
        self.mixed_from = x_c
        self.mixed_with = x_d
        self.mixed_where = m
        return x_c + 1000

    def __call__(self, x, x_d, m, y, drop):
        if self.mixed_with is None:
            # a step that does not mix
            self.mixed_with = x_d
            self.mixed_where = m
        self.mixed = x
        self.x_d = x_d
        self.m = m
        self.y = y
        self.drop = drop
        return torch.arange(8.0, requires_grad=True).view(2, 4, 1)

    def loss(self, z, x, t, noise):
        self.z = z
        self.x = x
        self.t = t
        self.noise = noise
        return t.float()


class SurePrior:
    """A prior of one bit per token that is sure of -1."""

    splits = 1

    def __call__(self, x, y):
        return torch.tensor([1.0, 0.0]).log().expand(*x.shape, 2)


# The random numbers of one step, for two images of four tokens.
POSTERIOR_NOISE = [
    [[1.0, -1.0]] * 4,
    [[2.0, 0.0]] * 4,
]
# quantile of the mask ratio, which stands for a ratio of 0.5
RATIO = [0.0]
# sorted, they give the order of the tokens: 0, 2 come first in one image, 1, 3 in the other
ORDER = [
    [0.1, 0.4, 0.2, 0.3],
    [0.9, 0.6, 0.8, 0.7],
]
LABEL_DROP = [0.05, 0.5]
# the next two are used with --ti-mix alone
PREDICTION = [[[0.5]] * 4, [[0.25]] * 4]
RHO = [
    [0.1, 0.9, 0.6, 0.4],
    [0.4, 0.7, 0.1, 0.2],
]
# two draws of each of two hidden tokens
TIMESTEP = [
    [[0.0, 0.5], [0.9999, 0.25]],
    [[0.125, 0.75], [0.001, 0.002]],
]
NOISE = [
    [[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]],
    [[[9.0, 10], [11, 12]], [[13, 14], [15, 16]]],
]


def mixar_step(step=0, *flags):
    """(model, loss) of one training step on two images of four tokens, two of them hidden.

    x_d is all +1.
    """
    args = train.parse(["--steps", "3", *flags])
    args.recipe["mixar"]["draws"] = 2
    model = Recorder()
    mean = 10 * torch.arange(8.0).view(2, 4, 1) + torch.tensor([1.0, 2.0])
    std = torch.tensor([0.5, 3.0]).expand(2, 4, 2)
    x_d = torch.ones(2, 4, 1)
    y = torch.tensor([0, 1])
    of_ti_mix = [PREDICTION, RHO] if "--ti-mix" in flags else []
    rng = Given([POSTERIOR_NOISE, NOISE], [ORDER, LABEL_DROP, *of_ti_mix, TIMESTEP], [RATIO])
    reparameterize = tokenizers.reparameterize
    sample_mask = mixing.sample_mask

    def note_x_c(mean, std, noise):
        model.x_c = reparameterize(mean, std, noise)
        return model.x_c

    masks = []

    def mask_ratio(u, low=0.7):
        return 0.5 if (u, low) == (RATIO[0], 0.7) else 0.75

    def note_mask(order, ratio):
        masks.append(sample_mask(order, ratio))
        return masks[0]

    of_eq07 = mock.patch.object(tokenizers, "reparameterize", note_x_c)
    of_eq08 = mock.patch.multiple(mixing, mask_ratio=mask_ratio, sample_mask=note_mask)
    with of_eq07, of_eq08:
        loss = train.mixar_loss(model, (mean, std, x_d, y), rng, step, SurePrior(), args)
    model.given = rng.given
    # one line of a step may use another mask by mistake: the mask is what two of three agree on
    model.hidden = model.m
    if masks and torch.equal(masks[0], model.mixed_where):
        model.hidden = masks[0]
    return model, loss


def test_eq07_the_step_draws_x_c_from_the_cached_moments():
    """Eq. (7): x_c is the cached mean plus the cached deviation times the noise."""
    model, _ = mixar_step()
    assert model.x_c[:, 0].tolist() == [[1.5, -1.0], [42.0, 42.0]]


def test_eq08_the_step_hides_the_first_of_a_random_order():
    """Eq. (8): half of the tokens are hidden here, the first of an order.

    Every image has an order of its own. One ratio, from mask_ratio, holds for the whole batch.
    """
    model, _ = mixar_step()
    assert model.hidden.tolist() == [[T, F, T, F], [F, T, F, T]]


def test_eq06_the_step_gives_mask_and_x_d_to_the_model():
    """Eq. (6): the model is told which tokens are hidden, by the mask of Eq. (8), and X_d."""
    model, _ = mixar_step()
    assert torch.equal(model.m, model.hidden)
    assert (model.x_d == 1).all()


def test_eq06_the_step_withholds_the_class_where_its_draw_is_below_label_drop():
    """Eq. (6): an image goes without its class where its uniform number is below LABEL_DROP.

    Otherwise the model is given its class.
    """
    model, _ = mixar_step()
    assert model.drop.tolist() == [T, F]
    assert model.y.tolist() == [0, 1]


def test_eq09_the_step_gives_the_mixed_sequence_to_the_model():
    """Eq. (9): the model sees x~, mixed from x_c and x_d by the mask of Eq. (8)."""
    model, _ = mixar_step()
    assert torch.equal(model.mixed_from, model.x_c)
    assert torch.equal(model.mixed, model.x_c + 1000)
    assert torch.equal(model.mixed_where, model.hidden)
    assert (model.mixed_with == 1).all()


def test_eq05_the_step_takes_the_loss_on_hidden_tokens_alone():
    """Eq. (5): the head is given z and x_c of the same HIDDEN tokens. The loss is the mean.

    The target is x_c, not the mixed sequence. The gradient goes on through z into the backbone.
    """
    model, loss = mixar_step()
    assert model.z.flatten().tolist() == model.hidden.flatten().nonzero().flatten().tolist()
    assert torch.equal(model.x, model.x_c[model.hidden])
    assert model.z.requires_grad
    torch.testing.assert_close(loss, model.t.float().mean(), equal_nan=True)


def test_eq05_the_step_draws_t_and_noise_for_every_hidden_token():
    """Eq. (5): every hidden token has its own t and its own noise, in each of the R = 2 draws.

    t is uniform in 0 .. 999. t and noise of an image lie in the rows of that image, one line per
    draw.
    """
    model, _ = mixar_step()
    hidden = int(model.hidden[0].sum())
    # the last two draws of the step; there is one line per draw and the images follow each other
    (f, uniform), (g, normal) = model.given[-2:]
    assert f is torch.rand
    assert g is torch.randn
    assert uniform.shape == (2, 2, hidden)
    assert normal.shape == (2, 2, hidden, 2)
    t = (1000 * torch.cat(list(uniform), dim=1)).long()
    assert torch.equal(model.t, t)
    assert torch.equal(model.noise, torch.cat(list(normal), dim=1))


def test_eq11_the_step_lets_the_prior_predict_behind_the_mask():
    """Eq. (11): with --ti-mix, g_M is asked for the true X_d behind the mask of Eq. (8).

    It is given the class and one uniform number for every token and bit group. Eq. (12) takes its
    answer.
    """
    asked = []
    x_hat = -torch.ones(2, 4, 1)
    taken = []

    def predict_masked(*inputs):
        asked.append(inputs)
        return x_hat

    def ti_mix(*inputs):
        taken.extend(inputs)
        return inputs[0]

    with mock.patch.multiple(mixing, predict_masked=predict_masked, ti_mix=ti_mix):
        model, _ = mixar_step(2, "--ti-mix")
    assert len(asked) == 1
    prior, x_d, m, y, u = asked[0]
    assert isinstance(prior, SurePrior)
    assert (x_d == 1).all()
    assert torch.equal(m, model.hidden)
    assert y.tolist() == [0, 1]
    assert u.tolist() == PREDICTION
    assert any(given is x_hat for given in [*taken, model.x_d])


def uniform_of_tokens(model):
    """The step's draws of uniform numbers, one for every token."""
    return [x for f, x in model.given if f is torch.rand and x.shape == (2, 4)]


def test_eq12_the_step_guides_by_the_mixed_tokens():
    """Eq. (12): with --ti-mix the model is guided by x~_d. Without it, the model is guided by x_d.

    lambda is 1, 0.5, 0 in the three steps. The truth, +1, is kept where rho is below lambda. What
    g_M predicts is -1 here.
    """
    def predict_masked(*inputs):
        return -torch.ones(2, 4, 1)

    model, _ = mixar_step()
    assert (model.x_d == 1).all()
    drawn_without = uniform_of_tokens(model)
    for step, lam in enumerate((1.0, 0.5, 0.0)):
        with mock.patch.object(mixing, "predict_masked", predict_masked):
            model, _ = mixar_step(step, "--ti-mix")
        drawn = uniform_of_tokens(model)
        # every token has a rho of its own, drawn last
        assert len(drawn) == len(drawn_without) + 1
        rho = drawn[-1]
        generated = model.hidden & (rho >= lam)
        assert torch.equal(model.x_d[..., 0] == -1, generated), f"step {step}"
        assert torch.equal(model.mixed_with, model.x_d)


# the steps of the other three models

class TinyPrior:
    """A prior of two bits per token, in two groups, that notes its inputs.

    It finds code 1 e^2 times as likely as code 0, in two images of three tokens.
    """

    splits = 2
    codes = 2
    bits = 2

    def __call__(self, x, y, drop):
        self.x = x
        self.y = y
        self.drop = drop
        return torch.tensor([0.0, 2.0]).expand(2, 3, 2, 2)


def test_eq03_the_step_hides_codes_and_withholds_classes():
    """Eq. (3): u = 0 hides every code of the first image, u = 1 hides none of the second.

    The smoothed cross-entropy is the mean over all codes.
    """
    model = TinyPrior()
    # the codes of each token are 1, 1 in the first image and 1, 0 in the second
    x_d = torch.tensor([[[1.0, 1]] * 3, [[1, -1.0]] * 3])
    batch = (None, None, x_d, torch.tensor([0, 1]))
    u_ratio = [0.0, 1.0]
    u_code = [[[0.5, 0.7]] * 3] * 2
    loss = train.prior_loss(model, batch, Given([], [u_ratio, u_code, LABEL_DROP]), 0)
    assert (model.x[0] == 0).all()
    assert torch.equal(model.x[1], x_d[1])
    assert model.drop.tolist() == [T, F]
    assert model.y.tolist() == [0, 1]

    log_p = torch.tensor([0.0, 2.0]).log_softmax(0)
    likely = 0.95 * log_p[1] + 0.05 * log_p[0]
    unlikely = 0.95 * log_p[0] + 0.05 * log_p[1]
    assert loss.item() == pytest.approx(-(0.75 * likely + 0.25 * unlikely).item())


def test_eq03_the_step_hides_each_code_by_its_own_draw():
    """Eq. (3): with u = 0.5, which hides 2 of 3 codes, those below 2/3 are hidden.

    Every bit group of every token has its own uniform number. A hidden code is all zeros.
    """
    model = TinyPrior()
    x_d = torch.tensor([[[1.0, -1]] * 3] * 2)
    u_code = [[[0.1, 0.9], [0.7, 0.6], [0.9, 0.2]], [[0.9, 0.9], [0.1, 0.1], [0.7, 0.9]]]
    batch = (None, None, x_d, torch.tensor([0, 1]))
    train.prior_loss(model, batch, Given([], [[0.5, 0.5], u_code, LABEL_DROP]), 0)
    assert model.x.tolist() == [[[0, -1], [1, 0], [1, 0]], [[1, -1], [0, 0], [1, -1]]]


class FourBits:
    """A prior of four bits per token, in two groups, that notes its input."""

    splits = 2
    bits = 4

    def __call__(self, x, y, drop):
        self.x = x
        return torch.zeros(2, 1, 2, 4)


def test_eq03_the_codes_are_the_groups_of_bits_in_order():
    """Eq. (3): the first half of a token's bits is its first code, the other half its second one.

    The least significant bit comes first. The targets are the codes BEFORE masking.
    """
    model = FourBits()
    x_d = torch.tensor([[[1.0, -1, -1, 1]], [[1.0, 1, -1, -1]]])
    batch = (None, None, x_d, torch.tensor([0, 1]))
    u_code = [[[0.1, 0.9]], [[0.9, 0.1]]]
    targets = []

    def code_loss(logits, codes):
        targets.append(codes.tolist())

    with mock.patch.object(train, "code_loss", code_loss):
        train.prior_loss(model, batch, Given([], [[0.5, 0.5], u_code, LABEL_DROP]), 0)
    assert targets == [[[[1, 2]], [[3, 0]]]]
    assert model.x.tolist() == [[[0, 0, -1, 1]], [[1, 1, 0, 0]]]


class TinyVAE:
    """A VAE whose posterior has mean 2 and variance 4. A picture is the mean of its latents."""

    def encode(self, x):
        assert (x == 0.5).all()
        mean = torch.full((1, 2, 1, 1), 2.0)
        logvar = torch.full((1, 2, 1, 1), math.log(4))
        return mean, logvar

    def decode(self, z):
        return z.mean().expand(1, 3, 2, 2)


def test_eq07_the_vae_learns_to_reconstruct_a_sample_of_its_posterior():
    """The loss is the squared error per value, plus 1e-4 times the KL per latent value.

    Pictures in [0, 1] go in as [-1, 1].
    """
    pictures = torch.full((1, 3, 2, 2), 0.75)
    noise = [[[[0.5]], [[0.5]]]]
    loss = stages.vae_loss(TinyVAE(), (pictures,), Given([noise]), 0)
    kl = 0.5 * (4 + 4 - 1 - math.log(4))
    assert loss.item() == pytest.approx((0.5 - 3) ** 2 + 1e-4 * kl)


class TinyBitTokenizer:
    """A bit tokenizer that gives every picture this z. A picture is the sum of its bits, plus 1."""

    def __init__(self, z, codebook):
        self.z = z
        self.quantize = SimpleNamespace(codebook=codebook)

    def encode(self, x):
        return self.z

    def decode(self, bits):
        return (bits.sum() + 1).expand(1, 3, 2, 2)


def test_eq07_the_bit_tokenizer_learns_straight_through_its_bits():
    """The loss is 4 times the squared error, plus the commitment, plus 0.02 times the entropy term.

    The entropy term is the entropy of a token minus the entropy of all. The gradient of the error
    reaches z as if z were the bits.
    """
    # two different tokens, close to 0: uncertain of their bits, so that the entropies count
    z = torch.tensor([0.003, -0.002, -0.004, 0.001]).view(1, 2, 1, 2).requires_grad_()
    codebook = tokenizers.codes_to_bits(torch.arange(4)[:, None], 2)
    pictures = torch.full((1, 3, 2, 2), 0.25)
    loss = stages.vq_loss(TinyBitTokenizer(z, codebook), (pictures,), None, 0)
    grad, = torch.autograd.grad(loss, z)

    commitment, per_sample, average = tokenizers.quantiser_losses(z, codebook)
    rest = commitment + 0.02 * (per_sample - average)
    grad_of_rest, = torch.autograd.grad(rest, z)
    assert abs(per_sample - average) > 0.1
    assert loss.item() == pytest.approx(4 * 0.75 ** 2 + rest.item())
    torch.testing.assert_close(grad, 4 * 2 * 0.75 + grad_of_rest)


# what the steps do with the gradient

def test_weight_decay_is_on_matrices_outside_the_head():
    """As in MAR, biases, norms and the diffusion head have no weight decay."""
    model = backbone.MAR(
        N=4, d_c=2, d_d=2, classes=3, D=8, depth=1, heads=2, K=1,
        head_depth=1, head_width=8, dropout=0.0,
    )
    recipe = dict(lr=1e-3, betas=(0.9, 0.95), decay=0.02, muon=False)
    decayed_group, free_group = checkpoint.make_optimizer(model, recipe).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = [names[id(p)] for p in decayed_group["params"]]
    free = [names[id(p)] for p in free_group["params"]]
    assert sorted(decayed + free) == sorted(names.values())
    assert "decoder_embed.weight" in decayed
    for name in decayed:
        assert model.get_parameter(name).ndim > 1
        assert not name.startswith("diffloss")
    for name in free:
        assert model.get_parameter(name).ndim == 1 or name.startswith("diffloss")


class WatchedOptimizer:
    """An optimizer that changes nothing and notes the gradient of a weight at each step."""

    def __init__(self, weight):
        self.weight = weight
        self.gradients = []

    def zero_grad(self, set_to_none):
        pass

    def step(self):
        self.gradients.append(self.weight.grad.item())


def test_a_matrix_is_made_about_orthogonal():
    """Newton-Schulz steps bring all singular values near 1 and keep the singular vectors.

    Each value s becomes what five times 3.4445 s - 4.775 s^3 + 2.0315 s^5 make of it.
    """
    torch.manual_seed(0)
    for rows, columns in ((6, 20), (20, 6)):
        stack = torch.randn(3, rows, columns)
        for g, found in zip(stack, checkpoint.orthogonal(stack)):
            u, s, v = torch.linalg.svd(g, full_matrices=False)
            s = s / s.square().sum().sqrt()
            for _ in range(5):
                s = 3.4445 * s - 4.775 * s ** 3 + 2.0315 * s ** 5
            assert (s - 1).abs().max() < 0.35
            torch.testing.assert_close(u.T @ found @ v.T, s.diag(), atol=1e-4, rtol=0)


def test_a_matrix_of_low_rank_stays_bounded_in_bf16():
    """Rounding must not grow where the singular values are 0: none of the result is far above 1."""
    torch.manual_seed(0)
    stack = torch.randn(2, 160, 8) @ torch.randn(2, 8, 640)
    with torch.autocast("cpu", torch.bfloat16):
        found = checkpoint.orthogonal(stack).float()
    assert torch.linalg.svdvals(found).max() < 1.3


def test_muon_is_that_of_torch_for_matrices_of_blocks_and_adamw_for_the_rest():
    """Two matrices of one shape, which are taken together, and a tall one.

    torch.optim.Muon computes in bf16, so its updates agree to a few per cent.
    """
    recipe = dict(lr=0.1, betas=(0.9, 0.95), decay=0.02, muon=True)
    torch.manual_seed(0)
    blocks = nn.ModuleList([nn.Linear(24, 8), nn.Linear(24, 8), nn.Linear(8, 24)])
    ours = nn.ModuleDict(dict(blocks=blocks, other=nn.Linear(8, 8)))
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
    optimizer = checkpoint.make_optimizer(ours, recipe)
    settings = dict(lr=0.1, weight_decay=0.02)
    matrices = [block.weight for block in theirs.blocks]
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings)
    adamw = torch.optim.AdamW([theirs.other.weight], betas=(0.9, 0.95), **settings)
    for step in range(3):
        gradients = [torch.randn_like(matrix) for matrix in matrices]
        other = torch.randn(8, 8)
        for model in (ours, theirs):
            for block, gradient in zip(model.blocks, gradients):
                block.weight.grad = gradient.clone()
            model.other.weight.grad = other.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for first, own, torchs in zip(start.blocks, ours.blocks, theirs.blocks):
        way = torchs.weight - first.weight
        assert (own.weight - torchs.weight).norm() < 0.03 * way.norm()
    torch.testing.assert_close(ours.other.weight, theirs.other.weight)


def test_muon_decays_the_weights_as_adamw_does():
    """Where the gradient is 0, a step only takes the share lr * decay of a weight away."""
    recipe = dict(lr=0.1, betas=(0.9, 0.95), decay=0.5, muon=True)
    model = nn.ModuleDict(dict(blocks=nn.ModuleList([nn.Linear(3, 2)])))
    weight = model.blocks[0].weight
    start = weight.detach().clone()
    weight.grad = torch.zeros(2, 3)
    checkpoint.make_optimizer(model, recipe).step()
    torch.testing.assert_close(weight.detach(), 0.95 * start)


def test_the_gradient_is_clipped_to_the_norm_of_clip():
    """A gradient of 1000 becomes one of 3 before the optimizer sees it.

    The norm that is returned for the log is the one before clipping.
    """
    model = nn.Linear(1, 1, bias=False)
    optimizer = WatchedOptimizer(model.weight)

    def steep(model, batch, rng, step):
        return 1000 * model.weight.sum()

    args = train.parse(["--amp", "fp32"])
    loss = train.Loss(model, steep)
    state = SimpleNamespace(model=model, optimizer=optimizer, step=0)
    _, norm, _ = train.update(args, loss, state, [((), Given())])
    assert norm == pytest.approx(1000)
    assert optimizer.gradients == [pytest.approx(3, rel=1e-4)]


@pytest.mark.parametrize("has_amx", [True, False])
def test_auto_is_bf16_where_the_cpu_has_amx(monkeypatch, has_amx):
    """A CPU with bf16 instructions but without AMX is faster in fp32."""
    found = dict(amx_tile=has_amx, avx512_bf16=True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    a = torch.ones(2, 2)
    kinds = {}
    for amp in ("auto", "bf16", "fp32"):
        with train.autocast(amp, torch.device("cpu")):
            kinds[amp] = (a @ a).dtype
    auto = torch.bfloat16 if has_amx else torch.float32
    assert kinds == dict(auto=auto, bf16=torch.bfloat16, fp32=torch.float32)


@pytest.mark.parametrize("amp, kind", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_products_of_muon_have_the_precision_of_the_flag(monkeypatch, amp, kind):
    """With --amp bf16 the directions are products in bf16; the weights stay float32."""
    model = nn.ModuleDict(dict(blocks=nn.ModuleList([nn.Linear(3, 2)])))
    weight = model.blocks[0].weight
    recipe = dict(lr=0.1, betas=(0.9, 0.95), decay=0.0, muon=True)
    optimizer = checkpoint.make_optimizer(model, recipe)
    found = []

    def orthogonal(g):
        directions = right(g)
        found.append(directions.dtype)
        return directions

    def linear(model, batch, rng, step):
        return weight.sum()

    right = checkpoint.orthogonal
    monkeypatch.setattr(checkpoint, "orthogonal", orthogonal)
    args = train.parse(["--amp", amp])
    state = SimpleNamespace(model=model, optimizer=optimizer, step=0)
    train.update(args, train.Loss(model, linear), state, [((), Given())])
    assert found == [kind]
    assert weight.dtype == torch.float32


# what the samplers are given

OF_PRIOR = ("prior_steps", "prior_cfg", "prior_power", "prior_temperature")
OF_MIXAR = ("ar_steps", "diffusion_steps", "cfg", "cfg_schedule", "temperature", "bound")


def system_with(settings):
    """A stand-in for sample.System with N = 4 tokens, d_c = 3 and two bit groups.

    It has what System's two sampling methods use.
    """
    return SimpleNamespace(
        settings=settings,
        prior=SimpleNamespace(splits=2),
        model=SimpleNamespace(N=4, d_c=3),
        device=torch.device("cpu"),
        amp="fp32",
    )


def test_eq04_the_sampler_is_given_its_settings(monkeypatch):
    """Eq. (4) is given the prior's four settings: steps, guidance, its power, temperature."""
    def settings_of_prior(prior, y, draw, gumbel, steps, guidance, power, temperature):
        return steps, guidance, power, temperature

    monkeypatch.setattr(sample, "sample_prior", settings_of_prior)
    # the value of every setting is its own name
    system = system_with({name: name for name in OF_PRIOR + OF_MIXAR})
    assert sample.System.sample_discrete(system, 0, [0], torch.tensor([0])) == OF_PRIOR


def test_eq06_the_sampler_is_given_its_settings(monkeypatch):
    """Eq. (6) is given ar_steps, diffusion_steps, cfg, its schedule, temperature and bound."""
    def settings_of_mixar(model, x_d, y, order, noise, ar_steps, diffusion_steps, cfg, schedule,
                          temperature, bound, on_step):
        return ar_steps, diffusion_steps, cfg, schedule, temperature, bound

    monkeypatch.setattr(sample, "generate", settings_of_mixar)
    system = system_with({name: name for name in OF_PRIOR + OF_MIXAR})
    assert sample.System.sample_continuous(system, 0, [0], torch.tensor([0]), None) == OF_MIXAR


def test_eq04_the_sampler_gets_the_random_numbers_of_each_image(monkeypatch):
    """Eq. (4) is given Gumbel and uniform numbers.

    Those of an image depend on the seed and on the number of the image alone.
    """
    def numbers_of_prior(prior, y, draw, gumbel, *settings):
        return gumbel(), draw(torch.zeros(1))

    def return_u(logits, u):
        return u

    monkeypatch.setattr(sample, "sample_prior", numbers_of_prior)
    monkeypatch.setattr(mixing, "sample_codes", return_u)
    system = system_with(dict.fromkeys(OF_PRIOR + OF_MIXAR))
    gumbel, uniform = sample.System.sample_discrete(system, 7, [3, 5], None)
    for row, image in enumerate((3, 5)):
        g = torch.Generator().manual_seed(7 * 10_000_019 + 2 * image)
        assert torch.equal(gumbel[row], -(-torch.rand(4, 2, generator=g).log()).log())
        assert torch.equal(uniform[row], torch.rand(4, 2, generator=g))


def test_eq06_the_sampler_gets_the_random_numbers_of_each_image(monkeypatch):
    """Eq. (6) is given a permutation, and normal noise for each diffusion step.

    Those of an image depend on the seed and on the number of the image alone. The rows of the noise
    hold one image after the other.
    """
    # three tokens of each image are filled in this AR step
    now = torch.tensor([[T, F, T, T], [T, T, T, F]])

    def numbers_of_mixar(model, x_d, y, order, noise, *settings):
        return order, noise(now, 2)

    monkeypatch.setattr(sample, "generate", numbers_of_mixar)
    system = system_with(dict.fromkeys(OF_PRIOR + OF_MIXAR))
    order, noise = sample.System.sample_continuous(system, 7, [3, 5], None, None)
    assert noise.shape == (2, 6, 3)
    for row, image in enumerate((3, 5)):
        g = torch.Generator().manual_seed(7 * 10_000_019 + 2 * image + 1)
        assert torch.equal(order[row], torch.rand(4, generator=g).argsort())
        rows = noise[:, 3 * row:3 * row + 3]
        assert torch.equal(rows, torch.randn(2, 3, 3, generator=g))


def test_eq07_samples_go_through_the_tokenizers_in_their_units():
    """Eq. (7) and back: x_c is denormalised by the run's mean and deviation before the VAE.

    Tokens become a grid row by row. The bit tokenizer sees pictures in [0, 1] and gives signs.
    """
    system = sample.System.__new__(sample.System)
    same = SimpleNamespace(encode=lambda x: x, decode=lambda x: x)
    system.vae = same
    system.vq = SimpleNamespace(encode=lambda x: x - 0.25, decode=lambda x: (x + 1) / 2)
    system.size = 2
    system.device = torch.device("cpu")
    system.mean = torch.tensor([0.0, 0.5, -0.5])
    system.std = torch.tensor([1.0, 0.5, 2.0])
    x_c = torch.tensor([[[-1.0, 1, 0], [1, -1, 0], [0, 0, 0.75], [-1, 1, 0]]])
    pictures = system.decode_continuous(x_c)
    assert pictures[0, 0].tolist() == [[0, 255], [128, 0]]
    assert pictures[0, 1].tolist() == [[255, 128], [191, 255]]
    assert pictures[0, 2].tolist() == [[64, 64], [255, 64]]

    pictures = torch.tensor([[[[0, 255], [100, 50]]] * 3]).byte()
    x_d = system.encode_discrete(pictures)
    assert x_d.tolist() == [[[-1] * 3, [1] * 3, [1] * 3, [-1] * 3]]
    assert system.decode_discrete(x_d)[0, 0].tolist() == [[0, 255], [255, 0]]
