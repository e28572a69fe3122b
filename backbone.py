"""The two masked transformers: Eqs. (3), (4) and (6), sections 3.1 to 3.3 of the paper.

`MAR` is p_theta(X_c | X_d) of Eq. (6), with the paper's guidances: none (plain MAR), dcmix (Eq. 9:
the decoder gets x_d where x_c is masked), dcsa (discrete tokens as a prefix) and dcca
(cross-attention to them). `MaskBitPrior` is p_phi(X_d) of Eqs. (3) and (4), where the paper prints
theta for phi. It is also g_M of Eq. (11). Our parameters are named as in the official models, so
that their files load.

Reads disk, tokenizers, mixing and diffusion_head.py. Feeds checkpoint, train, stages and sample.py.
Read train.py next.
Try: python backbone.py          (parameters and tokens beside the paper's)

B batch, N tokens, K class tokens, V seen by the encoder, D width, S bit groups. m True: to predict.
"""
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.functional import dropout, layer_norm, scaled_dot_product_attention

import disk
import mixing
import tokenizers
from diffusion_head import Blocks, DiffusionHead, linear

GUIDANCES = ("none", "dcmix", "dcsa", "dcca")

BASE = dict(
    size=256,
    vae=dict(width=128, mult=(1, 1, 2, 2, 4), blocks=2, z=32),                        # [VA-VAE]
    vq=dict(width=128, mult=(1, 1, 2, 2, 4), blocks=2, bits=14),                      # [MaskBit]
    prior=dict(D=1024, depth=24, heads=16, mlp=4096, prenorm=False, dropout=0.1),     # [MaskBit]
    mar=dict(D=768, depth=12, heads=12, K=64, dropout=0.1,                            # [MAR]
             head_depth=6, head_width=1024),
)
# depth: of the encoder and of the decoder. With MAR-H's head, large has Table 2's 557M.    [ours]
LARGE_MAR = dict(D=1024, depth=16, heads=16, K=64, dropout=0.1,
                 head_depth=12, head_width=1536)
PRESETS = {
    "tiny": dict(                                                                     # [ours]
        size=32,
        vae=dict(width=32, mult=(1, 2, 2), blocks=1, z=8, groups=1),
        vq=dict(width=32, mult=(1, 2, 2), blocks=1, bits=8, groups=1),
        prior=dict(D=128, depth=4, heads=4, mlp=512, prenorm=True, dropout=0.0),
        mar=dict(D=160, depth=3, heads=5, K=8, dropout=0.0,
                 head_depth=3, head_width=160),
    ),
    "small": dict(                                                                    # [ours]
        size=64,
        vae=dict(width=64, mult=(1, 2, 4), blocks=2, z=16),
        vq=dict(width=64, mult=(1, 2, 4), blocks=2, bits=12),
        prior=dict(D=384, depth=8, heads=6, mlp=1536, prenorm=True, dropout=0.0),
        mar=dict(D=384, depth=6, heads=6, K=16, dropout=0.0,
                 head_depth=4, head_width=512),
    ),
    "base": BASE,
    "large": BASE | dict(mar=LARGE_MAR),
    "huge": BASE | dict(mar=LARGE_MAR | dict(D=1280, depth=20)),
}


# MAR: p_theta(X_c | X_d)

def attention(q, k, v, heads, p=0.0):
    """softmax(q k^T / sqrt(D / heads)) v in each head, with dropout p on the weights.

    On a CPU the formula is written out for training and for bf16, where the fused kernel is slower.

    q (B, L, D), k and v (B, M, D) -> (B, L, D)
    """
    # (B, L, D) -> (B, heads, L, D / heads)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and (torch.is_grad_enabled() or q.dtype == torch.bfloat16):
        scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-2, -1)      # (B, heads, L, M)
        out = dropout(scores.softmax(-1).to(v.dtype), p) @ v
    else:
        out = scaled_dot_product_attention(q, k, v, dropout_p=p)
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, D, heads, p):
        super().__init__()
        self.qkv = linear(D, 3 * D)
        self.proj = linear(D, D)
        self.heads = heads
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        p = self.dropout.p if self.training else 0.0
        return self.dropout(self.proj(attention(q, k, v, self.heads, p)))


