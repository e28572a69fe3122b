"""Eqs. (6) and (9) inside the backbone, presets, and both transformers and their samplers against the official numbers."""
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import backbone
import golden
import mixing
import sample
import train
import tokenizers

T, F = True, False


# Eq. (6): what z may depend on

@cache
def small(guidance, mix_at="decoder", d_d=3):
    """A random MAR of 6 tokens with d_c = 4."""
    config = dict(N=6, d_c=4, classes=5, D=8, depth=2, heads=2, K=2, head_depth=1, head_width=8, dropout=0.0)
    return golden.fill(backbone.MAR(d_d=d_d, guidance=guidance, mix_at=mix_at, **config)).requires_grad_(False)


def inputs():
    """x_c, x_d, m, y, drop of two images; tokens 0, 2, 3 and 1, 4, 5 are hidden."""
    g = torch.Generator().manual_seed(1)
    x_d = torch.randint(0, 2, (2, 6, 3), generator=g) * 2.0 - 1
    m = torch.tensor([[T, F, T, T, F, F], [F, T, F, F, T, T]])
    return torch.randn(2, 6, 4, generator=g), x_d, m, torch.tensor([1, 4]), torch.tensor([F, F])


def changes_z(model, **changed):
    """Whether z of any token changes if these inputs are changed; per image."""
    names = ("x_c", "x_d", "m", "y", "drop")
    before = dict(zip(names, inputs()))
    with torch.no_grad():
        a, b = model(**before), model(**(before | changed))
    return [bool(d > 1e-4) for d in (a - b).abs().amax(dim=(1, 2))]


def flipped(positions):
    """X_d with the bits of image 0 turned round at these positions."""
    x_d = inputs()[1]
    x_d[0, positions] *= -1
    return x_d


def hidden_x_c_replaced():
    x_c, _, m, _, _ = inputs()
    return torch.where(m[..., None], torch.full_like(x_c, 9.0), x_c)


def test_eq06_z_does_not_know_the_hidden_x_c():
    """Eq. (6): x_c^i is predicted from the VISIBLE continuous tokens: a hidden one must not leak into any z."""
    for guidance in ("none", "dcsa", "dcca"):
        assert changes_z(small(guidance), x_c=hidden_x_c_replaced()) == [F, F], guidance


def test_eq06_z_depends_on_the_visible_x_c():
    """Eq. (6): every visible continuous token is context."""
    for guidance in ("none", "dcsa", "dcca"):
        for position in (1, 4, 5):
            x_c = inputs()[0]
            x_c[0, position] += 1
            assert changes_z(small(guidance), x_c=x_c) == [T, F], f"{guidance}, visible token {position}"


def test_eq06_dcsa_and_dcca_see_every_discrete_token():
    """Eq. (6): DC-SA and DC-CA condition on ALL of X_d, at visible positions too."""
    for guidance in ("dcsa", "dcca"):
        for position in range(6):
            assert changes_z(small(guidance), x_d=flipped([position])) == [T, F], f"{guidance}, token {position}"


def test_eq06_dcsa_and_dcca_know_where_a_discrete_token_lies():
    """DC-SA and DC-CA: the same discrete tokens in other places are other guidance."""
    x_d = inputs()[1]
    for guidance in ("dcsa", "dcca"):
        assert changes_z(small(guidance), x_d=x_d.roll(1, dims=1)) == [T, T], guidance


def test_eq06_without_guidance_x_d_is_ignored():
    """Guidance none is plain MAR: p(X_c), not p(X_c | X_d)."""
    assert changes_z(small("none"), x_d=-inputs()[1]) == [F, F]


def test_eq06_the_class_counts_unless_it_is_dropped():
    """Where drop is set, the label is replaced by "no class" and may not matter; elsewhere it must."""
    for guidance in ("none", "dcsa", "dcca"):
        model, other, dropped = small(guidance), torch.tensor([2, 3]), torch.tensor([T, F])
        assert changes_z(model, y=other) == [T, T], guidance
        assert changes_z(model, drop=dropped) == [T, F], guidance
        with torch.no_grad():
            x_c, x_d, m, y, _ = inputs()
            a, b = model(x_c, x_d, m, y, dropped), model(x_c, x_d, m, other, dropped)
        assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1]), guidance


