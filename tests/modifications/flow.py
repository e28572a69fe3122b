"""The check of flow.patch: literals, exact velocities, and a run. See test_modifications.py.

A failing line's message says what a wrong flow-matching head did.
"""
import sys

import torch

import diffusion_head
import running
import sample
import train

runs, out = sys.argv[1:]
x = torch.tensor([[4.0, -2.0]])
noise = torch.tensor([[0.0, 2.0]])

# the path, in literals
for t, expected in [(999, [0.0, 2.0]), (499, [2.0, 0.0]), (249, [3.0, -1.0])]:
    found = diffusion_head.straight_path(x, noise, torch.tensor([t]))
    assert torch.allclose(found, torch.tensor([expected])), f"x^t at t = {t} is {found}"

# the head starts with velocity 0, whose error is the mean of (4 - 0)^2 and (-2 - 2)^2
torch.manual_seed(0)
head = diffusion_head.DiffusionHead(C=2, D=3, W=8, depth=1)
loss = head.loss(torch.ones(1, 3), x, torch.tensor([[499], [0]]), noise.expand(2, 1, 2))
assert loss.tolist() == [[16.0], [16.0]], f"the loss of the velocity 0 is {loss.tolist()}"
loss.mean().backward()
assert head.net.final_layer.linear.weight.grad.abs().sum() > 0, "the loss does not train the head"


class Exact(torch.nn.Module):
    """The velocity towards the one token x = z: (x - noise), found from where the path is now."""

    def forward(self, x_t, t, z):
        return (z - x_t) / ((t[..., None] + 1) / 1000)


head.net = Exact()
z = torch.tensor([[4.0, -2.0], [1.0, 0.5]])
t = torch.tensor([[999, 499], [9, 99]])
loss = head.loss(z, z, t, torch.randn(2, 2, 2))
assert loss.max() < 1e-6, f"the velocity that leads from the noise to the token has loss {loss}"

for steps in (1, 2, 3, 10, 1000):
    start = torch.randn(steps, 2, 2)
    token = head.sample(z, start, steps)
    # 3 steps are at thirds of the way, between the thousandths that the head knows
    assert torch.allclose(token, z, atol=1e-2), f"{steps} steps end at {token}, not at {z}"

# guidance goes from the token without the class beyond the one with it: 1 + 3 (4 - 1) = 10
guided = head.sample(torch.tensor([[4.0]]), torch.randn(2, 1, 1), 2,
                     z_uncond=torch.tensor([[1.0]]), scale=3.0)
assert torch.allclose(guided, torch.tensor([[10.0]]), atol=1e-4), f"guided to {guided}, not to 10"
bounded = head.sample(torch.tensor([[4.0]]), torch.randn(2, 1, 1), 2, bound=3.0)
assert torch.allclose(bounded, torch.tensor([[3.0]])), f"bounded at {bounded}, not at 3"


class Still(torch.nn.Module):
    """No velocity: what comes out is where the path starts."""

    def forward(self, x_t, t, z):
        return torch.zeros_like(x_t)


head.net = Still()
start = torch.tensor([[[2.0, -4.0]], [[9.0, 9.0]]])
ends = head.sample(torch.zeros(1, 3), start, 2, temperature=0.5)
assert ends.tolist() == [[1.0, -2.0]], f"at temperature 0.5 the path starts at {ends.tolist()}"

# a head that learns one token, whatever the noise
torch.manual_seed(0)
head = diffusion_head.DiffusionHead(C=2, D=3, W=64, depth=2)
optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
z = torch.zeros(128, 3)
for step in range(150):
    t = torch.randint(0, 1000, (1, 128))
    loss = head.loss(z, x.expand(128, 2), t, torch.randn(1, 128, 2)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
for steps in (1, 2, 10):
    error = (head.sample(z, torch.randn(steps, 128, 2), steps) - x).abs().mean()
    assert error < 0.3, f"a trained head is {error:.2f} from its token after {steps} steps"

train.main(running.mixar(runs, out, "--steps", 2))
sample.main(running.sampling(out, f"{out}/some.npz", "--count", 4))
