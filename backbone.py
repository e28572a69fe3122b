"""The two masked transformers: Eqs. (3), (4) and (6), sections 3.1 to 3.3 of the paper.

`MaskBitPrior` is p_phi(X_d) and g_M: MaskBit's generator, Eqs. (3) and (4) on bit tokens.
`MAR` is p_theta(X_c | X_d), Eq. (6), with the paper's guidances: none (plain MAR), dcmix (Eq. 9),
dcsa (discrete tokens as a prefix), dcca (cross-attention). Parameter names are those of the official
models; `from_official` tells from an official file alone which model it holds, for the tokenizers too.

Reads mixing.py and diffusion_head.py, feeds train.py and sample.py. Read diffusion_head.py next.
Try: python backbone.py          (parameters, tokens and operations beside the paper's Tables 1 and 2)

B batch, N tokens, D width, K class tokens; m True = to predict.
"""
import argparse
import math
import re
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mixing
import tokenizers
from diffusion_head import DiffusionHead, linear

GUIDANCES = ("none", "dcmix", "dcsa", "dcca")

# mar: width, blocks (encoder = decoder), heads, K; head: blocks, width.                        [MAR] [paper, Tables 1, 2]
# prior: [MaskBit]; vae, vq: [VA-VAE] [MaskBit]; the whole row `tiny`: [ours].
PRESETS = {
    "tiny": dict(size=32, vae=dict(width=32, mult=(1, 2, 2), blocks=1, z=8, groups=1), vq=dict(width=32, mult=(1, 2, 2), blocks=1, bits=8, groups=1),
                 mar=dict(D=160, depth=3, heads=5, K=8, head_depth=3, head_width=160, dropout=0.0),
                 prior=dict(D=128, depth=4, heads=4, mlp=512, prenorm=True, dropout=0.0)),
    "base": dict(size=256, vae=dict(width=128, mult=(1, 1, 2, 2, 4), blocks=2, z=32), vq=dict(width=128, mult=(1, 1, 2, 2, 4), blocks=2, bits=14),
                 mar=dict(D=768, depth=12, heads=12, K=64, head_depth=6, head_width=1024, dropout=0.1),
                 prior=dict(D=1024, depth=24, heads=16, mlp=4096, prenorm=False, dropout=0.1)),
}
for _name, _mar in (("large", dict(D=1024, depth=16)), ("huge", dict(D=1280, depth=20))):
    PRESETS[_name] = PRESETS["base"] | dict(mar=_mar | dict(heads=16, K=64, head_depth=12, head_width=1536, dropout=0.1))


def dropout(x, p):
    """Each entry is 0 with probability p, else divided by 1 - p.   x any shape

    On a CPU one 64-bit draw serves four entries, p to the nearest 1/65536: PyTorch's one draw an entry took a sixth of a training step.
    """
    if p == 0 or x.device.type != "cpu":
        return torch.nn.functional.dropout(x, p)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
    keep = draws[:x.numel()].view(x.shape) >= round(65536 * p) - 32768
    return x * (keep.to(x.dtype) / (1 - p))


def attention(q, k, v, heads, p=0.0):
    """softmax(q k^T / sqrt(d)) v with dropout p on the weights.   q (B, L, D), k, v (B, M, D) -> (B, L, D).

    Written out on a CPU, which is faster there than the fused kernel's backward, and in bf16 than its forward.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and (torch.is_grad_enabled() or q.dtype == torch.bfloat16):
        weights = (q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)).softmax(-1).to(v.dtype)
        out = dropout(weights, p) @ v
    else:
        out = scaled_dot_product_attention(q, k, v, dropout_p=p)
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, D, heads, p):
        super().__init__()
        self.qkv, self.proj, self.heads, self.p = linear(D, 3 * D), linear(D, D), heads, p

    def forward(self, x):
        x = attention(*self.qkv(x).chunk(3, dim=-1), self.heads, self.p * self.training)
        return dropout(self.proj(x), self.p * self.training)


class CrossAttention(nn.Module):
    """DC-CA's block: no biases and no learned norm, so that MixAR-L has the 707M of Table 2.   [ours]"""

    def __init__(self, D, heads):
        super().__init__()
        self.q, self.kv, self.proj = (nn.Linear(D, d, bias=False) for d in (D, 2 * D, D))
        for layer in (self.q, self.kv, self.proj):
            nn.init.xavier_uniform_(layer.weight)
        self.heads = heads

    def forward(self, x, memory):
        q = self.q(layer_norm(x, x.shape[-1:], eps=1e-6))
        return self.proj(attention(q, *self.kv(memory).chunk(2, dim=-1), self.heads))