def test_eq06_images_of_a_batch_do_not_mix():
    """Eq. (6) is one image's distribution: z of an image is the same alone and in a batch."""
    for guidance in ("none", "dcsa", "dcca"):
        model, given = small(guidance), inputs()
        with torch.no_grad():
            torch.testing.assert_close(model(*given)[1:], model(*(a[1:] for a in given)))


def test_eq06_leaves_its_inputs_unchanged():
    """Eq. (6): the forward pass only reads its inputs."""
    for guidance in ("none", "dcsa", "dcca"):
        given, kept = inputs(), inputs()
        small(guidance)(*given)
        assert all(torch.equal(a, b) for a, b in zip(given, kept)), guidance


# Eq. (9) inside the backbone

MIXED = [("dcmix", "decoder"), ("dcmix", "encoder")]


def test_eq09_hidden_positions_are_guided_by_their_discrete_token():
    """Eq. (9): x_d^i at a hidden position takes the place of x_c^i, so z depends on it."""
    for how in MIXED:
        for position in (0, 2, 3):
            assert changes_z(small(*how), x_d=flipped([position])) == [T, F], f"{how}, hidden token {position}"


def test_eq09_visible_positions_hold_no_discrete_token():
    """Eq. (9): where m^i = 0 the mixed sequence holds x_c^i; x_d^i there must not change z."""
    for how in MIXED:
        assert changes_z(small(*how), x_d=flipped([1, 4, 5])) == [F, F], how


def test_eq09_z_does_not_know_the_hidden_x_c():
    """Eq. (9): a hidden x_c^i is replaced before the backbone sees it, so it must not leak into any z."""
    for how in MIXED:
        assert changes_z(small(*how), x_c=hidden_x_c_replaced()) == [F, F], how


def test_eq09_z_depends_on_the_visible_x_c():
    """Eq. (9): the visible continuous tokens stay in the mixed sequence."""
    for how in MIXED:
        for position in (1, 4, 5):
            x_c = inputs()[0]
            x_c[0, position] += 1
            assert changes_z(small(*how), x_c=x_c) == [T, F], f"{how}, visible token {position}"


def test_eq09_the_class_counts_unless_it_is_dropped():
    """DC-Mix keeps MAR's class tokens: a label matters exactly where it is not dropped."""
    for how in MIXED:
        assert changes_z(small(*how), y=torch.tensor([2, 3])) == [T, T], how
        with torch.no_grad():
            x_c, x_d, m, y, _ = inputs()
            a, b = (small(*how)(x_c, x_d, m, label, torch.tensor([T, F])) for label in (y, torch.tensor([2, 3])))
        assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1]), how


@torch.no_grad()
def test_eq09_a_hidden_token_enters_the_decoder_where_mar_has_its_mask_token():
    """Section 4.2: the padded bits take x_c's own way, input projection, positions, decoder_embed; only the blocks of the encoder are left out."""
    model, (x_c, x_d, m, y, drop), entering = small("dcmix"), inputs(), []
    hook = model.decoder_blocks[0].register_forward_pre_hook(lambda module, args: entering.append(args[0][:, 2:]))       # without K = 2 class tokens
    model(x_c, x_d, m, y, drop)
    hook.remove()
    padded = torch.cat([x_d, torch.zeros(2, 6, 1)], dim=2)                   # d_d = 3 to d_c = 4
    embedded = model.z_proj_ln(model.z_proj(padded) + model.encoder_pos_embed_learned[:, 2:])
    expected = model.decoder_embed(embedded) + model.decoder_pos_embed_learned[:, 2:]
    torch.testing.assert_close(entering[0][m], expected[m])


