"""Grouped products against a loop over groups: values, gradients, and what torch.compile believes of them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanomai.grouped import grouped_linear, grouped_outer_products, grouped_products, sort_pairs, to_experts, to_tokens

COUNTS = {"odd sizes": (5, 1, 7), "one group": (13,), "empty at the edges": (0, 4, 0, 0, 9, 0),
          "all in one": (0, 13, 0), "no rows": (0, 0)}


def randn(*shape, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(counts, d=5, f=3, dtype=torch.float64):
    """x (N, D), weight (E, F, D), both wanting gradients, and ends."""
    x, weight = randn(sum(counts), d, dtype=dtype), randn(len(counts), f, d, seed=1, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.tensor(counts).cumsum(0).int()


def definition(x, weight, ends) -> torch.Tensor:
    rows, start = [], 0
    for end, w in zip(ends.tolist(), weight, strict=True):
        rows += [w @ x[i] for i in range(start, end)]
        start = end
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])


@pytest.mark.parametrize("case", COUNTS)
def test_values_and_gradients(case):
    x, weight, ends = inputs(COUNTS[case])
    y, z = grouped_linear(x, weight, ends), definition(x, weight, ends)
    torch.testing.assert_close(y, z)
    dy = randn(*y.shape, seed=2)
    got = torch.autograd.grad(y, (x, weight), dy)
    wanted = torch.autograd.grad((z * dy).sum() + 0 * (x.sum() + weight.sum()), (x, weight))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("case", COUNTS)
def test_gradcheck(case):
    x, weight, ends = inputs(COUNTS[case], 3, 2)
    assert torch.autograd.gradcheck(lambda x, w: grouped_products(x, w, ends), (x, weight))


def test_a_gradient_that_is_not_contiguous():
    """That of a sum is one number, repeated."""
    x, weight, ends = inputs(COUNTS["odd sizes"])
    got = torch.autograd.grad(grouped_products(x, weight, ends).sum(), (x, weight))
    torch.testing.assert_close(got, torch.autograd.grad(definition(x, weight, ends).sum(), (x, weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", COUNTS)
def test_what_the_ops_tell_of_themselves(case, dtype):
    """Schemas, fake shapes and dtypes, and autograd as torch.compile will trace it."""
    x, weight, ends = inputs(COUNTS[case], 8, 16, dtype)
    torch.library.opcheck(grouped_products, (x, weight, ends))
    torch.library.opcheck(grouped_products, (x @ x.new_ones(8, 16), weight.mT, ends))  # as the backward pass calls it
    torch.library.opcheck(grouped_outer_products, (x @ x.new_ones(8, 16), x.detach(), ends),
                          test_utils=("test_schema", "test_faketensor"))


def test_bfloat16_is_as_near_as_one_product_is():
    x, weight, ends = inputs((40, 0, 24), 64, 32, torch.bfloat16)
    exact = definition(x.double(), weight.double(), ends)
    assert (grouped_products(x, weight, ends).double() - exact).norm() < 2**-8 * exact.norm()


def test_compiled_in_one_graph():
    """With another split of the rows the same graph serves: no shape depends on the ends."""
    compiled = torch.compile(grouped_linear, fullgraph=True, dynamic=False, backend="aot_eager")
    torch._dynamo.reset()
    for counts in ((5, 1, 7), (0, 13, 0), (6, 6, 1)):
        x, weight, ends = inputs(counts)
        with torch._dynamo.config.patch(error_on_recompile=True):
            y = compiled(x, weight, ends)
        z = definition(x, weight, ends)
        torch.testing.assert_close(y, z)
        got, wanted = (torch.autograd.grad(out.square().sum(), (x, weight)) for out in (y, z))
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 7])
def test_sorted_pairs(tokens, k):
    groups = torch.rand(tokens, 5, generator=torch.Generator().manual_seed(k)).argsort(-1)[:, :k]
    pairs = sort_pairs(groups, 5)
    assert groups.flatten()[pairs.order].tolist() == sorted(groups.flatten().tolist())
    assert pairs.places[pairs.order].tolist() == list(range(tokens * k))
    assert pairs.ends.tolist() == [(groups <= g).sum().item() for g in range(5)] and pairs.ends.dtype == torch.int32
    x = randn(tokens, 3).requires_grad_()
    rows = to_experts(x, pairs)
    assert torch.equal(rows, x[pairs.tokens])
    back = to_tokens(rows, pairs)
    assert torch.equal(back, x[:, None].expand(-1, k, -1))
    assert torch.autograd.gradcheck(lambda x: to_experts(x, pairs), x)
    assert torch.autograd.gradcheck(lambda rows: to_tokens(rows, pairs), rows.detach().requires_grad_())


def test_a_group_keeps_the_order_of_its_tokens():
    pairs = sort_pairs(torch.tensor([[1], [0], [1], [0], [1]]), 2)
    assert pairs.order.tolist() == [1, 3, 0, 2, 4]


def test_the_librarys_product_needs_no_number_from_the_gpu():
    """Tensors of a GPU that have no numbers: whoever asks for one fails, as the loop does."""
    with FakeTensorMode():
        x, weight, ends = (torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in (
            ((64, 32), torch.bfloat16), ((4, 48, 32), torch.bfloat16), (4, torch.int32)))
        y = grouped_products._init_fn(x, weight, ends)
        assert y.shape == (64, 48) and y.is_cuda
        assert grouped_products._init_fn(y, weight.mT, ends).shape == x.shape
        assert grouped_outer_products._init_fn(y, x, ends).shape == weight.shape
        with pytest.raises(Exception, match="_local_scalar_dense"):
            grouped_products._init_fn(x.float(), weight.float(), ends)


@pytest.mark.gpu
def test_the_host_never_waits_on_a_gpu():
    x, weight = randn(64, 32, dtype=torch.bfloat16).cuda(), randn(4, 48, 32, dtype=torch.bfloat16).cuda()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    groups = torch.randint(4, (64, 2), generator=torch.Generator().manual_seed(0)).cuda()
    grouped_linear(x, weight, torch.full((4,), 64, dtype=torch.int32, device="cuda"), "torch")  # loads what it needs
    torch.cuda.set_sync_debug_mode("error")
    try:
        pairs = sort_pairs(groups, 4)
        to_tokens(grouped_linear(to_experts(x, pairs), weight, pairs.ends, "torch"), pairs).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
