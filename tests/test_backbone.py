"""Tests of Eqs. (6) and (9) inside the backbone, then of its sizes.

After them, both transformers and their samplers are compared with the numbers of the official code.
"""
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import backbone
import golden
import mixing
import sample
import tokenizers
import train

T = True
F = False


# Eq. (6): what z may depend on

@cache
def small(guidance, mix_at="decoder", d_d=3):
    """A MAR with random weights, of 6 tokens with d_c = 4."""
    model = backbone.MAR(
        N=6, d_c=4, d_d=d_d, classes=5, guidance=guidance, mix_at=mix_at,
        D=8, depth=2, heads=2, K=2, head_depth=1, head_width=8, dropout=0.0,
    )
    return golden.fill(model).requires_grad_(False)


def inputs():
    """x_c, x_d, m, y, drop of two images.

    Tokens 0, 2, 3 of the first image are hidden, and tokens 1, 4, 5 of the second.
    """
    g = torch.Generator().manual_seed(1)
    x_d = torch.randint(0, 2, (2, 6, 3), generator=g) * 2.0 - 1
    x_c = torch.randn(2, 6, 4, generator=g)
    m = torch.tensor([[T, F, T, T, F, F], [F, T, F, F, T, T]])
    y = torch.tensor([1, 4])
    drop = torch.tensor([F, F])
    return x_c, x_d, m, y, drop


def z_of(model, x_c, x_d, m, y, drop):
    """z of Eq. (6), from x_c and x_d as the training step has them."""
    return model(model.mix(x_c, x_d, m), x_d, m, y, drop)


def changes_z(model, **changed):
    """For each image, whether any of its z changes if these inputs are changed."""
    names = ("x_c", "x_d", "m", "y", "drop")
    before = dict(zip(names, inputs()))
    after = before | changed
    with torch.no_grad():
        difference = (z_of(model, **before) - z_of(model, **after)).abs()
    return [bool(largest > 1e-4) for largest in difference.amax(dim=(1, 2))]


def x_d_flipped_at(*positions):
    """X_d, with all bits of these tokens of image 0 turned into their opposite."""
    _, x_d, _, _, _ = inputs()
    x_d[0, list(positions)] *= -1
    return x_d


def x_c_changed_at(position):
    """X_c, with another token at this position of image 0."""
    x_c, _, _, _, _ = inputs()
    x_c[0, position] += 1
    return x_c


def hidden_x_c_replaced():
    """X_c, with other tokens at all hidden positions of both images."""
    x_c, _, m, _, _ = inputs()
    return torch.where(m[..., None], torch.full_like(x_c, 9.0), x_c)


def label_counts_where_not_dropped(model):
    """Whether another class changes z exactly in the image whose class is not dropped."""
    x_c, x_d, m, y, _ = inputs()
    other = torch.tensor([2, 3])
    dropped = torch.tensor([T, F])
    with torch.no_grad():
        a = z_of(model, x_c, x_d, m, y, dropped)
        b = z_of(model, x_c, x_d, m, other, dropped)
    return torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1])


def test_eq06_z_does_not_know_the_hidden_x_c():
    """Eq. (6): x_c^i is predicted from the VISIBLE continuous tokens.

    A hidden one must not leak into any z.
    """
    for guidance in ("none", "dcsa", "dcca"):
        assert changes_z(small(guidance), x_c=hidden_x_c_replaced()) == [F, F], guidance


def test_eq06_z_depends_on_the_visible_x_c():
    """Eq. (6): every visible continuous token is context, so z must change with it."""
    for guidance in ("none", "dcsa", "dcca"):
        for position in (1, 4, 5):
            changed = changes_z(small(guidance), x_c=x_c_changed_at(position))
            assert changed == [T, F], f"{guidance}, visible token {position}"


def test_eq06_dcsa_and_dcca_see_every_discrete_token():
    """Eq. (6): DC-SA and DC-CA condition on ALL of X_d, also at visible positions."""
    for guidance in ("dcsa", "dcca"):
        for position in range(6):
            changed = changes_z(small(guidance), x_d=x_d_flipped_at(position))
            assert changed == [T, F], f"{guidance}, token {position}"


def test_eq06_dcsa_and_dcca_know_where_a_discrete_token_lies():
    """DC-SA and DC-CA: the same discrete tokens at other positions must give another z."""
    _, x_d, _, _, _ = inputs()
    for guidance in ("dcsa", "dcca"):
        assert changes_z(small(guidance), x_d=x_d.roll(1, dims=1)) == [T, T], guidance


