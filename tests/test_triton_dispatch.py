"""The model on Triton kernels is the model: values and every gradient, under each transform that training lays over it.

The kernels' own numerics are proved in their own files; here a switch that reaches the wrong op would show.
"""

import copy
import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nanomai import generate, masks, ops, train
from nanomai.architecture import ModelConfig, MoEConfig
from nanomai.config import ParallelConfig
from nanomai.kernels import KERNELS
from nanomai.model import build_model
from nanomai.parallel.apply import allocate, parallelize, share
from nanomai.parallel.launch import launch, process_group
from nanomai.parallel.layout import lay_out
from nanomai.trainer import Trainer
from tests.tiny_run import tiny, write_tiny
from triton_kernels.engine import Kernel

MODEL = ModelConfig(n_layers=2, d_model=48, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=80, vocab_size=101,
                    context_length=32)
GPT2 = dataclasses.replace(MODEL, norm="layernorm", activation="gelu", position="learned", biases=("qkv", "out", "mlp"))
EXPERTS = dataclasses.replace(MODEL, moe=MoEConfig(n_experts=5, experts_per_token=2, d_expert=24, n_shared_experts=1,
                                                   balance_loss=0.1))
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 14, [3] * 18 + [4]])
KERNELS_OF = {"rms_norm": {"rms_norm_forward", "rms_norm_backward"}, "rotary": {"qk_forward", "qk_backward"},
              "swiglu": {"swiglu_forward", "swiglu_backward"}, "attention": {"flash_forward", "flash_dq", "flash_dkdv"},
              "masked_attention": {"flash_forward", "flash_dq", "flash_dkdv"},
              "linear_cross_entropy": {"cross_entropy_forward"},
              "grouped_gemm": {"grouped_swiglu_forward", "grouped_product", "swiglu_backward", "sum_of_pairs",
                               "grouped_dw"}}


def batch(seed=0, rows=2):
    ids = torch.randint(101, (rows, 20), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[0, 3:6] = ops.IGNORE
    return ids[:, :-1], targets


def shaken(config: ModelConfig, kernels: str, dtype=torch.float32):
    """A model whose norms, biases and attention also do something."""
    model, generator = build_model(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    model.set_kernels(kernels)
    model.compute_dtype = dtype
    return model


def loss_and_gradients(model, documents=None, data=None) -> dict[str, torch.Tensor]:
    ids, targets = data or batch()
    model.zero_grad()
    loss = model(ids, targets, documents, reduction="sum")
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def distance(a: dict, b: dict) -> float:
    """The largest relative difference of a tensor; softmax does not see a key's bias, whose gradient is rounding."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / b[k].norm().clamp_min(1.0)).item() for k in b)


@pytest.fixture
def launched(monkeypatch) -> set[str]:
    """The names of the kernels that ran."""
    names, plain = set(), Kernel._launch
    monkeypatch.setattr(Kernel, "_launch", lambda self, *a, **k: (names.add(self.name), plain(self, *a, **k))[1])
    return names


CASES = {"causal": (MODEL, None), "documents": (MODEL, DOCUMENTS), "gpt2": (GPT2, None),
         "window": (dataclasses.replace(MODEL, sliding_window=7), None),
         "window, documents": (dataclasses.replace(MODEL, sliding_window=7), DOCUMENTS),
         "untied, with a bias": (dataclasses.replace(MODEL, tied_embeddings=False, biases=("head",)), None),
         "experts": (EXPERTS, None), "experts without a gate": (dataclasses.replace(EXPERTS, activation="gelu"), None)}


@pytest.mark.parametrize("case", CASES)
def test_values_and_every_gradient(case):
    config, documents = CASES[case]
    plain = loss_and_gradients(shaken(config, "torch"), documents)
    assert distance(loss_and_gradients(shaken(config, "triton"), documents), plain) < 1e-5


@pytest.mark.parametrize("name", KERNELS)
def test_each_name_switches_its_own_kernels(name, launched):
    documents, config = DOCUMENTS if name == "masked_attention" else None, EXPERTS if name == "grouped_gemm" else MODEL
    got = loss_and_gradients(shaken(config, name), documents)
    assert launched == KERNELS_OF[name]
    assert distance(got, loss_and_gradients(shaken(config, "torch"), documents)) < 1e-5


def test_torch_and_auto_launch_nothing_on_a_cpu(launched):
    for setting in ("torch", "auto"):
        loss_and_gradients(shaken(MODEL, setting), DOCUMENTS)
    assert not launched


def test_bfloat16_is_as_near_as_pytorch():
    exact = loss_and_gradients(shaken(MODEL, "torch").double(), DOCUMENTS)
    errors = [distance({k: v.double() for k, v in loss_and_gradients(shaken(MODEL, kernels, torch.bfloat16),
                                                                     DOCUMENTS).items()}, exact)
              for kernels in ("torch", "triton")]
    assert errors[1] < 1.5 * errors[0] < 0.1


@pytest.mark.parametrize("config, documents", [(MODEL, None), (MODEL, DOCUMENTS), (EXPERTS, None)],
                         ids=["causal", "documents", "experts"])
def test_compiled_in_whole_graphs(config, documents):
    model = shaken(config, "triton")
    parallelize(model, compile_blocks=True)  # fullgraph
    assert distance(loss_and_gradients(model, documents), loss_and_gradients(shaken(config, "torch"), documents)) < 1e-5


@pytest.mark.parametrize("config", [MODEL, EXPERTS], ids=["dense", "experts"])
def test_under_activation_checkpointing(config):
    model = shaken(config, "triton")
    for block in model.blocks.values():
        block.forward = lambda *a, plain=block.forward: checkpoint(plain, *a, use_reentrant=False)
    assert distance(loss_and_gradients(model, DOCUMENTS), loss_and_gradients(shaken(config, "torch"), DOCUMENTS)) < 1e-5


SHARED = dataclasses.replace(MODEL, vocab_size=102, sliding_window=7)  # ranks share products and sequences in halves
LAYOUTS = {"fsdp": {}, "fsdp, compiled": {}, "tensor": {"tensor": 2}, "context": {"context": 2},
           "context, compiled": {"context": 2}, "context by heads": {"context": 2, "context_by": "heads"}}


def shared_batch():
    """(2, 16) ids, targets and documents."""
    return [x[:, :16] for x in (*batch(), DOCUMENTS)]


def copy_shares(whole, model):
    """Gives this rank's part of each parameter its values."""
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            part, begin = share(mine)
            part.copy_(theirs[tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))])