class CrossAttention(nn.Module):
    """For DC-CA, of which the paper says little.   [ours]

    With neither biases nor learned norms MixAR-L has 708M parameters, nearly Table 2's 707M.
    """

    def __init__(self, D, heads):
        super().__init__()
        self.q = nn.Linear(D, D, bias=False)
        self.kv = nn.Linear(D, 2 * D, bias=False)
        self.proj = nn.Linear(D, D, bias=False)
        for layer in (self.q, self.kv, self.proj):
            nn.init.xavier_uniform_(layer.weight)
        self.heads = heads

    def forward(self, x, memory):
        q = self.q(layer_norm(x, x.shape[-1:], eps=1e-6))
        k, v = self.kv(memory).chunk(2, dim=-1)
        return self.proj(attention(q, k, v, self.heads))


class Block(nn.Module):
    """A pre-norm transformer block.   [MAR]

    cross: whether there is a cross-attention to `discrete` (B, N, D) after the self-attention, as
        in DC-CA. If not, `discrete` is not used.
    """

    def __init__(self, D, heads, p, cross):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.attn = SelfAttention(D, heads, p)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=linear(D, 4 * D), gelu=nn.GELU(), dropout1=nn.Dropout(p),
            fc2=linear(4 * D, D), dropout2=nn.Dropout(p)))
        self.cross = CrossAttention(D, heads) if cross else None

    def forward(self, x, discrete):
        x = x + self.attn(self.norm1(x))
        if self.cross is not None:
            x = x + self.cross(x, discrete)
        return x + self.mlp(self.norm2(x))


def random_table(*shape):
    return nn.Parameter(0.02 * torch.randn(shape))


