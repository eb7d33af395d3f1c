"""Bugs that were found in other sparse fine-tuning code, one test each, which would fail here with that bug.

| whose | the bug | the test |
|---|---|---|
| SpIEL | a bf16 optimizer's entries never grow older | ..._age_in_bf16, ..._newcomers_age |
| LIFT | weight decay acts on a copy: 0 and 10 train alike | ..._weight_decay_acts |
| LIFT | one step counter: a newcomer's first step is not Adam's first | ..._newcomer |
| SIFT | the first gradient is thrown away, a step's update reaches the weight one step late | ..._lag |
| PEFT's SHiRA, Super-Tuning | backward keeps a copy of every weight | ..._no_weight_copies |
| PEFT's SHiRA, Super-Tuning | merge and unmerge leave other bits | ..._unmerge |
| spops (RoSA) | 16-bit columns wrap beyond 32767 | ..._wide, ..._wide_weights_move |
| S2FT | rows are chosen, columns are trained | ..._slice |
| S2FT | a second backward overwrites the gradient | ..._accumulates |
| mttl | SNIP without the absolute value | ..._snip |
| RoSA | with several batches the square of the sum passes for a Fisher | ..._fisher |
| SpIEL | candidates come from the first batch alone (`drop_and_grow` keeps that) | ..._every_batch |
| SpIEL | processes choose different entries | test_selection_distributed.py |
"""

import pytest
import torch
from torch import Tensor, nn

from sparseft import Pattern, SparseAdamW, parameters, sparsify
from sparseft.delta import Delta
from sparseft.layers import selected
from sparseft.reselection import reselect
from tests.tiny import select_entries as select


def linear(n: int, m: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(m, n, bias=False)).to(dtype)


def some(n: int, m: int, share: float = 0.3) -> dict[str, Pattern]:
    return {"0.weight": Pattern.from_mask(torch.rand(n, m) < share, tile=(8, 8))}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_spiel_entries_age_in_bf16():
    """After five steps of a constant gradient Adam has gone five times lr; entries that stay at age 1 go elsewhere."""
    model = linear(6, 5, torch.bfloat16)
    optimizer = SparseAdamW(sparsify(model, some(6, 5)), lr=0.01, density_power=0.0, weight_decay=0.0)
    [leaf] = parameters(model)
    start = leaf.detach().clone()
    for _ in range(5):
        leaf.grad = torch.ones_like(leaf)
        optimizer.step()
    assert int(optimizer.state[leaf]["step"]) == 5
    # each step is lr / (1 + eps) in exact arithmetic; fp32 values below 1 round by at most 2^-25 per operation
    torch.testing.assert_close(start - leaf.detach(), torch.full_like(leaf, 0.05), rtol=1e-4, atol=0)


def idle_until(optimizer: SparseAdamW, step: int) -> dict:
    """The optimizer's state after one step without a gradient, its counters set to `step`."""
    for group in optimizer.param_groups:
        for leaf in group["params"]:
            leaf.grad = torch.zeros_like(leaf)
    optimizer.step()
    state = optimizer.state_dict()
    for saved in state["state"].values():
        saved["step"] = torch.full_like(saved["step"], step)
    return state


def test_spiel_newcomers_age_in_bf16():
    """Entries that come at step 300, which bf16 cannot count to, go five times lr in five steps of a constant
    gradient."""
    model = linear(6, 5, torch.bfloat16)
    first = torch.rand(6, 5) < 0.5
    optimizer = SparseAdamW(sparsify(model, {"0.weight": Pattern.from_mask(first, tile=(8, 8))}), lr=0.01,
                            density_power=0.0, weight_decay=0.0)  # fmt: skip
    state = idle_until(optimizer, 301)
    optimizer.load_state_dict(state)
    second = Pattern.from_mask(~first, tile=(8, 8))
    reselect(model, optimizer, {"0.weight": second})
    [leaf] = parameters(model)
    start = leaf.detach().clone()
    for _ in range(5):
        leaf.grad = torch.ones_like(leaf)
        optimizer.step()
    torch.testing.assert_close(start - leaf.detach(), torch.full_like(leaf, 0.05), rtol=1e-4, atol=0)


@pytest.mark.parametrize("decay_to", ["zero", "pretrained"])
def test_lift_weight_decay_acts(decay_to):
    def trained(weight_decay: float) -> Tensor:
        torch.manual_seed(1)
        model = linear(6, 5)
        optimizer = SparseAdamW(
            sparsify(model, some(6, 5)), lr=0.01, density_power=0.0, weight_decay=weight_decay, decay_to=decay_to
        )
        steps(model, optimizer, [torch.randn(4, 5) for _ in range(3)])
        return selected(model)["0.weight"].values.detach().clone()

    assert bool((trained(0.0) != trained(10.0)).all())


