"""Tests of Eq. (6) and of the entrance of Eq. (9), then of the sizes of the backbone.

After them, both transformers and their samplers are compared with the numbers of the official code:
MAR, Eq. (6), and MaskBit's generator, Eqs. (3) and (4).
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


# Eq. (6) with DC-Mix

MIXED = [("dcmix", "decoder"), ("dcmix", "encoder")]


def test_eq06_dcmix_is_guided_by_the_discrete_token_at_hidden_positions():
    """DC-Mix: at a hidden position x_d^i takes the place of x_c^i, so z must depend on x_d^i."""
    for how in MIXED:
        for position in (0, 2, 3):
            changed = changes_z(small(*how), x_d=x_d_flipped_at(position))
            assert changed == [T, F], f"{how}, hidden token {position}"


def test_eq06_dcmix_sees_no_discrete_token_at_visible_positions():
    """DC-Mix: where m^i = 0 the mixed sequence holds x_c^i, so x_d^i must not change z there."""
    for how in MIXED:
        assert changes_z(small(*how), x_d=x_d_flipped_at(1, 4, 5)) == [F, F], how


def test_eq06_dcmix_does_not_know_the_hidden_x_c():
    """DC-Mix: a hidden x_c^i is replaced before the backbone sees it.

    So it must not leak into any z.
    """
    for how in MIXED:
        assert changes_z(small(*how), x_c=hidden_x_c_replaced()) == [F, F], how


def test_eq06_dcmix_depends_on_the_visible_x_c():
    """DC-Mix: the visible continuous tokens stay in the mixed sequence, so z depends on them."""
    for how in MIXED:
        for position in (1, 4, 5):
            changed = changes_z(small(*how), x_c=x_c_changed_at(position))
            assert changed == [T, F], f"{how}, visible token {position}"


def test_eq06_dcmix_counts_the_class_unless_it_is_dropped():
    """DC-Mix keeps MAR's class tokens: a label changes z exactly where it is not dropped."""
    for how in MIXED:
        assert changes_z(small(*how), y=torch.tensor([2, 3])) == [T, T], how
        assert label_counts_where_not_dropped(small(*how)), how


@torch.no_grad()
def test_eq06_with_nothing_hidden_dcmix_is_mar():
    """Without hidden tokens the mixed sequence is X_c, so DC-Mix with MAR's weights gives its z."""
    x_c, x_d, m, y, drop = inputs()
    visible = torch.zeros_like(m)
    expected = z_of(small("none"), x_c, x_d, visible, y, drop)
    for how in MIXED:
        torch.testing.assert_close(z_of(small(*how), x_c, x_d, visible, y, drop), expected)


# Eq. (6), station by station: what enters each stack of blocks, and what leaves

WAYS = [("none", "decoder"), ("dcmix", "decoder"), ("dcmix", "encoder"), ("dcsa", "decoder"),
        ("dcca", "decoder")]
each_way = pytest.mark.parametrize("guidance, mix_at", WAYS)
# the positions of `inputs` that are visible to the encoder, behind K = 2 class tokens
VISIBLE = [[0, 1, 3, 6, 7], [0, 1, 2, 4, 5]]


def visible_of(x, mix_at):
    """The visible tokens of x (2, 2 + 6, D), image by image."""
    if mix_at == "encoder":
        return x
    return torch.stack([x[0, VISIBLE[0]], x[1, VISIBLE[1]]])


def embedded(model, x, y):
    """The class tokens and the tokens x, projected, with positions, then normalised."""
    label = model.class_emb(y)[:, None].expand(2, 2, 8)
    tokens = torch.cat([label, model.z_proj(x)], dim=1)
    return model.z_proj_ln(tokens + model.encoder_pos_embed_learned)


def embedded_discrete(model, x_d):
    """The discrete tokens out of their table, with the positions of x_c, then normalised."""
    codes = (x_d > 0).long() @ torch.tensor([1, 2, 4])
    table = model.discrete_emb(codes)
    return model.z_proj_ln(table + model.encoder_pos_embed_learned[:, 2:])