class MAR(nn.Module):
    """p_theta(x_c^i | x_c^{<i}, X_d) of Eq. (6): encoder, decoder and Eq. (5)'s diffusion head.

    guidance   at masked positions the decoder gets     other ways in for X_d
    none       the mask token                           -
    dcmix      the embedded x_d of Eq. (9)              -
    dcsa       the mask token                           a prefix in encoder and decoder
    dcca       the mask token                           cross-attention in every block of both

    In dcmix the encoder sees the visible x_c alone, as in MAR; Eq. (9)'s x_d bypasses it [ours].
    With mix_at="encoder", the letter of section 3.3, all of Eq. (9)'s x~ goes through both.

    N: tokens
    d_c, d_d: channels of x_c, bits of x_d
    classes: number of classes
    D, heads: width and attention heads
    depth: blocks of the encoder, and as many of the decoder
    K: class tokens
    head_depth, head_width: blocks and width of the diffusion head
    dropout: of the blocks
    guidance: one of GUIDANCES
    mix_at: "decoder" or "encoder", where Eq. (9)'s discrete tokens enter (dcmix only)
    """

    def __init__(self, N, d_c, d_d, classes, D, depth, heads, K, head_depth, head_width, dropout,
                 guidance="dcmix", mix_at="decoder"):
        super().__init__()
        self.N = N
        self.d_c = d_c
        self.K = K
        self.guidance = guidance
        self.mix_at = mix_at

        self.class_emb = nn.Embedding(classes, D)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.fake_latent = random_table(1, D)                        # stands for "no class"
        if guidance != "dcmix":
            self.mask_token = random_table(1, 1, D)                  # DC-Mix has x_d in its place
        self.encoder_pos_embed_learned = random_table(1, K + N, D)
        self.decoder_pos_embed_learned = random_table(1, K + N, D)
        self.diffusion_pos_embed_learned = random_table(1, N, D)
        self.z_proj = linear(d_c, D)
        self.z_proj_ln = nn.LayerNorm(D, eps=1e-6)
        if guidance in ("dcsa", "dcca"):
            self.discrete_emb = nn.Embedding(2 ** d_d, D)            # learnable   [paper 4.2]
            nn.init.normal_(self.discrete_emb.weight, std=0.02)

        cross = guidance == "dcca"
        self.encoder_blocks = Blocks(Block(D, heads, dropout, cross) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed = linear(D, D)
        self.decoder_blocks = Blocks(Block(D, heads, dropout, cross) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.diffloss = DiffusionHead(d_c, D, head_width, head_depth)

    def mix(self, x_c, x_d, m):
        """The sequence that goes in: Eq. (9)'s x~ for dcmix, x_c itself for the other guidances.

        x_c: (B, N, d_c)
        x_d: (B, N, d_d) bits, used by dcmix only
        m: (B, N) bool
        Returns (B, N, d_c).
        """
        if self.guidance == "dcmix":
            return mixing.dc_mix(x_c, mixing.pad(x_d, self.d_c), m)  # Eq. (9)
        return x_c

    def embed(self, x, y, drop):
        """K class tokens, then the tokens x.   (B, N, d_c) -> (B, K + N, D)"""
        label = torch.where(drop[:, None], self.fake_latent, self.class_emb(y))
        label = label[:, None].expand(-1, self.K, -1)                # (B, K, D)
        x = torch.cat([label, self.z_proj(x)], dim=1)                # (B, K + N, D)
        return self.z_proj_ln(x + self.encoder_pos_embed_learned)

    def embed_discrete(self, x_d):
        """DC-SA's prefix or DC-CA's memory.   (B, N, d_d) -> (B, N, D)"""
        # with the positions and the norm of the continuous tokens   [ours]
        discrete = self.discrete_emb(tokenizers.bits_to_codes(x_d))
        return self.z_proj_ln(discrete + self.encoder_pos_embed_learned[:, self.K:])

    def visible_positions(self, m):
        """The V of the K + N tokens that the encoder sees.   (B, N) bool -> (B, K + N) bool"""
        if self.mix_at == "encoder":
            m = torch.zeros_like(m)                                  # all of x~
        return ~nn.functional.pad(m, (self.K, 0))                    # class tokens are visible

    def encode(self, x, discrete):
        """The encoder and `decoder_embed` over the class tokens and the visible ones, x (B, V, D).

        discrete: (B, N, D), DC-SA's prefix or DC-CA's memory; None with the other guidances
        Returns (B, V, D), and `discrete` for the decoder: the prefix, which went the same way, the
        memory unchanged, or None.
        """
        if self.guidance == "dcsa":
            x = torch.cat([discrete, x], dim=1)                      # (B, N + V, D)
        x = self.encoder_blocks(x, discrete)
        x = self.decoder_embed(self.encoder_norm(x))
        if self.guidance == "dcsa":
            discrete = x[:, :self.N]
            x = x[:, self.N:]                                        # without the prefix
        return x, discrete

    def decode(self, x, discrete):
        """The decoder over all tokens.   x (B, K + N, D) -> z (B, N, D)"""
        x = x + self.decoder_pos_embed_learned
        if self.guidance == "dcsa":
            discrete = discrete + self.decoder_pos_embed_learned[:, self.K:]
            x = torch.cat([discrete, x], dim=1)                      # (B, N + K + N, D)
        x = self.decoder_blocks(x, discrete)
        x = self.decoder_norm(x)[:, -self.N:]                        # without prefix and class
        return x + self.diffusion_pos_embed_learned

    def forward(self, x, x_d, m, y, drop):
        """z^i of Eq. (5), from which the diffusion head gives p(x_c^i | ...) of Eq. (6).

        x: (B, N, d_c), the output of `mix`; masked positions of it are used only with dcmix
        x_d: (B, N, d_d) bits, for dcsa and dcca
        m: (B, N) bool, with the same count in every row
        y: (B,) int, the classes
        drop: (B,) bool, True for "no class"
        Returns z (B, N, D). ValueError if the rows of m have different counts.
        """
        if (m.sum(1) != m[0].sum()).any():
            raise ValueError("the mask must hide the same number of tokens in every row")
        embedded = self.embed(x, y, drop)                            # (B, K + N, D)
        discrete = None                                              # prefix or memory
        if self.guidance in ("dcsa", "dcca"):
            discrete = self.embed_discrete(x_d)                      # (B, N, D)
        visible = self.visible_positions(m)                          # (B, K + N)
        seen = embedded[visible].unflatten(0, (len(m), -1))          # (B, V, D)
        seen, discrete = self.encode(seen, discrete)

        # The decoder gets what the encoder made of visible tokens. Masked ones have a placeholder:
        # MAR's mask token or, for DC-Mix, the discrete token of Eq. (9), embedded but not encoded.
        # Visible tokens went through decoder_embed in `encode`, discrete ones do here.
        # With mix_at="encoder" all tokens are visible, and no placeholder stays.
        if self.guidance == "dcmix":
            placeholder = self.decoder_embed(embedded)               # (B, K + N, D)
        else:
            placeholder = self.mask_token.expand_as(embedded)        # (B, K + N, D)
        full = placeholder.to(seen.dtype, copy=True)                 # to be written into
        full[visible] = seen.flatten(0, 1)
        return self.decode(full, discrete)                           # (B, N, D)

    @classmethod
    def from_official(cls, state):
        """Plain MAR with the weights of an official file, {name: tensor}.   [MAR]"""
        D, d_c = state["z_proj.weight"].shape
        N = state["diffusion_pos_embed_learned"].shape[1]
        config = dict(
            N=N, d_c=d_c, d_d=0, D=D, heads=heads_of(D), dropout=0.1, guidance="none",
            classes=len(state["class_emb.weight"]),
            depth=disk.count_modules(state, "encoder_blocks."),
            K=state["encoder_pos_embed_learned"].shape[1] - N,
            head_depth=disk.count_modules(state, "diffloss.net.res_blocks."),
            head_width=len(state["diffloss.net.input_proj.weight"]),
        )
        return disk.build(cls, config, state)


# MaskBit's generator: p_phi(X_d)

class MultiHead(nn.Module):
    """Self-attention with parameters named as in PyTorch's nn.MultiheadAttention."""

    def __init__(self, D, heads, p):
        super().__init__()
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * D, D)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * D))
        self.out_proj = nn.Linear(D, D)
        self.heads = heads
        self.p = p

    def forward(self, x):
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.chunk(3, dim=-1)
        p = self.p if self.training else 0.0
        return self.out_proj(attention(q, k, v, self.heads, p))


