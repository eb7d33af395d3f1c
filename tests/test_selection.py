"""select, eligible and StreamingTopK against dense references written here with numpy."""

import copy
import ctypes
import logging
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from sparseft.layers import selected, sparsify
from sparseft.optim import SparseAdamW
from sparseft.pattern import Pattern, matrix_shape
from sparseft.selection import (
    ALLOCATIONS,
    CRITERIA,
    Allocation,
    Criterion,
    StreamingTopK,
    eligible,
    lift,
    vectors,
)
from sparseft.selection.heap import EVERY, HeapTrim
from tests.tiny import select_entries as select

VOCAB = 61
TILE = (8, 8)


class Mlp(nn.Module):
    """Odd shapes, a normalisation layer, a bias and a dropout that only train mode has."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(13, 37)
        self.norm = nn.LayerNorm(37)
        self.drop = nn.Dropout(0.3)
        self.down = nn.Linear(37, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.norm(self.up(x)).relu()))


def mlp_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def make_mlp() -> Mlp:
    torch.manual_seed(1)
    return Mlp().eval()


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=2, n_positions=32)).eval()


def make_olmoe() -> OlmoeForCausalLM:
    torch.manual_seed(4)
    config = OlmoeConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
        experts_implementation="eager",  # the grouped one has no fp64
    )  # fmt: skip
    return OlmoeForCausalLM(config).eval()


def mlp_batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(6, 13, generator=generator) for _ in range(n)]


def text_batches(n: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randint(VOCAB, (2, 9), generator=generator) for _ in range(n)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in rows]


MODELS = {
    "mlp": (make_mlp, mlp_batches, mlp_loss),
    "llama": (make_llama, text_batches, None),
    "gpt2": (make_gpt2, text_batches, None),
    "olmoe": (make_olmoe, text_batches, None),
}


# ---- references -------------------------------------------------------------------------------------------------


def dense_scores(model, batches, criterion, loss_fn) -> dict[str, np.ndarray]:
    """The scores of every eligible weight, from all dense gradients at once; the sums in fp64."""
    names = list(eligible(model))
    weights = [model.get_parameter(name) for name in names]
    wide = [w.detach().double() for w in weights]
    if criterion == "magnitude":
        return {name: w.abs().numpy() for name, w in zip(names, wide, strict=True)}
    sums = [torch.zeros_like(w) for w in wide]
    for batch in batches:
        loss = loss_fn(model, batch) if loss_fn else model(**batch).loss
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.double() ** 2 if criterion == "fisher" else gradient.double()
    if criterion == "taylor":
        sums = [total * w for total, w in zip(sums, wide, strict=True)]
    return {name: total.abs().numpy() for name, total in zip(names, sums, strict=True)}


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Flat positions of the k largest; ties to the lower position."""
    return np.sort(np.lexsort((np.arange(scores.size), -scores.reshape(-1)))[:k])