@torch.no_grad()
def test_eq09_with_nothing_hidden_dcmix_is_mar():
    """Eq. (9): without hidden tokens the mixed sequence is X_c, and DC-Mix with MAR's weights gives MAR's z."""
    x_c, x_d, m, y, drop = inputs()
    visible = torch.zeros_like(m)
    for how in MIXED:
        torch.testing.assert_close(small(*how)(x_c, x_d, visible, y, drop), small("none")(x_c, x_d, visible, y, drop))


def test_eq09_the_model_refuses_more_bits_than_channels():
    """Eq. (9) needs d_d <= d_c: dcmix with 5 bits and 4 channels is an error before training starts; other guidances may."""
    with pytest.raises(ValueError, match=r"(?s)5.*4"):
        small("dcmix", d_d=5)
    small("dcsa", d_d=5)


def test_an_unknown_guidance_is_an_error():
    """A misspelt guidance or place of mixing is a ValueError that lists the choices."""
    with pytest.raises(ValueError, match="dcmix"):
        small("dc-mix")
    with pytest.raises(ValueError, match="encoder"):
        small("dcmix", "middle")


# sizes: Tables 1 and 2

def parameters(preset, guidance):
    """{name: number of parameters} at 256 x 256, d_c = 32, 14 bits, 1000 classes; no memory is used."""
    with torch.device("meta"):
        model = backbone.MAR(256, 32, 14, 1000, guidance=guidance, **backbone.PRESETS[preset]["mar"])
    return {name: p.numel() for name, p in model.named_parameters()}


@pytest.mark.parametrize("preset, guidance, millions, paper", [
    ("base", "none", 208.0, 208), ("base", "dcmix", 208.0, 208),
    ("large", "dcmix", 557.0, 557), ("large", "dcsa", 573.8, 574), ("large", "dcca", 708.0, 707)])
def test_presets_have_the_papers_sizes(preset, guidance, millions, paper):
    """Tables 1 and 2, in millions; DC-CA is within 0.2 % of the paper's number, the others round to it."""
    count = sum(parameters(preset, guidance).values()) / 1e6
    assert round(count, 1) == millions
    assert abs(count - paper) < max(0.5, 0.002 * paper)


@pytest.mark.parametrize("preset", ["tiny", "base", "large", "huge"])
def test_dcmix_adds_no_parameters(preset):
    """Section 3.3: DC-Mix is MAR with x_d in the mask token's place; the mask token is the only difference."""
    none, dcmix = parameters(preset, "none"), parameters(preset, "dcmix")
    width = backbone.PRESETS[preset]["mar"]["D"]
    assert {k: n for k, n in none.items() if k not in dcmix} == {"mask_token": width}
    assert dcmix == {k: n for k, n in none.items() if k in dcmix}


def test_dcsa_and_dcca_add_what_the_paper_says():
    """Section 4.2: a table of 2^14 embeddings; DC-CA has one cross-attention in every block besides."""
    none, dcsa, dcca = (parameters("large", guidance) for guidance in ("none", "dcsa", "dcca"))
    assert {k: dcsa[k] for k in dcsa if k not in none} == {"discrete_emb.weight": 2 ** 14 * 1024}
    cross = {k.split(".cross.")[0] for k in dcca if ".cross." in k}
    assert cross == {f"{part}_blocks.{i}" for part in ("encoder", "decoder") for i in range(16)}


# MAR, against the official one

def tiny_mar(probe=None):
    return golden.model("mixar", "mar_tiny", probe).requires_grad_()


@pytest.fixture(scope="module")
def g():
    return golden.load("mar_tiny")


def forward(model, g, m, drop):
    """z of guidance none; X_d is not used."""
    return model(g["tokens"], None, m, g["labels"], torch.full((3,), drop))


def test_golden_mar_mask(g):
    """Eq. (8) hides what MAR hides: the first entries of the order."""
    assert mixing.sample_mask(g["orders"], float(g["train_mask_rate"])).tolist() == g["mask"].bool().tolist()