class PriorAttention(nn.Module):
    def __init__(self, D, heads, p, prenorm):
        super().__init__()
        self.mha = MultiHead(D, heads, p)
        self.norm = nn.LayerNorm(D, eps=1e-12)
        self.dropout = nn.Dropout(p)
        self.prenorm = prenorm

    def forward(self, x):
        if self.prenorm:
            return x + self.dropout(self.mha(self.norm(x)))
        return self.norm(x + self.dropout(self.mha(x)))


class PriorFeedForward(nn.Module):
    def __init__(self, D, mlp, p, prenorm):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, mlp), nn.GELU(), nn.Linear(mlp, D), nn.Dropout(p))
        self.norm = nn.LayerNorm(D, eps=1e-12)
        self.prenorm = prenorm

    def forward(self, x):
        if self.prenorm:
            return x + self.net(self.norm(x))
        return self.norm(x + self.net(x))


class MaskBitPrior(nn.Module):
    """p_phi of Eqs. (3) and (4): the logits of every bit group, masked or not.   [MaskBit]

    N: tokens
    bits: of a token, in `splits` groups
    classes: number of classes; one more row of the table stands for "no class"
    D, depth, heads, mlp: width, blocks, attention heads, width of the feed-forward layers
    prenorm: norms before attention and feed-forward instead of after them
    """

    def __init__(self, N, bits, classes, D, depth, heads, mlp, prenorm=False, dropout=0.1,
                 splits=2):
        super().__init__()
        self.N = N
        self.bits = bits
        self.splits = splits
        self.classes = classes
        codes = 2 ** (bits // splits)                                # of a group
        self.pos_emb = nn.Parameter(torch.empty(1, N + 1, D))
        # a buffer of the official files, from which from_official takes `splits`
        powers = 2 ** torch.arange(bits // splits, dtype=torch.int32)
        self.register_buffer("bits_to_indices", powers)
        self.class_emb = nn.Embedding(classes + 1, D)
        self.input_proj = nn.Linear(bits, D)
        self.first_layer = nn.Sequential(nn.LayerNorm(D, eps=1e-12), nn.Dropout(dropout))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList()
        for _ in range(depth):
            attend = PriorAttention(D, heads, dropout, prenorm)
            feed_forward = PriorFeedForward(D, mlp, dropout, prenorm)
            self.transformer.layers.append(nn.ModuleList([attend, feed_forward]))
        self.norm_after_transformer = nn.LayerNorm(D, eps=1e-12) if prenorm else None
        self.last_layer = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D, eps=1e-12))
        self.prediction_layer = nn.Linear(D, splits * codes)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_emb, std=0.02)

    def forward(self, x, y, drop=None):
        """The logits (B, N, S, 2^e) float32 of the S groups of e bits of every token.

        x: (B, N, bits) in {-1, +1}, 0 where masked
        y: (B,) int, the classes
        drop: (B,) bool, True for "no class"
        """
        if drop is not None:
            y = torch.where(drop, self.classes, y)
        x = torch.cat([self.input_proj(x), self.class_emb(y)[:, None]], dim=1)
        x = self.first_layer(x + self.pos_emb)                       # (B, N + 1, D)
        for attend, feed_forward in self.transformer.layers:
            x = feed_forward(attend(x))
        if self.norm_after_transformer is not None:
            x = self.norm_after_transformer(x)
        # the class is the last token here, where MAR has its class tokens first
        logits = self.prediction_layer(self.last_layer(x))[:, :-1]   # (B, N, S 2^e)
        return logits.unflatten(-1, (self.splits, -1)).float()

    @classmethod
    def from_official(cls, state):
        """MaskBit's generator with the weights of an official file, {name: tensor}.   [MaskBit]"""
        if "input_proj.weight" not in state:                                 # older: token_emb
            state = {key.replace("token_emb", "input_proj"): state[key] for key in state}
        D, bits = state["input_proj.weight"].shape
        config = dict(
            N=state["pos_emb"].shape[1] - 1, bits=bits, D=D, heads=heads_of(D), dropout=0.1,
            splits=bits // len(state["bits_to_indices"]),
            classes=len(state["class_emb.weight"]) - 1,
            depth=disk.count_modules(state, "transformer.layers."),
            mlp=len(state["transformer.layers.0.1.net.0.weight"]),
            prenorm="norm_after_transformer.weight" in state,
        )
        return disk.build(cls, config, state)