def test_lift_a_newcomers_first_step_is_adams_first():
    """At step 400, with beta2 = 0.95, a shared counter would make it 0.45 lr."""
    model = linear(6, 5)
    optimizer = SparseAdamW(
        sparsify(model, some(6, 5)), lr=0.01, density_power=0.0, betas=(0.9, 0.95), weight_decay=0.0
    )
    [leaf] = parameters(model)
    state = idle_until(optimizer, 399)
    newcomers = torch.rand(len(leaf)) < 0.5
    for saved in state["sparse"].values():
        saved["born"] = torch.where(newcomers, 399, 0).to(torch.int32)
    optimizer.load_state_dict(state)
    [leaf] = parameters(model)
    before = leaf.detach().clone()
    leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    first = before[newcomers] - leaf.detach()[newcomers]
    torch.testing.assert_close(first, torch.full_like(first, 0.01), rtol=1e-4, atol=0)
    assert bool(((before - leaf.detach())[~newcomers] < 0.005).all())  # moments of zeros, far from their start


@pytest.mark.parametrize("door", ["lean", "drop-in"])
def test_sift_no_lag(door):
    """The weight holds the update right after each step, the first batch's included."""
    torch.manual_seed(1)
    model, dense = linear(6, 5, torch.float64), linear(6, 5, torch.float64)
    dense.load_state_dict(model.state_dict())
    options = {"lr": 0.01, "weight_decay": 0.0}
    if door == "lean":
        optimizer = SparseAdamW(sparsify(model, some(6, 5)), density_power=0.0, **options)
    else:
        optimizer = SparseAdamW(model, density=0.3, tile=(8, 8), **options)
    oracle = torch.optim.AdamW(dense.parameters(), **options)
    for x in torch.randn(3, 4, 5).double():
        start = dense[0].weight.detach().clone()
        steps(model, optimizer, [x])
        steps(dense, oracle, [x])
        with torch.no_grad():
            chosen = next(iter(optimizer.selected(model).values())).pattern.to_mask()
            dense[0].weight.copy_(torch.where(chosen, dense[0].weight, start))
        assert bool((dense[0].weight[chosen] != start[chosen]).all())
        torch.testing.assert_close(model[0].weight, dense[0].weight, rtol=0, atol=1e-12)


def test_peft_no_weight_copies_for_backward():
    """Of what backward keeps, nothing but the weight itself is as large as the weight, and all else is the input."""
    model = sparsify(linear(96, 80), some(96, 80, 0.05))
    x = torch.randn(3, 80)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    weight = model[0].weight
    foreign = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept
               if t.untyped_storage().data_ptr() not in (weight.data_ptr(), x.data_ptr())}  # fmt: skip
    pattern = selected(model)["0.weight"].pattern
    ours = sum(t.numel() * t.itemsize for t in pattern.layout[:4])
    assert any(t.data_ptr() == weight.data_ptr() for t in kept)
    assert sum(foreign.values()) <= ours < weight.numel() * 4
    y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_peft_unmerge_is_exact(dtype):
    """Adding and subtracting a change in bf16 does not come back; stored values do."""
    torch.manual_seed(2)
    model = linear(64, 48, dtype)
    start = model[0].weight.detach().clone()
    optimizer = SparseAdamW(sparsify(model, some(64, 48)), lr=0.1)
    steps(model, optimizer, [torch.randn(4, 48).to(dtype) for _ in range(3)])
    delta = Delta.from_model(model)
    end = model[0].weight.detach().clone()
    plain = linear(64, 48, dtype)
    with torch.no_grad():
        plain[0].weight.copy_(start)
    for _ in range(3):
        delta.apply_(plain)
        assert torch.equal(plain[0].weight.view(torch.uint8), end.view(torch.uint8))
        delta.revert_(plain)
        assert torch.equal(plain[0].weight.view(torch.uint8), start.view(torch.uint8))
    wide, change = start.to(dtype), (end - start)
    assert dtype == torch.float32 or not torch.equal((wide + change) - change, start)  # what the rivals do


@pytest.mark.parametrize("shape", [(3, 40009), (40009, 3)])
def test_spops_wide_weights_train_where_they_should(shape):
    n, m = shape
    far = torch.tensor([0, 32767, 32768, 40000, 40008])
    row, col = (torch.ones_like(far), far) if m > n else (far, torch.ones_like(far))
    model = linear(n, m)
    pattern = Pattern.from_indices(row * m + col, (n, m), tile=(16, 64))
    sparsify(model, {"0.weight": pattern})
    x = torch.randn(4, m)
    y = model(x)
    d = torch.randn_like(y)
    y.backward(d)
    [leaf] = parameters(model)
    want = (d.T @ x)[row, col]
    at = (pattern.indices()[:, None] == row * m + col).nonzero()[:, 1]
    torch.testing.assert_close(leaf.grad, want[at])
    start = model[0].weight.detach().clone()
    SparseAdamW(model, lr=0.1).step()
    assert torch.equal((model[0].weight != start).nonzero(), torch.stack([row, col], 1)[(row * m + col).argsort()])