def test_eq06_without_guidance_x_d_is_ignored():
    """Guidance none is plain MAR. It models p(X_c), not p(X_c | X_d)."""
    _, x_d, _, _, _ = inputs()
    assert changes_z(small("none"), x_d=-x_d) == [F, F]


def test_eq06_the_class_counts_unless_it_is_dropped():
    """Where drop is set, "no class" replaces the label, so the label may not change z.

    Everywhere else it must.
    """
    for guidance in ("none", "dcsa", "dcca"):
        model = small(guidance)
        assert changes_z(model, y=torch.tensor([2, 3])) == [T, T], guidance
        assert changes_z(model, drop=torch.tensor([T, F])) == [T, F], guidance
        assert label_counts_where_not_dropped(model), guidance


def test_eq06_images_of_a_batch_do_not_mix():
    """Eq. (6) is the distribution of one image: its z is the same alone and in a batch."""
    for guidance in ("none", "dcsa", "dcca"):
        model = small(guidance)
        both = inputs()
        second = [a[1:] for a in both]
        with torch.no_grad():
            torch.testing.assert_close(z_of(model, *both)[1:], z_of(model, *second))


def test_eq06_leaves_its_inputs_unchanged():
    """Eq. (6): the forward pass only reads its inputs."""
    for guidance in ("none", "dcsa", "dcca"):
        given = inputs()
        z_of(small(guidance), *given)
        for after, before in zip(given, inputs()):
            assert torch.equal(after, before), guidance


# Eq. (9) inside the backbone

MIXED = [("dcmix", "decoder"), ("dcmix", "encoder")]


def test_eq09_hidden_positions_are_guided_by_their_discrete_token():
    """Eq. (9): at a hidden position x_d^i takes the place of x_c^i, so z must depend on x_d^i."""
    for how in MIXED:
        for position in (0, 2, 3):
            changed = changes_z(small(*how), x_d=x_d_flipped_at(position))
            assert changed == [T, F], f"{how}, hidden token {position}"


def test_eq09_visible_positions_hold_no_discrete_token():
    """Eq. (9): where m^i = 0 the mixed sequence holds x_c^i.

    So x_d^i must not change z there.
    """
    for how in MIXED:
        assert changes_z(small(*how), x_d=x_d_flipped_at(1, 4, 5)) == [F, F], how


def test_eq09_z_does_not_know_the_hidden_x_c():
    """Eq. (9): a hidden x_c^i is replaced before the backbone sees it.

    So it must not leak into any z.
    """
    for how in MIXED:
        assert changes_z(small(*how), x_c=hidden_x_c_replaced()) == [F, F], how


def test_eq09_z_depends_on_the_visible_x_c():
    """Eq. (9): the visible continuous tokens stay in the mixed sequence.

    So z must depend on them.
    """
    for how in MIXED:
        for position in (1, 4, 5):
            changed = changes_z(small(*how), x_c=x_c_changed_at(position))
            assert changed == [T, F], f"{how}, visible token {position}"


def test_eq09_the_class_counts_unless_it_is_dropped():
    """DC-Mix keeps MAR's class tokens: a label changes z exactly where it is not dropped."""
    for how in MIXED:
        assert changes_z(small(*how), y=torch.tensor([2, 3])) == [T, T], how
        assert label_counts_where_not_dropped(small(*how)), how


@torch.no_grad()
def test_eq09_a_hidden_token_enters_the_decoder_where_mar_has_its_mask_token():
    """Section 4.2: the padded bits go the same way as x_c.

    They pass the input projection, get the positions and pass decoder_embed. They leave out only
    the blocks of the encoder.
    """
    model = small("dcmix")
    x_c, x_d, m, y, drop = inputs()
    entering = []

    def note_input(module, args):
        # without the K = 2 class tokens
        entering.append(args[0][:, 2:])

    hook = model.decoder_blocks[0].register_forward_pre_hook(note_input)
    z_of(model, x_c, x_d, m, y, drop)
    hook.remove()

    # from d_d = 3 to d_c = 4
    padded = torch.cat([x_d, torch.zeros(2, 6, 1)], dim=2)
    positions = model.encoder_pos_embed_learned[:, 2:]
    embedded = model.z_proj_ln(model.z_proj(padded) + positions)
    expected = model.decoder_embed(embedded) + model.decoder_pos_embed_learned[:, 2:]
    torch.testing.assert_close(entering[0][m], expected[m])


