"""Run a pretrained network of an installed package before and after `patch`, and compare outputs and time.

    python docs/examples/patch_pretrained.py PACKAGE.MODULE:FACTORY --shape 1 3 224 224

FACTORY is called with `--arguments`, a JSON object, and gives an `nn.Module`. `--weights` is a file with a state dict,
if the factory does not load one. The network runs in evaluation, on noise of the given shape. The exit code is 1 if the
outputs differ by more than 1e-4, relative to their largest.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from srm_core.nn import patch

TOLERANCE = 1e-4


def network(target: str, arguments: dict[str, Any], weights: str | None) -> nn.Module:
    """The network in evaluation, with its weights."""
    module, _, factory = target.partition(":")
    model: nn.Module = getattr(import_module(module), factory)(**arguments)
    if weights is not None:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]


def seconds(models: Sequence[nn.Module], x: Tensor, repeats: int) -> list[float]:
    """The median time of a forward of each, in turns."""
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(repeats + 1):
        for model, times in zip(models, taken, strict=True):
            begin = perf_counter()
            model(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(perf_counter() - begin)
    return [median(times[1:]) for times in taken]


@torch.no_grad()
def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", metavar="PACKAGE.MODULE:FACTORY")
    parser.add_argument("--arguments", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--weights", metavar="FILE")
    parser.add_argument("--shape", type=int, nargs="+", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args(words)

    model = network(options.network, options.arguments, options.weights).to(options.device)
    x = torch.randn(options.shape, generator=torch.Generator().manual_seed(0)).to(options.device)
    keys = list(model.state_dict())
    want, original = tensors(model(x)), copy.deepcopy(model)
    with patch(model) as report:
        got = tensors(model(x))
        before, after = seconds((original, model), x, options.repeats)
        assert list(model.state_dict()) == keys
    print(report)
    pairs = list(zip(got, want, strict=True))
    difference = max(float((g - w).abs().max() / w.abs().max().clamp(min=1e-30)) for g, w in pairs)
    print(f"largest difference, relative to the largest value: {difference:.1e}")
    print(f"torch {1e3 * before:.2f} ms, patched {1e3 * after:.2f} ms")
    back = all(torch.equal(g, w) for g, w in zip(tensors(model(x)), want, strict=True))
    print(f"undone: {'the same bits as before' if back else 'NOT the same as before'}")
    return int(not back or not difference <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