@torch.no_grad()
def stations(model):
    """What passes the blocks of a model that is given `inputs`, and its z.

    into_encoder, into_decoder      the tokens that enter the first block
    out_of_encoder, out_of_decoder  the tokens that leave the last block
    memories                        the discrete tokens that each block is given
    """
    passed = SimpleNamespace(memories=[])

    def note_encoder(module, args, output):
        passed.out_of_encoder = output

    def note_decoder(module, args, output):
        passed.out_of_decoder = output

    def note_memory(module, args):
        passed.memories.append(args[1])

    def note_into_encoder(module, args):
        passed.into_encoder = args[0]

    def note_into_decoder(module, args):
        passed.into_decoder = args[0]

    blocks = [*model.encoder_blocks, *model.decoder_blocks]
    hooks = [block.register_forward_pre_hook(note_memory) for block in blocks]
    hooks += [model.encoder_blocks[0].register_forward_pre_hook(note_into_encoder),
              model.encoder_blocks[-1].register_forward_hook(note_encoder),
              model.decoder_blocks[0].register_forward_pre_hook(note_into_decoder),
              model.decoder_blocks[-1].register_forward_hook(note_decoder)]
    passed.z = z_of(model, *inputs())
    for hook in hooks:
        hook.remove()
    return passed


@each_way
@torch.no_grad()
def test_eq06_what_enters_the_encoder(guidance, mix_at):
    """The encoder gets the class tokens and the visible tokens of the (mixed) sequence.

    The positions are added before the norm. With mix_at "encoder" it gets every token. DC-SA puts
    all discrete tokens in FRONT of them.
    """
    model = small(guidance, mix_at)
    x_c, x_d, m, y, _ = inputs()
    expected = visible_of(embedded(model, model.mix(x_c, x_d, m), y), mix_at)
    if guidance == "dcsa":
        expected = torch.cat([embedded_discrete(model, x_d), expected], dim=1)
    torch.testing.assert_close(stations(model).into_encoder, expected)


@each_way
@torch.no_grad()
def test_eq06_what_enters_the_decoder(guidance, mix_at):
    """The decoder gets a token at every position, with positions of its own.

    Visible ones come from the encoder, through encoder_norm and decoder_embed, each to its own
    place. A hidden one is the mask token, or with DC-Mix the embedded discrete token, which leaves
    out the encoder's blocks but passes decoder_embed. DC-SA's prefix goes on into the decoder.
    """
    model = small(guidance, mix_at)
    x_c, x_d, m, y, _ = inputs()
    passed = stations(model)
    seen = model.decoder_embed(model.encoder_norm(passed.out_of_encoder))
    positions = model.decoder_pos_embed_learned
    if guidance == "dcsa":
        prefix = seen[:, :6] + positions[:, 2:]
        seen = seen[:, 6:]
    if guidance == "dcmix":
        expected = model.decoder_embed(embedded(model, model.mix(x_c, x_d, m), y))
    else:
        expected = model.mask_token.expand(2, 8, 8).clone()
    if mix_at == "encoder":
        expected = seen
    else:
        for image in range(2):
            expected[image, VISIBLE[image]] = seen[image]
    expected = expected + positions
    if guidance == "dcsa":
        expected = torch.cat([prefix, expected], dim=1)
    torch.testing.assert_close(passed.into_decoder, expected)


@each_way
@torch.no_grad()
def test_eq06_z_is_what_leaves_the_decoder_at_the_tokens(guidance, mix_at):
    """z is normalised, cut to the last N tokens, then gets the positions of the diffusion head.

    DC-SA's prefix and the class tokens stand in front and are cut off.
    """
    model = small(guidance, mix_at)
    passed = stations(model)
    last = model.decoder_norm(passed.out_of_decoder)[:, -6:]
    torch.testing.assert_close(passed.z, last + model.diffusion_pos_embed_learned)


@torch.no_grad()
def test_eq06_dcca_gives_the_discrete_tokens_to_every_block():
    """DC-CA: the blocks of the encoder AND those of the decoder look at the same memory.

    It is all of X_d out of its table, with positions, normalised. No block changes it.
    """
    model = small("dcca")
    _, x_d, _, _, _ = inputs()
    memory = embedded_discrete(model, x_d)
    passed = stations(model)
    assert len(passed.memories) == 4
    for given in passed.memories:
        torch.testing.assert_close(given, memory)
    for block in [*model.encoder_blocks, *model.decoder_blocks]:
        assert block.cross is not None


def by_hand(q, k, v, heads):
    """Attention, head by head: the weights are softmax(q k / sqrt(width of a HEAD))."""
    out = []
    for q, k, v in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        out.append(weights @ v)
    return torch.cat(out, dim=-1)


