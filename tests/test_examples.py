"""docs/examples: what they say they do, they do."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402

from srm_core.models import RecurrentMixer  # noqa: E402
from srm_core.nn import RecurrentMLPMixer  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SMALL = ["--width", "16", "--blocks", "2", "--heads", "4", "--length", "16", "--batch", "4", "--every", "2"]
TEXT = "The quick brown fox jumps over the lazy dog. Sphinx of black quartz, judge my vow.\n" * 40


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """They import each other, as scripts of one folder do; torch's switches are as before afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def mixer() -> ModuleType:
    return import_module("train_mixer")


@pytest.fixture
def problem() -> type[Exception]:
    kind: type[Exception] = import_module("training_data").Problem
    return kind


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages were not installed."""
    imported = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in names:
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    for module in [m for m in sys.modules if m.split(".")[0] in names]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", refuse)


def test_a_text_becomes_a_model_that_both_readers_load(mixer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert mixer.main(["text.txt", "--out", "m.safetensors", *SMALL, "--steps", "4", "--sample", "5"]) == 0
    rows = [json.loads(line) for line in Path("m.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert "validation" in rows[1]
    assert "wrote m.safetensors" in capsys.readouterr().out
    inference, module = RecurrentMixer.load("m.safetensors"), RecurrentMLPMixer.load("m.safetensors")
    assert inference.vocabulary.characters == module.vocabulary.characters == "".join(sorted(set(TEXT)))
    ids = [inference.vocabulary.encode("The quick")]
    with torch.no_grad():
        ours = module(torch.tensor(ids))
    torch.testing.assert_close(torch.from_numpy(inference.forward(ids)), ours, rtol=1e-4, atol=1e-4)
    with safe_open("m.safetensors", "numpy") as file:
        metadata = file.metadata()
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads(metadata["config"]) == {
        "vocab_size": len(set(TEXT)), "hidden_dim": 16, "seq_len": 16, "num_blocks": 2, "heads": 4,
        "mixed_heads": True, "decay": True,
    }  # fmt: skip
    assert metadata["steps"] == "4"
    assert 0 < float(metadata["test_bits_per_character"]) < 8


def test_two_steps_and_two_more_are_four_bit_for_bit(mixer: ModuleType) -> None:
    run = ["text.txt", *SMALL, "--steps", "4", "--dropout", "0.3"]
    assert mixer.main([*run, "--out", "whole.safetensors"]) == 0
    assert mixer.main([*run, "--out", "parts.safetensors", "--stop-at", "2"]) == 0
    assert not Path("parts.safetensors").exists()
    torch.rand(7)  # what else draws random numbers in between is of no account
    assert mixer.main([*run, "--out", "parts.safetensors", "--resume"]) == 0
    whole, parts = (torch.load(f"{name}.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert parts["step"] == 4
    for name in ("model", "optimiser", "schedule"):
        torch.testing.assert_close(whole["states"][name], parts["states"][name], rtol=0, atol=0)
    torch.testing.assert_close(whole["chance"], parts["chance"], rtol=0, atol=0)
    histories = [[{k: v for k, v in row.items() if k != "seconds"} for row in c["history"]] for c in (whole, parts)]
    assert histories[0] == histories[1]
    assert Path("whole.safetensors").read_bytes()[-1000:] == Path("parts.safetensors").read_bytes()[-1000:]


def test_the_copy_task_is_learnt(mixer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--width", "32", "--blocks", "2", "--heads", "4", "--length", "8", "--dropout", "0"]
    assert mixer.main(["--task", "copy", *size, "--steps", "300", "--every", "75"]) == 0
    first, last = (json.loads(line) for line in (Path("mixer.jsonl").read_text().splitlines()[i] for i in (1, -1)))
    assert last["accuracy"] > 0.95 >= first["accuracy"] - 0.05
    assert "% right" in capsys.readouterr().out
    with safe_open("mixer.safetensors", "numpy") as file:
        assert file.metadata()["task"] == "copy"


def test_the_copy_task_asks_for_what_was_given(mixer: ModuleType) -> None:
    data = import_module("training_data")
    ids, targets = data.CopyTask(8, torch.device("cpu")).batch(3)
    assert ids.shape == targets.shape == (3, 8)
    assert (targets[:, :4] == data.IGNORED).all()
    assert torch.equal(targets[:, 4:], ids[:, :4])
    assert torch.equal(ids[:, 5:], ids[:, :3])  # what has been told is read
    assert (ids[:, 4] == data.SYMBOLS).all()


def test_bytes_of_several_files(mixer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    Path("more.txt").write_text("Übermut tut selten gut. " * 40, encoding="utf-8")
    run = ["text.txt", "more.txt", "--tokens", "bytes", *SMALL, "--steps", "2", "--sample", "8"]
    assert mixer.main(run) == 0
    train = import_module("training_data").read_corpus(Path("text.txt"), Path("more.txt"))[0]
    assert f"{len(train.encode()):,} tokens to train on" in capsys.readouterr().out
    with safe_open("mixer.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert metadata["tokens"] == "bytes"
    assert "vocabulary" not in metadata
    assert json.loads(metadata["config"])["vocab_size"] == 256
    assert RecurrentMixer.load("mixer.safetensors").vocabulary is None


def test_a_hugging_face_tokenizer(
    mixer: ModuleType, problem: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Words:
        """As `transformers` has them: a length, encode and decode."""

        @classmethod
        def from_pretrained(cls, name: str) -> Words:
            if name != "words":
                raise OSError(f"{name} is not\na model")
            return cls()

        def __len__(self) -> int:
            return 7

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [len(word) % 7 for word in text.split()]

        def decode(self, ids: list[int]) -> str:
            return "~".join(map(str, ids))

    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=Words))
    assert mixer.main(["text.txt", "--tokens", "hf:words", *SMALL, "--steps", "2", "--sample", "3"]) == 0
    assert "~" in capsys.readouterr().out
    with pytest.raises(problem, match="hf:none: none is not a model"):
        mixer.main(["text.txt", "--tokens", "hf:none", *SMALL])


def test_a_tokenizer_file(mixer: ModuleType) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(dict.fromkeys(["?", *TEXT.split()]))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save("tokenizer.json")
    assert mixer.main(["text.txt", "--tokens", "hf:tokenizer.json", *SMALL, "--steps", "2", "--sample", "3"]) == 0


def test_an_archive_without_the_plays(mixer: ModuleType, problem: type[Exception]) -> None:
    import tarfile

    with tarfile.open("other.tar.gz", "w:gz") as archive:
        archive.add("text.txt")
    with pytest.raises(problem, match=r"other\.tar\.gz: an archive without the texts"):
        mixer.main(["other.tar.gz", *SMALL])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["none.txt"], "none.txt: cannot be read: No such file"),
        (["latin.txt"], "latin.txt: no UTF-8 at byte 4"),
        (["text.txt", "--length", "9000"], "the training text has 2,656 .* a window needs 9,001; .* --length"),
        (["short.txt", "--length", "7"], "the validation text has 1 tokens"),
        ([], "no text; give files"),
        (["text.txt", "--tokens", "letters"], "found 'letters'; required characters, bytes or hf:NAME"),
        (["text.txt", "--out", "no/m.safetensors"], "no folder no"),
        (["text.txt", "--width", "15"], "heads: found 16; required a divisor of hidden_dim 15"),
        (["text.txt", "--resume"], "no checkpoint to resume from"),
        (["--task", "copy", "--length", "9"], "found 9; required an even number"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(mixer: ModuleType, given: list[str], said: str) -> None:
    from srm_core.errors import SRMError

    Path("latin.txt").write_bytes(b"abcd\xe9" * 100)
    Path("short.txt").write_text("a" * 19, encoding="utf-8")
    with pytest.raises((import_module("training_data").Problem, SRMError), match=said) as raised:
        mixer.main([*given, "--steps", "1"])
    assert "\n" not in str(raised.value)


def test_without_tokenizers_it_says_what_to_install(
    mixer: ModuleType, problem: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "transformers", "tokenizers")
    with pytest.raises(problem, match="pip install tokenizers"):
        mixer.main(["text.txt", "--tokens", "hf:gpt2", *SMALL])


def test_a_checkpoint_of_another_run(mixer: ModuleType, problem: type[Exception]) -> None:
    run = ["text.txt", *SMALL, "--steps", "4"]
    assert mixer.main([*run, "--stop-at", "1"]) == 0
    with pytest.raises(problem, match=r"another run \(--lr: 0\.003, now 0\.1\)"):
        mixer.main([*run, "--resume", "--lr", "0.1"])
    with pytest.raises(problem, match="--width: 16, now 32"):
        mixer.main([*run, "--resume", "--width", "32"])
    Path("text.txt").write_text(TEXT.replace("fox", "vix"), encoding="utf-8")
    with pytest.raises(problem, match="the text: "):
        mixer.main([*run, "--resume"])
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    Path("mixer.ckpt").write_bytes(b"nothing")
    with pytest.raises(problem, match=r"mixer\.ckpt: no checkpoint"):
        mixer.main([*run, "--resume"])
    torch.save({"weight": torch.ones(1)}, "mixer.ckpt")
    with pytest.raises(problem, match="no checkpoint that this script wrote"):
        mixer.main([*run, "--resume"])


def test_a_loss_that_is_not_finite_stops_and_spoils_nothing(mixer: ModuleType, problem: type[Exception]) -> None:
    run = ["text.txt", *SMALL, "--steps", "8"]
    assert mixer.main([*run, "--stop-at", "4"]) == 0
    before = torch.load("mixer.ckpt", weights_only=True)
    before["states"]["model"]["output_layer.weight"].fill_(float("nan"))
    torch.save(before, "mixer.ckpt")
    kept = Path("mixer.ckpt").read_bytes()
    with pytest.raises(problem, match="the loss of step 6 is nan"):
        mixer.main([*run, "--resume"])
    assert Path("mixer.ckpt").read_bytes() == kept


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to another process")
def test_ctrl_c_leaves_a_checkpoint(mixer: ModuleType) -> None:
    run = ["text.txt", *SMALL, "--steps", "1000000", "--every", "1"]
    process = subprocess.Popen(
        [sys.executable, "-u", str(EXAMPLES / "train_mixer.py"), *run],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        while "'step': 1," not in (line := process.stdout.readline()):
            assert line, process.communicate()[1]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == mixer.INTERRUPTED, err
    assert "Traceback" not in err
    assert "interrupted after step" in out
    assert "--resume" in out
    step = torch.load("mixer.ckpt", weights_only=True)["step"]
    assert f"interrupted after step {step:,};" in out
    assert mixer.main([*run, "--resume", "--stop-at", str(step + 1)]) == 0
    assert torch.load("mixer.ckpt", weights_only=True)["step"] == step + 1


def test_a_curve_if_matplotlib_is_there(
    mixer: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["text.txt", *SMALL, "--steps", "2"]
    with monkeypatch.context() as bare:
        without(bare, "matplotlib", "plot_training")
        assert mixer.main(run) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert not Path("mixer.png").exists()
    pytest.importorskip("matplotlib")
    assert mixer.main(run) == 0
    assert Path("mixer.png").read_bytes().startswith(b"\x89PNG")


def test_mlflow_gets_the_losses_of_one_run(mixer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    stub = SimpleNamespace(
        start_run=lambda **k: said.append(k) or SimpleNamespace(info=SimpleNamespace(run_id="r1")),
        log_params=lambda p: said.append("params"),
        log_metrics=lambda m, step: said.append((step, sorted(m))),
        end_run=lambda: said.append("end"),
    )
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    run = ["text.txt", *SMALL, "--steps", "4", "--log", "mlflow"]
    assert mixer.main([*run, "--stop-at", "2"]) == 0
    assert mixer.main([*run, "--resume"]) == 0
    assert said == [
        {"run_id": None, "run_name": "mixer"}, "params", (2, ["seconds", "train"]), "end",
        {"run_id": "r1", "run_name": None}, (4, ["seconds", "train", "validation"]), "end",
    ]  # fmt: skip


def test_tensorboard_gets_the_losses(mixer: ModuleType) -> None:
    pytest.importorskip("tensorboard")
    assert mixer.main(["text.txt", *SMALL, "--steps", "4", "--log", "tensorboard"]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("mixer").Reload()
    assert [e.step for e in events.Scalars("train")] == [2, 4]
    assert [e.step for e in events.Scalars("validation")] == [4]


@pytest.mark.parametrize("log", ["tensorboard", "mlflow"])
def test_without_a_log_it_says_what_to_install(
    mixer: ModuleType, problem: type[Exception], monkeypatch: pytest.MonkeyPatch, log: str
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    without(monkeypatch, "tensorboard", "mlflow")
    with pytest.raises(problem, match=rf"--log {log}: .*pip install 'srm-core\[{log}\]'"):
        mixer.main(["text.txt", *SMALL, "--steps", "2", "--log", log])


def test_the_digits_are_read_as_well_as_by_the_twin() -> None:
    pytest.importorskip("sklearn")
    found = import_module("train_digits").run()
    assert found["srm_core.nn"] > 0.95
    assert abs(found["srm_core.nn"] - found["torch"]) < 0.01


def test_the_residual_block_turns_sequences_round() -> None:
    step = import_module("residual_attention").run(1000)
    assert step is not None


def test_the_agent_learns_to_remember() -> None:
    before, after = import_module("agent").run(300)
    assert before < 0.4
    assert after > 0.8


def test_the_agent_in_steps_is_the_agent_in_parallel() -> None:
    module = import_module("agent")
    agent = module.Agent()
    seen, memory, steps = torch.rand(2, 5, module.SEEN), None, []
    with torch.no_grad():
        for t in range(5):
            logits, memory = agent.step(seen[:, t], memory)
            steps.append(logits)
        torch.testing.assert_close(torch.stack(steps, 1), agent(seen))