@torch.no_grad()
def test_eq09_with_nothing_hidden_dcmix_is_mar():
    """Eq. (9): without hidden tokens the mixed sequence is X_c.

    So DC-Mix with MAR's weights gives MAR's z.
    """
    x_c, x_d, m, y, drop = inputs()
    visible = torch.zeros_like(m)
    expected = z_of(small("none"), x_c, x_d, visible, y, drop)
    for how in MIXED:
        torch.testing.assert_close(z_of(small(*how), x_c, x_d, visible, y, drop), expected)


# sizes: Tables 1 and 2

def parameters(preset, guidance):
    """{name: number of parameters} at 256 x 256, d_c = 32, 14 bits, 1000 classes.

    The model is made on the meta device, which takes no memory.
    """
    config = backbone.PRESETS[preset]["mar"]
    with torch.device("meta"):
        model = backbone.MAR(256, 32, 14, 1000, guidance=guidance, **config)
    return {name: p.numel() for name, p in model.named_parameters()}


@pytest.mark.parametrize("preset, guidance, millions, paper", [
    ("base", "none", 208.0, 208),
    ("base", "dcmix", 208.0, 208),
    ("large", "dcmix", 557.0, 557),
    ("large", "dcsa", 573.8, 574),
    ("large", "dcca", 708.0, 707),
])
def test_presets_have_the_papers_sizes(preset, guidance, millions, paper):
    """The sizes in millions are those of Tables 1 and 2.

    DC-CA is within 0.2 % of the paper's number. The others round to it.
    """
    count = sum(parameters(preset, guidance).values()) / 1e6
    assert round(count, 1) == millions
    assert abs(count - paper) < max(0.5, 0.002 * paper)


@pytest.mark.parametrize("preset", ["tiny", "base", "large", "huge"])
def test_dcmix_adds_no_parameters(preset):
    """Section 3.3: DC-Mix is MAR with x_d in the place of the mask token.

    The mask token is the only difference between their parameters.
    """
    none = parameters(preset, "none")
    dcmix = parameters(preset, "dcmix")
    width = backbone.PRESETS[preset]["mar"]["D"]
    assert none == dcmix | {"mask_token": width}
    assert "mask_token" not in dcmix


def test_dcsa_and_dcca_add_what_the_paper_says():
    """Section 4.2: both add a table of 2^14 embeddings.

    DC-CA also adds one cross-attention to every block.
    """
    none = parameters("large", "none")
    dcsa = parameters("large", "dcsa")
    added = {name: count for name, count in dcsa.items() if name not in none}
    assert added == {"discrete_emb.weight": 2 ** 14 * 1024}

    dcca = parameters("large", "dcca")
    blocks = {name.split(".cross.")[0] for name in dcca if ".cross." in name}
    encoder = {f"encoder_blocks.{i}" for i in range(16)}
    decoder = {f"decoder_blocks.{i}" for i in range(16)}
    assert blocks == encoder | decoder


# MAR, against the official one

def tiny_mar(probe=None):
    """The tiny official MAR; probe: see golden.fill."""
    return golden.model("mixar", "mar_tiny", probe).requires_grad_()


@pytest.fixture(scope="module")
def g():
    """MAR's numbers for its tiny model."""
    return golden.load("mar_tiny")


def forward(model, g, m, drop):
    """z of guidance none for the three reference images. X_d is not used."""
    return model(g["tokens"], None, m, g["labels"], torch.full((3,), drop))


def test_golden_mar_mask(g):
    """Eq. (8) hides what MAR hides: the first entries of the order."""
    m = mixing.sample_mask(g["orders"], float(g["train_mask_rate"]))
    assert m.tolist() == g["mask"].bool().tolist()


@pytest.mark.parametrize("suffix, drop, everything", [
    ("", False, False),
    ("_uncond", True, False),
    ("_all_masked", False, True),
])
@torch.no_grad()
def test_golden_mar_forward(g, suffix, drop, everything):
    """The encoder's output and z equal MAR's.

    Three cases: with classes, without classes, and with everything hidden, as in the first step
    of generation.
    """
    model = tiny_mar()
    m = g["mask"].bool()
    assert m.sum(1).tolist() == [int(g["num_masked"])] * 3
    encoded = []

    def note_output(module, inputs, output):
        encoded.append(output)

    model.encoder_norm.register_forward_hook(note_output)
    z = forward(model, g, torch.ones_like(m) if everything else m, drop)
    assert golden.difference(encoded[0], g[f"encoder_out{suffix}"]) < 1e-5
    assert golden.difference(z, g[f"decoder_z{suffix}"]) < 1e-5


