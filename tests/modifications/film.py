"""The check of film.patch: it starts as plain MAR, then x_d reaches its token. And a run.

See test_modifications.py. A failing line's message says what a wrong guidance did.
"""
import sys
from pathlib import Path

import torch

import backbone
import running
import sample
import train

runs, out = sys.argv[1:]
SIZE = dict(N=4, d_c=3, d_d=2, classes=2, D=16, depth=2, heads=2, K=2, head_depth=1, head_width=8,
            dropout=0.0)


def made(guidance):
    torch.manual_seed(0)
    return backbone.MAR(**SIZE, guidance=guidance).eval()


plain = made("none")
film = made("film")
torch.manual_seed(1)
x_c = torch.randn(2, 4, 3)
m = torch.tensor([[True, True, False, True], [False, True, True, True]])
bits = torch.tensor([[[1.0, -1], [-1, -1], [1, 1], [1, -1]], [[-1.0, 1], [1, 1], [-1, 1], [1, 1]]])
y = torch.tensor([0, 1])
drop = torch.tensor([False, True])


@torch.no_grad()
def z(model, x_d):
    return model(model.mix(x_c, x_d, m), x_d, m, y, drop)


shared = film.load_state_dict(plain.state_dict(), strict=False)
assert not shared.unexpected_keys and all("film" in key for key in shared.missing_keys), shared
assert torch.equal(z(film, bits), z(plain, bits)), "film does not start as plain MAR"
added = sum(p.numel() for p in film.parameters()) - sum(p.numel() for p in plain.parameters())
# in each of 4 blocks: 2 bits and a bias for 4 numbers of width 16
assert added == 4 * (2 + 1) * 4 * 16, f"film has {added} parameters more"

# every bit of every token moves z, be it masked or visible
for name, p in film.named_parameters():
    if "film" in name or "norm" in name:
        torch.nn.init.normal_(p, std=0.5)
before = z(film, bits)
for position in range(4):
    for bit in range(2):
        other = bits.clone()
        other[:, position, bit] *= -1
        assert not torch.allclose(z(film, other), before), f"bit {bit} of {position} is not seen"

# without attention a token is alone: x_d of a position moves z of this position and of no other
for block in [*film.encoder_blocks, *film.decoder_blocks]:
    torch.nn.init.zeros_(block.attn.proj.weight)
before = z(film, bits)
for position in range(4):
    other = bits.clone()
    other[:, position] *= -1
    moved = ((z(film, other) - before).abs() > 1e-6).any(-1)                 # (B, N)
    expected = torch.arange(4).expand(2, 4) == position
    assert torch.equal(moved, expected), f"x_d of position {position} moves z at {moved}"

# shift and scale of both norms: each of them alone moves what comes out of a block
block = film.decoder_blocks[0]
torch.nn.init.xavier_uniform_(block.attn.proj.weight)
torch.nn.init.zeros_(block.film.bias)
x = torch.randn(1, 3, 16)
half = x + block.attn(block.norm1(x))
whole = half + block.mlp(block.norm2(half))
without = block(x, torch.zeros(1, 3, 2))
assert torch.allclose(without, whole, atol=1e-5), "shift 0 and scale 0 change a block"
for part in range(4):
    torch.nn.init.zeros_(block.film.weight)
    with torch.no_grad():
        block.film.weight[16 * part:16 * (part + 1)] = 1.0
        assert not torch.allclose(block(x, torch.ones(1, 3, 2)), without), f"part {part} is idle"

train.main(running.mixar(runs, out, "--guidance", "film", "--steps", 4))
# z has no gradient until the layers behind it, which start as zero, have moved
learned = running.weights(Path(out))
assert learned["encoder_blocks.0.film.weight"].abs().max() > 0, "film is not trained"
sample.main(running.sampling(out, f"{out}/some.npz", "--count", 4))