@pytest.mark.parametrize("suffix, drop, everything", [("", False, False), ("_uncond", True, False), ("_all_masked", False, True)])
@torch.no_grad()
def test_golden_mar_forward(g, suffix, drop, everything):
    """The encoder's output and z with classes, without classes, and with everything hidden as in the first step of generation."""
    model, m, seen = tiny_mar(), g["mask"].bool(), []
    assert m.sum(1).tolist() == [int(g["num_masked"])] * 3
    model.encoder_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    z = forward(model, g, torch.ones_like(m) if everything else m, drop)
    assert golden.difference(seen[0], g[f"encoder_out{suffix}"]) < 1e-5
    assert golden.difference(z, g[f"decoder_z{suffix}"]) < 1e-5


@pytest.mark.parametrize("probe", ["all", "nogain"])
@torch.no_grad()
def test_golden_mar_norms(g, probe):
    """Weights so small that a wrong epsilon in any norm of the backbone shows."""
    found = forward(tiny_mar(probe), g, g["mask"].bool(), False)
    assert golden.difference(found, golden.load("eps_probe_mar")[f"decoder_z_{probe}"]) < 1e-5


@torch.no_grad()
def test_golden_mar_block():
    """One transformer block on an input of about 1e-3."""
    probe = golden.load("eps_probe_mar")
    found = tiny_mar().encoder_blocks[0](probe["encoder_block0_x"], None)
    assert golden.difference(found, probe["encoder_block0_out"]) < 1e-5


def test_attention_is_the_same_with_and_without_gradient(g):
    """Training on a CPU writes attention out, inference uses the fused kernel: the results agree."""
    model, m = tiny_mar(), g["mask"].bool()
    with torch.no_grad():
        fused = forward(model, g, m, False)
    assert golden.difference(forward(model, g, m, False), fused) < 1e-5


def test_golden_mar_training_step(g):
    """MAR's whole training loss and its gradients: class drop, 2 draws of (t, noise) per token, mean over hidden tokens."""
    model, m = tiny_mar().train(), g["mask"].bool()
    for block in [*model.encoder_blocks, *model.decoder_blocks]:
        block.attn.p = block.mlp.p = 0.0                                     # the reference ran without dropout
    dropped = g["train_label_drop_draws"] < 0.1
    assert dropped.tolist() == g["train_label_dropped"].tolist()
    z, rows = model(g["tokens"], None, m, g["labels"], dropped), m.flatten()
    t, noise = g["train_t"].view(2, 48)[:, rows], g["train_noise"].view(2, 48, 8)[:, rows]
    loss = model.diffloss.loss(z[m], g["tokens"][m], t, noise).mean()
    loss.backward()
    assert golden.difference(loss, g["train_loss"]) < 1e-5
    for name in ("class_emb.weight", "fake_latent", "mask_token", "z_proj.weight"):
        expected = g["train_grad_" + name.removesuffix(".weight") + "_weight" * name.startswith("z_proj")]
        assert golden.difference(model.get_parameter(name).grad, expected) < 2e-4, name
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    assert norm == pytest.approx(float(g["train_grad_global_norm"]), rel=2e-4)


# Eq. (6), sampled: MAR's generation loop

@pytest.mark.parametrize("name, steps, cfg, schedule", [
    ("zero_iter8_cfg1", 8, 1.0, "linear"), ("zero_iter8_cfg3", 8, 3.0, "linear"),
    ("zero_iter16_cfg1", 16, 1.0, "linear"), ("zero_iter16_cfg3", 16, 3.0, "linear"),
    ("noise_iter8_cfg3", 8, 3.0, "linear"), ("noise_iter16_cfg1", 16, 1.0, "linear"),
    ("noise_iter8_cfg3_constant", 8, 3.0, "constant"), ("noise_iter8_uncond", 8, 1.0, "linear")])
def test_golden_generate(name, steps, cfg, schedule):
    """Whole latents: with all noise zero, or with given first noise; guided or not; without classes."""
    g, model, predicted = golden.load("mar_sample_tiny"), tiny_mar(), []

    def noise(now, n):
        predicted.append(now.sum(1).tolist())
        first = g["noise_per_token"][now] if name.startswith("noise") else torch.zeros(int(now.sum()), 8)
        return torch.cat([first[None], torch.zeros(24, *first.shape)])

    if "uncond" in name:
        model.class_emb.weight.data[:] = model.fake_latent
    x_c = sample.generate(model, None, g["labels"], g["orders"], noise, steps, 25, cfg, schedule)
    expected = g[f"{name}_tokens"].flatten(2).transpose(1, 2)                # (B, c, h, w) -> (B, N, c)
    assert predicted == [[n, n] for n in g[f"{name}_num_predicted"].tolist()]
    assert golden.difference(x_c, expected) < 1e-4