@pytest.mark.parametrize("probe", ["all", "nogain"])
@torch.no_grad()
def test_golden_mar_norms(g, probe):
    """The weights are so small that a wrong epsilon in any norm of the backbone shows."""
    found = forward(tiny_mar(probe), g, g["mask"].bool(), False)
    expected = golden.load("eps_probe_mar")[f"decoder_z_{probe}"]
    assert golden.difference(found, expected) < 1e-5


@torch.no_grad()
def test_golden_mar_block():
    """One transformer block equals MAR's on an input of about 1e-3."""
    probe = golden.load("eps_probe_mar")
    found = tiny_mar().encoder_blocks[0](probe["encoder_block0_x"], None)
    assert golden.difference(found, probe["encoder_block0_out"]) < 1e-5


def test_attention_is_the_same_with_and_without_gradient(g):
    """Training on a CPU writes attention out, inference uses the fused kernel: both agree."""
    model = tiny_mar()
    m = g["mask"].bool()
    with torch.no_grad():
        fused = forward(model, g, m, False)
    written_out = forward(model, g, m, False)
    assert golden.difference(written_out, fused) < 1e-5


def test_golden_mar_training_step(g):
    """MAR's whole training loss and its gradients.

    Classes are dropped, each token has 2 draws of (t, noise), and the loss is the mean over hidden
    tokens.
    """
    model = tiny_mar().train()
    for block in [*model.encoder_blocks, *model.decoder_blocks]:
        # the reference ran without dropout
        for module in block.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    dropped = g["train_label_drop_draws"] < 0.1
    assert dropped.tolist() == g["train_label_dropped"].tolist()

    m = g["mask"].bool()
    rows = m.flatten()
    z = model(g["tokens"], None, m, g["labels"], dropped)
    t = g["train_t"].view(2, 48)[:, rows]
    noise = g["train_noise"].view(2, 48, 8)[:, rows]
    loss = model.diffloss.loss(z[m], g["tokens"][m], t, noise).mean()
    loss.backward()
    assert golden.difference(loss, g["train_loss"]) < 1e-5

    references = {
        "class_emb.weight": "train_grad_class_emb",
        "fake_latent": "train_grad_fake_latent",
        "mask_token": "train_grad_mask_token",
        "z_proj.weight": "train_grad_z_proj_weight",
    }
    for name, reference in references.items():
        gradient = model.get_parameter(name).grad
        assert golden.difference(gradient, g[reference]) < 2e-4, name

    squares = [float(p.grad.double().square().sum()) for p in model.parameters()]
    norm = math.sqrt(sum(squares))
    assert norm == pytest.approx(float(g["train_grad_global_norm"]), rel=2e-4)


# sampling by Eq. (6): MAR's generation loop

def no_noise(now, n):
    """Stands in for the noise of an AR step where the model does not use it."""
    return None


@pytest.mark.parametrize("name, steps, cfg, schedule", [
    ("zero_iter8_cfg1", 8, 1.0, "linear"),
    ("zero_iter8_cfg3", 8, 3.0, "linear"),
    ("zero_iter16_cfg1", 16, 1.0, "linear"),
    ("zero_iter16_cfg3", 16, 3.0, "linear"),
    ("noise_iter8_cfg3", 8, 3.0, "linear"),
    ("noise_iter16_cfg1", 16, 1.0, "linear"),
    ("noise_iter8_cfg3_constant", 8, 3.0, "constant"),
    ("noise_iter8_uncond", 8, 1.0, "linear"),
])
def test_golden_generate(name, steps, cfg, schedule):
    """Whole latents equal MAR's.

    The noise is all zero, or the first noise is given. Guidance is on or off. One case is without
    classes.
    """
    g = golden.load("mar_sample_tiny")
    model = tiny_mar()
    predicted = []

    def noise(now, n):
        predicted.append(now.sum(1).tolist())
        if name.startswith("noise"):
            first = g["noise_per_token"][now]
        else:
            first = torch.zeros(int(now.sum()), 8)
        return torch.cat([first[None], torch.zeros(24, *first.shape)])

    if "uncond" in name:
        model.class_emb.weight.data[:] = model.fake_latent
    x_c = sample.generate(model, None, g["labels"], g["orders"], noise, steps, 25, cfg, schedule)
    assert predicted == [[n, n] for n in g[f"{name}_num_predicted"].tolist()]
    # from (B, c, h, w) to (B, N, c)
    expected = g[f"{name}_tokens"].flatten(2).transpose(1, 2)
    assert golden.difference(x_c, expected) < 1e-4