def choose_freely(scores: dict[str, np.ndarray], density: float, floor: float = 0.0) -> dict[str, np.ndarray]:
    """Boolean masks of the best entries of one budget over all weights, `floor` of it for certain by size."""
    flat = np.concatenate([s.reshape(-1) for s in scores.values()])
    mask = np.zeros(flat.size, dtype=bool)
    start, k = 0, round(density * flat.size)
    for s in scores.values():
        mask[start + top(s, int(floor * k * s.size / flat.size))] = True
        start += s.size
    mask[top(np.where(mask, np.inf, flat), k)] = True
    parts = np.split(mask, np.cumsum([s.size for s in scores.values()])[:-1])
    return {name: part.reshape(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def choose_in_tiles(
    scores: dict[str, np.ndarray], density: float, tile, tile_budget: float, floor: float = 0.0
) -> dict[str, np.ndarray]:
    """Masks after sorting rows and columns and keeping the best tiles, tile by tile in plain loops."""
    scores = {name: s.reshape(matrix_shape(s.shape)) for name, s in scores.items()}
    free, tiles = choose_freely(scores, density, floor), []
    for name, s in scores.items():
        mass = np.where(free[name], s, 0.0)
        rows = np.argsort(-mass.sum(1), kind="stable")
        cols = np.argsort(-mass.sum(0), kind="stable")
        for r in range(0, s.shape[0], tile[0]):
            for c in range(0, s.shape[1], tile[1]):
                block = np.ix_(rows[r : r + tile[0]], cols[c : c + tile[1]])
                tiles.append((mass[block].sum(), free[name][block].any(), name, block))
    tiles.sort(key=lambda t: -t[0])
    k, entries = sum(mask.sum() for mask in free.values()), sum(s.size for s in scores.values())
    allowed = {name: np.full(s.shape, -1.0) for name, s in scores.items()}
    room, taken = dict.fromkeys(scores, 0), 0
    for name, s in scores.items():  # first what every weight gets for certain
        own = [t for t in tiles if t[2] == name]
        least, sure = int(floor * tile_budget * len(own)), int(floor * k * s.size / entries)
        for n, (_, occupied, _, block) in enumerate(own):
            if occupied and (n < least or room[name] < sure):
                room[name] += s[block].size
                allowed[name][block] = s[block]
                taken += 1
    for _, occupied, name, block in tiles:
        if (
            occupied
            and allowed[name][block].min() < 0
            and (taken < round(tile_budget * len(tiles)) or sum(room.values()) < k)
        ):
            room[name] += scores[name][block].size
            allowed[name][block] = scores[name][block]
            taken += 1
    return choose_freely(allowed, density, floor)


def groups_of(scores: dict[str, np.ndarray], allocation: str) -> list[dict[str, np.ndarray]]:
    """The weights that share a budget, spelled out per model of this file."""
    if allocation in ("global", "mixed"):
        return [scores]
    if allocation == "layer":
        return [{name: s} for name, s in scores.items()]
    kinds: dict[str, dict[str, np.ndarray]] = {}
    for name, s in scores.items():
        for prefix in ("model.layers.0.", "model.layers.1.", "transformer.h.0.", "transformer.h.1."):
            if name.startswith(prefix):
                kinds.setdefault(name.removeprefix(prefix), {})[name] = s
                break
        else:
            kinds[name] = {name: s}
    return list(kinds.values())


FLOORS = {"global": 0.0, "layer": 0.0, "kind": 0.0, "mixed": 0.5}


def masks_of(patterns: dict[str, Pattern], scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Masks by weight, those without a pattern empty."""
    return {
        name: patterns[name].validate().to_mask().numpy().reshape(s.shape)
        if name in patterns
        else np.zeros(s.shape, bool)
        for name, s in scores.items()
    }


def assert_same(patterns: dict[str, Pattern], expected: dict[str, np.ndarray]) -> None:
    found = masks_of(patterns, expected)
    for name, mask in expected.items():
        np.testing.assert_array_equal(found[name], mask, err_msg=name)


def digests(patterns: dict[str, Pattern]) -> dict[str, str]:
    return {name: pattern.digest for name, pattern in patterns.items()}


# ---- criteria, allocation, tiles --------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["grad", "taylor", "fisher", "magnitude"])
@pytest.mark.parametrize("allocation", FLOORS)
@pytest.mark.parametrize("which", MODELS)
def test_free_choice_is_the_dense_reference(which, allocation, criterion):
    make, batches, loss_fn = MODELS[which]
    model = make().double()
    data = [x.double() if isinstance(x, Tensor) else x for x in batches(3)]
    scores = dense_scores(model, data, criterion, loss_fn)
    patterns = select(
        model,
        data,
        density=0.07,
        criterion=criterion,
        allocation=allocation,
        tile=TILE,
        tile_budget=1.0,
        loss_fn=loss_fn,
    )
    groups = [choose_freely(group, 0.07, FLOORS[allocation]) for group in groups_of(scores, allocation)]
    expected = {name: next(group[name] for group in groups if name in group) for name in scores}
    assert_same(patterns, expected)
    assert list(patterns) == [name for name in scores if expected[name].any()]  # model order, empty ones left out


@pytest.mark.parametrize("n", [1, 2])  # one batch and several take different ways
@pytest.mark.parametrize("criterion", ["grad", "taylor", "fisher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_narrow_weights_are_summed_in_fp32(dtype, criterion, n):
    model, data = make_llama().to(dtype), text_batches(n)
    scores = dense_scores(model, data, criterion, None)
    patterns = select(model, data, density=0.1, criterion=criterion, tile_budget=1.0)
    masks = masks_of(patterns, scores)
    chosen = np.concatenate([scores[name][masks[name]] for name in scores])
    flat = np.concatenate([s.reshape(-1) for s in scores.values()])
    best = np.sort(flat)[-len(chosen) :]
    assert len(chosen) == round(0.1 * flat.size)
    # A sum of n <= 2 fp32 terms, then one product: relative error of a sum up to 2^-23 of its largest partial sum, so
    # an entry may only be chosen wrongly within that distance of the threshold.
    slack = 4 * 2.0**-23 * flat.max()
    assert chosen.min() >= best[0] - slack
    assert chosen.sum() == pytest.approx(best.sum(), abs=slack * len(chosen))


@pytest.mark.parametrize("tile_budget", [0.02, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("allocation", FLOORS)
@pytest.mark.parametrize("which", MODELS)
def test_tile_budget_is_the_dense_reference(which, allocation, tile_budget):
    make, batches, loss_fn = MODELS[which]
    model = make().double()
    data = [x.double() if isinstance(x, Tensor) else x for x in batches(2)]
    scores = dense_scores(model, data, "grad", loss_fn)
    patterns = select(
        model, data, density=0.03, allocation=allocation, tile=TILE, tile_budget=tile_budget, loss_fn=loss_fn
    )
    for group in groups_of(scores, allocation):
        expected = choose_in_tiles(group, 0.03, TILE, tile_budget, FLOORS[allocation])
        found = masks_of(patterns, group)
        for name, mask in expected.items():
            np.testing.assert_array_equal(found[name].reshape(mask.shape), mask, err_msg=name)
        total = sum(-(-n // 8) * -(-m // 8) for n, m in (matrix_shape(s.shape) for s in group.values()))
        k = round(0.03 * sum(s.size for s in group.values()))
        used = sum(len(patterns[name].tiles) for name in group if name in patterns)
        smallest = min(
            min(n % 8 or 8, 8) * min(m % 8 or 8, 8) for n, m in (matrix_shape(s.shape) for s in group.values())
        )
        # With a floor every weight may need a tile of its own to hold its sure entries.
        assert used <= max(round(tile_budget * total), -(-k // smallest)) + (len(group) if FLOORS[allocation] else 0)
        assert sum(mask.sum() for mask in found.values()) == k


def planted(rows: int, cols: int) -> Tensor:
    """A matrix whose magnitude is row scale times column scale, both in random order, times noise."""
    generator = torch.Generator().manual_seed(7)
    row, col = (torch.randn(n, generator=generator).mul(0.5).exp() for n in (rows, cols))
    return row[:, None] * col * torch.randn(rows, cols, generator=generator)


def blocks_of(matrix: Tensor) -> Tensor:
    """[tiles, entries] of a matrix padded with zeros to whole tiles, in natural order."""
    padded = nn.functional.pad(matrix, (0, -matrix.shape[1] % TILE[1], 0, -matrix.shape[0] % TILE[0]))
    return padded.unflatten(1, (-1, TILE[1])).unflatten(0, (-1, TILE[0])).transpose(1, 2).flatten(0, 1).flatten(1)


@pytest.mark.parametrize(("tile_budget", "least"), [(0.05, 0.97), (0.1, 0.999)])
def test_planted_structure_is_concentrated(tile_budget, least, caplog):
    """Scattered over nearly all tiles in natural order, the free choice survives in few sorted ones."""
    model = nn.Sequential(nn.Linear(250, 331, bias=False), nn.Linear(331, 120, bias=False)).requires_grad_(False)
    for layer in model:
        layer.weight.copy_(planted(*layer.weight.shape))
    free = select(model, criterion="magnitude", tile=TILE, tile_budget=1.0)
    with caplog.at_level(logging.INFO, "sparseft"):
        tiled = select(model, criterion="magnitude", tile=TILE, tile_budget=tile_budget)

    def mass(patterns):
        return sum(float(p.gather(model.get_parameter(name)).double().abs().sum()) for name, p in patterns.items())

    natural = torch.cat([blocks_of(weight.abs().double()) for weight in model.parameters()])
    chosen = torch.cat([blocks_of(free[n].to_mask() * w.abs().double()) for n, w in model.named_parameters()])
    k, budget = sum(map(len, free.values())), round(tile_budget * len(natural))
    assert k == sum(map(len, tiled.values()))
    assert sum(len(p.tiles) for p in tiled.values()) <= budget
    naive = natural[chosen.sum(1).topk(budget).indices].flatten().topk(k).values.sum() / mass(free)
    share = mass(tiled) / mass(free)
    assert share > least
    assert naive < share - 0.1
    assert f"{100 * share:.2f} % of the score mass" in caplog.text


def test_whole_budget_still_sorts_rows_and_columns():
    model = nn.Sequential(nn.Linear(40, 30, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(planted(30, 40))
    pattern = select(model, criterion="magnitude", density=0.1, tile=TILE, tile_budget=1.0)["0.weight"]
    mass = torch.where(pattern.to_mask(), model[0].weight.detach().abs(), 0).double()
    assert pattern.rows.tolist() == mass.sum(1).argsort(descending=True)[: len(pattern.rows)].tolist()
    assert pattern.cols.tolist() == mass.sum(0).argsort(descending=True)[: len(pattern.cols)].tolist()


@pytest.mark.parametrize("tile_budget", [0.2, 1.0])
def test_ties_go_to_the_earlier_weight_and_the_lower_position(tile_budget):
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))

    def loss(model, batch):  # every |gradient| is 1
        return model[0].weight.sum() - model[1].weight.sum()

    patterns = select(model, [None], density=0.125, tile=TILE, tile_budget=tile_budget, loss_fn=loss)
    assert list(patterns) == ["0.weight"]
    assert len(patterns["0.weight"]) == 64
    if tile_budget == 1.0:
        assert patterns["0.weight"].indices().sort().values.tolist() == list(range(64))


@pytest.mark.parametrize("tile", [(1, 1), (3, 5), (1, 64), (256, 256), (37, 13)])
def test_any_tile_shape(tile):
    patterns = select(make_mlp(), criterion="magnitude", density=0.2, tile=tile, tile_budget=0.3)
    assert sum(len(p.validate()) for p in patterns.values()) == round(0.2 * (13 * 37 + 37 * 5))
    assert {p.tile for p in patterns.values()} == {tile}


def test_density_one_selects_everything():
    patterns = select(make_mlp(), criterion="random", density=1, tile=TILE, tile_budget=0.1)
    assert all(p.density == 1 for p in patterns.values())
    assert list(patterns) == ["up.weight", "down.weight"]


@pytest.mark.parametrize("tile_budget", [0.2, 1.0])
def test_a_floor_reaches_the_weights_that_a_global_budget_passes_over(tile_budget):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))).requires_grad_(False)
    for i, layer in enumerate(model):
        layer.weight.mul_(100.0**-i)
    count = {}
    for floor in (0.0, 0.25, 0.5, 1.0):
        allocation = Allocation(lambda name: "", floor)
        patterns = select(model, criterion="magnitude", density=0.01, allocation=allocation, tile=TILE,
                          tile_budget=tile_budget)  # fmt: skip
        count[floor] = [len(patterns.get(f"{i}.weight", ())) for i in range(4)]
    # k = round(163.84); int(floor * k / 4) each, what is left goes to the first weight, whose entries are largest
    assert count == {0.0: [164, 0, 0, 0], 0.25: [134, 10, 10, 10], 0.5: [104, 20, 20, 20], 1.0: [41, 41, 41, 41]}


def test_a_kind_is_the_name_after_the_layer_number():
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.11.mlp.up_proj.weight", "h.3.attn.c_attn.weight",
             "0.weight", "head.weight", "experts.3.layers.7.gate.bias"]  # fmt: skip
    assert list(map(ALLOCATIONS["kind"].budget, names)) == [
        "mlp.up_proj.weight", "mlp.up_proj.weight", "attn.c_attn.weight", "weight", "head.weight", "gate.bias"
    ]  # fmt: skip


# ---- Wanda ------------------------------------------------------------------------------------------------------


def matmul_inputs(model: nn.Module, batches, loss_fn, wanted, power: int = 2) -> dict[str, np.ndarray]:
    """Per weight the sum of |x|^power of every input feature over the tokens that `wanted(batch)` keeps, in fp64.

    The layers' inputs are read off the products that the forward pass hands to torch, not off the layers.
    """
    found: dict[str, np.ndarray] = {}
    names = {w.data_ptr(): name for name, w in eligible(model).items()}

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            for weight in args[1:]:
                if function in (nn.functional.linear, torch.addmm) and isinstance(weight, Tensor):
                    name = names.get(weight.data_ptr())
                    if name is not None:
                        x = (args[1] if function is torch.addmm else args[0]).detach().double().numpy()
                        x = x.reshape(-1, x.shape[-1])[keep.reshape(-1) if keep is not None else slice(None)]
                        found[name] = found.get(name, 0) + (np.abs(x) ** power).sum(0)
            return function(*args, **(kwargs or {}))

    for batch in batches:
        keep = wanted(batch)
        with Spy(), torch.no_grad():
            loss_fn(model, batch) if loss_fn else model(**batch)
    return found


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("allocation", ["global", "layer"])
@pytest.mark.parametrize("which", ["mlp", "llama", "gpt2"])
@pytest.mark.parametrize(("criterion", "power"), [("wanda", 2), ("wanda-mean", 1)])
def test_wanda_is_the_dense_reference(criterion, power, which, allocation, n):
    make, batches, loss_fn = MODELS[which]
    model = make().double()
    data = [x.double() if isinstance(x, Tensor) else x for x in batches(n)]
    sums = matmul_inputs(model, data, loss_fn, lambda batch: None, power)
    scores = {}
    for name, weight in eligible(model).items():
        norm = sums[name] ** (1 / power)
        scores[name] = np.abs(weight.detach().numpy()) * (norm[:, None] if which == "gpt2" else norm)
    patterns = select(model, data, criterion=criterion, density=0.07, allocation=allocation, tile=TILE, tile_budget=1.0,
                      loss_fn=loss_fn)  # fmt: skip
    groups = [choose_freely(group, 0.07) for group in groups_of(scores, allocation)]
    assert_same(patterns, {name: mask for group in groups for name, mask in group.items()})


def test_wanda_leaves_padding_out():
    model, [batch] = make_llama().double(), text_batches(1)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 5:] = 0
    data = [{**batch, "attention_mask": mask}]
    squares = matmul_inputs(model, data, None, lambda batch: batch["attention_mask"].bool().numpy())
    scores = {n: np.abs(w.detach().numpy()) * np.sqrt(squares[n]) for n, w in eligible(model).items()}
    assert_same(select(model, data, criterion="wanda", density=0.07, tile=TILE, tile_budget=1.0),
                choose_freely(scores, 0.07))  # fmt: skip
    everything = select(model, [batch], criterion="wanda", density=0.07, tile=TILE, tile_budget=1.0)
    with pytest.raises(AssertionError):
        assert_same(everything, choose_freely(scores, 0.07))


def test_wanda_needs_linear_layers():
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate\.weight belongs to none"):
        select(make_olmoe(), text_batches(1), criterion="wanda")
    model = make_mlp()
    with pytest.raises(ValueError, match=r"batch 0: the input of up\.weight's layer is not finite"):
        select(model, [torch.full((2, 13), torch.inf)], criterion="wanda", loss_fn=mlp_loss)
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- LIFT -------------------------------------------------------------------------------------------------------


def principal(weight: Tensor, rank: int) -> np.ndarray:
    """The best approximation of this rank, matrix by matrix, by LAPACK in fp64."""
    u, s, vh = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


@pytest.mark.parametrize("which", ["mlp", "llama", "olmoe"])  # olmoe: stacks of matrices
def test_exact_lift_is_the_dense_reference(which):
    model = MODELS[which][0]().double()
    scores = {name: np.abs(principal(w, 3)) for name, w in eligible(model).items()}
    patterns = select(model, criterion=lift(3, exact=True), density=0.07, tile=TILE, tile_budget=1.0)
    assert_same(patterns, choose_freely(scores, 0.07))


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (3, 40, 30)])
def test_randomised_lift_of_a_matrix_of_that_rank_is_the_matrix(shape):
    generator = torch.Generator().manual_seed(20)
    left, right = (torch.randn(*s, generator=generator, dtype=torch.float64)
                   for s in ((*shape[:-1], 5), (*shape[:-2], 5, shape[-1])))  # fmt: skip
    weight = left @ right
    scores = lift(5).score("w", weight, None, 0)
    # Exact but for rounding: a few dozen products of orthonormal factors, each off by about shape * eps * |W|.
    slack = 100 * max(shape) * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(weight).max())
    assert float((scores - weight).abs().max()) < slack


@pytest.mark.parametrize("shape", [(60, 200), (200, 60)])
def test_randomised_lift_is_nearly_the_best_approximation(shape):
    rank, power = 8, 2
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(21), dtype=torch.float64)  # hardly decays
    s = np.linalg.svd(weight.numpy(), compute_uv=False)
    error = np.linalg.norm(weight.numpy() - lift(rank).score("w", weight, None, 0).numpy(), 2)
    # Halko et al. (2011), corollary 10.10 and theorem 9.3, with as many spare directions as the rank
    tail = np.sqrt((s[rank:] ** (2 * (2 * power + 1))).sum())
    bound = (1 + np.sqrt(rank / (rank - 1))) * s[rank] ** (2 * power + 1) + np.e * np.sqrt(2 * rank) / rank * tail
    assert s[rank] <= error * (1 + 1e-12)
    assert error <= s[rank] + bound ** (1 / (2 * power + 1))
    best = np.linalg.norm(s[rank:])  # and in the Frobenius norm, which the scores see, within a few per cent
    assert np.linalg.norm(weight.numpy() - lift(rank).score("w", weight, None, 0).numpy()) < 1.05 * best


def test_lift_of_what_has_no_higher_rank_is_the_magnitude():
    model = make_mlp()
    for criterion in ("lift", "lift-exact"):  # 64 is more than the smaller side of every weight here
        assert digests(select(model, criterion=criterion, density=0.1, tile=TILE)) == digests(
            select(model, criterion="magnitude", density=0.1, tile=TILE)
        )
    vector = torch.randn(9)
    assert torch.equal(lift(3).score("b", vector, None, 0), vector)


def test_randomised_lift_depends_on_seed_and_name_alone():
    weight = torch.randn(50, 40)
    first = lift(4).score("a", weight, None, 0)
    torch.manual_seed(5)
    assert torch.equal(lift(4).score("a", weight, None, 0), first)
    assert not torch.equal(lift(4).score("b", weight, None, 0), first)
    assert not torch.equal(lift(4).score("a", weight, None, 1), first)
    with pytest.raises(ValueError, match="rank must be positive, got 0"):
        lift(0)


# ---- rows and columns -------------------------------------------------------------------------------------------


def choose_lines(scores: dict[str, np.ndarray], density: float, along: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Masks of the lines with the largest mean, taken one by one while what they add comes closer to k."""
    scores = {name: s.reshape(matrix_shape(s.shape)) for name, s in scores.items()}
    lines = [(mean, name, a, i) for name, s in scores.items() for a in along for i, mean in enumerate(s.mean(a))]
    masks = {name: np.zeros(s.shape, bool) for name, s in scores.items()}
    k, taken = round(density * sum(s.size for s in scores.values())), 0
    for _, name, a, i in sorted(lines, key=lambda line: -line[0]):
        line = masks[name][(i, slice(None)) if a == 1 else (slice(None), i)]
        size = int((~line).sum())  # without the entries that crossing lines have taken
        if size and abs(taken + size - k) >= abs(taken - k):
            break
        line[:] = True
        taken += size
    return masks


@pytest.mark.parametrize("density", [0.02, 0.15, 1.0])
@pytest.mark.parametrize(("structure", "along"), [("rows", (1,)), ("columns", (0,)), ("rows-and-columns", (1, 0))])
@pytest.mark.parametrize("allocation", ["global", "layer", "kind"])
@pytest.mark.parametrize("which", MODELS)
def test_lines_are_the_dense_reference(which, allocation, structure, along, density):
    make, batches, loss_fn = MODELS[which]
    model = make().double()
    data = [x.double() if isinstance(x, Tensor) else x for x in batches(2)]
    groups = groups_of(dense_scores(model, data, "grad", loss_fn), allocation)
    expected = {name: mask for group in groups for name, mask in choose_lines(group, density, along).items()}
    settings = {"density": density, "allocation": allocation, "structure": structure, "tile": TILE, "loss_fn": loss_fn}
    if not any(mask.any() for mask in expected.values()):  # every first line is too long
        with pytest.raises(ValueError, match=f"selects nothing: .* one of the {structure}"):
            select(model, data, **settings)
        return
    assert_same(select(model, data, **settings), expected)


@pytest.mark.parametrize("structure", ["rows", "rows-and-columns"])
def test_lines_keep_no_scores(structure, caplog):
    with caplog.at_level(logging.INFO, "sparseft"):
        select(make_mlp(), mlp_batches(1), density=0.1, structure=structure, loss_fn=mlp_loss)
    assert "score buffer: 0.0 MB for 0 of 2 weights" in caplog.text


def test_crossing_lines_fill_few_tiles():
    """Chosen rows and chosen columns stand first, so their cross lies in the first bands."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1e-3)
        model[0].weight[[3, 60]] = 2.0
        model[0].weight[:, [5, 30, 50]] = 1.0
    k = 2 * 64 + 3 * 64 - 6
    pattern = select(model, criterion="magnitude", density=k / 64**2, structure="rows-and-columns", tile=TILE)[
        "0.weight"
    ]
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[[3, 60]], expected[:, [5, 30, 50]] = True, True
    assert torch.equal(pattern.to_mask(), expected)
    assert len(pattern.tiles) == 8 + 8 - 1


# ---- the same number for every row --------------------------------------------------------------------------------


def choose_per_row(scores: np.ndarray, density: float, tile_budget: float) -> np.ndarray:
    """Mask of every row's best entries, inside every band's best tiles, in plain loops."""
    s = scores.reshape(matrix_shape(scores.shape))
    (n, m), k = s.shape, round(density * s.size)

    def choose(s: np.ndarray) -> np.ndarray:
        mask = np.zeros(s.shape, bool)
        for i, row in enumerate(s):
            mask[i, top(row, k // n)] = True
        left = [(-np.where(mask[i], -np.inf, row).max(), i) for i, row in enumerate(s)]
        for _, i in sorted(left)[: k % n]:
            mask[i, np.where(mask[i], -np.inf, s[i]).argmax()] = True
        return mask

    free = choose(s)
    if tile_budget == 1:
        return free
    mass, allowed = np.where(free, s, 0.0), np.full(s.shape, -1.0)
    rows, cols = np.argsort(-mass.sum(1), kind="stable"), np.argsort(-mass.sum(0), kind="stable")
    for r in range(0, n, TILE[0]):
        blocks = [np.ix_(rows[r : r + TILE[0]], cols[c : c + TILE[1]]) for c in range(0, m, TILE[1])]
        blocks.sort(key=lambda block: -mass[block].sum())
        room = 0
        for number, block in enumerate(blocks):
            if number < round(tile_budget * len(blocks)) or room < -(-k // n):
                allowed[block], room = s[block], room + s[block].shape[1]
    return choose(allowed)


@pytest.mark.parametrize("density", [0.01, 0.15, 1.0])
@pytest.mark.parametrize("tile_budget", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("which", MODELS)
def test_rows_get_their_own_entries_as_in_the_dense_reference(which, tile_budget, density, monkeypatch):
    monkeypatch.setattr("sparseft.selection.rows.CHUNK", 100)  # a few rows at a time
    make, batches, loss_fn = MODELS[which]
    model = make().double()
    data = [x.double() if isinstance(x, Tensor) else x for x in batches(2)]
    scores = dense_scores(model, data, "grad", loss_fn)
    patterns = select(
        model, data, density=density, allocation="row", tile=TILE, tile_budget=tile_budget, loss_fn=loss_fn
    )
    for name, found in masks_of(patterns, scores).items():
        expected = choose_per_row(scores[name], density, tile_budget)
        np.testing.assert_array_equal(found.reshape(expected.shape), expected, err_msg=name)
        counts = expected.sum(1)
        assert counts.max() - counts.min() <= 1
        assert counts.sum() == round(density * expected.size)


def test_equal_scores_of_rows_go_to_the_lower_positions():
    model = nn.Sequential(nn.Linear(10, 4, bias=False))
    nn.init.ones_(model[0].weight)
    pattern = select(model, criterion="magnitude", density=0.25, allocation="row", tile_budget=1.0)["0.weight"]
    assert pattern.indices().sort().values.tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 30, 31]


# ---- norms and biases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "batches", "loss_fn", "expected"),
    [
        (make_mlp, mlp_batches, mlp_loss, ["up.bias", "norm.weight", "norm.bias"]),
        (make_llama, text_batches, None,
         [f"model.layers.{i}.{norm}_layernorm.weight" for i in range(2) for norm in ("input", "post_attention")]
         + ["model.norm.weight"]),
    ],
    ids=["mlp", "llama"],
)  # fmt: skip
def test_train_norms_adds_whole_vectors(make, batches, loss_fn, expected):
    model, data = make(), batches(2)
    settings = {"density": 0.05, "tile": TILE, "loss_fn": loss_fn}
    plain = digests(select(model, data, **settings))
    patterns = select(model, data, train_norms=True, **settings)
    assert sorted(patterns.keys() - plain.keys()) == sorted(expected)
    assert list(patterns) == [name for name, _ in model.named_parameters() if name in patterns]
    for name, pattern in patterns.items():
        if name in plain:
            assert pattern.digest == plain[name]
        else:
            length = model.get_parameter(name).numel()
            assert pattern.validate().shape == (1, length)
            assert pattern.indices().tolist() == list(range(length))
    fewer = select(model, data, train_norms=True, exclude=expected[0], **settings)
    assert fewer.keys() == patterns.keys() - {expected[0]}


# ---- random, user criteria, streaming ---------------------------------------------------------------------------


def test_random_depends_on_seed_and_name_alone():
    def chosen(model, **settings):
        return digests(select(model, criterion="random", allocation="layer", tile=TILE, **settings))

    model = make_llama()
    base = chosen(model)
    alone = chosen(model, include="layers.1.mlp")
    assert alone == {name: base[name] for name in alone}
    torch.manual_seed(99)
    assert chosen(make_llama()) == base
    assert all(chosen(model, seed=1)[name] != digest for name, digest in base.items())


def test_random_is_spread_evenly():
    model = nn.Sequential(nn.Linear(300, 200, bias=False), nn.Linear(200, 100, bias=False))
    patterns = select(model, criterion="random", density=0.1, tile_budget=1.0)
    n = len(patterns["0.weight"])  # hypergeometric: 8000 draws, share 3/4, standard deviation under 39
    assert n + len(patterns["1.weight"]) == 8000
    assert abs(n - 6000) < 5 * 39


def test_a_function_as_criterion_gets_name_weight_and_summed_gradient():
    model, data = make_mlp(), mlp_batches(2)
    seen = {}

    def criterion(name, weight, gradient):
        seen[name] = gradient.clone()
        return gradient * weight

    patterns = select(model, data, criterion=criterion, density=0.1, tile=TILE, loss_fn=mlp_loss)
    assert digests(patterns) == digests(
        select(model, data, criterion="taylor", density=0.1, tile=TILE, loss_fn=mlp_loss)
    )
    model.zero_grad()
    for batch in data:
        mlp_loss(model, batch).backward()
    assert seen.keys() == {"up.weight", "down.weight"}
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


def test_a_criterion_object_may_need_no_gradient():
    negative = Criterion(lambda name, weight, total, seed: 1 / (1 + weight.abs()))
    patterns = select(make_mlp(), criterion=negative, density=0.1, tile_budget=1.0)
    weights = torch.cat([p.detach().flatten() for p in eligible(make_mlp()).values()]).abs()
    chosen = torch.cat([p.gather(make_mlp().get_parameter(name)) for name, p in patterns.items()]).abs()
    assert torch.equal(chosen.sort().values, weights.sort().values[: len(chosen)])


@pytest.mark.parametrize("tile_budget", [0.25, 1.0])
@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_one_batch_streams_to_the_same_result_as_sums(allocation, tile_budget):
    model, [batch] = make_llama(), text_batches(1)
    settings = {"density": 0.05, "allocation": allocation, "tile": TILE, "tile_budget": tile_budget}
    one = select(model, [batch], **settings)
    several = select(model, (b for b in [batch, batch, batch, batch]), **settings)  # 4 g: exactly the same order
    assert digests(one) == digests(several)


@pytest.mark.parametrize("k", [0, 1, 7, 60, 500, 5000])
@pytest.mark.parametrize("levels", [3, 10**6])  # few values: nearly everything is a tie
def test_streaming_topk(k, levels):
    generator = torch.Generator().manual_seed(k + levels)
    shapes = {"e": (5, 7), "b": (100,), "a": (1, 1), "d": (40, 30), "c": (3, 0), "f": (11, 3, 4)}
    scores = {n: torch.randint(-levels, levels, s, generator=generator).float() for n, s in shapes.items()}
    flat = np.concatenate([s.abs().numpy().reshape(-1) for s in scores.values()])
    mask = np.zeros(flat.size, bool)
    mask[top(flat, k)] = True
    parts = np.split(mask, np.cumsum([s.numel() for s in scores.values()])[:-1])
    expected = {n: part.nonzero()[0].tolist() for n, part in zip(scores, parts, strict=True) if part.any()}
    for adding in (list(scores), list(scores)[::-1], sorted(scores)):
        best = StreamingTopK(k, order=list(scores))
        for name in adding:
            best.add(name, scores[name])
            assert sum(best._counts.values()) <= 2 * k
        result = best.result()
        assert {n: i.tolist() for n, i in result.items()} == expected
        assert list(result) == list(expected)
        for name, values in best.scores().items():
            assert torch.equal(values, scores[name].abs().reshape(-1)[result[name]])
            assert torch.equal(best.signed()[name], scores[name].reshape(-1)[result[name]])


def test_streaming_topk_of_products():
    generator = torch.Generator().manual_seed(8)
    a, b = (torch.randn(9, 11, generator=generator).bfloat16() for _ in range(2))
    best = StreamingTopK(10)
    best.add("x", a, b)
    assert best.result()["x"].tolist() == top((a.float() * b.float()).abs().numpy(), 10).tolist()


def test_streaming_topk_prefers_the_first_added_without_an_order():
    best = StreamingTopK(3)
    best.add("z", torch.ones(2))
    best.add("a", torch.ones(2))
    assert {n: i.tolist() for n, i in best.result().items()} == {"z": [0, 1], "a": [0]}


def test_streaming_topk_refuses():
    best = StreamingTopK(3, order=["x", "y"])
    best.add("x", torch.ones(2))
    with pytest.raises(ValueError, match="new one, got 'x'"):
        best.add("x", torch.ones(2))
    with pytest.raises(ValueError, match="one of order, got 'z'"):
        best.add("z", torch.ones(2))
    with pytest.raises(ValueError, match="other must have score's shape"):
        best.add("y", torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="k must not be negative"):
        StreamingTopK(-1)


# ---- determinism ------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from torch import nn
from sparseft.selection import select
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(30, 50), nn.Dropout(0.5), nn.ReLU(), nn.Linear(50, 20))
data = [torch.randn(8, 30) for _ in range(3)]
torch.manual_seed({noise})
loss = lambda model, x: model(x).square().mean()
for criterion in ("grad", "fisher", "random"):
    patterns = select(model, data, criterion=criterion, density=0.1, tile=(8, 8), loss_fn=loss)
    print({{name: p.digest for name, p in patterns.items()}})
"""


def test_same_digests_in_two_processes():
    """With dropout, another state of the global generator and another hash seed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    out = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT.format(noise=noise)],
            env={**environment, "PYTHONHASHSEED": str(noise)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for noise in (1, 2)
    ]
    assert out[0] == out[1]
    assert len(set(out[0].splitlines())) == 3


def test_a_shuffling_loader_gives_the_same_result_twice():
    model, data = make_mlp().train(), torch.cat(mlp_batches(4))
    loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)
    torch.manual_seed(10)
    first = digests(select(model, loader, density=0.1, criterion="fisher", tile=TILE, loss_fn=mlp_loss))
    torch.manual_seed(11)
    assert digests(select(model, loader, density=0.1, criterion="fisher", tile=TILE, loss_fn=mlp_loss)) == first
    other = digests(select(model, loader, density=0.1, criterion="fisher", tile=TILE, loss_fn=mlp_loss, seed=1))
    assert other != first  # another dropout, another order


# ---- memory and state -------------------------------------------------------------------------------------------


def test_freed_memory_is_handed_back_every_few_megabytes():
    trims: list[int] = []
    heap = HeapTrim()
    assert sys.platform != "linux" or heap._trim is not None or not hasattr(ctypes.CDLL(None), "malloc_trim")
    heap._trim = trims.append
    for size, so_far in ((EVERY - 1, 0), (1, 1), (EVERY // 2, 1), (0, 1), (EVERY, 2), (0, 2)):
        heap.freed(size)
        assert len(trims) == so_far


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_one_dense_gradient_at_a_time(allocation, n):
    model = make_llama()
    alive: list[weakref.ref] = []
    most = 0

    def count(parameter: nn.Parameter) -> None:
        """Runs before select's own hook, when the gradient has just been written."""
        nonlocal most
        alive.append(weakref.ref(parameter.grad))
        most = max(most, sum(ref() is not None for ref in alive))

    for parameter in eligible(model).values():
        parameter.register_post_accumulate_grad_hook(count)
    select(model, text_batches(n), density=0.05, allocation=allocation, tile=TILE, tile_budget=1.0)
    assert len(alive) == n * 14
    assert most == 1
    assert all(ref() is None for ref in alive)


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({"tile_budget": 1.0, "n": 1}, 0),
        ({"tile_budget": 1.0, "n": 2}, 666),
        ({"tile_budget": 0.5, "n": 1}, 666),
        ({"tile_budget": 0.5, "n": 1, "allocation": "layer"}, 0),
        ({"tile_budget": 0.5, "n": 0, "criterion": "magnitude"}, 666),
    ],
)
def test_the_score_buffer_is_reported(settings, held, caplog):
    data = mlp_batches(settings.pop("n"))
    with caplog.at_level(logging.INFO, "sparseft"):
        select(make_mlp(), data, density=0.1, tile=TILE, loss_fn=mlp_loss, **settings)
    assert f"score buffer: {held * 4 / 1e6:.1f} MB for {2 if held else 0} of 2 weights" in caplog.text


class Stateful(nn.Module):
    """Everything a selection could disturb: batch statistics, dropout, frozen weights, gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(12)
        self.first, self.norm, self.second = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 7)
        self.head = nn.Linear(7, 3)
        self.head.weight.requires_grad_(False)
        self.first.bias.requires_grad_(False)
        self.second.eval()
        self.first.weight.grad = torch.full_like(self.first.weight, 3.0)
        self.norm.weight.grad = torch.full_like(self.norm.weight, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(self.second(self.norm(self.first(x))), 0.2))


def state(model: nn.Module) -> list:
    tensors = [t.clone() for t in model.state_dict().values()]
    gradients = [(p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return [tensors, gradients, hooks, [m.training for m in model.modules()], torch.get_rng_state()]


def assert_untouched(model: nn.Module, before: list) -> None:
    after = state(model)
    assert all(torch.equal(a, b) for a, b in zip(after[0], before[0], strict=True))
    for (flag, gradient, _), (flag_before, gradient_before, values) in zip(after[1], before[1], strict=True):
        assert flag == flag_before
        assert gradient is gradient_before
        assert values is None or torch.equal(gradient, values)
    assert after[2:4] == before[2:4]
    assert torch.equal(after[4], before[4])


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_the_model_comes_back_as_it_was(criterion):
    model = Stateful()
    if criterion == "fisher-sample":
        model.norm.eval()  # one sample has no batch statistics
    data = [torch.randn(8, 6) for _ in range(2)]
    before = state(model)
    with torch.no_grad():  # a caller's no_grad does not reach the backward passes
        patterns = select(model, data, criterion=criterion, density=0.3, loss_fn=mlp_loss, allocation="layer",
                          structure="entries")  # fmt: skip
    assert list(patterns) == ["first.weight", "second.weight", "head.weight"]  # the frozen one too
    assert_untouched(model, before)


NO_LABEL = torch.full((8,), -100)


@pytest.mark.parametrize("criterion", ["grad", "fisher-token"])
def test_a_callers_inference_mode_does_not_reach_the_backward_passes(criterion):
    model, data = make_mlp(), mlp_batches(2)
    settings = {"criterion": criterion, "density": 0.1, "tile": TILE, "loss_fn": mlp_loss}
    expected = digests(select(model, data, **settings))
    with torch.inference_mode():
        assert digests(select(model, data, **settings)) == expected


def explode(model, batch):
    mlp_loss(model, batch).backward()  # gradients are written, then
    raise KeyError("broken")


ERRORS = {
    "density 0": ({"density": 0}, ValueError, r"density must lie in \(0, 1\], got 0"),
    "density 2": ({"density": 2}, ValueError, "density must lie in"),
    "density nan": ({"density": float("nan")}, ValueError, "density must lie in"),
    "too little": ({"density": 1e-4}, ValueError, "density 0.0001 selects no entry: the largest budget has 117"),
    "density text": ({"density": "0.1"}, TypeError, "density must be a number, got '0.1'"),
    "half a k": ({"k": 10.5}, TypeError, "k must be an int, got 10.5"),
    "memory text": ({"memory": "1G"}, TypeError, "memory must be a number of bytes, got '1G'"),
    "tile budget": ({"tile_budget": 0.0}, ValueError, r"tile_budget must lie in \(0, 1\], got 0"),
    "tile": ({"tile": (512, 512)}, ValueError, "tile must be two positive sizes"),
    "allocation": ({"allocation": "best"}, ValueError, r"Allocation or one of .*'row'\], got 'best'"),
    "floor": ({"allocation": Allocation(str, 1.5)}, ValueError, r"allocation.floor must lie in \[0, 1\], got 1.5"),
    "structure": (
        {"structure": "row"},
        ValueError,
        "structure must be one of .*'entries', 'rows', .*got 'row'",
    ),
    "half a row": (
        {"structure": "rows", "density": 0.01},
        ValueError,
        "density 0.01 selects nothing: .*the rows",
    ),
    "half a block": ({"criterion": "smt", "k": 1}, ValueError, "k=1 selects nothing: .* one of the blocks"),
    "floor of rows": (
        {"structure": "rows", "allocation": "mixed"},
        ValueError,
        "a floor goes by entries, and .*'rows'",
    ),
    "rows of lines": ({"structure": "rows", "allocation": "row"}, ValueError, "rows go by entries, and .*'rows'"),
    "rows of several": (
        {"allocation": Allocation(lambda n: "", rows=True)},
        ValueError,
        "first.weight and .* share one",
    ),
    "rows with a floor": ({"allocation": Allocation(str, 0.5, rows=True)}, ValueError, "floor must be 0"),
    "criterion": ({"criterion": "gard"}, ValueError, "one of .*'fisher', .*'grad', .*got 'gard'"),
    "no match": (
        {"include": "attention"},
        ValueError,
        "'attention' matches no weight; names look like .'first.weight'",
    ),
    "no match out": ({"exclude": "attention"}, ValueError, "'attention' matches no weight"),
    "nothing left": ({"exclude": "*"}, ValueError, r"exclude='\*' leave no weight"),
    "no batches": (
        {"batches": None},
        ValueError,
        r"batches must be given.*\['lift', 'lift-exact', 'magnitude', 'pafi', 'random', 's2ft', 'shira-struct'\]",
    ),
    "empty batches": ({"batches": []}, ValueError, "at least one batch, got none"),
    "one dict": ({"batches": {"x": 1}}, TypeError, r"iterable of batches, got dict; one batch: \[batch\]"),
    "a number": ({"batches": 3}, TypeError, "iterable of batches, got int"),
    "not a mapping": ({"loss_fn": None}, TypeError, "batch 0 must be a mapping.*got Tensor"),
    "no loss": ({"loss_fn": lambda m, x: None}, ValueError, "batch 0: .* must be a scalar tensor, got NoneType"),
    "nan loss": (  # of a mean over no label: its gradient is zero
        {"loss_fn": lambda m, x: nn.functional.cross_entropy(m(x), NO_LABEL)},
        ValueError,
        r"batch 0: the loss must be finite, got nan \(is no label counted\?\)",
    ),
    "zero gradient": ({"loss_fn": lambda m, x: 0 * m(x).sum()}, ValueError, "score 0 to every entry"),
    "vector loss": ({"loss_fn": lambda m, x: m(x)}, ValueError, r"must be a scalar tensor, got shape \(8, 3\)"),
    "constant loss": ({"loss_fn": lambda m, x: torch.ones(())}, ValueError, "batch 0: the loss gives no gradient"),
    "unrelated loss": ({"loss_fn": lambda m, x: m.norm.weight.sum()}, ValueError, "gives no gradient for any"),
    "broken loss": ({"loss_fn": explode}, KeyError, "broken"),
    "infinite gradient": (
        {
            "batches": [torch.ones(8, 6), torch.full((8, 6), float("inf"))],
            "loss_fn": lambda m, x: (m.first.weight * x[:1]).sum(),
        },
        ValueError,
        "batch 1: the gradient of first.weight is not finite",
    ),
    "wrong score": (
        {"criterion": lambda n, w, g: g[0]},
        ValueError,
        r"scores of shape \(7, 9\) for second.*got \(9,\)",
    ),
    "no score": ({"criterion": lambda n, w, g: 1.0}, ValueError, "for second.weight, got float"),
    "wide score": (
        {"criterion": lambda n, w, g: g.double() * 1e300},
        ValueError,
        "scores for second.weight that are not finite in torch.float32",
    ),
    "complex score": ({"criterion": lambda n, w, g: g + 1j}, TypeError, "real scores for second.weight, got torch.co"),
    "nan score": ({"criterion": lambda n, w, g: g / 0}, ValueError, "scores for second.weight that are not finite"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_change_nothing(case):
    settings, error, message = ERRORS[case]
    model = Stateful()
    settings = {"batches": [torch.ones(8, 6)], "loss_fn": mlp_loss, "exclude": "head"} | settings
    before = state(model)
    with pytest.raises(error, match=message):
        select(model, settings.pop("batches"), **settings)
    assert_untouched(model, before)


def test_nan_weights_are_named():
    model = Stateful()
    with torch.no_grad():
        model.second.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"batch 0: the gradient of .*weight is not finite"):
        select(model, [torch.ones(8, 6)], loss_fn=mlp_loss)
    with pytest.raises(ValueError, match=r"scores for second.weight that are not finite"):
        select(model, criterion="magnitude")


def test_a_model_without_a_loss_is_explained():
    model = make_llama()
    with pytest.raises(ValueError, match=r"model\(\*\*batch\).loss .* must be a scalar tensor"):
        select(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])


def test_a_weight_that_the_loss_does_not_reach_scores_zero(caplog):
    model = make_mlp()

    def loss(model, x):
        return model.up(x).square().mean()

    patterns = select(model, mlp_batches(1), density=0.1, loss_fn=loss, tile_budget=1.0)
    assert list(patterns) == ["up.weight"]
    assert "1 weights, the first down.weight, were not reached" in caplog.text
    patterns = select(model, mlp_batches(1), density=0.1, loss_fn=loss, tile_budget=1.0, allocation="layer")
    assert patterns["down.weight"].indices().tolist() == list(range(18))
    assert "1 weights, the first down.weight, are in budgets without a score but 0" in caplog.text
    everything = select(model, mlp_batches(1), density=1.0, loss_fn=loss)
    assert len(everything["down.weight"]) == 37 * 5  # k is exact even so


def test_a_layer_too_small_for_one_entry_is_left_out():
    patterns = select(make_mlp(), criterion="magnitude", density=0.002, allocation="layer")
    assert {name: len(p) for name, p in patterns.items()} == {"up.weight": 1}  # 0.962 entries, and 0.37


def test_gradient_checkpointing():
    model, data = make_llama().train(), text_batches(2)
    plain = digests(select(model, data, density=0.05, tile=TILE))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert digests(select(model, data, density=0.05, tile=TILE)) == plain


class Shared(nn.Module):
    """One linear layer used twice, each time in its own checkpoint."""

    def __init__(self, use_reentrant: bool):
        super().__init__()
        torch.manual_seed(13)
        self.layer, self.use_reentrant = nn.Linear(10, 10, bias=False), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=self.use_reentrant)
        return x


def test_a_gradient_in_parts_is_refused():
    x = torch.randn(4, 10, requires_grad=True)
    model = Shared(use_reentrant=True)
    before = state(model)
    with pytest.raises(RuntimeError, match=r"gradient of layer.weight came in parts.*use_reentrant=False"):
        select(model, [x], loss_fn=mlp_loss)
    assert_untouched(model, before)
    whole = select(Shared(use_reentrant=False), [x], loss_fn=mlp_loss, density=0.2, tile_budget=1.0, criterion="fisher")
    model = Shared(use_reentrant=False)
    mlp_loss(model, x).backward()
    assert (
        whole["layer.weight"].indices().sort().values.tolist()
        == top(model.layer.weight.grad.abs().numpy(), 20).tolist()
    )


# ---- which weights ----------------------------------------------------------------------------------------------


def test_default_weights_of_a_llama():
    names = list(eligible(make_llama()))
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    assert names == [f"model.layers.{i}.{part}.weight" for i in range(2) for part in parts]


def test_default_weights_of_gpt2_leave_out_the_tied_embedding():
    names = list(eligible(make_gpt2()))
    parts = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert names == [f"transformer.h.{i}.{part}.weight" for i in range(2) for part in parts]


def test_experts_are_eligible():
    model = make_olmoe()
    weights = eligible(model, include="experts")
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        f"model.layers.{i}.mlp.experts.{part}": shape
        for i in range(2)
        for part, shape in (("gate_up_proj", (4, 24, 16)), ("down_proj", (4, 16, 12)))
    }
    pattern = select(model, text_batches(1), include="experts", tile=TILE)["model.layers.0.mlp.experts.gate_up_proj"]
    assert pattern.shape == (96, 16)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("q_proj", None, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ("*.1.mlp.*", None, ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]),
        ("layers.1.mlp", "*_proj.weight", []),
        (["layers.0.self_attn", "down_proj"], ["k_proj", "v_proj"],
         ["0.self_attn.q_proj", "0.self_attn.o_proj", "0.mlp.down_proj", "1.mlp.down_proj"]),
        ("model.layers.0.*", "[kvqo]_proj", ["0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj"]),  # no norms
        ("proj", None, None),  # whole components only
    ],
)  # fmt: skip
def test_include_and_exclude(include, exclude, expected):
    if expected is None:
        with pytest.raises(ValueError, match="matches no weight"):
            eligible(make_llama(), include, exclude)
    else:
        assert list(eligible(make_llama(), include, exclude)) == [f"model.layers.{name}.weight" for name in expected]


@pytest.mark.parametrize(
    ("make", "include", "expected"),
    [
        (make_llama, "embed_tokens", ["model.embed_tokens.weight"]),
        (make_llama, "lm_head", ["lm_head.weight"]),
        (make_llama, "input_layernorm", [f"model.layers.{i}.input_layernorm.weight" for i in range(2)]),
        (make_gpt2, "lm_head", ["transformer.wte.weight"]),  # tied: any name, listed under the first
        (make_gpt2, ["wpe", "c_fc"], ["transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight",
                                      "transformer.h.1.mlp.c_fc.weight"]),
    ],
)  # fmt: skip
def test_naming_what_is_left_out_by_default_brings_it_in(make, include, expected):
    model = make()
    assert list(eligible(model, include)) == expected
    patterns = select(model, text_batches(2), include=include, density=0.1, allocation="layer", tile=TILE)
    assert list(patterns) == expected


def test_tied_layers_are_selected_once_with_their_whole_gradient():
    model = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Tanh(), nn.Linear(9, 9, bias=False))
    model[2].weight = model[0].weight
    patterns = select(model, [x[:, :9] for x in mlp_batches(1)], density=0.2, tile_budget=1.0, loss_fn=mlp_loss)
    mlp_loss(model, mlp_batches(1)[0][:, :9]).backward()
    assert list(patterns) == ["0.weight"]
    assert patterns["0.weight"].indices().sort().values.tolist() == top(model[0].weight.grad.abs().numpy(), 16).tolist()
    assert list(eligible(model, "2")) == ["0.weight"]


def test_an_untied_head_is_found_by_the_model_not_by_its_name():
    model = make_gpt2()
    model.config.tie_word_embeddings = False
    model.lm_head = nn.Linear(24, VOCAB, bias=False)
    assert "lm_head.weight" not in eligible(model)
    renamed = copy.deepcopy(make_llama())
    renamed.get_output_embeddings = lambda: renamed.model.layers[1].mlp.up_proj
    assert "model.layers.1.mlp.up_proj.weight" not in eligible(renamed)


def test_integer_parameters_are_never_eligible():
    model = make_mlp()
    model.table = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    assert list(eligible(model)) == ["up.weight", "down.weight"]
    patterns = select(model, mlp_batches(2), density=0.1, loss_fn=mlp_loss, allocation="layer")
    assert model.table.requires_grad is False
    assert patterns.keys() == {"up.weight", "down.weight"}


@pytest.mark.parametrize("criterion", ["grad", "taylor", "fisher", "wanda", "magnitude"])
@pytest.mark.parametrize("which", MODELS)
def test_a_sparsified_model_is_scored_as_the_plain_one_with_its_weights(which, criterion):
    make, batches, loss_fn = MODELS[which]
    # everything, embeddings and vectors too; Wanda only knows linear layers
    include = "*" if criterion != "wanda" else {"olmoe": "self_attn"}.get(which)
    options = {"density": 0.1, "tile": TILE, "tile_budget": 0.5, "loss_fn": loss_fn, "include": include}
    model = make()
    patterns = select(model, batches(1), **options)
    sparsify(model, patterns)
    optimizer = SparseAdamW(model, lr=0.05)

    def loss(batch) -> Tensor:
        return loss_fn(model, batch) if loss_fn else model(**batch).loss

    for batch in batches(3):
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss(batches(1)[0]).backward()  # gradients that wait for the next step
    plain = make()
    plain.load_state_dict(model.state_dict())

    def state() -> list:
        leaves = [(c.values.detach().clone(), c.values.grad.clone(), c.pattern) for c in selected(model).values()]
        flags = [(type(m), [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()]
        return [*leaves, *flags]

    before = state()
    found = select(model, batches(2), criterion=criterion, **options)
    assert digests(found) == digests(select(plain, batches(2), criterion=criterion, **options))
    for old, new in zip(before, state(), strict=True):
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(old, new, strict=True))
    loss(batches(1)[0]).backward()
    for chosen in selected(model).values():
        assert chosen.weight.grad is None and chosen.values.grad.isfinite().all()


def test_leaves_are_no_weights():
    model = make_mlp()
    names = list(eligible(model, include="*")), list(vectors(model))
    sparsify(model, select(model, criterion="magnitude", density=0.5, train_norms=True))
    assert (list(eligible(model, include="*")), list(vectors(model))) == names
    again = select(model, criterion="magnitude", density=0.5, train_norms=True, allocation="layer")
    assert again.keys() == {"up.weight", "up.bias", "norm.weight", "norm.bias", "down.weight"}


def test_a_sparsified_model_is_left_in_order_by_an_error():
    model = make_mlp()
    sparsify(model, select(model, criterion="magnitude", density=0.5))
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="scalar"):
        select(model, mlp_batches(1), density=0.1, loss_fn=lambda m, batch: m(batch))
    assert [type(m) for m in model.modules()] == classes
    mlp_loss(model, mlp_batches(1)[0]).backward()
    assert all(c.values.grad is not None and c.weight.grad is None for c in selected(model).values())
