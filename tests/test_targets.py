"""The output embedding's rows of the target tokens: which are chosen, and that they train without a dense gradient."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import sparseft
from sparseft import Pattern, SparseAdamW, densify, select, sparsify
from sparseft.attention import lean_attention
from sparseft.layers import SparseEmbedding, SparseLinear, selected
from sparseft.loss import lean_loss
from sparseft.selection.targets import Targets

from . import tiny

EMBEDDING = "model.embed_tokens.weight"


def model(tied: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    made = tiny.llama()
    if not tied:
        made.config.tie_word_embeddings = False
        made.lm_head.weight = nn.Parameter(torch.randn_like(made.lm_head.weight))
    return made.to(dtype)


def batch(seed: int = 0, size: int = 3, length: int = 11) -> dict[str, Tensor]:
    ids = torch.randint(4, 30, (size, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "labels": labels}


def most_frequent(batches: list[dict[str, Tensor]], count: int) -> list[int]:
    """By plain Python: the most frequent labels, of equally frequent ones the lower."""
    seen: dict[int, int] = {}
    for one in batches:
        for token in one["labels"].flatten().tolist():
            if token != -100:
                seen[token] = seen.get(token, 0) + 1
    return sorted(sorted(seen), key=lambda token: -seen[token])[:count]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("criterion", ["grad", "magnitude"])
def test_rows_of_the_most_frequent_targets_are_selected(tied, criterion):
    net, data = model(tied), [batch(0), batch(1)]
    settings = {"criterion": criterion, "density": 0.1, "tile": (8, 8), "train_norms": False}
    without = select(net, data, train_targets=False, **settings)
    patterns = select(net, iter(data), train_targets=True, **settings)
    name = EMBEDDING if tied else "lm_head.weight"
    width = net.config.hidden_size
    rows = most_frequent(data, int(0.1 * sum(map(len, without.values()))) // width)
    assert rows
    expected = torch.zeros_like(net.get_parameter(name), dtype=torch.bool)
    expected[rows] = True
    assert torch.equal(patterns[name].to_mask(), expected)
    assert {n: p.digest for n, p in patterns.items() if n != name} == {n: p.digest for n, p in without.items()}


@pytest.mark.parametrize("words", [1, 2, 3, 4, 20])
def test_rows_come_by_themselves_where_there_is_room_for_all_targets(words):
    net, data = model(), [batch(0), batch(1)]
    for one in data:
        said = one["labels"] != -100
        one["labels"][said] = 4 + one["labels"][said] % words
    settings = {"density": 0.1, "tile": (8, 8), "train_norms": False}
    without = select(net, data, train_targets=False, **settings)
    room = int(0.1 * sum(map(len, without.values()))) // net.config.hidden_size
    assert 1 < room < 20, "the cases lie on both sides"
    patterns = select(net, data, **settings)
    if len(most_frequent(data, 99)) <= room:
        assert {n: p.digest for n, p in patterns.items()} == {
            n: p.digest for n, p in select(net, data, train_targets=True, **settings).items()
        }
        assert len(patterns[EMBEDDING]) == len(most_frequent(data, 99)) * net.config.hidden_size
    else:
        assert {n: p.digest for n, p in patterns.items()} == {n: p.digest for n, p in without.items()}


def test_what_has_no_targets_gets_no_rows():
    net = model()
    no_labels = [{"input_ids": batch()["input_ids"]}]

    def loss(net, one):
        return net(**one).logits.square().mean()

    settings = {"density": 0.1, "tile": (8, 8), "loss_fn": loss}
    assert EMBEDDING not in select(net, no_labels, **settings)
    assert EMBEDDING not in select(net, criterion="magnitude", density=0.1, tile=(8, 8))
    with pytest.raises(ValueError, match='train_targets: the batches hold no "labels"'):
        select(net, no_labels, train_targets=True, **settings)
    with pytest.raises(ValueError, match="train_targets: batches must be given"):
        select(net, criterion="magnitude", train_targets=True)
    with pytest.raises(ValueError, match="train_targets: Linear has no get_output_embeddings"):
        select(nn.Linear(8, 8), [torch.ones(1, 8)], train_targets=True, loss_fn=lambda net, x: net(x).sum())


def test_batches_are_counted_once_however_often_they_are_read():
    head, data = torch.zeros(40, 2), [batch(0), batch(1)]
    targets = Targets(data, head)
    assert [one is two for one, two in zip(targets, data, strict=True)] == [True, True]
    first = targets.counts.clone()
    list(targets)
    targets.read()
    assert torch.equal(targets.counts, first) and int(first.sum()) == 2 * 3 * 5
    classes = Targets([{"labels": torch.tensor([0.5])}, {"labels": torch.tensor([99])}], head)  # of other heads
    classes.read()
    assert not classes.counts.any()


def patterns_of(net: nn.Module, mask: Tensor, name: str = EMBEDDING) -> dict[str, Pattern]:
    attention = "model.layers.0.self_attn.q_proj.weight"
    some = torch.zeros_like(net.get_parameter(attention), dtype=torch.bool)
    some[::3, ::2] = True
    return {name: Pattern.from_mask(mask, tile=(8, 8)), attention: Pattern.from_mask(some, tile=(8, 8))}


def masks(net: nn.Module) -> dict[str, Tensor]:
    shape = net.get_parameter(EMBEDDING).shape
    rows, scattered, far = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    rows[[5, 9, 17]] = True
    scattered[[5, 9, 12], [3, 0, 31]] = True
    far[[0, shape[0] - 1]] = True  # tokens that the batches do not have
    return {"rows": rows, "scattered": scattered, "far": far}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("what", ["rows", "scattered", "far"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_is_the_dense_ones_entries(tied, what, dtype):
    net = model(tied, dtype)
    dense = copy.deepcopy(net)
    lean_attention(dense)  # in bf16 torch's rounds more than the embedding does
    lean_loss(dense)
    dense(**batch()).loss.backward()
    patterns = patterns_of(net, masks(net)[what])
    expected = {name: p.gather(dense.get_parameter(name).grad) for name, p in patterns.items()}
    wide = copy.deepcopy(net).double()
    wide(**batch()).loss.backward()
    exact = {name: p.gather(wide.get_parameter(name).grad) for name, p in patterns.items()}
    sparsify(net, patterns)
    assert type(net.model.embed_tokens) is SparseEmbedding
    assert (type(net.lm_head) is SparseLinear) == tied
    net(**batch()).loss.backward()
    # bf16: the dense gradient was rounded once per use and once for the sum, ours not at all; and what comes to the
    # embedding went through other roundings in the layers: both are about as far from fp64
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8}[dtype]
    for name, wide in exact.items():
        off = (expected[name].double() - wide).abs().max() / wide.abs().max().clamp_min(1e-30)
        tolerance = max(tolerance, float(off)) if dtype == torch.bfloat16 else tolerance
    for name, chosen in selected(net).items():
        assert chosen.weight.grad is None
        scale = expected[name].abs().max().clamp_min(1e-30)
        assert float((chosen.values.grad - expected[name]).abs().max() / scale) <= tolerance, name


class WithHead(nn.Module):
    """A model whose output head has a weight of its own."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.embedding, self.head = embedding, nn.Linear(8, 40, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_padding_gets_no_gradient_through_the_embedding():
    torch.manual_seed(0)
    net = WithHead(nn.Embedding(40, 8, padding_idx=3))
    ids = torch.tensor([[3, 5, 3, 7]])
    mask = torch.zeros(40, 8, dtype=torch.bool)
    mask[[3, 5]] = True
    sparsify(net, {"embedding.weight": Pattern.from_mask(mask, tile=(8, 8))})
    assert type(net.embedding) is SparseEmbedding
    net.embedding(ids).sum().backward()
    assert selected(net)["embedding.weight"].values.grad.tolist() == [0.0] * 8 + [1.0] * 8