@pytest.mark.parametrize("cfg, name", [(1.0, "zero_iter8_cfg1"), (3.0, "zero_iter8_cfg3")])
@torch.no_grad()
def test_golden_first_z_of_generation(cfg, name):
    """The z of the first predicted tokens, which stand at the END of the order.

    In a guided run, their z without class follow.
    """
    g = golden.load("mar_sample_tiny")
    model = tiny_mar()
    everything = torch.ones(2, 16, dtype=torch.bool)
    left = int(g[f"{name}_mask_len"][0])
    now = ~mixing.hide(g["orders"], left)
    drops = [F, T] if cfg == 3.0 else [F]
    z = []
    for drop in drops:
        dropped = torch.full((2,), drop)
        z.append(model(torch.zeros(2, 16, 8), None, everything, g["labels"], dropped)[now])
    assert golden.difference(torch.cat(z), g[f"{name}_z_step0"]) < 1e-4


class Recorder:
    """A model of any number of tokens that notes what its head is asked for in each AR step.

    counts  how many tokens are predicted
    scales  the guidance scale
    steps   how many diffusion steps are taken
    """

    d_c = 1

    def __init__(self):
        self.counts = []
        self.scales = []
        self.steps = []
        self.diffloss = SimpleNamespace(sample=self.sample)

    def mix(self, x_c, x_d, m):
        return x_c

    def __call__(self, x, x_d, m, y, drop):
        return torch.zeros(*m.shape, 1)

    def sample(self, z, noise, steps, temperature, z_uncond, scale, bound):
        self.counts.append(len(z))
        self.scales.append(scale)
        self.steps.append(steps)
        return torch.zeros(len(z), 1)


def record(tokens, ar_steps, *settings, noise=no_noise):
    """The Recorder of one image of so many tokens. The settings begin with the diffusion steps."""
    model = Recorder()
    order = torch.arange(tokens)[None]
    sample.generate(model, None, torch.tensor([0]), order, noise, ar_steps, *settings)
    return model


def assert_scales(model, expected):
    """The guidance scales of all AR steps equal the expected ones."""
    scales = torch.tensor(model.scales).double()
    torch.testing.assert_close(scales, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [32, 64, 128, 256])
def test_golden_generation_schedule_of_256_tokens(steps):
    """How many tokens each of MAR's steps predicts, and with what guidance scale.

    The scale is linear and never quite reaches cfg.
    """
    g = golden.load("mar_sample_tiny")
    model = record(256, steps, 25, 3.0)
    assert model.counts == g[f"schedule256_iter{steps}_num_predicted"].tolist()
    assert_scales(model, g[f"schedule256_iter{steps}_cfg_iter_cfg3"])


@pytest.mark.parametrize("name", [
    "zero_iter8_cfg3",
    "zero_iter16_cfg3",
    "noise_iter8_cfg3_constant",
])
def test_golden_generation_schedule_of_16_tokens(name):
    """In every step, hidden_after is the number of tokens that MAR leaves hidden.

    The guidance scale follows it, or stays constant.
    """
    g = golden.load("mar_sample_tiny")
    masks = g[f"{name}_mask_len"].tolist()
    hidden = 16
    for s, expected in enumerate(masks):
        hidden = sample.hidden_after(s, len(masks), 16, hidden)
        assert hidden == expected, f"step {s}"
    schedule = "constant" if "constant" in name else "linear"
    model = record(16, len(masks), 25, 3.0, schedule)
    assert_scales(model, g[f"{name}_cfg_iter"])


