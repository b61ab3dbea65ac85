"""Two processes against one: sums, clipping, failures; and a job that hangs is ended."""

import time

import pytest
import torch

from nanomai.config import ConfigError, ModelConfig
from nanomai.model import build_model
from nanomai.parallel.apply import clip_gradients, parallelize, sum_gradients
from nanomai.parallel.launch import launch, process_group
from nanomai.parallel.mesh import Mesh, RankFailed

MODEL = ModelConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, vocab_size=31,
                    context_length=8)
IDS = torch.randint(31, (4, 9), generator=torch.Generator().manual_seed(0))
MAX_NORM = 0.5


def gradients(mesh: Mesh, dtypes=()) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of this rank's share of the batch, summed, divided and clipped; and their norm before."""
    model = build_model(MODEL)
    for name, dtype in dtypes:
        model.get_submodule(name).to(dtype)
    mine = IDS.chunk(mesh.world_size)[mesh.rank]
    model(mine[:, :-1], mine[:, 1:], reduction="sum").backward()
    sum_gradients(model, mesh)
    norm = clip_gradients(model, MAX_NORM, 32)
    return [p.grad for p in model.parameters()], norm


def on_each_rank(rank, folder):
    with process_group() as mesh:  # already joined: the same mesh again
        assert mesh == Mesh(rank, 2, rank) and mesh.is_main == (rank == 0)
        assert mesh.sum(torch.tensor([rank + 1.0, 10.0])).tolist() == [3.0, 20.0]
        if rank == 0:
            time.sleep(0.3)
            (folder / "written").touch()
        mesh.barrier()
        assert (folder / "written").exists()
        assert mesh.from_main(lambda: f"by {rank}") == "by 0"
        with pytest.raises(ValueError if rank == 0 else RankFailed, match="no such thing"):
            mesh.from_main(lambda: int("no such thing"))
        torch.save(gradients(mesh), folder / f"gradients-{rank}.pt")
        mixed = [("embed", torch.bfloat16), ("norm", torch.float64), ("blocks.0.mlp.w_up", torch.bfloat16)]
        torch.save(gradients(mesh, mixed), folder / f"mixed-{rank}.pt")


def test_two_ranks_are_one(tmp_path):
    launch(on_each_rank, 2, tmp_path)
    expected, norm = gradients(Mesh())
    for kind, rtol in (("gradients", 1e-5), ("mixed", 0.05)):
        (first, n0), (second, n1) = (torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in range(2))
        assert n0 == n1 and n0.item() == pytest.approx(norm.item(), rel=rtol)
        for a, b, c in zip(first, second, expected, strict=True):
            assert torch.equal(a, b), "every rank ends with the same numbers"
            assert (a.float() - c).norm() <= rtol * c.norm()


def fails_on_one(rank):
    if rank == 1:
        raise ValueError("this rank has had enough")
    with process_group() as mesh:
        mesh.barrier()  # the other never comes


def test_a_failure_of_one_rank_is_raised_here():
    with pytest.raises(Exception, match="this rank has had enough"):
        launch(fails_on_one, 2)


def hangs(rank):
    time.sleep(1000)


def test_a_job_that_hangs_is_ended():
    with pytest.raises(TimeoutError, match=r"^hangs on 2 processes did not end within 0 s$"):
        launch(hangs, 2, timeout_s=0)


# --- one process


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group() as mesh:
        assert mesh == Mesh() and mesh.is_main and not torch.distributed.is_initialized()
        mesh.barrier()
        x = torch.ones(2)
        assert mesh.sum(x) is x and mesh.from_main(lambda: 5) == 5
        with pytest.raises(ValueError):
            mesh.from_main(lambda: int("x"))


def test_half_a_launch_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE is 2 and RANK is not set; start with torchrun, or unset "):
        process_group().__enter__()


def with_gradients(*values: list[float]) -> torch.nn.Module:
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(len(v))) for v in values])
    for p, v in zip(model, values, strict=True):
        p.grad = torch.tensor(v)
    return model


@pytest.mark.parametrize("max_norm, divide_by, norm, clipped", [
    (0.0, 1.0, 13.0, [[3.0, 4.0], [12.0]]), (100.0, 1.0, 13.0, [[3.0, 4.0], [12.0]]),
    (1.3, 1.0, 13.0, [[0.3, 0.4], [1.2]]), (0.0, 2.0, 6.5, [[1.5, 2.0], [6.0]]), (1.3, 2.0, 6.5, [[0.3, 0.4], [1.2]]),
    (7.0, 2.0, 6.5, [[1.5, 2.0], [6.0]])])
def test_clipping(max_norm, divide_by, norm, clipped):
    model = with_gradients([3.0, 4.0], [12.0])
    assert clip_gradients(model, max_norm, divide_by).item() == pytest.approx(norm)
    assert [p.grad.tolist() for p in model] == [pytest.approx(values, rel=1e-5) for values in clipped]


def test_clipping_is_torchs():
    ours, theirs = (with_gradients(*torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).tolist())
                    for _ in range(2))
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
    torch.testing.assert_close(clip_gradients(ours, 0.7), norm)
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_told(bad):
    assert not clip_gradients(with_gradients([1.0, bad], [2.0]), 1.0).isfinite()


def test_a_parameter_without_gradient_is_passed_over():
    model = with_gradients([3.0], [4.0])
    model[1].grad = None
    assert clip_gradients(model, 0.0).item() == 3.0


@pytest.mark.parametrize("compiled", [False, True])
def test_parallelize_compiles_the_blocks_and_the_loss(monkeypatch, compiled):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: calls.append((self, options)))
    model = build_model(MODEL)
    assert parallelize(model, Mesh(), compiled) is model
    wanted = [*model.blocks.values(), model.loss] if compiled else []
    assert calls == [(part, {"fullgraph": True, "dynamic": False}) for part in wanted]