class Mlp(nn.Module):
    def __init__(self, D, p):
        super().__init__()
        self.fc1, self.fc2, self.p = linear(D, 4 * D), linear(4 * D, D), p

    def forward(self, x):
        x = dropout(gelu(self.fc1(x)), self.p * self.training)
        return dropout(self.fc2(x), self.p * self.training)


class Block(nn.Module):
    """Pre-norm transformer block; with `cross`, cross-attention after the self-attention (DC-CA)."""

    def __init__(self, D, heads, p, cross):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.attn, self.mlp = SelfAttention(D, heads, p), Mlp(D, p)
        self.cross = CrossAttention(D, heads) if cross else None

    def forward(self, x, memory):
        x = x + self.attn(self.norm1(x))
        if self.cross is not None:
            x = x + self.cross(x, memory)
        return x + self.mlp(self.norm2(x))


def gaussian(*shape):
    return nn.Parameter(0.02 * torch.randn(shape))


class MAR(nn.Module):
    """p_theta(x_c^i | visible x_c, X_d), Eq. (6): an encoder over visible tokens, a decoder over all, Eq. (5)'s head.

    N tokens of d_c channels, d_d bits, `classes` classes; guidance as in GUIDANCES; mix_at "decoder" or
    "encoder" says where Eq. (9)'s discrete tokens enter (dcmix only). ValueError on an unknown guidance
    or if dcmix has d_d > d_c.
    """

    def __init__(self, N, d_c, d_d, classes, D, depth, heads, K, head_depth, head_width, dropout,
                 guidance="dcmix", mix_at="decoder"):
        super().__init__()
        if guidance not in GUIDANCES or mix_at not in ("decoder", "encoder"):
            raise ValueError(f"guidance must be one of {GUIDANCES} and mix_at decoder or encoder, got {guidance}, {mix_at}")
        if guidance == "dcmix" and d_d > d_c:
            raise ValueError(f"d_d = {d_d} bits do not fit into d_c = {d_c} channels; dcmix (Eq. 9) needs d_d <= d_c")
        self.N, self.d_c, self.d_d, self.D, self.K, self.guidance, self.mix_at = N, d_c, d_d, D, K, guidance, mix_at
        self.recompute = False
        self.class_emb = nn.Embedding(classes, D)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.fake_latent = gaussian(1, D)                                    # the class vector of "no class"
        if guidance != "dcmix":
            self.mask_token = gaussian(1, 1, D)                              # DC-Mix has x_d in its place
        self.encoder_pos_embed_learned = gaussian(1, K + N, D)
        self.decoder_pos_embed_learned = gaussian(1, K + N, D)
        self.diffusion_pos_embed_learned = gaussian(1, N, D)
        self.z_proj, self.z_proj_ln = linear(d_c, D), nn.LayerNorm(D, eps=1e-6)
        if guidance in ("dcsa", "dcca"):
            self.discrete_emb = nn.Embedding(2 ** d_d, D)                    # the learnable table of section 4.2
            nn.init.normal_(self.discrete_emb.weight, std=0.02)
        cross = guidance == "dcca"
        self.encoder_blocks = nn.ModuleList(Block(D, heads, dropout, cross) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed = linear(D, D)
        self.decoder_blocks = nn.ModuleList(Block(D, heads, dropout, cross) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.diffloss = DiffusionHead(d_c, D, head_width, head_depth)

    def embed(self, x, y, drop):
        """Class vectors K times, then z_proj(x); positions and norm over both.   x (B, N, d_c) -> (B, K + N, D)"""
        label = torch.where(drop[:, None], self.fake_latent, self.class_emb(y))                  # (B, D)
        x = torch.cat([label[:, None].expand(-1, self.K, -1), self.z_proj(x)], dim=1)            # (B, K + N, D)
        return self.z_proj_ln(x + self.encoder_pos_embed_learned)

    def discrete(self, x_d):
        """The discrete tokens of DC-SA and DC-CA at the continuous tokens' positions.   (B, N, d_d) -> (B, N, D)"""
        return self.z_proj_ln(self.discrete_emb(tokenizers.bits_to_codes(x_d)) + self.encoder_pos_embed_learned[:, self.K:])

    def run_blocks(self, blocks, x, memory):
        """The blocks one after the other; with `recompute` their inner activations are computed again in the backward pass, not kept."""
        for block in blocks:
            keep = not (self.recompute and torch.is_grad_enabled())
            x = block(x, memory) if keep else checkpoint(block, x, memory, use_reentrant=False)
        return x

    def forward(self, x_c, x_d, m, y, drop):
        """z of Eq. (6).

        x_c (B, N, d_c) (values where m is True do not matter), x_d (B, N, d_d) bits (unused by guidance
        none), m (B, N) bool (there or on the CPU) with the same count in every row, y (B,) int, drop (B,)
        bool: no class. -> z (B, N, D). ValueError on an uneven mask.
        """
        if (m.sum(1) != m[0].sum()).any():
            raise ValueError("the mask must hide the same number of tokens in every row")

        # what goes in: the mixed sequence of Eq. (9) for dcmix, else x_c
        x = x_c
        if self.guidance == "dcmix":
            x = mixing.dc_mix(x_c, mixing.pad(x_d, self.d_c), m.to(x.device))                    # (B, N, d_c)       Eq. (9)
        x = self.embed(x, y, drop)                                           # (B, K + N, D)
        memory = self.discrete(x_d) if self.guidance in ("dcsa", "dcca") else None
        prefix = self.N if self.guidance == "dcsa" else 0                    # DC-SA: N more tokens, always visible

        # encoder: the visible tokens alone; with mix_at encoder all count as visible
        masked = torch.nn.functional.pad(m, (self.K, 0))                     # (B, K + N) class tokens are visible
        if self.guidance == "dcmix" and self.mix_at == "encoder":
            masked = torch.zeros_like(masked)
        keep = masked.shape[1] - int(masked[0].sum())
        visible = masked.int().argsort(dim=1, stable=True)[:, :keep, None].expand(-1, -1, self.D).to(x.device)
        seen = x.gather(1, visible)                                          # (B, K + visible, D)
        if prefix:
            seen = torch.cat([memory, seen], dim=1)
        seen = self.decoder_embed(self.encoder_norm(self.run_blocks(self.encoder_blocks, seen, memory)))

        # decoder: every position; a masked one holds DC-Mix's embedded discrete token where MAR has its mask token
        x = self.decoder_embed(x) if self.guidance == "dcmix" else self.mask_token.expand_as(x)
        x = x.to(seen.dtype).scatter(1, visible, seen[:, prefix:]) + self.decoder_pos_embed_learned
        if prefix:
            x = torch.cat([seen[:, :prefix] + self.decoder_pos_embed_learned[:, self.K:], x], dim=1)
        x = self.run_blocks(self.decoder_blocks, x, memory)
        return self.decoder_norm(x)[:, prefix + self.K:] + self.diffusion_pos_embed_learned      # (B, N, D)


class MultiHead(nn.Module):
    """PyTorch's multi-head attention layout: in_proj_weight (3D, D), in_proj_bias, out_proj."""

    def __init__(self, D, heads, p):
        super().__init__()
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * D, D)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * D))
        self.out_proj, self.heads, self.p = nn.Linear(D, D), heads, p

    def forward(self, x):
        qkv = torch.nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(attention(*qkv.chunk(3, dim=-1), self.heads, self.p * self.training))