def test_eq06_attention_is_a_softmax_over_the_keys_of_each_head():
    """softmax(q k^T / sqrt(D / heads)) v: the scale is that of a head, not of the whole width.

    It is the same while training, where it is written out, and at inference, by the fused kernel.
    """
    g = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(2, 5, 8, generator=g)
    k = torch.randn(2, 3, 8, generator=g)
    v = torch.randn(2, 3, 8, generator=g)
    for heads in (1, 2, 4):
        expected = by_hand(q, k, v, heads)
        for training in (True, False):
            with torch.set_grad_enabled(training):
                found = backbone.attention(q, k, v, heads)
            torch.testing.assert_close(found, expected, msg=f"{heads} heads, {training}")


@torch.no_grad()
def test_eq06_a_block_attends_then_looks_at_the_memory_then_thinks():
    """A block adds three things, each of its NORMALISED input, in this order.

    They are self-attention, with DC-CA the cross-attention, and the MLP. In the cross-attention the
    tokens ask (q) and the discrete tokens answer (k, v).
    """
    for guidance in ("none", "dcca"):
        block = small(guidance).encoder_blocks[0]
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2, 5, 8, generator=g)
        memory = torch.randn(2, 3, 8, generator=g)

        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
        expected = x + block.attn.proj(by_hand(q, k, v, 2))
        if guidance == "dcca":
            normed = torch.nn.functional.layer_norm(expected, [8], eps=1e-6)
            k, v = block.cross.kv(memory).chunk(2, dim=-1)
            expected = expected + block.cross.proj(by_hand(block.cross.q(normed), k, v, 2))
        expected = expected + block.mlp(block.norm2(expected))
        torch.testing.assert_close(block(x, memory), expected)


# Eq. (9) at the entrance of the backbone

def test_eq09_dcmix_mixes_the_padded_bits_and_the_others_mix_nothing():
    """Eq. (9): with DC-Mix, what goes in holds the padded bits at hidden positions.

    The other guidances take X_c as it is.
    """
    x_c = torch.tensor([[[1., 2, 3, 4]] * 6])
    x_d = torch.tensor([[[1., -1, 1]] * 6])
    m = torch.tensor([[T, F, F, F, F, T]])
    hidden = [1, -1, 1, 0]
    visible = [1, 2, 3, 4]
    for mix_at in ("decoder", "encoder"):
        mixed = small("dcmix", mix_at).mix(x_c, x_d, m)
        assert mixed.tolist() == [[hidden, *[visible] * 4, hidden]]
    for guidance in ("none", "dcsa", "dcca"):
        assert torch.equal(small(guidance).mix(x_c, x_d, m), x_c), guidance


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
def test_eq06_presets_have_the_papers_sizes(preset, guidance, millions, paper):
    """The sizes in millions are those of Tables 1 and 2.

    DC-CA is within 0.2 % of the paper's number. The others round to it.
    """
    count = sum(parameters(preset, guidance).values()) / 1e6
    assert round(count, 1) == millions
    assert abs(count - paper) < max(0.5, 0.002 * paper)


@pytest.mark.parametrize("preset", ["tiny", "small", "base", "large", "huge"])
def test_eq06_dcmix_adds_no_parameters(preset):
    """Section 3.3: DC-Mix is MAR with x_d in the place of the mask token.

    The mask token is the only difference between their parameters.
    """
    none = parameters(preset, "none")
    dcmix = parameters(preset, "dcmix")
    width = backbone.PRESETS[preset]["mar"]["D"]
    assert none == dcmix | {"mask_token": width}
    assert "mask_token" not in dcmix


def test_eq06_dcsa_and_dcca_add_what_the_paper_says():
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


def forward(model, g, m, drop):
    """z of guidance none for the three reference images. X_d is not used."""
    return model(g["tokens"], None, m, g["labels"], torch.full((3,), drop))


def test_eq08_golden_mar_mask():
    """Eq. (8) hides what MAR hides: the first entries of the order."""
    g = golden.load("mar_tiny")
    m = mixing.sample_mask(g["orders"], float(g["train_mask_rate"]))
    assert m.tolist() == g["mask"].bool().tolist()


@pytest.mark.parametrize("suffix, drop, everything", [
    ("", False, False),
    ("_uncond", True, False),
    ("_all_masked", False, True),
])
@torch.no_grad()
def test_eq06_golden_mar_forward(suffix, drop, everything):
    """The encoder's output and z equal MAR's.

    Three cases: with classes, without classes, and with everything hidden, as in the first step
    of generation.
    """
    g = golden.load("mar_tiny")
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
def test_eq06_golden_mar_norms(probe):
    """The weights are so small that a wrong epsilon in any norm of the backbone shows."""
    g = golden.load("mar_tiny")
    found = forward(tiny_mar(probe), g, g["mask"].bool(), False)
    expected = golden.load("eps_probe_mar")[f"decoder_z_{probe}"]
    assert golden.difference(found, expected) < 1e-5


