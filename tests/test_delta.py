"""Delta: bit-exact apply and revert, a file that is whole or refused, and a model that errors leave untouched."""

import copy
import hashlib
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as parse_safetensors
from safetensors.torch import load_file, save_file
from torch import nn

import sparseft
from sparseft import delta as room
from sparseft.delta import Delta
from sparseft.layers import selected, write_values_
from sparseft.packing import from_leb128, pack_pattern, to_leb128, unpack_pattern
from sparseft.pattern import Pattern, matrix_shape

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Zoo(nn.Module):
    """One of each: an odd Linear, one without selected entries, a stored [in, out] matrix, 3-D experts, tied ends."""

    def __init__(self, dtype=torch.float32, tied=True):
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.up = nn.Linear(7, 13)
        self.still = nn.Linear(13, 5)
        self.conv = nn.Parameter(torch.randn(5, 130))
        self.experts = nn.Parameter(torch.randn(3, 9, 67))
        self.head = nn.Linear(7, 11, bias=False)
        self.to(dtype)
        if tied:
            self.head.weight = self.embed.weight


DENSITIES = {"embed.weight": 0.3, "up.weight": 0.4, "still.weight": 0.0, "conv": 1.0, "experts": 0.05}


def patterns(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(model.get_parameter(n).shape, generator=generator) < d for n, d in DENSITIES.items()}
    return {n: Pattern.from_mask(m.view(matrix_shape(m.shape)), tile=(4, 8)) for n, m in masks.items()}


def train(model, scale=0.1):
    """Any change of the leaves, some entries left as they are."""
    with torch.no_grad():
        for s in selected(model).values():
            s.values.add_(scale * torch.randn_like(s.values) * (torch.rand_like(s.values) < 0.7))
    write_values_(model)
    return model


def trained(dtype=torch.float32, seed=1):
    """(untouched model, the same after sparse training)"""
    plain = Zoo(dtype)
    model = copy.deepcopy(plain)
    return plain, train(sparseft.sparsify(model, patterns(model, seed)))


def bits(model):
    """The whole state_dict, as bytes."""
    return {n: t.detach().clone().contiguous().view(torch.uint8) for n, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def raises_unchanged(model, call, match):
    before = bits(model)
    with pytest.raises(ValueError, match=match):
        call(model)
    assert same(bits(model), before)


# ---- apply and revert -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*FLOATS, torch.float64), ids=str)
def test_round_trip_is_exact_to_the_bit(tmp_path, dtype):
    plain, model = trained(dtype)
    start, end = bits(plain), bits(model)
    assert not same(start, end)
    delta = Delta.from_model(model)
    assert same(bits(model), end)
    delta.save(tmp_path / "d.safetensors")
    loaded = Delta.load(tmp_path / "d.safetensors")
    for _ in range(2):
        assert loaded.apply_(plain) is plain
        assert same(bits(plain), end)
        assert loaded.revert_(plain) is plain
        assert same(bits(plain), start)
    loaded.revert_(model)
    assert same(bits(model), start)


def test_weights_of_several_dtypes(tmp_path):
    plain = Zoo()
    plain.up.to(torch.bfloat16)
    plain.experts.data = plain.experts.data.half()
    start = bits(plain)
    model = copy.deepcopy(plain)
    delta = Delta.from_model(train(sparseft.sparsify(model, patterns(model))))
    delta.save(tmp_path / "d")
    delta = Delta.load(tmp_path / "d")
    assert {c.dtype for c in delta.changes.values()} == {"float32", "bfloat16", "float16"}
    assert same(bits(delta.apply_(plain)), bits(model))
    assert same(bits(delta.revert_(plain)), start)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_signed_zero_infinity_and_subnormals_survive(tmp_path, dtype):
    odd = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.finfo(dtype).smallest_normal / 2, -1.5])
    plain = nn.Linear(3, 2, bias=False).to(dtype)
    plain.weight.data = odd.to(dtype).view(2, 3)
    model = copy.deepcopy(plain)
    sparseft.sparsify(model, {"weight": Pattern.from_mask(torch.ones(2, 3, dtype=torch.bool))})
    model.values.data = model.values.data.flip(0).contiguous()
    write_values_(model)
    delta = Delta.from_model(model)
    assert delta.summary().total.changed == 6  # -0 -> -1.5 and so on: each entry got another one's bits
    delta.save(tmp_path / "d")
    start = bits(plain)
    assert same(bits(Delta.load(tmp_path / "d").apply_(plain)), bits(model))
    assert same(bits(delta.revert_(plain)), start)