class PriorAttention(nn.Module):
    def __init__(self, D, heads, p, prenorm):
        super().__init__()
        self.mha, self.norm, self.p, self.prenorm = MultiHead(D, heads, p), nn.LayerNorm(D, eps=1e-12), p, prenorm

    def forward(self, x):
        if self.prenorm:
            return x + dropout(self.mha(self.norm(x)), self.p * self.training)
        return self.norm(x + dropout(self.mha(x), self.p * self.training))


class PriorFeedForward(nn.Module):
    def __init__(self, D, mlp, p, prenorm):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, mlp), nn.GELU(), nn.Linear(mlp, D), nn.Dropout(p))
        self.norm, self.prenorm = nn.LayerNorm(D, eps=1e-12), prenorm

    def forward(self, x):
        return x + self.net(self.norm(x)) if self.prenorm else self.norm(x + self.net(x))


class MaskBitPrior(nn.Module):
    """p_phi of Eqs. (3), (4): bits in {-1, +1}, 0 where masked -> logits of every bit group.   [MaskBit]

    N tokens of `bits` bits in `splits` groups; `classes` classes and one more row for "no class".
    """

    def __init__(self, N, bits, classes, D, depth, heads, mlp, prenorm=False, dropout=0.1, splits=2):
        super().__init__()
        self.N, self.bits, self.splits, self.classes, self.codes = N, bits, splits, classes, 2 ** (bits // splits)
        self.pos_emb = nn.Parameter(torch.empty(1, N + 1, D))
        self.register_buffer("bits_to_indices", 2 ** torch.arange(bits // splits, dtype=torch.int32))
        self.class_emb = nn.Embedding(classes + 1, D)
        self.input_proj = nn.Linear(bits, D)
        self.first_layer = nn.Sequential(nn.LayerNorm(D, eps=1e-12), nn.Dropout(dropout))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(
            nn.ModuleList([PriorAttention(D, heads, dropout, prenorm), PriorFeedForward(D, mlp, dropout, prenorm)]) for _ in range(depth))
        self.norm_after_transformer = nn.LayerNorm(D, eps=1e-12) if prenorm else None
        self.last_layer = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D, eps=1e-12))
        self.prediction_layer = nn.Linear(D, splits * self.codes)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_emb, std=0.02)

    def forward(self, x, y, drop=None):
        """x (B, N, bits) in {-1, 0, +1}, y (B,) int, drop (B,) bool: no class -> logits (B, N, splits, 2^(bits/splits))."""
        if drop is not None:
            y = torch.where(drop, self.classes, y)
        x = torch.cat([self.input_proj(x), self.class_emb(y)[:, None]], dim=1)                   # (B, N + 1, D)
        x = self.first_layer(x + self.pos_emb)
        for attend, feed_forward in self.transformer.layers:
            x = feed_forward(attend(x))
        if self.norm_after_transformer is not None:
            x = self.norm_after_transformer(x)
        logits = self.prediction_layer(self.last_layer(x))[:, :-1]                               # (B, N, S C)
        return logits.unflatten(-1, (self.splits, self.codes)).float()