class Steps:
    """A model whose every token is the number of the AR step that sampled it, counted from 1."""

    d_c = 1

    def __init__(self):
        self.saw = []
        self.scales = []
        self.diffloss = self

    def mix(self, x_c, x_d, m):
        return x_c

    def __call__(self, x_c, x_d, m, y, drop):
        self.saw.append((x_c[..., 0].clone(), m, drop.tolist()))
        return torch.zeros(*m.shape, 1)

    def sample(self, z, noise, steps, temperature, z_uncond, scale, bound):
        self.scales.append(scale)
        return torch.full((len(z), 1), float(len(self.scales)))


def filled(cfg=1.0):
    """x_c of eight tokens that four AR steps sampled, as a list of 8, and the model."""
    model = Steps()
    order = torch.tensor([[3, 1, 7, 0, 4, 6, 2, 5]])
    x_c = sample.generate(model, None, torch.tensor([0]), order, no_noise, 4, 25, cfg)
    return x_c[0, :, 0].tolist(), model


def test_eq06_generation_draws_more_tokens_in_every_ar_step():
    """Eq. (6): of 8 tokens 7, 5, 3, 0 stay hidden after the four AR steps.

    That is 8 cos(pi/2 s/4), rounded down. The order is used from its END.
    """
    x_c, _ = filled()
    assert x_c == [3, 4, 2, 4, 3, 1, 2, 4]


def test_eq06_generation_sees_the_tokens_drawn_before():
    """Eq. (6): each AR step predicts from the x_c of all earlier steps, and hides the rest."""
    _, model = filled()
    assert [int(m.sum()) for _, m, _ in model.saw] == [8, 7, 5, 3]
    for x_c, m, drop in model.saw:
        assert torch.equal(x_c == 0, m)
        assert drop == [False]


def test_eq06_generation_is_guided_more_the_more_is_known():
    """With guidance, every AR step computes a second z without class.

    The scale grows from 1 towards 3 with the share of tokens that are known after the step.
    """
    _, model = filled(cfg=3.0)
    assert [drop for _, _, drop in model.saw] == [[False], [True]] * 4
    assert model.scales == [1.25, 1.75, 2.25, 2.75]


@pytest.mark.parametrize("given, ar_steps, expected", [
    (25, 4, [25] * 4),
    ((40, 10), 4, [40, 30, 20, 10]),
    ([40, 10], 1, [40]),
])
def test_diffusion_steps_fall_linearly_over_the_ar_steps(given, ar_steps, expected):
    """One number of diffusion steps holds for every AR step.

    Of two, the first AR step has the first and the last AR step has the second. The noise has as
    many steps.
    """
    asked = []

    def noise(now, n):
        asked.append(n)

    model = record(16, ar_steps, given, noise=noise)
    assert model.steps == expected
    assert asked == expected


def test_more_steps_than_tokens_still_fill_every_token_once():
    """In 40 guided AR steps of 16 tokens, every token is predicted exactly once.

    Some steps predict nothing.
    """
    g = golden.load("mar_sample_tiny")
    predicted = torch.zeros(2, 16)

    def noise(now, n):
        predicted.add_(now)
        return torch.zeros(2, int(now.sum()), 8)

    x_c = sample.generate(tiny_mar(), None, g["labels"], g["orders"], noise, 40, 2, 3.0)
    assert (predicted == 1).all()
    assert (x_c != 0).all()
    assert x_c.isfinite().all()


# g_M, against MaskBit's generator

def tiny_prior(norm, probe=None):
    """The tiny generator of MaskBit; norm: "post" or "pre", probe: see golden.fill."""
    model = golden.model("prior", f"maskbit_generator_tiny_{norm}norm", probe)
    return model.requires_grad_()


@pytest.fixture(scope="module")
def bit():
    """MaskBit's numbers for its tiny generators."""
    return golden.load("maskbit_generator_tiny")


NORMS = pytest.mark.parametrize("norm", ["post", "pre"])