def test_only_selected_entries_differ_after_apply():
    plain, model = trained()
    delta = Delta.from_model(model)
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    delta.apply_(plain)
    for name, parameter in plain.named_parameters():
        changed = (parameter != before[name]).view(matrix_shape(parameter.shape))
        allowed = delta.changes[name].pattern.to_mask() if name in delta.changes else torch.zeros_like(changed)
        assert not bool((changed & ~allowed).any())
        assert bool(changed.any()) == (DENSITIES.get(name, 0) > 0)


def test_switching_between_two_deltas():
    plain, one = trained(torch.bfloat16, seed=1)
    two = copy.deepcopy(plain)
    train(sparseft.sparsify(two, patterns(two, seed=2)))
    a, b = Delta.from_model(one), Delta.from_model(two)
    assert a.fingerprint == b.fingerprint
    model = copy.deepcopy(plain)
    a.apply_(model)
    raises_unchanged(model, b.apply_, r"weight 'conv': \d+ of the delta's 650 entries differ")
    b.apply_(a.revert_(model))
    assert same(bits(model), bits(two))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_delta_goes_from_device_to_device(dtype):
    plain, model = trained(dtype)
    start, end = bits(plain), bits(model)
    delta = Delta.from_model(model)
    assert Delta.from_model(model.cuda()).fingerprint == delta.fingerprint
    delta.apply_(plain.cuda())
    assert same(bits(plain.cpu()), end)
    delta.revert_(plain.cuda())
    assert same(bits(plain.cpu()), start)


def test_tied_weights_are_one_entry_and_found_under_one_name():
    plain, model = trained()
    delta = Delta.from_model(model)
    assert "head.weight" not in delta.changes
    assert delta.changes["embed.weight"].tied == ("head.weight",)
    delta.apply_(plain)
    assert plain.head.weight is plain.embed.weight


def test_a_sparsified_model_keeps_its_values_in_step():
    """Its own delta and, on another model, one with other entries than are selected there."""
    plain, model = trained(torch.bfloat16)
    delta = Delta.from_model(model)
    other = sparseft.sparsify(copy.deepcopy(plain), patterns(plain, seed=5))
    for each in (model, other):
        if each is model:
            delta.revert_(each)
            for s in selected(each).values():
                assert torch.equal(s.values, s.base.float())
        delta.apply_(each)
        for s in selected(each).values():
            now = s.pattern.gather(s.weight.detach())
            assert torch.equal(s.values.to(now.dtype), now)
        weights = bits(each)
        write_values_(each)
        assert same(bits(each), weights)


def test_masters_of_entries_that_the_delta_leaves_alone_are_kept():
    plain = nn.Linear(4, 4, bias=False).bfloat16()
    diagonal = {"weight": Pattern.from_mask(torch.eye(4) > 0)}
    delta = Delta.from_model(sparseft.sparsify(copy.deepcopy(plain), diagonal))
    sparseft.sparsify(plain, {"weight": Pattern.from_mask(torch.ones(4, 4, dtype=torch.bool))})
    finer = plain.values.detach() * (1 + 2**-12)  # rounds back: less than half a step of bfloat16
    plain.values.data.copy_(finer)
    write_values_(plain)
    delta.apply_(plain)
    on_diagonal = torch.isin(selected(plain)["weight"].pattern.indices(), torch.arange(0, 16, 5))
    assert torch.equal(plain.values[~on_diagonal], finer[~on_diagonal])
    assert torch.equal(plain.values[on_diagonal], plain.base[on_diagonal].float())
    assert not torch.equal(plain.values[~on_diagonal], plain.base[~on_diagonal].float())


# ---- what is refused, with the model untouched ----------------------------------------------------------------


def test_states_of_the_model_are_told_apart():
    plain, model = trained()
    delta = Delta.from_model(model)
    raises_unchanged(model, delta.apply_, "applied already")
    raises_unchanged(plain, delta.revert_, "not applied")
    with torch.no_grad():
        model.conv[0, 0] += 1
    raises_unchanged(model, delta.revert_, "'conv': 1 of the delta's 650 entries")
    raises_unchanged(model, delta.apply_, r"'conv': \d+ of the delta's 650 entries differ")


def change_selected(model):
    model.experts.data.view(-1)[patterns(model)["experts"].indices()[3]] += 1