@pytest.mark.parametrize("leaving", ["revert", "keep"])
@pytest.mark.parametrize("shape", [(3, 40009), (40009, 3)])
def test_spops_wide_weights_move_where_they_should(shape, leaving):
    n, m = shape
    far = torch.tensor([5, 32768, 40000, 40008])
    places = [(torch.full_like(far, i), far) if m > n else (far, torch.full_like(far, i)) for i in (0, 2)]
    patterns = [{"0.weight": Pattern.from_indices(row * m + col, shape, tile=(16, 64))} for row, col in places]
    model = linear(n, m)
    start = model[0].weight.detach().clone()
    optimizer = SparseAdamW(sparsify(model, patterns[0]), lr=0.1)
    steps(model, optimizer, [torch.randn(4, m)])
    reselect(model, optimizer, patterns[1], leaving=leaving)
    steps(model, optimizer, [torch.randn(4, m)])
    expected = torch.zeros(shape, dtype=torch.bool)
    for row, col in places if leaving == "keep" else places[1:]:
        expected[row, col] = True
    assert torch.equal(model[0].weight != start, expected)
    delta = Delta.from_model(model)
    plain = linear(n, m)
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
    delta.revert_(plain)
    assert torch.equal(plain[0].weight, start)


@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_s2ft_the_chosen_slice_is_the_trained_one(structure):
    """A matrix that is not square, and whose largest row and column differ."""
    model = linear(12, 20)
    with torch.no_grad():
        model[0].weight[3] *= 100
        model[0].weight[:, 5] *= 1000
    line = 20 if structure == "rows" else 12
    chosen = select(model, criterion="magnitude", structure=structure, k=line, tile=(8, 8))
    expected = torch.zeros(12, 20, dtype=torch.bool)
    if structure == "rows":
        expected[int(model[0].weight.abs().mean(1).argmax())] = True
    else:
        expected[:, 5] = True
    start = model[0].weight.detach().clone()
    optimizer = SparseAdamW(sparsify(model, chosen), lr=0.1)
    steps(model, optimizer, [torch.randn(6, 20)])
    assert torch.equal(model[0].weight != start, expected)


def test_s2ft_backward_accumulates():
    model = sparsify(linear(6, 5, torch.float64), some(6, 5))
    data = list(torch.randn(3, 4, 5).double())
    for x in data:
        model(x).square().sum().backward()
    [leaf] = parameters(model)
    summed = leaf.grad.clone()
    leaf.grad = None
    model(torch.cat(data)).square().sum().backward()
    torch.testing.assert_close(summed, leaf.grad)


def test_mttl_snip_takes_large_negative_products():
    model = linear(2, 2)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    gradient = torch.tensor([[3.0, -5.0], [0.5, -0.1]])
    [pattern] = select(model, [gradient], criterion="snip", k=2, tile=(2, 2), tile_budget=1.0,
                       loss_fn=lambda m, g: (m[0].weight * g).sum()).values()  # fmt: skip
    assert sorted(pattern.indices().tolist()) == [0, 1]


def test_rosa_fisher_is_no_squared_sum():
    """Gradients that cancel over the batches are important to Fisher and nothing to a sum."""
    model = linear(1, 2)
    data = [torch.tensor([[5.0, 1.0]]), torch.tensor([[-5.0, 1.0]])]
    found = {}
    for criterion in ("fisher", "grad"):
        [pattern] = select(model, data, criterion=criterion, k=1, tile=(2, 2), tile_budget=1.0,
                           loss_fn=lambda m, g: (m[0].weight * g).sum()).values()  # fmt: skip
        found[criterion] = pattern.indices().tolist()
    assert found == {"fisher": [0], "grad": [1]}


@pytest.mark.parametrize("memory", [None, 12])
def test_spiel_every_batch_has_a_say(memory):
    """The entry that matters is the smallest in the first batch. (`drop_and_grow` is SpIEL's own rule: its candidates
    are those of the first batch.)"""
    model = linear(1, 3)
    data = [torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 9.0]])]
    [pattern] = select(model, data, k=1, tile=(2, 2), tile_budget=1.0, memory=memory,
                       loss_fn=lambda m, g: (m[0].weight * g).sum()).values()  # fmt: skip
    assert pattern.indices().tolist() == [2]


def test_the_table_names_its_tests():
    cells = [line.split("|")[3].strip() for line in __doc__.splitlines() if line.startswith("|") and "..." in line]
    told = [part for cell in cells for part in cell.split(", ")]
    assert told and all(any(part[4:] in name for name in globals() if name.startswith("test_")) for part in told)