@torch.no_grad()
def test_eq06_golden_mar_block():
    """One transformer block equals MAR's on an input of about 1e-3."""
    probe = golden.load("eps_probe_mar")
    found = tiny_mar().encoder_blocks[0](probe["encoder_block0_x"], None)
    assert golden.difference(found, probe["encoder_block0_out"]) < 1e-5


def test_eq06_attention_is_the_same_with_and_without_gradient():
    """Training on a CPU writes attention out, inference uses the fused kernel: both agree."""
    g = golden.load("mar_tiny")
    model = tiny_mar()
    m = g["mask"].bool()
    with torch.no_grad():
        fused = forward(model, g, m, False)
    written_out = forward(model, g, m, False)
    assert golden.difference(written_out, fused) < 1e-5


def test_golden_mar_training_step():
    """MAR's whole training loss and its gradients.

    Classes are dropped, each token has 2 draws of (t, noise), and the loss is the mean over hidden
    tokens.
    """
    g = golden.load("mar_tiny")
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
def test_eq06_golden_first_z_of_generation(cfg, name):
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
def test_eq06_golden_generation_schedule_of_256_tokens(steps):
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
def test_eq06_golden_generation_schedule_of_16_tokens(name):
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


class Numbers:
    """A model that notes what it is asked for.

    The z of token i of image b is 10 b + i, plus 100 without the class. The token that its head
    samples is z. What it mixes is x_c + 0.5.
    """

    d_c = 1

    def __init__(self):
        self.mixed = []
        self.asked = []
        self.heads = []
        self.diffloss = self

    def mix(self, x_c, x_d, m):
        self.mixed.append((x_c.clone(), x_d, m))
        return x_c + 0.5

    def __call__(self, x, x_d, m, y, drop):
        self.asked.append((x.clone(), x_d, m, y, drop))
        z = 10 * torch.arange(2)[:, None] + torch.arange(4) + 100 * drop[:, None]
        return z[..., None].float()

    def sample(self, z, noise, steps, temperature, z_uncond, scale, bound):
        self.heads.append((z, noise, temperature, z_uncond, bound))
        return z


def numbered(cfg):
    """x_c of two images of four tokens in three AR steps, the model, and what on_step was given."""
    model = Numbers()
    x_d = torch.ones(2, 4, 3)
    y = torch.tensor([3, 5])
    order = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    after = []

    def noise(now, n):
        return now

    x_c = sample.generate(model, x_d, y, order, noise, 3, 25, cfg, "linear", 0.7, 5.0,
                          after.append)
    return x_c, model, x_d, y, after