def flip_a_selected_sign(model):
    model.experts.data.view(-1)[patterns(model)["experts"].indices()[0]] *= -1


def change_unselected(model):
    free = ~patterns(model)["experts"].to_mask().view(-1)
    model.experts.data.view(-1)[free.nonzero()[-1]] *= -1


def drop(model):
    del model.experts


def reshape(model):
    model.experts = nn.Parameter(model.experts.data.view(9, 3, 67).clone())


def transpose(model):
    model.experts.data = model.experts.data.transpose(0, 1).contiguous().transpose(0, 1)


def halve(model):
    model.up.bfloat16()


def untie(model):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def tie(model):
    model.again = model.experts


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_selected, "'experts': 1 of the delta's"),
        (change_unselected, "'experts' differs from the delta's base outside"),
        (flip_a_selected_sign, "'experts': 1 of the delta's"),
        (drop, "no weight 'experts' .1 of 5"),
        (reshape, "'experts': shape must be"),
        (transpose, "'experts': contiguous"),
        (halve, "'up.weight': dtype must be torch.float32 .* torch.bfloat16"),
        (untie, r"'embed.weight': other names .* must be \['head.weight'\] .* got \[\]"),
        (tie, "'experts': other names"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_model_that_is_not_the_base(damage, message):
    plain, model = trained()
    delta = Delta.from_model(model)
    damage(plain)
    raises_unchanged(plain, delta.apply_, message)


def test_a_weight_on_the_meta_device():
    plain, model = trained()
    delta = Delta.from_model(model)
    plain.still.to("meta")
    weights = {n: p.detach().clone() for n, p in plain.named_parameters() if not p.is_meta}
    with pytest.raises(ValueError, match=r"'still.weight': on the meta device"):
        delta.apply_(plain)
    assert all(torch.equal(plain.get_parameter(n), w) for n, w in weights.items())


def test_dense_training_of_one_weight_is_noticed():
    plain, model = trained(torch.bfloat16)
    delta = Delta.from_model(model)
    delta.apply_(plain)
    with torch.no_grad():
        plain.up.weight -= 0.01
    raises_unchanged(plain, delta.revert_, "'up.weight'")


@pytest.mark.parametrize("failing", range(4))
def test_a_write_that_fails_is_taken_back(monkeypatch, failing):
    plain, model = trained()
    delta, calls = Delta.from_model(model), []

    def swap(weight, values, pattern, mode):
        calls.append(weight)
        if len(calls) == failing + 1:
            raise MemoryError("no room")
        real(weight, values, pattern, mode)

    real = room.scatter_delta_
    monkeypatch.setattr(room, "scatter_delta_", swap)
    before = bits(plain)
    with pytest.raises(MemoryError):
        delta.apply_(plain)
    assert len(calls) == 2 * failing + 1
    assert same(bits(plain), before)


def test_from_model_wants_a_sparsified_model_and_json():
    with pytest.raises(ValueError, match="sparsified"):
        Delta.from_model(Zoo())
    _, model = trained()
    with pytest.raises(TypeError, match="JSON"):
        Delta.from_model(model, metadata={"a": object()})


# ---- fingerprint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fingerprint_is_of_the_base_before_and_after_training(tmp_path, dtype):
    plain = Zoo(dtype)
    model = sparseft.sparsify(copy.deepcopy(plain), patterns(plain))
    before = Delta.from_model(model)
    after = Delta.from_model(train(model))
    assert before.fingerprint == after.fingerprint
    save_file({n: p.detach() for n, p in plain.named_parameters()}, tmp_path / "model")
    for name, tensor in load_file(tmp_path / "model").items():
        if name in after.changes:
            assert after.changes[name].sha256 == hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
    other = copy.deepcopy(plain)
    other.up.weight.data[0, 0] += 1
    assert Delta.from_model(sparseft.sparsify(other, patterns(plain))).fingerprint != before.fingerprint


# ---- file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A small delta and its file."""
    layers = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).bfloat16()
    chosen = {"0.weight": Pattern.from_mask(torch.rand(5, 6) < 0.4, tile=(2, 4)),
              "1.weight": Pattern.from_mask(torch.rand(3, 5) < 0.2)}  # fmt: skip
    delta = Delta.from_model(train(sparseft.sparsify(layers, chosen)), metadata={"seed": 3, "loss": 0.25})
    delta.save(tmp_path / "d.safetensors")
    return delta, tmp_path / "d.safetensors"


