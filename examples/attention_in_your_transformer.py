"""Use the attention kernel in a transformer of your own: one call in place of scaled_dot_product_attention.

python examples/attention_in_your_transformer.py --steps 200

The model learns to reverse a sequence of digits.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--length", type=int, default=12)
args = parser.parse_args()

DIGITS, WIDTH, HEADS = 10, 64, 4


class Block(nn.Module):
    """Self-attention and a feed-forward network, each with a norm before it and a residual connection around it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, N, C)
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each: views, which the kernel reads as they are
        attended = ops.attention(q, k, v, mask=mask)  # (B, H, N, D), laid out as (B, N, H, D) in memory
        x = x + self.out(attended.transpose(1, 2).flatten(2))  # so this is a view, too
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, length: int):
        super().__init__()
        self.token, self.position = nn.Embedding(DIGITS, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(2))
        self.head = nn.Linear(WIDTH, DIGITS)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, N) → (B, N, DIGITS)
        x = self.token(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return self.head(x)


torch.manual_seed(0)
model = Transformer(args.length)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(1, args.steps + 1):
    tokens = torch.randint(DIGITS, (64, args.length))
    logits, target = model(tokens), tokens.flip(1)
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % max(1, args.steps // 10) == 0:
        right = (logits.argmax(-1) == target).float().mean()
        print(f"step {step:4d}  loss {loss:.3f}  {right:.0%} of the digits are right")

# An explicit `impl` runs exactly that implementation or raises. None takes the best one that supports the inputs.
q = torch.randn(1, HEADS, args.length, WIDTH // HEADS)
torch.testing.assert_close(ops.attention(q, q, q), ops.attention(q, q, q, impl="reference"), rtol=1e-4, atol=1e-5)
