"""Pattern: round trips, order, packing, digests, validation, files. The oracle is a set of (row, column) pairs."""

import dataclasses
import json
import pickle
import re

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparseft.pattern import Pattern, matrix_shape, pack

TILES = ((1, 1), (3, 5), (16, 16), (64, 64), (256, 256), (1, 65536), (65536, 1))


@st.composite
def chosen(draw) -> tuple[tuple[int, int], tuple[int, int], list[int], list[float]]:
    """A shape, a tile, unique flat positions in random order, and a mass for each."""
    shape = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    size = shape[0] * shape[1]
    tile = draw(st.one_of(st.sampled_from(TILES), st.tuples(st.integers(1, 9), st.integers(1, 9))))
    flat = draw(
        st.lists(st.integers(0, max(size - 1, 0)), unique=True, max_size=min(size, 60)) if size else st.just([])
    )
    mass = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=len(flat), max_size=len(flat)))
    return shape, tile, flat, mass


def build(choice) -> Pattern:
    shape, tile, flat, mass = choice
    return Pattern.from_indices(
        torch.tensor(flat, dtype=torch.int64), shape, tile=tile, mass=torch.tensor(mass, dtype=torch.float32)
    )


def sample(shape=(9, 11), tile=(2, 4), density=0.4) -> Pattern:
    rng = torch.Generator().manual_seed(3)
    return Pattern.from_mask(
        torch.rand(shape, generator=rng) < density, tile=tile, mass=torch.rand(shape, generator=rng)
    )


# ---- round trips and order ------------------------------------------------------------------------------------


@given(chosen())
def test_indices_round_trip(choice):
    shape, tile, flat, _ = choice
    p = build(choice).validate()
    assert p.shape == shape and p.tile == tile and len(p) == len(flat)
    assert sorted(p.indices().tolist()) == sorted(flat)
    assert p.density == len(flat) / max(shape[0] * shape[1], 1)


@given(chosen())
def test_mask_round_trip(choice):
    shape, tile, flat, _ = choice
    mask = numpy.zeros(shape, bool)
    mask.reshape(-1)[flat] = True
    p = Pattern.from_mask(torch.from_numpy(mask), tile=tile).validate()
    assert numpy.array_equal(p.to_mask().numpy(), mask)
    assert p.to_mask().shape == shape
    assert p == Pattern.from_indices(torch.from_numpy(numpy.flatnonzero(mask)), shape, tile=tile)


@given(chosen())
def test_the_order_of_the_given_indices_does_not_matter(choice):
    shape, tile, flat, mass = choice
    back = (shape, tile, flat[::-1], mass[::-1])
    assert build(choice) == build(back)
    assert torch.equal(build(choice).indices(), build(back).indices())