def test_what_is_saved_is_loaded(saved):
    delta, path = saved
    loaded = Delta.load(path)
    assert list(loaded.changes) == list(delta.changes)
    assert loaded.metadata == {"seed": 3, "loss": 0.25}
    assert (len(loaded), loaded.nbytes, loaded.fingerprint) == (len(delta), delta.nbytes, delta.fingerprint)
    for name, change in delta.changes.items():
        other = loaded.changes[name]
        assert (change.shape, change.pattern, change.sha256, change.tied) == (
            other.shape, other.pattern, other.sha256, other.tied)  # fmt: skip
        assert torch.equal(change.values, other.values) and torch.equal(change.base, other.base)
    loaded.save(path.with_name("again"))
    assert path.with_name("again").read_bytes() == path.read_bytes()


def test_other_readers_see_plain_safetensors(saved):
    delta, path = saved
    tensors = load_file(path)
    assert torch.equal(tensors["0.weight.values"], delta.changes["0.weight"].values)
    assert torch.equal(tensors["1.weight.base"], delta.changes["1.weight"].base)
    assert sum(t.nbytes for t in tensors.values()) == delta.nbytes


def test_truncated_anywhere(saved):
    _, path = saved
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"truncated|damaged|sha256"):
            Delta.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="sha256"):
        Delta.load(path)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x29])  # 0x20: letter case; 0x29: one JSON blank to another
def test_tampered_anywhere(saved, flip):
    _, path = saved
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        with pytest.raises(ValueError, match=path.name):
            Delta.load(path)


