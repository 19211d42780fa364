"""`srm-core convert`: checkpoints in, safetensors out, and nothing of a checkpoint is ever run."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
# ruff: noqa: E402

from safetensors.torch import load_file

from srm_core import cli
from srm_core.models import RecurrentMixer
from srm_core.nn import RecurrentMLPMixer

VARIANTS = {
    "row": {},
    "kernel": {"kernel": 3, "decay": True},
    "heads": {"heads": 4},
    "mixed": {"heads": 4, "mixed_heads": True, "decay": True},
    "combined": {"heads": 2, "combined_heads": True, "decay": True},
    "combined-plain": {"heads": 2, "combined_heads": True, "use_projections": False},
    "parallel": {"heads": 4, "parallel_heads": True, "decay": True},
    "parallel-plain": {"heads": 4, "parallel_heads": True, "use_projections": False},
}
SIZES = {"vocab_size": 13, "hidden_dim": 12, "seq_len": 24, "num_blocks": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def srm(capsys: pytest.CaptureFixture[str]):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["convert", *arguments])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture
def refused(srm):
    def check(*arguments: str, parts: tuple[str, ...]) -> None:
        before = set(os.listdir())
        code, out, err = srm(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("srm-core: error: ")
        assert err.count("\n") == 1, err
        for part in parts:
            assert part in err
        assert set(os.listdir()) == before

    return check


def model(**variant) -> RecurrentMLPMixer:
    torch.manual_seed(0)
    return RecurrentMLPMixer(**SIZES, **variant)


def difference(out: str) -> float:
    return float(re.search(r"largest difference of the logits: (\S+),", out)[1])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_with_its_config(variant, srm):
    source = model(**variant)
    torch.save({"model_state_dict": source.state_dict(), "config": {**SIZES, **variant}, "epoch": 3}, "w.pt")
    code, out, err = srm("w.pt", "w.safetensors", "--check")
    assert code == 0, err
    assert difference(out) < 1e-10
    assert f"{source.count_params():,} parameters" in out
    assert RecurrentMixer.load("w.safetensors").config == source.config
    for name, tensor in load_file("w.safetensors").items():
        assert torch.equal(tensor, source.state_dict()[name])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_config_from_shapes(variant, srm, refused):
    """What shapes do not tell is asked for, and only that."""
    source = model(**variant)
    torch.save(source.state_dict(), "bare.pt")
    unclear = {"heads": "mixed_heads", "parallel_heads": "use_projections"}
    name = None if "combined_heads" in variant else next((unclear[k] for k in reversed(unclear) if k in variant), None)
    if name:
        refused("bare.pt", "w.safetensors", parts=(f"shapes do not tell {name}", "--config"))
        Path("c.json").write_text(json.dumps({name: getattr(source.config, name)}))
        code, _, err = srm("bare.pt", "w.safetensors", "--config", "c.json")
    else:
        code, _, err = srm("bare.pt", "w.safetensors")
    assert code == 0, err
    assert RecurrentMixer.load("w.safetensors").config == source.config


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes(prefix, srm):
    source = model()
    torch.save({"state_dict": {prefix + k: v for k, v in source.state_dict().items()}}, "w.pt")
    assert srm("w.pt", "w.safetensors")[0] == 0
    assert set(load_file("w.safetensors")) == set(source.state_dict())


def test_a_compiled_model(srm):
    torch.save(torch.compile(model(), backend="eager").state_dict(), "w.pt")
    assert srm("w.pt", "w.safetensors", "--check")[0] == 0


def test_dtypes_and_vocabulary(srm):
    torch.save({"state_dict": model().bfloat16().state_dict(), "config": SIZES, "vocabulary": "abcdefghijklm"}, "w.pt")
    code, out, _ = srm("w.pt", "w.safetensors", "--check")
    assert code == 0
    assert difference(out) < 1e-10
    assert {t.dtype for t in load_file("w.safetensors").values()} == {torch.bfloat16}
    assert len(RecurrentMixer.load("w.safetensors").generate(["abc"], 4)[0]) == 4


def test_never_replaces_unasked(srm, refused):
    torch.save(model().state_dict(), "w.pt")
    Path("w.safetensors").write_text("precious")
    refused("w.pt", "w.safetensors", parts=("exists already", "--force"))
    assert Path("w.safetensors").read_text() == "precious"
    assert srm("w.pt", "w.safetensors", "--force")[0] == 0
    assert RecurrentMixer.load("w.safetensors").config.num_blocks == 2


def test_the_check_can_fail(srm, monkeypatch):
    """Two models that differ: exit code 1, and no file."""
    torch.save(model().state_dict(), "w.pt")
    forward = RecurrentMixer.forward
    monkeypatch.setattr(RecurrentMixer, "forward", lambda self, ids: forward(self, ids) + 1e-3)
    code, out, _ = srm("w.pt", "w.safetensors", "--check")
    assert code == 1
    assert difference(out) == pytest.approx(1e-3)
    assert "w.safetensors is not written" in out
    assert os.listdir() == ["w.pt"]
    monkeypatch.setattr(RecurrentMixer, "forward", lambda self, ids: forward(self, ids) * float("nan"))
    assert srm("w.pt", "w.safetensors", "--check")[0] == 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("how", ["torch", "torch-old", "pickle"])
def test_runs_no_code(how, protocol, refused):
    content = {"state_dict": model().state_dict(), "config": Evil()}
    with open("evil.pt", "wb") as file:
        if how == "pickle":
            pickle.dump({"config": Evil()}, file, protocol=protocol)
        else:
            torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=how == "torch")
    named = protocol == 2
    refused("evil.pt", "w.safetensors", parts=("refused: it holds", "mkdir", "run code") if named else ("evil.pt",))
    assert not Path("was_run").exists()


def test_refuses_other_objects(refused):
    torch.save(model(), "w.pt")
    refused("w.pt", "x.safetensors", parts=("refused: it holds srm_core.nn.mixer.RecurrentMLPMixer", "state_dict()"))
    torch.save({"state_dict": model().state_dict(), "config": argparse.Namespace(heads=4)}, "w.pt")
    refused("w.pt", "x.safetensors", parts=("refused: it holds argparse.Namespace",))


def test_refuses_what_is_no_checkpoint(refused):
    torch.save({"state_dict": model().state_dict()}, "w.pt")
    for name, content in {"junk": b"hello", "empty": b"", "short": Path("w.pt").read_bytes()[:4000]}.items():
        Path(name).write_bytes(content)
        refused(name, "x.safetensors", parts=(name,))
    refused("none.pt", "x.safetensors", parts=("none.pt: cannot be read: No such file",))
    refused(".", "x.safetensors", parts=("cannot be read",))
    refused("w.pt", "no/x.safetensors", parts=("the folder no does not exist",))
    for value, part in (
        ([1], "found a list"),
        ({"a": 1}, "a: found a int; required a tensor"),
        ({"a": torch.ones(1)}, "its names are not those of a recurrent mixer"),
        ({"state_dict": 3}, "its state dict is a int"),
        ({"state_dict": {}}, "is empty"),
        ({"a": torch.ones(2, dtype=torch.int32)}, "a: found a torch.strided tensor of torch.int32"),
        ({"a": torch.ones(2).to_sparse()}, "a: found a torch.sparse_coo tensor"),
        ({"a": torch.ones(2), "module.a": torch.ones(2)}, "a: is there twice"),
    ):
        torch.save(value, "bad.pt")
        refused("bad.pt", "x.safetensors", parts=("bad.pt: ", part))


def test_refuses_a_config_that_does_not_fit(refused):
    state_dict = model(heads=4).state_dict()
    torch.save({"state_dict": state_dict, "config": SIZES}, "w.pt")
    refused("w.pt", "x.safetensors", parts=("w.pt: the state dict has no",))
    for content, part in (
        ("{", "is no JSON"),
        ("[1]", "found a list"),
        ('{"heads": 4, "mixed_heads": false, "colour": 1}', "unknown colour"),
        (json.dumps({**SIZES, "heads": 5}), "required a divisor"),
        (json.dumps({**SIZES, "heads": 4, "seq_len": 25}), "found shape (1, 24); required (1, 25)"),
    ):
        Path("c.json").write_text(content)
        refused("w.pt", "x.safetensors", "--config", "c.json", parts=(part,))
    refused("w.pt", "x.safetensors", "--config", "none.json", parts=("--config none.json: cannot be read",))
    state_dict["output_layer.weight"][0, 0] = float("nan")
    torch.save({"state_dict": state_dict, "config": {**SIZES, "heads": 4}}, "w.pt")
    refused("w.pt", "x.safetensors", parts=("output_layer.weight: holds a NaN",))
    torch.save({"state_dict": {**model().state_dict(), "more": torch.ones(1)}, "config": SIZES}, "w.pt")
    refused("w.pt", "x.safetensors", parts=("parameters that the config does not: more",))


def test_refuses_where_it_cannot_write(refused, monkeypatch):
    torch.save(model().state_dict(), "w.pt")

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused("w.pt", "x.safetensors", parts=("x.safetensors: cannot be written: No space left on device",))