# Files, and the sizes of the paper

def heads_of(D):
    """How many attention heads an official model of width D has, which its weights do not show.

    Each has 64 features, but there are at most 16 [MAR] [MaskBit] and at least 4 [ours].
    """
    return max(4, min(16, D // 64))


KINDS = dict(vae=tokenizers.KLVAE, vq=tokenizers.BitVQ, prior=MaskBitPrior, mixar=MAR)


def load_model(path, kind):
    """Returns (model, saved): the averaged weights, if there are any, ready for inference, and the
    checkpoint's dict, which is dict(step=0, meta=None) for an official file.

    path: a checkpoint of train.py, its folder, or an official file; SystemExit if it is neither
    kind: a key of KINDS
    """
    saved = disk.load_checkpoint(path, kind)
    with disk.reading(path, f"{kind} checkpoint"):
        if "kind" in saved:
            return disk.build(KINDS[kind], saved["config"], saved["ema"]), saved
        # An official file has no `kind`. It holds its weights bare or under these names. The last
        # one that is there is taken: model_ema is MAR's moving average.
        state = saved
        for name in ("state_dict", "model", "model_ema"):
            state = saved.get(name, state)
        state = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        return KINDS[kind].from_official(state), dict(step=0, meta=None)


# name: preset, guidance, d_c, changes of the head; the paper's parameters (M) and tokens
SIZES = {
    "MAR-B": ("base", "none", 16, {}, 208, ""),
    "MAR-L": ("large", "none", 16, dict(head_depth=8, head_width=1280), 479, ""),
    "MAR-H": ("huge", "none", 16, {}, 943, ""),
    "MixAR-B": ("base", "dcmix", 32, {}, 208, ""),
    "MixAR-L, DC-Mix": ("large", "dcmix", 32, {}, 557, 320),
    "MixAR-L, DC-SA": ("large", "dcsa", 32, {}, 574, 512),
    "MixAR-L, DC-CA": ("large", "dcca", 32, {}, 707, 512),
}


def sized(name):
    """The model of a row of SIZES at 256 x 256 with 14 bits, on the meta device: no memory."""
    preset, guidance, d_c, head, _, _ = SIZES[name]
    with torch.device("meta"):
        return MAR(256, d_c, 14, 1000, guidance=guidance, **PRESETS[preset]["mar"] | head).eval()


def main():
    print(f"{'':18}{'params (M)':>11}{'paper (M)':>11}{'tokens':>8}{'paper':>7}")
    for name, (_, guidance, _, _, paper_millions, paper_tokens) in SIZES.items():
        model = sized(name)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        tokens = model.K + model.N
        if guidance in ("dcsa", "dcca"):
            tokens += model.N
        print(f"{name:18}{millions:11.1f}{paper_millions:11}{tokens:8}{paper_tokens:7}")
    print("tokens: class, continuous and discrete. The paper's 512 leave out the 64 class tokens.")


if __name__ == "__main__":
    main()