@pytest.mark.parametrize("cfg, name", [(1.0, "zero_iter8_cfg1"), (3.0, "zero_iter8_cfg3")])
@torch.no_grad()
def test_golden_first_z_of_generation(cfg, name):
    """The z of the first predicted tokens, those at the END of the order; guided runs add those without class."""
    g, model = golden.load("mar_sample_tiny"), tiny_mar()
    everything, left = torch.ones(2, 16, dtype=torch.bool), int(g[f"{name}_mask_len"][0])
    now = ~mixing.hide(g["orders"], left)
    z = [model(torch.zeros(2, 16, 8), None, everything, g["labels"], torch.full((2,), drop))[now] for drop in (F, T)[:1 + (cfg != 1)]]
    assert golden.difference(torch.cat(z), g[f"{name}_z_step0"]) < 1e-4


class Recorder:
    """A model of N tokens that notes how many tokens each step predicts and with what guidance scale."""

    d_c = 1

    def __init__(self):
        self.counts, self.scales, self.steps, self.diffloss = [], [], [], SimpleNamespace(sample=self.sample)

    def __call__(self, x_c, x_d, m, y, drop):
        return torch.zeros(*m.shape, 1)

    def sample(self, z, noise, steps, temperature, z_uncond, scale, bound):
        self.counts.append(len(z))
        self.scales.append(scale)
        self.steps.append(steps)
        return torch.zeros(len(z), 1)


