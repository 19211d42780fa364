"""The model on torch and CuPy arrays, with the recurrences from a backend in another package."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import srm_core
from srm_core.models import RecurrentMixer

HERE = Path(__file__).parent


def _missing(library: str, device: str) -> str:
    module = pytest.importorskip(library)
    if device == "cuda" and library == "torch" and not module.cuda.is_available():
        return "no CUDA device"
    return ""


@pytest.fixture(params=[("torch", None), ("torch", "cuda"), ("cupy", None)], ids=lambda p: "-".join(map(str, p)))
def placed(request: pytest.FixtureRequest):
    library, device = request.param
    if why := _missing(library, device or ""):
        pytest.skip(why)
    if library == "cupy" and not sys.modules["cupy"].cuda.is_available():
        pytest.skip("no CUDA device")
    return library, device


@pytest.fixture
def eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The backend `eager`, installed as a package of its own."""
    info = tmp_path / "srm_eager-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: srm-eager\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[srm_core.backends]\neager = eager_backend\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(HERE))
    srm_core.reload_config()
    yield "eager"
    monkeypatch.undo()
    srm_core.reload_config()


def test_the_model_runs_on_any_library(placed: tuple[str, str | None], eager: str) -> None:
    """Logits in all three forms, and the text, are those of NumPy."""
    library, device = placed
    prompts = ["ROMEO.\nBut soft", "A"]
    expected = RecurrentMixer.load(dtype="float64")
    model = RecurrentMixer.load(library=library, device=device, dtype="float64")
    ids = np.array([expected.vocabulary.encode("What light through yonder window")])
    with srm_core.use_backend(eager):
        whole = model.forward(ids)
        assert type(whole).__module__.startswith(library)
        first, state = model.prefill(ids[:, :20])
        stepped, _ = model.step(ids[:, 20], state)
        texts = model.generate(prompts, 40, temperature=0.7, seed=3)
        remembered = len(srm_core.dispatch.operator("recurrent_mix").memo)
        model.forward(ids)
    assert len(srm_core.dispatch.operator("recurrent_mix").memo) == remembered > 0
    truth = expected.forward(ids)
    for got, want in ((whole, truth), (first, truth[:, :20]), (stepped, truth[:, 20])):
        host = got.get() if library == "cupy" else got.cpu().numpy()
        np.testing.assert_allclose(host, want, rtol=1e-9, atol=1e-9)
    assert texts == expected.generate(prompts, 40, temperature=0.7, seed=3)


def test_no_backend_copies_between_devices(placed: tuple[str, str | None]) -> None:
    """Without a backend for the device the error names what each one lacks; nothing moves silently."""
    library, device = placed
    if device is None and library == "torch":
        pytest.skip("the numpy backend sees CPU tensors as views")
    model = RecurrentMixer.load(library=library, device=device)
    with pytest.raises(srm_core.NoBackendError, match="the arrays are on cuda"), srm_core.use_backend("numpy"):
        model.forward(np.zeros((1, 3), int))
