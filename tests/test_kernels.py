"""Which implementation an op uses: what a setting means, what `auto` becomes, and a package that is not ours."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanomai import kernels, machine, ops
from nanomai.architecture import MoEConfig
from nanomai.config import Config, ConfigError, ModelConfig, TrainConfig
from nanomai.model import build_model

ROOT = Path(__file__).resolve().parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")
ALL = ",".join(kernels.KERNELS)


def resolved(setting: str, device=CPU, **model) -> str:
    return machine.resolve(Config(model=ModelConfig(**model), train=TrainConfig(kernels=setting)), device).train.kernels


def test_what_a_setting_means():
    assert kernels.parse("auto") is None
    assert kernels.parse("torch") == frozenset()
    assert kernels.parse("triton") == kernels.parse(ALL) == set(kernels.KERNELS)
    assert kernels.parse("swiglu, rms_norm") == {"swiglu", "rms_norm"}
    assert kernels.parse(" triton ") == set(kernels.KERNELS)
    for setting, wrong in (("rms_norm,swiglo", "swiglo"), ("auto,swiglu", "auto"), ("torch,triton", "torch")):
        with pytest.raises(ValueError, match=f"kernels '{wrong}': give auto, torch or triton alone, or a list of rms_"):
            kernels.parse(setting)


def test_a_model_hands_it_to_every_part():
    model = build_model(ModelConfig(moe=MoEConfig(n_experts=4, d_expert=8, n_shared_experts=1)))
    block = model.blocks["0"]
    parts = {"grouped_gemm": [block.mlp.experts], "swiglu": [block.mlp.shared],
             "rms_norm": [block.attention_norm, block.mlp_norm, model.norm],
             "linear_cross_entropy": [model.loss], "masked_attention": [model],
             "rotary": [block.attention], "attention": [block.attention]}
    assert parts.keys() == set(kernels.KERNELS)
    for name in kernels.KERNELS:
        assert all(part.impl(name) == "auto" for part in parts[name])
    for chosen in kernels.KERNELS:
        model.set_kernels(chosen)
        assert {part.impl(name) for name in parts for part in parts[name] if name != chosen} == {"torch"}
        assert {part.impl(chosen) for part in parts[chosen]} == {"triton"}
    model.set_kernels("auto")
    assert block.mlp.shared.impl("swiglu") == "auto"


def test_auto_is_decided_once(monkeypatch):
    """On a CPU PyTorch; on a GPU the kernels of the table, but none that cannot take the model's heads."""
    monkeypatch.setattr(machine, "_has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    assert resolved("auto") == "torch"
    assert resolved("auto", GPU) == "masked_attention"
    assert resolved("auto", GPU, head_dim=192) == "torch"
    assert resolved("torch", GPU) == "torch" and resolved("swiglu", GPU) == "swiglu"
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert resolved("auto", GPU) == "torch"


def test_wrong_settings_are_one_line(monkeypatch):
    with pytest.raises(ConfigError, match=r"kernels 'flash': give auto, .*masked_attention") as error:
        resolved("flash")
    assert error.value.field == "train.kernels"
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    with pytest.raises(ConfigError, match="the kernels need Triton"):
        resolved("triton")
    with pytest.raises(ValueError, match="rms_norm: impl 'cuda' is not one of auto, torch, triton"):
        ops.rms_norm(torch.ones(2, 3), torch.ones(3), 1e-5, impl="cuda")


FOREIGN = """
import sys
sys.path[:0] = [{root!r}, {foreign!r}][::{order}]
import torch
from nanomai import ops
x = torch.ones(2, 16)
print(ops.swiglu(x, x).sum() > 0)
print(ops.swiglu(x, x, impl="triton").sum() > 0)
"""


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_foreign_package_of_that_name(first, tmp_path):
    """It is refused by its path where it would be found first, and only when a kernel is asked for."""
    pytest.importorskip("triton")
    package = tmp_path / "triton_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "swiglu.py").write_text("def swiglu(gate, up): return 0 * gate")
    code = FOREIGN.format(root=str(ROOT), foreign=str(tmp_path), order=1 if first == "ours" else -1)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    if first == "ours":
        assert done.returncode == 0 and done.stdout.split() == ["tensor(True)"] * 2, done.stderr
    else:
        last = done.stderr.strip().splitlines()[-1]
        assert done.stdout.split() == ["tensor(True)"]
        assert last.startswith("ImportError: triton_kernels is another project's package") and str(package) in last


@pytest.mark.parametrize("setting, model, why", [
    ("attention", {}, "every sample has documents: choose masked_attention"),
    ("rms_norm", {"norm": "layernorm"}, "the norm is layernorm"), ("swiglu", {"activation": "gelu"}, "is gelu"),
    ("rotary", {"position": "learned"}, "positions are learned"), ("triton", {"head_dim": 192}, "192 is above 128"),
    ("swiglu,masked_attention", {"head_dim": 130}, "130 is above 128"), ("triton", {"d_model": 8200}, "above 8192")])
def test_a_kernel_that_the_model_cannot_use_is_refused(setting, model, why):
    pytest.importorskip("triton")
    with pytest.raises(ConfigError, match=f"cannot be used: .*{why}"):
        resolved(setting, **model)
    assert resolved("triton", norm="layernorm", activation="gelu", position="learned") == "triton"


def test_what_a_run_used_is_kept_where_it_can_be():
    pytest.importorskip("triton")

    def resumed(saved: str, device, now="auto"):
        before, config = (Config(train=TrainConfig(kernels=k)) for k in (saved, now))
        return machine.resolve(config, device, before=before).train.kernels

    assert resumed("masked_attention", CPU) == "torch", "the interpreter would take days"
    assert resumed("auto", CPU) == "torch" and resumed("torch", CPU) == "torch"
    assert resumed("masked_attention", CPU, now="masked_attention") == "masked_attention"


def test_what_a_run_used_is_kept_on_a_gpu(monkeypatch):
    monkeypatch.setattr(machine, "_has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    for saved, now in (("auto", "torch"), ("torch", "torch"), ("masked_attention", "masked_attention")):
        before = Config(train=TrainConfig(kernels=saved))
        assert machine.resolve(Config(), GPU, before=before).train.kernels == now