@pytest.mark.parametrize("steps", [32, 64, 128, 256])
def test_golden_generation_schedule_of_256_tokens(steps):
    """How many tokens each of MAR's steps predicts, and the linear guidance that never quite reaches cfg."""
    g, model = golden.load("mar_sample_tiny"), Recorder()
    sample.generate(model, None, torch.tensor([0]), torch.arange(256)[None], lambda now, n: None, steps, 25, 3.0)
    assert model.counts == g[f"schedule256_iter{steps}_num_predicted"].tolist()
    torch.testing.assert_close(torch.tensor(model.scales).double(), g[f"schedule256_iter{steps}_cfg_iter_cfg3"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["zero_iter8_cfg3", "zero_iter16_cfg3", "noise_iter8_cfg3_constant"])
def test_golden_generation_schedule_of_16_tokens(name):
    """hidden_after is MAR's m of every step; the guidance scale follows it, or stays constant."""
    g, hidden, model = golden.load("mar_sample_tiny"), 16, Recorder()
    masks = g[f"{name}_mask_len"].tolist()
    for s, expected in enumerate(masks):
        hidden = sample.hidden_after(s, len(masks), 16, hidden)
        assert hidden == expected, f"step {s}"
    schedule = "constant" if "constant" in name else "linear"
    sample.generate(model, None, torch.tensor([0]), torch.arange(16)[None], lambda now, n: None, len(masks), 25, 3.0, schedule)
    torch.testing.assert_close(torch.tensor(model.scales).double(), g[f"{name}_cfg_iter"], rtol=1e-6, atol=0)


class Steps:
    """A model whose every token is the number of the AR step that drew it."""

    d_c = 1

    def __init__(self):
        self.saw, self.scales, self.diffloss = [], [], self

    def __call__(self, x_c, x_d, m, y, drop):
        self.saw.append((x_c[..., 0].clone(), m, drop.tolist()))
        return torch.zeros(*m.shape, 1)

    def sample(self, z, noise, steps, temperature, z_uncond, scale, bound):
        self.scales.append(scale)
        return torch.full((len(z), 1), float(len(self.scales)))


def filled(cfg=1.0):
    """Eight tokens drawn in four AR steps -> x_c (8,), the model."""
    model = Steps()
    order = torch.tensor([[3, 1, 7, 0, 4, 6, 2, 5]])
    return sample.generate(model, None, torch.tensor([0]), order, lambda now, n: None, 4, 25, cfg)[0, :, 0].tolist(), model


def test_eq06_generation_draws_more_tokens_in_every_ar_step():
    """Eq. (6): of 8 tokens 7, 5, 3, 0 stay hidden after the four steps, 8 cos(pi/2 s/4) rounded down; the order is used from its end."""
    assert filled()[0] == [3, 4, 2, 4, 3, 1, 2, 4]


def test_eq06_generation_sees_the_tokens_drawn_before():
    """Eq. (6): each AR step predicts from the visible x_c, those of earlier steps, and hides exactly the rest."""
    _, model = filled()
    assert [int(m.sum()) for _, m, _ in model.saw] == [8, 7, 5, 3]
    for x_c, m, drop in model.saw:
        assert torch.equal(x_c == 0, m) and drop == [False]


def test_eq06_generation_is_guided_more_the_more_is_known():
    """With guidance 3: a second z without class in every step, and a scale that grows from 1 with the share of tokens known after it."""
    _, model = filled(cfg=3.0)
    assert [drop for _, _, drop in model.saw] == [[False], [True]] * 4
    assert model.scales == [1.25, 1.75, 2.25, 2.75]


@pytest.mark.parametrize("given, ar_steps, expected", [(25, 4, [25] * 4), ((40, 10), 4, [40, 30, 20, 10]), ([40, 10], 1, [40])])
def test_diffusion_steps_fall_linearly_over_the_ar_steps(given, ar_steps, expected):
    """One number holds for every AR step; of two, the first AR step has the first and the last the second. The noise is of the same length."""
    model, asked = Recorder(), []
    sample.generate(model, None, torch.tensor([0]), torch.arange(16)[None], lambda now, n: asked.append(n), ar_steps, given)
    assert model.steps == asked == expected


def test_more_steps_than_tokens_still_fill_every_token_once():
    """40 steps of 16 tokens, guided: some steps predict nothing, every token is predicted exactly once."""
    g, predicted = golden.load("mar_sample_tiny"), torch.zeros(2, 16)

    def noise(now, n):
        predicted.add_(now)
        return torch.zeros(2, int(now.sum()), 8)

    x_c = sample.generate(tiny_mar(), None, g["labels"], g["orders"], noise, 40, 2, 3.0)
    assert (predicted == 1).all() and (x_c != 0).all() and x_c.isfinite().all()


# g_M, against MaskBit's generator

def tiny_prior(prenorm, probe=None):
    return golden.model("prior", f"maskbit_generator_tiny_{'pre' if prenorm else 'post'}norm", probe).requires_grad_()


@pytest.fixture(scope="module")
def bit():
    return golden.load("maskbit_generator_tiny")


NORMS = pytest.mark.parametrize("norm", ["post", "pre"])


def test_golden_bit_conversions(bit):
    """Index, bits (least significant first) and the two codes of every token, for 6 and for 14 bits."""
    for name, K in (("conv", 6), ("conv14", 14)):
        index, codes, bits = bit[f"{name}_index"], bit[f"{name}_split"], bit[f"{name}_bits"]
        assert torch.equal(tokenizers.codes_to_bits(index[..., None], K), bits)
        assert torch.equal(tokenizers.bits_to_codes(bits), index)
        assert torch.equal(tokenizers.bits_to_codes(bits.unflatten(-1, (2, K // 2))), codes)
        assert torch.equal(tokenizers.codes_to_bits(codes, K // 2), bits)
    assert tiny_prior(False).bits_to_indices.equal(bit["bits_to_indices"])


def test_golden_prior_input(bit):
    """Masked codes become zeros, each bit group by itself."""
    assert torch.equal(tokenizers.codes_to_bits(bit["masked_tokens"], 3), bit["input_bits"])


@NORMS
@torch.no_grad()
def test_golden_prior_logits(bit, norm):
    """Logits with some labels dropped and with none."""
    model = tiny_prior(norm == "pre")
    assert golden.difference(model(bit["input_bits"], bit["labels"], bit["drop_mask"]), bit[f"logits_{norm}"]) < 1e-5
    assert golden.difference(model(bit["input_bits"], bit["labels"]), bit[f"logits_{norm}_nodrop"]) < 1e-5


@NORMS
@pytest.mark.parametrize("probe", ["all", "nogain"])
@torch.no_grad()
def test_golden_prior_norms(bit, norm, probe):
    """Weights so small that a wrong epsilon in any norm of the generator shows."""
    found = tiny_prior(norm == "pre", probe)(bit["input_bits"], bit["labels"], bit["drop_mask"])
    assert golden.difference(found, golden.load("eps_probe_maskbit")[f"logits_{norm}_{probe}"]) < 1e-5


@torch.no_grad()
def test_golden_prior_layer():
    """Attention and feed-forward of one pre-norm layer on an input of about 1e-4."""
    probe = golden.load("eps_probe_maskbit")
    attend, feed_forward = tiny_prior(True).transformer.layers[0]
    assert golden.difference(attend(probe["pre_layer0_x"]), probe["pre_layer0_attn_out"]) < 1e-5
    assert golden.difference(feed_forward(probe["pre_layer0_x"]), probe["pre_layer0_ff_out"]) < 1e-5


def test_prior_leaves_its_inputs_unchanged(bit):
    """MaskBit's own forward overwrites the caller's labels where they are dropped; this one only reads them."""
    x, y, drop = bit["input_bits"].clone(), bit["labels"].clone(), bit["drop_mask"].clone()
    tiny_prior(False)(x, y, drop)
    assert torch.equal(x, bit["input_bits"]) and torch.equal(y, bit["labels"]) and torch.equal(drop, bit["drop_mask"])


def test_golden_training_mask(bit):
    """Which codes MaskBit's training hides, given its uniform draws."""
    mask = train.training_mask(bit["trainmask_u_ratio"], bit["trainmask_u_token"])
    assert torch.equal(mask, bit["trainmask_mask"])
    assert torch.equal(torch.where(mask, 8, bit["trainmask_tokens"]), bit["trainmask_masked"])


def test_golden_masked_loss(bit):
    """Eq. (3) as MaskBit trains it, and three of its gradients."""
    assert golden.difference(train.masked_loss(bit["logits_post"], bit["tokens"]), bit["mlm_loss"]) < 1e-5
    model = tiny_prior(False)
    train.masked_loss(model(bit["input_bits"], bit["labels"], bit["drop_mask"]), bit["tokens"]).backward()
    for p, name in ((model.input_proj.weight, "input_proj"), (model.pos_emb, "pos_emb"), (model.prediction_layer.bias, "prediction_bias")):
        assert golden.difference(p.grad, bit[f"mlm_grad_{name}"]) < 1e-5, name


# Eq. (4): MaskBit's sampler

class FixedPrior:
    """A prior of 16 tokens with given logits, other ones where the label is dropped."""

    N, splits, bits = 16, 2, 6

    def __init__(self, bit):
        self.logits, self.free = bit["sampler_logits_cond"], bit["sampler_logits_uncond"]

    def __call__(self, x, y, drop=None):
        images = len(y) // 3
        drop = torch.zeros(len(y), dtype=torch.bool) if drop is None else drop
        return torch.where(drop[:, None, None, None], self.free.repeat(images, 1, 1, 1), self.logits.repeat(images, 1, 1, 1))


@pytest.mark.parametrize("name, steps, guidance", [
    ("fixed8", 8, 5.8), ("fixed8_gumbel", 8, 5.8), ("fixed8_noguidance", 8, 0.0),
    ("model8", 8, 5.8), ("model8_gumbel", 8, 5.8), ("model24", 24, 5.8), ("wraparound64", 64, 5.8)])
def test_golden_prior_sampler(bit, name, steps, guidance):
    """Which codes each step fixes and which it hides again, with fixed logits and with the tiny model; the code drawn is the likeliest."""
    prior = FixedPrior(bit) if name.startswith("fixed") else tiny_prior(False)
    gumbels = iter(bit["sampler_gumbel"] if "gumbel" in name else torch.zeros(steps, 3, 16, 2))
    seen = []

    class Watched(FixedPrior):
        def __call__(self, x, y, drop=None):
            seen.append(x[:3])
            return prior(x, y, drop)

    bits = sample.sample_prior(Watched(bit), torch.tensor([1, 5, 8]), lambda logits: logits.argmax(-1), lambda: next(gumbels),
                               steps, guidance, 3.0, 2.0 if "gumbel" in name else 4.5)
    expected = tokenizers.codes_to_bits(bit[f"{name}_inputs"].flatten(0, 1), 3).unflatten(0, (steps, 3))
    for i, x in enumerate(seen):
        assert torch.equal(x, expected[i]), f"what the model sees in step {i}"
    assert torch.equal(tokenizers.bits_to_codes(bits), bit[f"{name}_tokens"])


@pytest.mark.parametrize("steps", [8, 64, 256])
def test_golden_prior_schedule_of_512_codes(bit, steps):
    """How many of 256 x 2 codes are still masked before each step."""
    class Counting:
        N, splits, bits = 256, 2, 14

        def __call__(self, x, y):
            seen.append(int((x.unflatten(-1, (2, 7))[..., 0] == 0).sum()))
            return torch.zeros(1, 256, 2, 128)

    seen, generator = [], torch.Generator().manual_seed(0)
    sample.sample_prior(Counting(), torch.tensor([0]), lambda logits: torch.zeros(1, 256, 2, dtype=torch.long),
                        lambda: torch.rand(1, 256, 2, generator=generator), steps, 0.0, 3.0, 1.0)
    assert seen == bit[f"schedule_num_masked_before_step_512_{steps}"].tolist()


@pytest.mark.parametrize("steps", [8, 64, 256])
def test_golden_prior_guidance(bit, steps):
    """MaskBit's cosine guidance of power 3: 0 in the first step, never quite 5.8."""
    found = torch.tensor([sample.prior_guidance(5.8, 3.0, i, steps) for i in range(steps)])
    assert golden.difference(found, bit[f"schedule_guidance_{steps}"]) < 1e-6


def test_eq03_the_prior_learns_the_codes_behind_a_random_mask():
    """Eq. (3): each code is hidden with probability acos(u) / (pi / 2), one u an image; cross-entropy smoothed by 0.1 over all codes."""
    bit = golden.load("maskbit_generator_tiny")
    test_golden_training_mask(bit)
    test_golden_masked_loss(bit)


def test_eq04_x_d_is_drawn_from_all_masked_keeping_the_most_certain_codes():
    """Eq. (4): which codes each step fixes and hides again, with guidance and Gumbel noise that change over the steps."""
    bit = golden.load("maskbit_generator_tiny")
    for name, steps, guidance in (("fixed8", 8, 5.8), ("fixed8_gumbel", 8, 5.8), ("model8_gumbel", 8, 5.8)):
        test_golden_prior_sampler(bit, name, steps, guidance)
    test_golden_prior_guidance(bit, 8)


def test_dropout_drops_the_share_p_and_keeps_the_mean():
    """A share p of the entries is 0 whichever part of a 64-bit draw decides them, the others and their gradients are divided by 1 - p; p = 0 drops nothing."""
    torch.manual_seed(0)
    x = torch.ones(250, 403, requires_grad=True)                             # 100,750 entries, not a multiple of 4
    y = backbone.dropout(x, 0.1)
    y.sum().backward()
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.9]) and torch.equal(x.grad, y)
    for lane in range(4):
        assert (y.flatten()[lane::4] == 0).double().mean().item() == pytest.approx(0.1, abs=0.006)       # 3 deviations
    neighbours = (y.flatten()[:-1] == 0) & (y.flatten()[1:] == 0)
    assert neighbours.double().mean().item() == pytest.approx(0.01, abs=0.001)
    assert torch.equal(backbone.dropout(x, 0.0), x)
