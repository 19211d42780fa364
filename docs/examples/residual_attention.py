"""Train one residual attention block, x + attend(norm(x)), then x + mlp(norm(x)), to turn sequences round.

    python docs/examples/residual_attention.py

Which position to look at is all that there is to learn, and only attention can look. Stops when every symbol of 256 new
sequences is right.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srm_core.nn import Attention

SYMBOLS, LENGTH, WIDTH, HEADS = 8, 12, 32, 4


class Block(nn.Module):
    """x (B, T, E) -> (B, T, E)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Turner(nn.Module):
    """Symbols (B, T) -> logits (B, T, SYMBOLS)."""

    def __init__(self) -> None:
        super().__init__()
        self.symbol, self.place = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block = Block(WIDTH, HEADS)
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS))

    def forward(self, symbols: Tensor) -> Tensor:
        return self.out(self.block(self.symbol(symbols) + self.place.weight))


@torch.no_grad()
def accuracy(model: Turner, symbols: Tensor) -> float:
    return (model(symbols).argmax(-1) == symbols.flip(1)).float().mean().item()


def run(most: int = 2000) -> int | None:
    """The step at which it was solved; None: not within `most`."""
    torch.manual_seed(0)
    model = Turner()
    optim = torch.optim.AdamW(model.parameters(), lr=3e-3)
    held = torch.randint(SYMBOLS, (256, LENGTH))
    for step in range(1, most + 1):
        symbols = torch.randint(SYMBOLS, (64, LENGTH))
        loss = F.cross_entropy(model(symbols).flatten(0, 1), symbols.flip(1).flatten())
        optim.zero_grad()
        loss.backward()
        optim.step()
        if step % 50 == 0:
            right = accuracy(model, held)
            print(f"step {step:4}: loss {loss.item():.4f}, {right:.1%} right")
            if right == 1:
                return step
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="give up after these")
    raise SystemExit(0 if run(parser.parse_args().steps) else "not solved; try more --steps")
