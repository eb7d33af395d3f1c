"""Rates by density: which leaves share a group, and what rate it gets."""

import pytest
import torch
from torch import nn

import sparseft
from sparseft import Pattern, SparseAdamW, param_groups


def sparsified(density: float = 0.1) -> nn.Module:
    """A layer with scattered entries, one of which whole rows train, a whole bias and an empty pattern."""
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 30), nn.Linear(30, 7))
    scattered = torch.randperm(2000)[: round(density * 2000)]
    patterns = {
        "0.weight": Pattern.from_indices(scattered, (50, 40)),
        "0.bias": Pattern.from_indices(torch.arange(50), (50,)),
        "1.weight": Pattern.from_indices(torch.cat([torch.arange(50), torch.arange(500, 550)]), (30, 50)),
        "2.weight": Pattern.from_indices(torch.zeros(0, dtype=torch.int64), (7, 30)),
    }
    return sparseft.sparsify(model, patterns)


@pytest.mark.parametrize("density", [0.005, 0.01, 0.3])
@pytest.mark.parametrize("power", [0.0, 0.5, 0.75])
def test_the_rate_follows_the_density(density, power):
    scattered, whole = param_groups(sparsified(density), 2.0, power)
    assert [name for name, _ in scattered["params"]] == ["0.weight", "2.weight"]  # an empty pattern has no whole row
    assert [name for name, _ in whole["params"]] == ["0.bias", "1.weight"]
    share = round(density * 2000) / (2000 + 210)
    assert scattered["lr"] == pytest.approx(2.0 * (0.01 / share) ** power)
    assert whole["lr"] == pytest.approx(2.0 * 0.01**power)


def test_an_optimizer_of_a_model_has_these_groups_and_one_of_leaves_has_one():
    model = sparsified()
    optimizer = SparseAdamW(model, lr=1e-2)
    expected = param_groups(model, 1e-2)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in expected]
    assert [g["param_names"] for g in optimizer.param_groups] == [[n for n, _ in g["params"]] for g in expected]
    assert [g["lr"] for g in SparseAdamW(sparseft.parameters(sparsified()), lr=1e-2).param_groups] == [1e-2]
    other = torch.optim.AdamW(param_groups(sparsified(), 1e-2))
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in expected]


def test_a_rate_in_a_tensor_stays_one():
    rate = torch.tensor(1e-2)
    whole = param_groups(sparsified(), rate)[1]
    assert whole["lr"].shape == () and float(whole["lr"]) == pytest.approx(1e-2 * 0.01**0.75)
    assert param_groups(sparsified(), rate, 0.0)[0]["lr"] is rate


def test_one_kind_makes_one_group():
    model = nn.Sequential(nn.Linear(4, 5))
    sparseft.sparsify(model, {"0.bias": Pattern.from_indices(torch.arange(5), (5,))})
    assert len(param_groups(model, 1.0)) == 1


def test_a_new_leaf_joins_its_kind():
    model = sparsified()
    optimizer = SparseAdamW(model, lr=1e-2)
    some = Pattern.from_indices(torch.tensor([0, 8]), (7, 30))
    row = Pattern.from_indices(torch.arange(30), (7, 30))
    assert optimizer.group_for(some) is optimizer.param_groups[0]
    assert optimizer.group_for(row) is optimizer.param_groups[1]
    leaves = dict(param_groups(model, 1e-2)[0]["params"])
    apart = SparseAdamW([{"params": [leaf]} for leaf in leaves.values()])
    assert apart.group_for(some) is None and apart.group_for(row) is None


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="density_power must be >= 0, got -1"):
        param_groups(sparsified(), 1e-2, -1)
    with pytest.raises(ValueError, match="this model has no selected entries"):
        param_groups(nn.Linear(2, 3), 1e-2)


def test_frozen_leaves_are_no_parameters_to_train():
    model = sparsified()
    model.requires_grad_(False)  # as putting LoRA on top does
    with pytest.raises(ValueError, match="none requires a gradient"):
        SparseAdamW(model)
