"""What the triton backend measures once and remembers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import srm_core
from srm_core.errors import KernelError

if find_spec("triton") is None or find_spec("torch") is None:
    pytest.skip("needs triton", allow_module_level=True)

from srm_backends.triton import autotune

SLOW, FAST, LARGE = (64, ("a", 1)), (128, ("b", 2)), (256, ("c", 4))


def context(deterministic: bool = False) -> Any:
    return SimpleNamespace(memo={}, deterministic=deterministic, device=SimpleNamespace(index=0))


class Gpu:
    """In the place of one: how long each choice takes, and which were timed."""

    def __init__(self, monkeypatch: Any, folder: Path) -> None:
        self.folder, self.timed = folder, list[Any]()
        self.times: dict[Any, float] = {SLOW: 2.0, FAST: 1.0, LARGE: 3.0}
        self.capturing = False
        self.running: Any = None
        monkeypatch.setattr(autotune.triton.testing, "do_bench", self.bench)
        monkeypatch.setattr(autotune.torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(autotune.torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(autotune, "INTERPRETED", False)
        self.patch = monkeypatch
        self.restart()

    def restart(self) -> None:
        """As another process would begin."""
        table = autotune.Table(self.folder / "gpu.json")
        self.patch.setattr(autotune, "_table", lambda _: table)

    def bench(self, run: Any, **options: Any) -> float:
        run()
        self.timed.append(self.running)
        return self.times[self.running]

    def run(self, choice: Any) -> None:
        if self.times[choice] == 0:
            raise KernelError("out of resource: shared memory")
        self.running = choice

    def choose(self, ctx: Any, worth: bool = True, choices: Any = (SLOW, FAST, LARGE)) -> Any:
        def ask() -> autotune.Question:
            return autotune.Question(("float32", 4096), worth, choices)

        return autotune.choose(ctx, "scan", (), ask, self.run)


@pytest.fixture
def gpu(monkeypatch: Any, tmp_path: Path) -> Gpu:
    return Gpu(monkeypatch, tmp_path / "triton")


def test_the_fastest_is_measured_once_and_kept_for_other_processes(gpu: Gpu) -> None:
    ctx = context()
    assert gpu.choose(ctx) == gpu.choose(ctx) == gpu.choose(context()) == FAST
    assert gpu.timed == [SLOW, FAST, LARGE]
    assert json.loads((gpu.folder / "gpu.json").read_text()) == {"scan float32 4096": [128, ["b", 2]]}
    gpu.restart()
    assert gpu.choose(context()) == FAST
    assert len(gpu.timed) == 3


def test_what_is_no_choice_any_more_is_measured_again(gpu: Gpu) -> None:
    gpu.choose(context())
    gpu.restart()
    assert gpu.choose(context(), choices=(SLOW, LARGE)) == SLOW
    assert gpu.timed[3:] == [SLOW, LARGE]


def test_what_the_gpu_cannot_run_is_passed_over(gpu: Gpu) -> None:
    gpu.times[FAST] = 0
    assert gpu.choose(context()) == SLOW
    gpu.times = dict.fromkeys(gpu.times, 0.0)
    assert gpu.choose(context(), choices=(LARGE, FAST)) == LARGE  # whose own error the caller will see


def test_a_little_faster_is_noise(gpu: Gpu) -> None:
    gpu.times[FAST] = 1.98
    assert gpu.choose(context()) == SLOW


@pytest.mark.parametrize("why", ["small", "deterministic", "off", "capture", "alone"])
def test_nothing_is_measured(gpu: Gpu, monkeypatch: Any, why: str) -> None:
    ctx = context(deterministic=why == "deterministic")
    choices = (SLOW,) if why == "alone" else (SLOW, FAST)
    gpu.capturing = why == "capture"
    if why == "off":
        monkeypatch.setenv("SRM_AUTOTUNE", "off")
        srm_core.reload_config()
    assert gpu.choose(ctx, worth=why != "small", choices=choices) == SLOW
    assert not gpu.timed
    if why == "off":
        monkeypatch.undo()
        srm_core.reload_config()


def test_a_capture_takes_what_is_known_and_decides_nothing(gpu: Gpu) -> None:
    ctx = context()
    gpu.capturing = True
    assert gpu.choose(ctx) == SLOW
    gpu.capturing = False
    assert gpu.choose(ctx) == FAST
    gpu.capturing = True
    assert gpu.choose(context()) == FAST


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"scan float32 4096": 7}'])
def test_a_damaged_file_is_as_none(gpu: Gpu, text: str) -> None:
    gpu.folder.mkdir()
    (gpu.folder / "gpu.json").write_text(text)
    gpu.restart()
    assert gpu.choose(context()) == FAST


def test_what_cannot_be_written_is_kept_in_this_process(gpu: Gpu, caplog: Any) -> None:
    gpu.folder.write_text("a file, where a folder should be")
    assert gpu.choose(context()) == gpu.choose(context()) == FAST
    assert len(gpu.timed) == 3
    assert "cannot be kept" in caplog.text


def test_other_processes_entries_stay(gpu: Gpu) -> None:
    gpu.choose(context())
    (gpu.folder / "gpu.json").write_text('{"mdi": [1]}')
    gpu.choose(context(), choices=(SLOW, LARGE))
    assert json.loads((gpu.folder / "gpu.json").read_text())["mdi"] == [1]


def test_a_wrong_switch_is_named(monkeypatch: Any) -> None:
    monkeypatch.setenv("SRM_AUTOTUNE", "never")
    with pytest.raises(srm_core.ConfigError, match=r"SRM_AUTOTUNE: found 'never'; required 'on' or 'off'"):
        srm_core.reload_config()
    monkeypatch.undo()
    srm_core.reload_config()