def craft(path, edit):
    """Change a saved file's header and tensors, and sign it anew: only the content check can find it."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8:end])["__metadata__"]["delta"])
    tensors = parse_safetensors(data)
    edit(header, tensors)
    path.write_bytes(room._sign(tensors, header | {"sha256": "0" * 64}))


def leb128(*numbers):
    """Independent of the code under test: one number at a time."""
    out = []
    for n in numbers:
        while n > 0x7F:
            out.append(n & 0x7F | 0x80)
            n >>= 7
        out.append(n)
    return torch.tensor(out, dtype=torch.uint8)


def entry(**fields):
    return lambda header, tensors: header["weights"][0].update(fields)


def tensor(part, make):
    def edit(header, tensors):
        tensors[f"0.weight.{part}"] = make(tensors[f"0.weight.{part}"])

    return edit


def packed(*numbers):
    """Weight 0 with this packed pattern and values of that length."""

    def edit(header, tensors):
        tensors["0.weight.pattern"] = leb128(*numbers)
        for part in ("values", "base"):
            tensors[f"0.weight.{part}"] = torch.zeros(1, dtype=torch.bfloat16)

    return edit


def test_crafting_itself_is_sound(saved):
    _, path = saved
    craft(path, packed(1, 4, 1, 5, 1, 0, 0, 0))  # row 4, column 5, one tile, one entry at its corner
    assert Delta.load(path).changes["0.weight"].pattern.indices().tolist() == [4 * 6 + 5]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (packed(1, 5, 1, 5, 1, 0, 0, 0), r"0.weight.*row 5 must lie in \[0, 5\)"),
        (packed(1, 4, 1, 6, 1, 0, 0, 0), r"0.weight.*column 6 must lie in \[0, 6\)"),
        (packed(1, 2**32 + 4, 1, 5, 1, 0, 0, 0), f"0.weight.*row {2**32 + 4} must lie"),
        (packed(1, 4, 1, 5, 1, 0, 0, 1), "0.weight.*Pattern.local"),
        (packed(1, 4, 1, 5, 1, 0, 0, 2**16), "0.weight.*position 65536 must lie"),
        (packed(1, 4, 1, 5, 1, 1, 0, 0), "0.weight.*Pattern.tiles"),
        (packed(2, 4, 4, 1, 5, 1, 0, 0, 0), "0.weight.*every index once"),
        (packed(1, 4, 1, 5, 1, 0, 1, 0), "tiles must hold 1 entries"),
        (packed(1, 4, 1, 5, 1, 0, 2**63 - 1, 0), "tiles must hold 1 entries"),
        (packed(1, 4, 1, 5, 3, 0, 0, 0, 2**63 - 1, 2**63 - 1, 0, 0), "tiles must hold 1 entries"),  # the sum wraps to 1
        (packed(1, 4, 1, 5, 9, 0, 0, 0), "ends before its tiles"),
        (packed(1, 4, 1, 5, 3, 0, 0, 0), "tiles must hold 0 entries"),
        (packed(1, 4, 9), "ends before its columns"),
        (packed(), "ends before its rows"),
        (packed(2**64), "more than 63 bits"),
        (tensor("pattern", lambda t: t | 0x80), "inside a number"),
        (tensor("pattern", lambda t: t.char()), "0.weight.pattern must be 1-D torch.uint8, got 1-D torch.int8"),
        (tensor("values", lambda t: t[1:]), "entries"),
        (tensor("base", lambda t: t.half()), "0.weight.base must be 1-D torch.bfloat16"),
        (tensor("base", lambda t: t.view(1, -1)), "0.weight.base must be 1-D"),
        (lambda h, t: t.pop("1.weight.values"), "1.weight.values must be .* got none"),
        (lambda h, t: t.update(extra=torch.zeros(1)), "'extra' belongs to no"),
        (lambda h, t: h["weights"].append(h["weights"][0]), "0.weight.pattern must be"),
        (lambda h, t: h.pop("weights"), "weights"),
        (lambda h, t: h.pop("metadata"), "metadata"),
        (lambda h, t: h.update(weights=3), "not readable"),
        (lambda h, t: h.update(weights=[3]), "list of objects, got 3"),
        (lambda h, t: h.update(metadata=3), "not readable"),
        (lambda h, t: h.update(format="sparseft.delta.v2"), "format must be .*, got 'sparseft.delta.v2'"),
        (entry(name=3), "name must be a str"),
        (entry(name="2.weight"), "2.weight.pattern"),
        (entry(dtype="float8_e4m3fn"), "dtype must be one of"),
        (entry(dtype=None), "dtype must be a str"),
        (entry(shape=[2, 2]), "0.weight"),
        (entry(shape=[5, -6]), "must be sizes"),
        (entry(shape=[5, 6.0]), "must be sizes"),
        (entry(tile=[0, 4]), "tile"),
        (entry(tile=[4]), "tile"),
        (entry(tile=[2**10, 2**10]), "tile"),
        (entry(sha256=None), "sha256 must be a str"),
        (entry(tied="x"), "tied must be a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_correctly_signed_file_with_impossible_content(saved, edit, message):
    _, path = saved
    craft(path, edit)
    with pytest.raises(ValueError, match=message):
        Delta.load(path)


def test_other_files(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    Pattern.from_mask(torch.eye(3) > 0).save(tmp_path / "pattern")
    (tmp_path / "text").write_text("no such thing at all, but more than eight bytes")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("plain", "pattern", "text", "empty"):
        with pytest.raises(ValueError, match=f"{name}: no "):
            Delta.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Delta.load(tmp_path / "absent")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_save_leaves_the_old_file(saved, monkeypatch, step):
    delta, path = saved
    before = path.read_bytes()
    delta.metadata["new"] = True

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        delta.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# ---- the packed pattern ---------------------------------------------------------------------------------------


@st.composite
def some_pattern(draw):
    rows, cols = draw(st.integers(0, 40)), draw(st.integers(1, 40))
    tile = draw(st.sampled_from([(1, 1), (2, 3), (4, 8), (64, 64), (1, 65536), (256, 256)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(rows, cols, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    return Pattern.from_mask(mask, tile=tile, mass=torch.rand(rows, cols, generator=generator))


@given(some_pattern())
def test_packed_pattern_round_trip(pattern):
    data = pack_pattern(pattern)
    assert data.dtype == torch.uint8
    assert unpack_pattern(data, pattern.shape, pattern.tile) == pattern


def test_packed_pattern_of_large_positions():
    """Tile positions above int16's sign bit, flat positions above 2^32."""
    shape = (1 << 17, 1 << 17)
    indices = torch.tensor([0, (1 << 34) - 1, 3 << 32, (3 << 32) + 255])
    pattern = Pattern.from_indices(indices, shape, tile=(1, 65536))
    assert unpack_pattern(pack_pattern(pattern), shape, (1, 65536)).indices().tolist() == pattern.indices().tolist()
    full = Pattern.from_mask(torch.ones(256, 256, dtype=torch.bool), tile=(256, 256))
    assert unpack_pattern(pack_pattern(full), full.shape, full.tile) == full