OFFICIAL = {"vae": ("KL-16 or VA-VAE", "quant_conv."), "vq": ("MaskBit tokenizer", "quantize."),             # what they are called, and
            "prior": ("MaskBit generator", "transformer."), "mixar": ("MAR", "diffloss.")}                   # how keys of theirs alone begin
# official parameter names -> ours
RENAMED = {"vae": {r"mid\.block_1": "mid.block.0", r"mid\.block_2": "mid.block.1", r"mid\.attn_1": "mid.attn.0", r"(down|up)sample\.conv": "resize"},
           "vq": {r"res_blocks": "block", r"(down|upsample)_conv": "resize"}, "prior": {r"^token_emb": "input_proj"}, "mixar": {}}


def count(state, prefix):
    """How many numbered modules lie under `prefix`."""
    return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})


def size(state, key, axis=0):
    """The length of one axis of a parameter. LookupError naming a missing or mis-shaped one."""
    if key not in state:
        raise LookupError(f"missing {key}")
    if state[key].dim() <= axis:
        raise LookupError(f"{key} is {tuple(state[key].shape)}, expected more axes")
    return state[key].shape[axis]


def heads_of(D):
    """The heads, which no shape tells: 64 features each, at most 16 heads [MAR] [MaskBit], at least 4 [ours].   768 -> 12, 1024 and 1280 -> 16"""
    return max(4, min(16, D // 64))


def rename(state, kind):
    """Official parameter names -> ours, without what only VA-VAE's training used. LookupError where two become one.

    The KL-VAE counts its up levels from the full resolution, MaskBit and we in the order they run.
    """
    ours, last = {}, count(state, "decoder.up.") - 1
    for key, value in state.items():
        if kind == "vae" and key.startswith(("loss.", "foundation_model.", "linear_proj.")):
            continue
        for old, new in RENAMED[kind].items():
            key = re.sub(old, new, key)
        if kind == "vae":
            key = re.sub(r"^decoder\.up\.(\d+)", lambda level: f"decoder.up.{last - int(level[1])}", key)
        if key in ours:
            raise LookupError(f"{key} under two names")
        ours[key] = value
    return ours


def tokenizer_config(state):
    """The configuration of a KL-VAE or a MaskBit tokenizer with our parameter names.   [VA-VAE] [MAR] [MaskBit]"""
    widths = [size(state, f"encoder.down.{i}.block.0.conv1.weight") for i in range(max(count(state, "encoder.down."), 1))]
    config = dict(width=widths[0], mult=[width // widths[0] for width in widths], blocks=count(state, "encoder.down.0.block."))
    if any(key.startswith("quantize.") for key in state):
        return config | dict(bits=size(state, "encoder.conv_out.weight"))
    return config | dict(z=size(state, "post_quant_conv.weight"), attn=count(state, "decoder.up.0.attn.") > 0)


def mar_config(state):
    """The configuration of an official MAR, of patch size 1 as all released ones.   [MAR]"""
    D, d_c, N = size(state, "z_proj.weight"), size(state, "z_proj.weight", 1), size(state, "diffusion_pos_embed_learned", 1)
    return dict(N=N, d_c=d_c, d_d=0, classes=size(state, "class_emb.weight"), D=D, depth=count(state, "encoder_blocks."), heads=heads_of(D),
                K=size(state, "encoder_pos_embed_learned", 1) - N, head_depth=count(state, "diffloss.net.res_blocks."),
                head_width=size(state, "diffloss.net.input_proj.weight"), dropout=0.1, guidance="none")


def prior_config(state):
    """The configuration of an official MaskBit generator.   [MaskBit]"""
    D, bits = size(state, "input_proj.weight"), size(state, "input_proj.weight", 1)
    return dict(N=size(state, "pos_emb", 1) - 1, bits=bits, splits=bits // size(state, "bits_to_indices"), classes=size(state, "class_emb.weight") - 1, D=D,
                depth=count(state, "transformer.layers."), heads=heads_of(D), mlp=size(state, "transformer.layers.0.1.net.0.weight"),
                prenorm="norm_after_transformer.weight" in state, dropout=0.1)


def from_official(saved, kind, path, weights="ema"):
    """The content of an official file -> configuration, state dict with our parameter names.   [MAR] [MaskBit] [VA-VAE]

    The weights lie under "model_ema" (not for weights "raw"), "model", "state_dict" or bare. SystemExit on another family.
    """
    wrappers = ("model_ema", "model", "state_dict")[weights == "raw":]
    inner = next((saved[key] for key in wrappers if isinstance(saved.get(key), dict)), saved)
    state = {str(key): value for key, value in inner.items() if isinstance(value, torch.Tensor)}
    found = next((family for family, (_, mark) in OFFICIAL.items() if any(key.startswith(mark) for key in state)), None)
    if found != kind:
        found = f"an official {OFFICIAL[found][0]} file" if found else f"no model known here but the keys {', '.join(map(str, list(inner)[:4]))}"
        raise SystemExit(f"{path}: expected a {kind} checkpoint or an official {OFFICIAL[kind][0]} file, found {found}")
    try:
        state = rename(state, kind)
        return {"prior": prior_config, "mixar": mar_config}.get(kind, tokenizer_config)(state), state
    except (LookupError, ZeroDivisionError) as error:
        raise SystemExit(f"{path}: not the expected official {OFFICIAL[kind][0]} file: {error}") from None


def same_size(path, **sizes):
    """SystemExit unless both of every pair are equal."""
    for what, (found, expected) in sizes.items():
        if found != expected:
            raise SystemExit(f"{path}: {found} {what}, expected the {expected} of what it goes with")


PARTS = ("vae", "vq", "prior")
KINDS = {"vae": tokenizers.KLVAE, "vq": tokenizers.BitVQ, "prior": MaskBitPrior, "mixar": MAR}


def load_checkpoint(path, kind, official=False):
    """The dict in `path`, saved by train.py or fid.py, or with `official` by others; read without running any code in it.

    kind "vae", "vq", "prior", "mixar" or "classifier". SystemExit with one line on any other file.
    """
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such file; expected a {kind} checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):         # MAR's files hold their flags
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:                                               # a damaged file can fail in any way
        unsafe = "it would run code when loaded" if "unsupported global" in str(error).lower() else "it is truncated or no PyTorch file"
        raise SystemExit(f"{path}: expected a {kind} checkpoint, but {unsafe}; it was not loaded") from None
    found = saved.get("kind", kind if official else "a dict without kind") if isinstance(saved, dict) else type(saved).__name__
    if found != kind:
        raise SystemExit(f"{path}: expected a {kind} checkpoint, found {found}")
    parts = ("config", "model", "meta") if kind == "classifier" else ("config", "model", "ema", "meta", "step")
    if "kind" in saved and (missing := [part for part in parts if part not in saved]):
        raise SystemExit(f"{path}: this {kind} checkpoint lacks {', '.join(missing)}")
    return saved


def load_weights(module, state, path):
    """Strict load: SystemExit naming every missing, unexpected or mis-shaped key. A module on the meta device gets its memory here."""
    own = module.state_dict()
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    wrong += [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape]
    if wrong:
        raise SystemExit(f"{path}: does not fit the model: " + "; ".join(wrong))
    if any(value.is_meta for value in own.values()):
        module.to_empty(device="cpu")
    module.load_state_dict(state)


def build(kind, config, state, path):
    """The model of this configuration with these weights, ready for inference. SystemExit where they do not fit."""
    try:
        with torch.device("meta"):                                           # no time lost on start values
            model = KINDS[kind](**config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise SystemExit(f"{path}: there is no {kind} of the configuration {config}: {error}") from None
    load_weights(model, state, path)
    return model.eval().requires_grad_(False)


def load_model(path, kind, weights="ema"):
    """The model saved at `path` (a checkpoint, a folder with last.pt, or an official file), ready for inference, and its checkpoint dict.

    weights "ema" or "raw". SystemExit with one line where it cannot be loaded.
    """
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    saved = load_checkpoint(path, kind, official=True)
    if "kind" in saved:
        return build(kind, saved["config"], saved["ema" if weights == "ema" else "model"], path), saved
    config, state = from_official(saved, kind, path, weights)
    return build(kind, config, state, path), dict(config=config, step=0, meta={})


# name: preset, guidance, d_c, other head; the paper's parameters (M) and tokens
SIZES = {"MAR-B": ("base", "none", 16, {}, 208, ""), "MAR-L": ("large", "none", 16, dict(head_depth=8, head_width=1280), 479, ""),
         "MAR-H": ("huge", "none", 16, {}, 943, ""), "MixAR-B": ("base", "dcmix", 32, {}, 208, ""), "MixAR-L, DC-Mix": ("large", "dcmix", 32, {}, 557, 320),
         "MixAR-L, DC-SA": ("large", "dcsa", 32, {}, 574, 512), "MixAR-L, DC-CA": ("large", "dcca", 32, {}, 707, 512)}


def sized(name):
    """The model of a row of SIZES at 256 x 256 with 14 bits, on the meta device: shapes without memory."""
    preset, guidance, d_c, head, _, _ = SIZES[name]
    with torch.device("meta"):
        return MAR(256, d_c, 14, 1000, guidance=guidance, **PRESETS[preset]["mar"] | head).eval()


@torch.no_grad()
def forward_flops(model, ratio=0.85):
    """Floating-point operations, two a multiply-add, for z of one image (without the diffusion head) with this mask ratio."""
    N = model.N
    m = torch.arange(N)[None] < math.ceil(N * ratio)                         # on the CPU: its values count
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, N, model.d_c), torch.empty(1, N, model.d_d), m, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.bool))
    return counter.get_total_flops()


def main():
    print(f"{'':18}{'params (M)':>11}{'paper (M)':>11}{'tokens':>8}{'paper':>7}{'TFLOPs':>8}")
    for name, (_, guidance, _, _, millions, tokens) in SIZES.items():
        model = sized(name)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        length = model.K + model.N * (1 + (guidance in ("dcsa", "dcca")))
        print(f"{name:18}{parameters:11.1f}{millions:11}{length:8}{tokens:7}{forward_flops(model) / 1e12:8.3f}")
    print("tokens: class, continuous and discrete; the paper's 512 leave out the 64 class tokens, its 320 do not. TFLOPs: backbone, one image, mask ratio 0.85")


if __name__ == "__main__":
    main()