def test_embeddings_that_compute_otherwise_are_gathered():
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    mask = torch.zeros(40, 8, dtype=torch.bool)
    mask[5] = True
    for made in (Scaled(40, 8), nn.Embedding(40, 8, scale_grad_by_freq=True), nn.Embedding(40, 8, max_norm=9.0)):
        kind, expected = type(made), copy.deepcopy(made)
        expected(torch.tensor([5, 5, 1])).sum().backward()
        net = sparsify(WithHead(made), {"embedding.weight": Pattern.from_mask(mask, tile=(8, 8))})
        made(torch.tensor([5, 5, 1])).sum().backward()
        assert type(made) is kind
        assert torch.equal(selected(net)["embedding.weight"].values.grad, expected.weight.grad[5])


def test_a_head_that_is_no_layer_gets_its_part_of_the_gradient():
    embedding = nn.Embedding(40, 8)
    ids, mask = torch.tensor([5, 7]), torch.zeros(40, 8, dtype=torch.bool)
    mask[[5, 9]] = True
    expected = copy.deepcopy(embedding)
    (expected(ids) @ expected.weight.T).square().sum().backward()
    sparsify(embedding, {"weight": Pattern.from_mask(mask, tile=(8, 8))})
    (embedding(ids) @ embedding.weight.T).square().sum().backward()
    assert torch.allclose(selected(embedding)["weight"].values.grad, expected.weight.grad[[5, 9]].flatten())