def on_two_ranks(rank, folder):
    with process_group() as mesh:
        for case, settings in LAYOUTS.items():
            parallel, whole = ParallelConfig(**settings), shaken(SHARED, "triton")
            layout, model = lay_out(parallel, mesh), copy.deepcopy(whole).to("meta")
            allocate(parallelize(model, layout, parallel, case.endswith("compiled")), torch.device("cpu"))
            copy_shares(whole, model)
            mine = [x.chunk(layout.data_size)[layout.data_rank] for x in shared_batch()]
            loss = model(*mine, reduction="sum")
            loss.backward()
            gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
            torch.save(gradients | {"loss": layout.sum(loss.detach())}, folder / f"{case}-{rank}.pt")


def test_on_two_ranks(tmp_path):
    launch(on_two_ranks, 2, tmp_path)
    *data, documents = shared_batch()
    expected = loss_and_gradients(shaken(SHARED, "torch"), documents, data)
    for case in LAYOUTS:
        for rank in range(2):
            assert distance(torch.load(tmp_path / f"{case}-{rank}.pt"), expected) < 1e-5, case


def test_a_run_on_kernels(tmp_path, monkeypatch):
    """Training and evaluation; the configuration says what was used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_write", lambda *_: "")  # 256 tokens take long in an interpreter; see below
    write_tiny(tmp_path)
    runs = {kernels: train(tiny(train__kernels=kernels, train__steps=3, train__final_eval_tokens=256), show=False)
            for kernels in ("torch", "triton")}
    assert runs["triton"].losses == pytest.approx(runs["torch"].losses, rel=1e-5)
    assert "kernels: triton" in (runs["triton"].run_dir / "config.yaml").read_text()


def test_sampling_with_a_cache(launched):
    models = [shaken(MODEL, kernels).eval() for kernels in ("torch", "triton")]
    for prompts in ([1, 2, 3], [[4, 5, 6, 7], [8]]):  # plainly causal; pads on the left
        answers = [generate(model, prompts, max_tokens=6, temperature=0.0) for model in models]
        assert answers[0] == answers[1]
    assert "flash_forward" in launched


def test_a_matrix_is_no_mask_for_the_kernel():
    q = torch.randn(1, 2, 5, 16)
    mask = ops.attention_mask(torch.arange(5), torch.arange(5))
    with pytest.raises(TypeError, match="takes a FlashMask, as training_mask makes it, and no matrix"):
        ops.attention(q, q, q, mask, impl="triton")


def test_a_flash_mask_is_the_mask():
    q, (k, v) = torch.randn(2, 4, 19, 16), torch.randn(2, 2, 2, 19, 16)
    for window, documents in ((None, None), (5, None), (None, DOCUMENTS), (5, DOCUMENTS)):
        masks = [ops.training_mask(torch.arange(19), window, documents, 16, impl) for impl in ("torch", "triton")]
        assert (masks[1] is None) == (window is None and documents is None) == (masks[0] is None)
        torch.testing.assert_close(ops.attention(q, k, v, masks[1]), ops.attention_plain(q, k, v, masks[0]))


def test_heads_too_wide_for_the_kernel_keep_the_matrix(monkeypatch):
    monkeypatch.setattr(masks, "uses_triton", lambda name, on_gpu, impl: impl != "torch")
    assert isinstance(ops.training_mask(torch.arange(5), 2, None, 128), ops.FlashMask)
    assert isinstance(ops.training_mask(torch.arange(5), 2, None, 129), torch.Tensor)


def test_a_flash_mask_is_for_the_kernel():
    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(TypeError, match="a FlashMask is for the kernel"):
        ops.attention(q, q, q, ops.FlashMask(2, None), impl="torch")


def test_document_ids_have_the_shape_of_ids():
    with pytest.raises(ValueError, match=r"document_ids \(1, 19\) must have the shape of ids, \(2, 19\)"):
        build_model(MODEL)(*batch(), DOCUMENTS[:1])