@given(chosen())
def test_entries_run_tile_by_tile_row_major_inside(choice):
    """The order that the kernels walk, told without the code that makes it."""
    p = build(choice)
    place_of_row = {r: i for i, r in enumerate(p.rows.tolist())}
    place_of_col = {c: i for i, c in enumerate(p.cols.tolist())}
    bm, bn = p.tile
    order = []
    for flat in p.indices().tolist():
        r, c = place_of_row[flat // p.shape[1]], place_of_col[flat % p.shape[1]]
        order.append((r // bm, c // bn, r % bm, c % bn))
    assert order == sorted(order)
    tiles = [(r * bm, c * bn) for r, c, _, _ in order]
    assert [tuple(t) for t in p.tiles[:, 1:3].tolist()] == list(dict.fromkeys(tiles))  # each active tile once
    for _, row0, col0, first, last in p.tiles.tolist():
        assert set(tiles[first:last]) == {(row0, col0)}
    assert [(r * bn + c) for _, _, r, c in order] == [x & 0xFFFF for x in p.local.tolist()]


@given(chosen())
def test_rows_and_columns_fall_by_mass(choice):
    shape, _, flat, mass = choice
    p = build(choice)
    for order, index in (
        (p.rows, [f // max(shape[1], 1) for f in flat]),
        (p.cols, [f % max(shape[1], 1) for f in flat]),
    ):
        total: dict[int, float] = {}
        for i, m in zip(index, mass, strict=True):
            total[i] = total.get(i, 0.0) + m
        assert order.tolist() == sorted(total, key=lambda i: (-total[i], i))


def test_without_a_mass_entries_are_counted():
    mask = torch.tensor([[0, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    p = Pattern.from_mask(mask, tile=(2, 2))
    assert p.rows.tolist() == [1, 3, 0] and p.cols.tolist() == [2, 0, 1]


def test_a_given_order_is_kept():
    indices = torch.tensor([0, 5, 7, 10])  # rows 0, 1, 1, 2 of a [3, 4]
    p = Pattern.from_indices(
        indices, (3, 4), tile=(2, 2), row_order=torch.tensor([2, 0, 1]), col_order=torch.tensor([1, 3, 0, 2])
    ).validate()
    assert p.rows.tolist() == [2, 0, 1] and p.cols.tolist() == [1, 3, 0, 2]
    assert p.indices().tolist() == [10, 0, 5, 7]


def test_an_order_may_hold_idle_rows():
    p = Pattern.from_indices(torch.tensor([5]), (3, 4), row_order=torch.arange(3), col_order=torch.arange(4)).validate()
    assert p.rows.tolist() == [0, 1, 2] and p.indices().tolist() == [5]


@pytest.mark.parametrize("tile", TILES)
def test_a_full_mask_of_a_large_tile(tile):
    """Positions up to 65,535 survive their 16 bits."""
    shape = (min(tile[0], 300) + 1, min(tile[1], 300) + 1)
    shape = (tile[0], 3) if tile[0] == 65536 else (3, tile[1]) if tile[1] == 65536 else shape
    p = Pattern.from_mask(torch.ones(shape, dtype=torch.bool), tile=tile).validate()
    assert p.to_mask().all()
    assert len(p.tiles) == -(-shape[0] // tile[0]) * -(-shape[1] // tile[1])


def test_positions_beyond_32_bits():
    """A weight of 4.9e9 entries: nothing of its size may be allocated, and no position wraps."""
    shape, flat = (70000, 70000), [0, 2**31 - 1, 2**31, 2**32 + 5, 70000 * 70000 - 1]
    p = Pattern.from_indices(torch.tensor(flat), shape, tile=(16, 16)).validate()
    assert sorted(p.indices().tolist()) == flat
    assert p.rows.long().max() == 69999 and p.cols.long().max() == 69999


@pytest.mark.parametrize(
    ("shape", "seen"), [((5,), (1, 5)), ((), (1, 1)), ((2, 3, 4), (6, 4)), ((0, 3), (0, 3)), ((2, 0), (2, 0))]
)
def test_weights_of_another_rank(shape, seen):
    assert matrix_shape(shape) == seen
    p = Pattern.from_mask(torch.ones(shape, dtype=torch.bool))
    assert p.shape == seen and len(p) == seen[0] * seen[1]


@given(chosen())
def test_gather_follows_the_entries(choice):
    p = build(choice)
    weight = torch.randn(p.shape)
    got = p.gather(weight)
    assert got.tolist() == [weight.reshape(-1)[i].item() for i in p.indices().tolist()]
    if len(p):
        got.zero_()  # a copy
        assert weight.reshape(-1)[p.indices()].any()


def test_gather_reads_transposed_weights():
    p, weight = sample(), torch.randn(11, 9).T
    assert torch.equal(p.gather(weight), p.gather(weight.contiguous()))


def test_to_another_device_is_the_same_pattern():
    assert sample().to("cpu") == sample()


# ---- pack -----------------------------------------------------------------------------------------------------


@given(st.lists(chosen(), min_size=1, max_size=4))
def test_pack_joins_layers(choices):
    patterns = [build((shape, (4, 8), flat, mass)) for shape, _, flat, mass in choices]
    layout = pack(patterns)
    assert layout.tile == (4, 8)
    assert layout.local.tolist() == [x for p in patterns for x in p.local.tolist()]
    found: list[list[tuple[int, int]]] = [[] for _ in patterns]
    for layer, row0, col0, first, last in layout.tiles.tolist():
        for x in layout.local[first:last].tolist():
            r, c = divmod(x & 0xFFFF, 8)
            found[layer].append((int(layout.rows[row0 + r]), int(layout.cols[col0 + c])))
    expected = [[divmod(i, p.shape[1]) for i in p.indices().tolist()] for p in patterns]
    assert found == expected


def test_pack_refuses_different_tiles():
    with pytest.raises(ValueError, match=re.escape("must share one tile shape, got [(2, 4), (4, 4)]")):
        pack([sample(), sample(tile=(4, 4))])
    with pytest.raises(ValueError, match="must share one tile shape, got"):
        pack([])


# ---- digest ---------------------------------------------------------------------------------------------------


def test_equal_patterns_have_equal_digests():
    assert sample().digest == sample().digest and sample() == sample() and hash(sample()) == hash(sample())
    assert len(sample().digest) == 64
    assert sample() != "pattern"
    assert len({sample(), sample(), sample(density=0.2)}) == 2
    assert pickle.loads(pickle.dumps(sample())) == sample()


def changed(p: Pattern, name: str, value: object) -> Pattern:
    return dataclasses.replace(p, **{name: value})


def edit(tensor: Tensor, at, value: int) -> Tensor:
    out = tensor.clone()
    out[at] = value
    return out


def test_the_digest_changes_with_every_part():
    p = sample()
    others = [
        changed(p, "shape", (9, 12)),
        changed(p, "shape", (11, 9)),
        changed(p, "tile", (4, 2)),
        *(changed(p, name, edit(getattr(p, name), i, 1234)) for name in ("rows", "cols", "local") for i in (0, -1)),
        *(changed(p, "tiles", edit(p.tiles, (i, j), 1234)) for i in (0, -1) for j in range(5)),
        *(changed(p, name, getattr(p, name)[:-1]) for name in ("rows", "cols", "tiles", "local")),
    ]
    assert len({q.digest for q in (p, *others)}) == len(others) + 1


def test_the_digest_tells_rows_from_columns():
    """Two valid patterns whose tensors, written one after the other, are the same bytes."""
    one = Pattern.from_indices(torch.tensor([2]), (3, 3), row_order=torch.tensor([0, 1]), col_order=torch.tensor([2]))
    other = Pattern.from_indices(torch.tensor([1]), (3, 3), row_order=torch.tensor([0]), col_order=torch.tensor([1, 2]))
    assert one.validate().indices().tolist() != other.validate().indices().tolist()
    assert one != other


# ---- validation -----------------------------------------------------------------------------------------------


def corrupt(p: Pattern) -> dict[str, tuple[Pattern, str]]:
    """Every kind of damage, and the message that must name its first bad element."""
    last, k = len(p.tiles) - 1, len(p)
    gap = p.tiles.clone()
    gap[1:, 3:] += 1
    swapped = p.tiles.clone()
    swapped[[0, 1], 1:3] = swapped[[1, 0], 1:3]
    few = Pattern.from_mask(torch.ones(3, 3, dtype=torch.bool), tile=(2, 4))
    return {
        "tile zero": (changed(p, "tile", (0, 4)), "tile must be two positive sizes with at most 65536 positions"),
        "tile large": (changed(p, "tile", (257, 256)), "tile must be two positive sizes with at most 65536 positions"),
        "tile three": (changed(p, "tile", (2, 2, 2)), "tile must be two positive sizes"),
        "rows dtype": (changed(p, "rows", p.rows.long()), "Pattern.rows must be 1-D torch.int32, got 1-D torch.int64"),
        "rows rank": (changed(p, "rows", p.rows[None]), "Pattern.rows must be 1-D torch.int32, got 2-D"),
        "cols dtype": (changed(p, "cols", p.cols.short()), "Pattern.cols must be 1-D torch.int32, got 1-D torch.int16"),
        "tiles dtype": (changed(p, "tiles", p.tiles.int()), "Pattern.tiles must be 2-D torch.int64"),
        "tiles width": (changed(p, "tiles", p.tiles[:, :4]), "Pattern.tiles must be [n, 5]"),
        "local dtype": (
            changed(p, "local", p.local.int()),
            "Pattern.local must be 1-D torch.int16, got 1-D torch.int32",
        ),
        "row large": (changed(p, "rows", edit(p.rows, 2, 9)), "Pattern.rows[2] is 9, expected an index in [0, 9)"),
        "row negative": (changed(p, "rows", edit(p.rows, 1, -1)), "Pattern.rows[1] is -1, expected an index in [0, 9)"),
        "row twice": (
            changed(p, "rows", edit(p.rows, 3, int(p.rows[1]))),
            f"Pattern.rows[3] is {int(p.rows[1])}, expected every index once",
        ),
        "col large": (changed(p, "cols", edit(p.cols, 0, 11)), "Pattern.cols[0] is 11, expected an index in [0, 11)"),
        "col twice": (
            changed(p, "cols", edit(p.cols, 5, int(p.cols[0]))),
            f"Pattern.cols[5] is {int(p.cols[0])}, expected every index once",
        ),
        "layer": (changed(p, "tiles", edit(p.tiles, (1, 0), 1)), "Pattern.tiles LAYER[1] is 1, expected 0"),
        "row0 odd": (
            changed(p, "tiles", edit(p.tiles, (2, 1), 1)),
            f"Pattern.tiles ROW0[2] is 1, expected a multiple of 2 in [0, {len(p.rows)})",
        ),
        "row0 large": (
            changed(p, "tiles", edit(p.tiles, (last, 1), 10)),
            f"Pattern.tiles ROW0[{last}] is 10, expected a multiple of 2 in [0, {len(p.rows)})",
        ),
        "row0 negative": (changed(p, "tiles", edit(p.tiles, (0, 1), -2)), "Pattern.tiles ROW0[0] is -2"),
        "col0 odd": (
            changed(p, "tiles", edit(p.tiles, (0, 2), 2)),
            f"Pattern.tiles COL0[0] is 2, expected a multiple of 4 in [0, {len(p.cols)})",
        ),
        "entry0": (changed(p, "tiles", gap), "Pattern.tiles ENTRY0[1] is"),
        "entry1": (
            changed(p, "tiles", edit(edit(p.tiles, (0, 4), 0), (1, 3), 0)),
            "Pattern.tiles ENTRY1[0] is 0, expected more than ENTRY0",
        ),
        "end": (changed(p, "local", p.local[:-1]), f"Pattern.tiles must end at entry {k - 1}, got {k}"),
        "no tiles": (changed(p, "tiles", p.tiles[:0]), f"Pattern.tiles must end at entry {k}, got 0"),
        "tile order": (changed(p, "tiles", swapped), "Pattern.tiles[0] is 0, expected ascending tile numbers"),
        "local large": (
            changed(p, "local", edit(p.local, k - 1, 8)),
            f"Pattern.local[{k - 1}] is 8, expected a position inside tile (2, 4)",
        ),
        "local unsigned": (changed(p, "local", edit(p.local, k - 1, -1)), f"Pattern.local[{k - 1}] is 65535"),
        "local beyond the rows": (changed(few, "local", edit(few.local, 8, 6)), "Pattern.local[8] is 6, expected"),
        "local beyond the columns": (changed(few, "local", edit(few.local, 8, 3)), "Pattern.local[8] is 3, expected"),
        "local twice": (
            changed(p, "local", edit(p.local, 1, int(p.local[0]))),
            f"is {int(p.local[0])}, expected ascending positions inside a tile",
        ),
    }


@pytest.mark.parametrize("damage", corrupt(sample()))
def test_validate_names_the_damage(damage):
    p, message = corrupt(sample())[damage]
    with pytest.raises(ValueError, match=re.escape(message)):
        p.validate()


def test_validate_returns_the_pattern():
    p = sample()
    assert p.validate() is p
    assert len(Pattern.from_indices(torch.zeros(0, dtype=torch.int64), (3, 4)).validate()) == 0


def from_indices(flat, shape=(3, 4), **kwargs):
    return lambda: Pattern.from_indices(torch.tensor(flat, dtype=torch.int64), shape, **kwargs)


ERRORS = {
    "dtype": (
        lambda: Pattern.from_indices(torch.tensor([1], dtype=torch.int32), (3, 4)),
        TypeError,
        "indices must be a 1-D int64 tensor, got 1-D torch.int32",
    ),
    "rank": (from_indices([[1]]), TypeError, "indices must be a 1-D int64 tensor, got 2-D torch.int64"),
    "too large": (from_indices([3, 12]), ValueError, "indices must lie in [0, 12) for shape (3, 4), got 12"),
    "negative": (from_indices([3, -1]), ValueError, "indices must lie in [0, 12) for shape (3, 4), got -1"),
    "empty shape": (from_indices([0], shape=(0, 4)), ValueError, "indices must lie in [0, 0)"),
    "twice": (from_indices([7, 3, 7]), ValueError, "indices must be unique, got 7 twice"),
    "tile": (from_indices([3], tile=(300, 300)), ValueError, "tile must be two positive sizes with at most 65536"),
    "tile zero": (from_indices([3], tile=(0, 1)), ValueError, "tile must be two positive sizes"),
    "order misses a row": (
        from_indices([3, 5], row_order=torch.tensor([0, 2])),
        ValueError,
        "row_order must hold every active index, 1 is missing",
    ),
    "order repeats": (
        from_indices([3, 5], col_order=torch.tensor([3, 1, 1])),
        ValueError,
        "col_order must hold every index once",
    ),
    "order out of range": (
        from_indices([3], row_order=torch.tensor([0, 3])),
        ValueError,
        "row_order must hold indices in [0, 3), got 0..3",
    ),
    "mask": (lambda: Pattern.from_mask(torch.ones(3, 4)), TypeError, "mask must be a bool tensor, got torch.float32"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


# ---- files ----------------------------------------------------------------------------------------------------


@given(chosen())
def test_save_and_load(tmp_path_factory, choice):
    path = tmp_path_factory.mktemp("pattern") / "p.safetensors"
    p = build(choice)
    p.save(path)
    loaded = Pattern.load(path)
    assert loaded == p and loaded.shape == p.shape and loaded.tile == p.tile
    assert torch.equal(loaded.indices(), p.indices())


def parts(path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "p.safetensors"
    sample().save(path)
    return path


def test_every_truncation_is_refused(saved):
    whole = saved.read_bytes()
    for size in sorted({0, 1, 7, 8, 9, *range(10, len(whole), 61), len(whole) - 1}):
        saved.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(str(saved))):
            Pattern.load(saved)


def test_every_flipped_byte_of_the_tensors_is_refused(saved):
    whole = bytearray(saved.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in range(start, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        saved.write_bytes(damaged)
        with pytest.raises(ValueError):
            Pattern.load(saved)


def header_changes() -> dict[str, dict[str, str | None]]:
    return {
        "no format": {"format": None},
        "format": {"format": "sparseft.pattern.v2"},
        "no digest": {"digest": None},
        "digest": {"digest": "0" * 64},
        "no shape": {"shape": None},
        "shape larger": {"shape": "[10, 11]"},
        "shape smaller": {"shape": "[8, 11]"},
        "shape enormous": {"shape": json.dumps([10**15, 11])},
        "shape negative": {"shape": "[-9, 11]"},
        "shape of one": {"shape": "[9]"},
        "shape a number": {"shape": "9"},
        "shape of text": {"shape": '["9", "11"]'},
        "shape no json": {"shape": "9 by 11"},
        "no tile": {"tile": None},
        "tile": {"tile": "[4, 2]"},
        "tile of text": {"tile": '["2", "4"]'},
        "tile no json": {"tile": "("},
    }


@pytest.mark.parametrize("change", header_changes())
def test_a_changed_header_is_refused(saved, change):
    tensors, header = parts(saved)
    for name, value in header_changes()[change].items():
        header.pop(name)
        header |= {} if value is None else {name: value}
    save_file(tensors, saved, header)
    with pytest.raises(ValueError):
        Pattern.load(saved)


@pytest.mark.parametrize("name", ["rows", "cols", "tiles", "local"])
def test_a_missing_tensor_is_refused(saved, name):
    tensors, header = parts(saved)
    del tensors[name]
    save_file(tensors, saved, header)
    with pytest.raises(ValueError, match=name):
        Pattern.load(saved)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"expected format sparseft\.pattern\.v1, got None"):
        Pattern.load(path)
    path.write_text("not a tensor file at all, but long enough to hold a header length")
    with pytest.raises(ValueError, match="is not a readable pattern file"):
        Pattern.load(path)


def test_a_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        Pattern.load(tmp_path / "nothing")