def test_training_moves_the_one_tied_weight_as_dense_training_of_these_rows():
    net, reference = model(), model()
    mask = masks(net)["rows"]
    sparsify(net, {EMBEDDING: Pattern.from_mask(mask, tile=(8, 8))})
    optimizer = SparseAdamW(net, lr=0.01, density_power=0.0, weight_decay=0.0)
    reference.requires_grad_(False)
    weight = reference.get_parameter(EMBEDDING).requires_grad_(True)
    dense = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.0)
    before = weight.detach().clone()
    for seed in range(4):
        net(**batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reference(**batch(seed)).loss.backward()
        weight.grad[~mask] = 0
        dense.step()
        dense.zero_grad()
    after = net.get_parameter(EMBEDDING)
    assert net.lm_head.weight is after
    assert torch.equal(after[~mask], before[~mask])
    assert torch.allclose(after, weight, rtol=0, atol=1e-12) and not torch.equal(after, before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copys_head_and_embedding_still_share_a_leaf(how):
    net = sparsify(model(), patterns_of(model(), masks(model())["rows"]))
    twin = how(net)
    assert twin.lm_head.values is selected(twin)[EMBEDDING].values is not selected(net)[EMBEDDING].values
    SparseAdamW(twin, lr=0.1)
    for one in (net, twin):
        one(**batch()).loss.backward()
    assert torch.equal(selected(twin)[EMBEDDING].values.grad, selected(net)[EMBEDDING].values.grad)


def test_nothing_is_left_after_densify_and_nothing_more_in_the_state_dict():
    net = model()
    plain = copy.deepcopy(net)
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    sparsify(net, patterns_of(net, masks(net)["rows"]))
    assert net.state_dict().keys() == plain.state_dict().keys()
    net.load_state_dict(plain.state_dict())
    densify(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in net.named_buffers()] == [n for n, _ in plain.named_buffers()]
    for name, module in net.named_modules():
        assert set(vars(module)) == attributes[name], name


def test_other_rows_reach_the_tied_head_too():
    net = sparsify(model(), patterns_of(model(), masks(model())["rows"]))
    optimizer = SparseAdamW(net, lr=0.01)
    other = masks(net)["rows"].roll(1, 0)
    sparseft.reselect(net, optimizer, patterns_of(net, other))
    dense = densify(copy.deepcopy(net))
    dense(**batch()).loss.backward()
    net(**batch()).loss.backward()
    chosen = selected(net)[EMBEDDING]
    assert torch.allclose(chosen.values.grad, chosen.pattern.gather(dense.get_parameter(EMBEDDING).grad), atol=1e-12)


def test_a_compiled_model_has_no_graph_break():
    net = sparsify(model(dtype=torch.float32), patterns_of(model(), masks(model())["rows"]))
    expected = net(**batch())
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    loss = compiled(**batch()).loss
    assert torch.allclose(loss, expected.loss)
    loss.backward()
    assert selected(net)[EMBEDDING].values.grad.abs().sum() > 0


def test_an_excluded_embedding_is_left_alone():
    net = model()
    settings = {"density": 0.1, "tile": (8, 8)}
    for exclude in ("embed_tokens", ["lm_head"]):
        assert EMBEDDING not in select(net, [batch()], exclude=exclude, **settings)
        with pytest.raises(ValueError, match=r"train_targets: exclude=.* leaves out the output embedding"):
            select(net, [batch()], exclude=exclude, train_targets=True, **settings)


def test_an_embedding_that_cannot_train_is_not_chosen():
    net = model(tied=False)
    net.lm_head.weight = nn.Parameter(torch.randn(net.config.hidden_size, net.config.vocab_size).double().T)
    assert "lm_head.weight" not in select(net, [batch()], density=0.1, tile=(8, 8))


def test_weights_loaded_under_the_heads_name_alone_become_the_values():
    net = sparsify(model(), patterns_of(model(), masks(model())["rows"]))
    loaded = torch.randn_like(net.lm_head.weight)
    net.load_state_dict({"lm_head.weight": loaded}, strict=False)
    chosen = selected(net)[EMBEDDING]
    assert torch.equal(chosen.values, chosen.pattern.gather(loaded))


def test_the_heads_pattern_is_left_out_of_what_ddp_broadcasts():
    net = sparsify(model(), patterns_of(model(), masks(model())["rows"]))
    net._apply(lambda tensor: tensor.clone())  # as .to("cuda"): tied buffers become two
    int16 = {name for name, buffer in net.named_buffers() if buffer.dtype == torch.int16}
    assert "lm_head.local" in int16 <= set(net._ddp_params_and_buffers_to_ignore)


def test_drop_and_grow_leaves_whole_rows_alone():
    net = sparsify(model(), patterns_of(model(), masks(model())["rows"]))
    before = {name: chosen.pattern for name, chosen in selected(net).items()}
    SparseAdamW(net, lr=0.01)
    from sparseft.selection.growth import drop_and_grow

    after = drop_and_grow(net, [batch()], 0.5)
    assert after[EMBEDDING] == before[EMBEDDING]
    assert any(after[name] != before[name] for name in after)