def test_golden_bit_conversions(bit):
    """The index, the bits and the two codes of every token, for 6 and for 14 bits.

    The least significant bit comes first.
    """
    for name, K in (("conv", 6), ("conv14", 14)):
        index = bit[f"{name}_index"]
        codes = bit[f"{name}_split"]
        bits = bit[f"{name}_bits"]
        assert torch.equal(tokenizers.codes_to_bits(index[..., None], K), bits)
        assert torch.equal(tokenizers.bits_to_codes(bits), index)
        groups = bits.unflatten(-1, (2, K // 2))
        assert torch.equal(tokenizers.bits_to_codes(groups), codes)
        assert torch.equal(tokenizers.codes_to_bits(codes, K // 2), bits)
    assert tiny_prior("post").bits_to_indices.equal(bit["bits_to_indices"])


def test_golden_prior_input(bit):
    """Masked codes become zeros, each bit group by itself."""
    assert torch.equal(tokenizers.codes_to_bits(bit["masked_tokens"], 3), bit["input_bits"])


@NORMS
@torch.no_grad()
def test_golden_prior_logits(bit, norm):
    """The logits equal MaskBit's, with some labels dropped and with none."""
    model = tiny_prior(norm)
    some_dropped = model(bit["input_bits"], bit["labels"], bit["drop_mask"])
    assert golden.difference(some_dropped, bit[f"logits_{norm}"]) < 1e-5
    none_dropped = model(bit["input_bits"], bit["labels"])
    assert golden.difference(none_dropped, bit[f"logits_{norm}_nodrop"]) < 1e-5


@NORMS
@pytest.mark.parametrize("probe", ["all", "nogain"])
@torch.no_grad()
def test_golden_prior_norms(bit, norm, probe):
    """The weights are so small that a wrong epsilon in any norm of the generator shows."""
    model = tiny_prior(norm, probe)
    found = model(bit["input_bits"], bit["labels"], bit["drop_mask"])
    expected = golden.load("eps_probe_maskbit")[f"logits_{norm}_{probe}"]
    assert golden.difference(found, expected) < 1e-5


@torch.no_grad()
def test_golden_prior_layer():
    """Attention and feed-forward of one pre-norm layer on an input of about 1e-4."""
    probe = golden.load("eps_probe_maskbit")
    attend, feed_forward = tiny_prior("pre").transformer.layers[0]
    x = probe["pre_layer0_x"]
    assert golden.difference(attend(x), probe["pre_layer0_attn_out"]) < 1e-5
    assert golden.difference(feed_forward(x), probe["pre_layer0_ff_out"]) < 1e-5


def test_prior_leaves_its_inputs_unchanged(bit):
    """The forward pass only reads its inputs.

    MaskBit's own forward pass overwrites the caller's labels where they are dropped.
    """
    x = bit["input_bits"].clone()
    y = bit["labels"].clone()
    drop = bit["drop_mask"].clone()
    tiny_prior("post")(x, y, drop)
    assert torch.equal(x, bit["input_bits"])
    assert torch.equal(y, bit["labels"])
    assert torch.equal(drop, bit["drop_mask"])


def test_golden_training_mask(bit):
    """Given MaskBit's uniform random numbers, the training mask hides the codes that it hides."""
    mask = train.training_mask(bit["trainmask_u_ratio"], bit["trainmask_u_token"])
    assert torch.equal(mask, bit["trainmask_mask"])
    masked = torch.where(mask, 8, bit["trainmask_tokens"])
    assert torch.equal(masked, bit["trainmask_masked"])


def test_golden_masked_loss(bit):
    """Eq. (3) as MaskBit trains it, and three of its gradients."""
    loss = train.masked_loss(bit["logits_post"], bit["tokens"])
    assert golden.difference(loss, bit["mlm_loss"]) < 1e-5

    model = tiny_prior("post")
    logits = model(bit["input_bits"], bit["labels"], bit["drop_mask"])
    train.masked_loss(logits, bit["tokens"]).backward()
    found = {
        "input_proj": model.input_proj.weight.grad,
        "pos_emb": model.pos_emb.grad,
        "prediction_bias": model.prediction_layer.bias.grad,
    }
    for name, gradient in found.items():
        assert golden.difference(gradient, bit[f"mlm_grad_{name}"]) < 1e-5, name


# Eq. (4): MaskBit's sampler

class FixedPrior:
    """A prior of 16 tokens with fixed logits. Where the label is dropped, they are other ones."""

    N = 16
    splits = 2
    bits = 6

    def __init__(self, bit):
        self.with_class = bit["sampler_logits_cond"]
        self.without_class = bit["sampler_logits_uncond"]

    def __call__(self, x, y, drop=None):
        # the reference has three images; a guided call has them twice
        repeats = len(y) // 3
        with_class = self.with_class.repeat(repeats, 1, 1, 1)
        without_class = self.without_class.repeat(repeats, 1, 1, 1)
        if drop is None:
            return with_class
        return torch.where(drop[:, None, None, None], without_class, with_class)


class WatchedPrior:
    """The prior given, of 16 tokens, that notes the bits of the first three images of each call."""

    N = 16
    splits = 2
    bits = 6

    def __init__(self, prior):
        self.prior = prior
        self.seen = []

    def __call__(self, x, y, drop=None):
        self.seen.append(x[:3])
        return self.prior(x, y, drop)


def likeliest(logits):
    """The likeliest code, in place of a random one."""
    return logits.argmax(-1)


@pytest.mark.parametrize("name, steps, guidance", [
    ("fixed8", 8, 5.8),
    ("fixed8_gumbel", 8, 5.8),
    ("fixed8_noguidance", 8, 0.0),
    ("model8", 8, 5.8),
    ("model8_gumbel", 8, 5.8),
    ("model24", 24, 5.8),
    ("wraparound64", 64, 5.8),
])
def test_golden_prior_sampler(bit, name, steps, guidance):
    """Which codes each step fixes and which it hides again, as MaskBit does.

    The logits are fixed or the tiny model's. The code that is fixed is the likeliest one.
    """
    if "gumbel" in name:
        gumbels = iter(bit["sampler_gumbel"])
        temperature = 2.0
    else:
        gumbels = iter(torch.zeros(steps, 3, 16, 2))
        temperature = 4.5

    def gumbel():
        return next(gumbels)

    prior = WatchedPrior(FixedPrior(bit) if name.startswith("fixed") else tiny_prior("post"))
    y = torch.tensor([1, 5, 8])
    bits = sample.sample_prior(prior, y, likeliest, gumbel, steps, guidance, 3.0, temperature)

    expected = tokenizers.codes_to_bits(bit[f"{name}_inputs"].flatten(0, 1), 3)
    expected = expected.unflatten(0, (steps, 3))
    for i, x in enumerate(prior.seen):
        assert torch.equal(x, expected[i]), f"what the model sees in step {i}"
    assert torch.equal(tokenizers.bits_to_codes(bits), bit[f"{name}_tokens"])


class CountingPrior:
    """A prior of 256 tokens in two groups that notes how many codes are masked in each call."""

    N = 256
    splits = 2
    bits = 14

    def __init__(self):
        self.masked = []

    def __call__(self, x, y):
        first_bits = x.unflatten(-1, (2, 7))[..., 0]
        self.masked.append(int((first_bits == 0).sum()))
        return torch.zeros(1, 256, 2, 128)


@pytest.mark.parametrize("steps", [8, 64, 256])
def test_golden_prior_schedule_of_512_codes(bit, steps):
    """How many of 256 x 2 codes are still masked before each step."""
    prior = CountingPrior()
    generator = torch.Generator().manual_seed(0)

    def code_0(logits):
        return torch.zeros(1, 256, 2, dtype=torch.long)

    def random_score():
        return torch.rand(1, 256, 2, generator=generator)

    sample.sample_prior(prior, torch.tensor([0]), code_0, random_score, steps, 0.0, 3.0, 1.0)
    expected = bit[f"schedule_num_masked_before_step_512_{steps}"]
    assert prior.masked == expected.tolist()


@pytest.mark.parametrize("steps", [8, 64, 256])
def test_golden_prior_guidance(bit, steps):
    """MaskBit's cosine guidance of power 3 is 0 in the first step and never quite reaches 5.8."""
    found = torch.tensor([sample.prior_guidance(5.8, 3.0, i, steps) for i in range(steps)])
    assert golden.difference(found, bit[f"schedule_guidance_{steps}"]) < 1e-6


def test_eq03_the_prior_learns_the_codes_behind_a_random_mask():
    """Eq. (3): each code is hidden with probability acos(u) / (pi / 2), with one u for each image.

    The loss is the cross-entropy, smoothed by 0.1, over all codes.
    """
    bit = golden.load("maskbit_generator_tiny")
    test_golden_training_mask(bit)
    test_golden_masked_loss(bit)


def test_eq04_x_d_is_drawn_from_all_masked_keeping_the_most_certain_codes():
    """Eq. (4): every step fixes the most certain codes and hides the others again.

    Guidance and Gumbel noise change over the steps.
    """
    bit = golden.load("maskbit_generator_tiny")
    for name in ("fixed8", "fixed8_gumbel", "model8_gumbel"):
        test_golden_prior_sampler(bit, name, 8, 5.8)
    test_golden_prior_guidance(bit, 8)