@given(st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 300), max_size=20))
def test_leb128_is_the_standard_one(numbers):
    given_numbers = torch.tensor([7, *numbers])
    data = to_leb128(given_numbers)
    assert torch.equal(data, leb128(7, *numbers))
    assert torch.equal(from_leb128(data), given_numbers)


def test_an_entry_costs_little_more_than_a_byte_for_its_place():
    mask = torch.rand(512, 512) < 0.05
    pattern = Pattern.from_mask(mask)
    gaps = len(pattern)  # one byte each as long as no gap exceeds 127: at 5 % those are rarer than 1 in 600
    assert gaps < pack_pattern(pattern).nbytes < 1.3 * gaps


# ---- figures --------------------------------------------------------------------------------------------------


def test_summary_counts_and_measures(tmp_path):
    plain, model = trained(torch.bfloat16)
    summary = Delta.from_model(model, metadata={"base": "zoo"}).summary()
    assert summary.metadata == {"base": "zoo"}
    total = {"entries": 0, "changed": 0, "sum": 0.0, "max": 0.0, "squares": 0.0, "base": 0.0}
    for name, figures in summary.weights.items():
        mask = patterns(plain)[name].to_mask()
        was = plain.get_parameter(name).detach().double().view(mask.shape)[mask]
        now = model.get_parameter(name).detach().double().view(mask.shape)[mask]
        moved = (now - was).abs()
        assert (figures.size, figures.entries, figures.changed) == (mask.numel(), len(was), int((now != was).sum()))
        assert figures.share == len(was) / mask.numel()
        if len(was):
            assert figures.mean_abs == pytest.approx(float(moved.mean()), rel=1e-12)
            assert figures.max_abs == float(moved.max())
            assert figures.relative == pytest.approx(float(moved.norm() / was.norm()), rel=1e-12)
        else:
            assert (figures.mean_abs, figures.max_abs, figures.relative) == (0, 0, 0)
        total["entries"] += len(was)
        total["changed"] += figures.changed
        total["sum"] += float(moved.sum())
        total["max"] = max(total["max"], figures.max_abs)
        total["squares"] += float((moved**2).sum())
        total["base"] += float((was**2).sum())
    t = summary.total
    assert (t.entries, t.changed, t.max_abs) == (total["entries"], total["changed"], total["max"])
    assert 0 < t.changed < t.entries
    assert t.mean_abs == pytest.approx(total["sum"] / total["entries"], rel=1e-12)
    assert t.relative == pytest.approx((total["squares"] / total["base"]) ** 0.5, rel=1e-12)
    lines = str(summary).splitlines()
    assert len(lines) == 2 + len(summary.weights) and str(t.entries) in lines[-1]


def test_change_from_zero_is_infinite_relative_change():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data.zero_()
    sparseft.sparsify(layer, {"weight": Pattern.from_mask(torch.ones(2, 2, dtype=torch.bool))})
    assert Delta.from_model(layer).summary().total.relative == 0
    layer.values.data.fill_(1)
    write_values_(layer)
    assert Delta.from_model(layer).summary().total.relative == float("inf")


def test_repr_says_how_much_and_of_what():
    _, model = trained()
    delta = Delta.from_model(model)
    assert repr(delta) == f"Delta(5 weights, {len(delta)} entries, base {delta.fingerprint[:12]})"
    assert len(delta) == sum(len(p) for p in patterns(model).values())


def test_the_drop_in_door_makes_a_delta_too(tmp_path):
    plain = Zoo(torch.bfloat16)
    model = copy.deepcopy(plain)
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=0.1, density=0.05)
    for _ in range(3):
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
    delta = Delta.from_model(model, optimizer)
    assert len(delta) == sum(round(0.05 * p.numel()) for p in plain.parameters() if p.dim() >= 2)
    delta.save(tmp_path / "delta.safetensors")
    again = Delta.load(tmp_path / "delta.safetensors").apply_(copy.deepcopy(plain))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    delta.revert_(model)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match="pass the optimizer"):
        Delta.from_model(model)


def test_a_compiled_model_goes_by_its_plain_names():
    plain = nn.Sequential(nn.Linear(8, 8))
    model = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    sparseft.sparsify(model, sparseft.select(model, criterion="magnitude", density=0.1, train_norms=False))
    optimizer = sparseft.SparseAdamW(model, lr=0.1)
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    delta = Delta.from_model(model)
    assert list(delta.changes) == ["0.weight"]
    delta.apply_(plain)
    assert torch.equal(plain[0].weight, model.get_parameter("_orig_mod.0.weight"))