def test_eq06_generation_gives_x_d_mask_and_class_to_every_pass():
    """Eq. (6): each AR step mixes x_c and X_d by the mask of what is still hidden.

    The model sees the mixed sequence, X_d, this mask and the class. The pass without class sees the
    SAME X_d: guidance leaves out the class alone.
    """
    for cfg, drops in [(1.0, [F]), (3.0, [F, T])]:
        _, model, x_d, y, _ = numbered(cfg)
        assert len(model.mixed) == 3
        assert len(model.asked) == 3 * len(drops)
        for k, (x, given, m, classes, drop) in enumerate(model.asked):
            x_c, mixed_with, mixed_where = model.mixed[k // len(drops)]
            assert torch.equal(x, x_c + 0.5)
            assert torch.equal(mixed_with, x_d)
            assert torch.equal(mixed_where, m)
            assert torch.equal(given, x_d)
            assert torch.equal(classes, y)
            assert drop.tolist() == [drops[k % len(drops)]] * 2


def test_eq06_generation_samples_each_token_from_its_own_z():
    """Eq. (6): the head samples the tokens of this step alone, each from the z of its position.

    z without class is that of the same tokens. Noise, temperature and bound reach the head.
    """
    x_c, model, _, _, after = numbered(3.0)
    assert x_c[..., 0].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    hidden = torch.ones(2, 4, dtype=torch.bool)
    for (z, now, temperature, z_uncond, bound), m in zip(model.heads, after):
        # what is hidden before the step and not after it
        assert torch.equal(now, hidden & ~m)
        assert z.flatten().tolist() == (10 * now.nonzero()[:, 0] + now.nonzero()[:, 1]).tolist()
        assert torch.equal(z_uncond, z + 100)
        assert (temperature, bound) == (0.7, 5.0)
        hidden = m
    assert not hidden.any()
    _, model, _, _, _ = numbered(1.0)
    assert all(z_uncond is None for _, _, _, z_uncond, _ in model.heads)


@pytest.mark.parametrize("given, ar_steps, expected", [
    (25, 4, [25] * 4),
    ((40, 10), 4, [40, 30, 20, 10]),
    ([40, 10], 1, [40]),
])
def test_eq06_diffusion_steps_fall_linearly_over_the_ar_steps(given, ar_steps, expected):
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


def test_eq06_more_steps_than_tokens_still_fill_every_token_once():
    """In 40 guided AR steps of 16 tokens, every token is predicted exactly once.

    Some steps predict nothing.
    """
    predicted = torch.zeros(1, 16)

    def noise(now, n):
        predicted.add_(now)

    record(16, 40, 2, 3.0, noise=noise)
    assert (predicted == 1).all()


def test_more_steps_than_tokens_give_finite_tokens():
    """A step that predicts nothing gives no rows to the backbone and to the head."""
    g = golden.load("mar_sample_tiny")

    def noise(now, n):
        return torch.zeros(2, int(now.sum()), 8)

    x_c = sample.generate(tiny_mar(), None, g["labels"], g["orders"], noise, 40, 2, 3.0)
    assert (x_c != 0).all()
    assert x_c.isfinite().all()


# g_M, against MaskBit's generator

def tiny_prior(norm, probe=None):
    """The tiny generator of MaskBit; norm: "post" or "pre", probe: see golden.fill."""
    model = golden.model("prior", f"maskbit_generator_tiny_{norm}norm", probe)
    return model.requires_grad_()


NORMS = pytest.mark.parametrize("norm", ["post", "pre"])


def test_eq07_golden_bit_conversions():
    """The index, the bits and the two codes of every token, for 6 and for 14 bits.

    The least significant bit comes first.
    """
    bit = golden.load("maskbit_generator_tiny")
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


def test_eq07_golden_masked_codes_become_zeros():
    """Masked codes become zeros, each bit group by itself."""
    bit = golden.load("maskbit_generator_tiny")
    assert torch.equal(tokenizers.codes_to_bits(bit["masked_tokens"], 3), bit["input_bits"])


@NORMS
@torch.no_grad()
def test_eq03_golden_prior_logits(norm):
    """The logits equal MaskBit's, with some labels dropped and with none."""
    bit = golden.load("maskbit_generator_tiny")
    model = tiny_prior(norm)
    some_dropped = model(bit["input_bits"], bit["labels"], bit["drop_mask"])
    assert golden.difference(some_dropped, bit[f"logits_{norm}"]) < 1e-5
    none_dropped = model(bit["input_bits"], bit["labels"])
    assert golden.difference(none_dropped, bit[f"logits_{norm}_nodrop"]) < 1e-5


@NORMS
@pytest.mark.parametrize("probe", ["all", "nogain"])
@torch.no_grad()
def test_eq03_golden_prior_norms(norm, probe):
    """The weights are so small that a wrong epsilon in any norm of the generator shows."""
    bit = golden.load("maskbit_generator_tiny")
    model = tiny_prior(norm, probe)
    found = model(bit["input_bits"], bit["labels"], bit["drop_mask"])
    expected = golden.load("eps_probe_maskbit")[f"logits_{norm}_{probe}"]
    assert golden.difference(found, expected) < 1e-5


@torch.no_grad()
def test_eq03_golden_prior_layer():
    """Attention and feed-forward of one pre-norm layer on an input of about 1e-4."""
    probe = golden.load("eps_probe_maskbit")
    attend, feed_forward = tiny_prior("pre").transformer.layers[0]
    x = probe["pre_layer0_x"]
    assert golden.difference(attend(x), probe["pre_layer0_attn_out"]) < 1e-5
    assert golden.difference(feed_forward(x), probe["pre_layer0_ff_out"]) < 1e-5


def test_eq03_prior_leaves_its_inputs_unchanged():
    """The forward pass only reads its inputs.

    MaskBit's own forward pass overwrites the caller's labels where they are dropped.
    """
    bit = golden.load("maskbit_generator_tiny")
    x = bit["input_bits"].clone()
    y = bit["labels"].clone()
    drop = bit["drop_mask"].clone()
    tiny_prior("post")(x, y, drop)
    assert torch.equal(x, bit["input_bits"])
    assert torch.equal(y, bit["labels"])
    assert torch.equal(drop, bit["drop_mask"])


def test_eq03_golden_training_mask():
    """Given MaskBit's uniform random numbers, the training mask hides the codes that it hides."""
    bit = golden.load("maskbit_generator_tiny")
    mask = train.training_mask(bit["trainmask_u_ratio"], bit["trainmask_u_token"])
    assert torch.equal(mask, bit["trainmask_mask"])
    masked = torch.where(mask, 8, bit["trainmask_tokens"])
    assert torch.equal(masked, bit["trainmask_masked"])


def test_eq03_golden_code_loss():
    """Eq. (3) as MaskBit trains it, and three of its gradients."""
    bit = golden.load("maskbit_generator_tiny")
    loss = train.code_loss(bit["logits_post"], bit["tokens"])
    assert golden.difference(loss, bit["mlm_loss"]) < 1e-5

    model = tiny_prior("post")
    logits = model(bit["input_bits"], bit["labels"], bit["drop_mask"])
    train.code_loss(logits, bit["tokens"]).backward()
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
    """The prior given, of 16 tokens, that notes the bits and the classes of each call."""

    N = 16
    splits = 2
    bits = 6

    def __init__(self, prior):
        self.prior = prior
        self.seen = []

    def __call__(self, x, y, drop=None):
        self.seen.append((x, y))
        return self.prior(x, y, drop)


def likeliest(logits):
    """The likeliest code, in place of a random one."""
    return logits.argmax(-1)


def assert_samples_as_maskbit(name, prior, steps, guidance=5.8):
    """What the prior sees in every step of sample_prior, and the codes, equal MaskBit's.

    name  the name of the reference
    """
    bit = golden.load("maskbit_generator_tiny")
    if "gumbel" in name:
        gumbels = iter(bit["sampler_gumbel"])
        temperature = 2.0
    else:
        gumbels = iter(torch.zeros(steps, 3, 16, 2))
        temperature = 4.5

    def gumbel():
        return next(gumbels)

    watched = WatchedPrior(prior)
    y = torch.tensor([1, 5, 8])
    bits = sample.sample_prior(watched, y, likeliest, gumbel, steps, guidance, 3.0, temperature)

    expected = tokenizers.codes_to_bits(bit[f"{name}_inputs"].flatten(0, 1), 3)
    expected = expected.unflatten(0, (steps, 3))
    assert len(watched.seen) == steps
    for i, (x, classes) in enumerate(watched.seen):
        assert (x.unflatten(0, (-1, 3)) == expected[i]).all(), f"what the model sees in step {i}"
        assert (classes.unflatten(0, (-1, 3)) == y).all()
    assert torch.equal(tokenizers.bits_to_codes(bits), bit[f"{name}_tokens"])


@pytest.mark.parametrize("name, guidance", [
    ("fixed8", 5.8),
    ("fixed8_gumbel", 5.8),
    ("fixed8_noguidance", 0.0),
])
def test_eq04_golden_prior_sampler(name, guidance):
    """Eq. (4): X_d is drawn from all masked. Every step fixes the most certain codes.

    It hides the others again, as MaskBit does. Guidance l_c + g (l_c - l_u) rises over the steps,
    Gumbel noise falls. The logits are fixed. The code that is fixed is the likeliest one.
    """
    prior = FixedPrior(golden.load("maskbit_generator_tiny"))
    assert_samples_as_maskbit(name, prior, 8, guidance)


@pytest.mark.parametrize("name, steps", [
    ("model8", 8),
    ("model8_gumbel", 8),
    ("model24", 24),
    ("wraparound64", 64),
])
def test_golden_prior_sampler_with_the_model(name, steps):
    """Eqs. (3) and (4) together: the sampler with the logits of MaskBit's tiny generator."""
    assert_samples_as_maskbit(name, tiny_prior("post"), steps)


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
def test_eq04_golden_prior_schedule_of_512_codes(steps):
    """How many of 256 x 2 codes are still masked before each step."""
    bit = golden.load("maskbit_generator_tiny")
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
def test_eq04_golden_prior_cfg_at(steps):
    """MaskBit's cosine guidance of power 3 is 0 in the first step and never quite reaches 5.8."""
    bit = golden.load("maskbit_generator_tiny")
    found = torch.tensor([sample.prior_cfg_at(5.8, 3.0, i, steps) for i in range(steps)])
    assert golden.difference(found, bit[f"schedule_guidance_{steps}"]) < 1e-6
