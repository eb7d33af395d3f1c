"""Delta: the change of a model as a small safetensors file that can be applied and undone to the bit.

The file holds, for every weight <name>, three tensors:

    <name>.pattern  uint8    where the entries are, see `packing.py`
    <name>.values   [k]      the new values, in the weight's dtype and the pattern's order
    <name>.base     [k]      the base model's values at the same entries

and one header string (safetensors metadata, key `delta`), a JSON object:

    format    "sparseft.delta.v1"
    sha256    of the whole file, taken with this field as 64 zeros: any changed byte is found
    weights   [{name, shape, dtype, tile, sha256 (of the base weight's bytes, row-major), tied (its other names)}]
    metadata  anything JSON: base model, training data, configuration, metrics

An entry costs twice its weight's dtype and 1.2 bytes for its place (SmolLM2-135M, bf16, 1 % of the linear weights:
5.36 bytes per entry, header included). Equal deltas are equal files.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from sparseft.layers import plain, selected
from sparseft.ops import scatter_delta_
from sparseft.optim import SparseAdamW
from sparseft.packing import pack_pattern, unpack_pattern
from sparseft.pattern import Pattern, matrix_shape
from sparseft.reselection import all_entries, bits

FORMAT = "sparseft.delta.v1"
DTYPES = {str(dtype).removeprefix("torch."): dtype
          for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}  # fmt: skip
_UNSIGNED = "0" * 64
_WEIGHT_FIELDS = {"name": str, "shape": list, "dtype": str, "tile": list, "sha256": str, "tied": list}


@dataclass(frozen=True, eq=False)
class Change:
    """The change of one weight.

    Attributes:
        shape: the weight's own shape, of any rank. `pattern`: its k entries, in the weight seen as a matrix.
        values, base: [k] on the CPU, in the weight's dtype: after and before.
        sha256: of the base weight's bytes (all entries). `tied`: other names of the same parameter.
    """

    shape: tuple[int, ...]
    pattern: Pattern
    values: Tensor
    base: Tensor
    sha256: str
    tied: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """Name of the weight's dtype, such as "bfloat16"."""
        return str(self.values.dtype).removeprefix("torch.")

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds for this weight."""
        return {"pattern": pack_pattern(self.pattern), "values": self.values, "base": self.base}


@dataclass(frozen=True)
class Figures:
    """The size of a change, of one weight or of all.

    Attributes:
        size: entries of the weight. `entries`: selected ones. `changed`: those whose bits differ from the base.
        mean_abs, max_abs: of values - base over the selected entries.
        change_norm, base_norm: Euclidean norms over the selected entries.
        nbytes: of the stored tensors.
    """

    size: int
    entries: int
    changed: int
    mean_abs: float
    max_abs: float
    change_norm: float
    base_norm: float
    nbytes: int

    @property
    def share(self) -> float:
        """Selected share of the weight."""
        return self.entries / max(self.size, 1)

    @property
    def relative(self) -> float:
        """Norm of the change over the norm of the base entries; inf for a change from zero."""
        if self.base_norm == 0:
            return math.inf if self.change_norm else 0.0
        return self.change_norm / self.base_norm


@dataclass(frozen=True)
class Summary:
    """What a delta changes: figures per weight and in total, its base's fingerprint, its metadata."""

    weights: dict[str, Figures]
    total: Figures
    fingerprint: str
    metadata: dict

    def __str__(self) -> str:
        rows = [("weight", "entries", "share", "changed", "mean |change|", "max |change|", "relative", "bytes")]
        for name, f in [*self.weights.items(), ("total", self.total)]:
            rows.append((name, f"{f.entries}", f"{f.share:.3%}", f"{f.changed}", f"{f.mean_abs:.2e}",
                         f"{f.max_abs:.2e}", f"{f.relative:.3f}", f"{f.nbytes}"))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
        return "\n".join("  ".join(line) for line in lines)


class Delta:
    """New and base values of the selected entries of a model's weights.

    `len(delta)` is the number of entries. Made by `from_model` or `load`; treat it as immutable.

    Attributes:
        changes: weight name -> Change, in the model's order.
        metadata: the JSON object given to `from_model`.
    """

    def __init__(self, changes: Mapping[str, Change], metadata: Mapping | None = None):
        self.changes = dict(changes)
        self.metadata: dict = json.loads(json.dumps(dict(metadata or {})))  # fails here rather than in save

    @classmethod
    def from_model(
        cls, model: nn.Module, optimizer: SparseAdamW | None = None, *, metadata: Mapping | None = None
    ) -> "Delta":
        """The change since `sparsify`, of all selected entries, also of those that did not move, and of those that
        `reselect` has left outside with their change.

        Reads every affected weight once, for its sha256 (0.7 s per GB on one core with SHA instructions), and
        copies one weight at a time.

        Args:
            model: a sparsified model, or the one that `optimizer` trains through the drop-in door.
            metadata: anything JSON: base model, training data, configuration, metrics.

        Raises:
            ValueError: the model is not sparsified.
            TypeError: the metadata is not JSON.
        """
        names = _names(model)
        chosen = selected(model) if optimizer is None else optimizer.selected(model)
        if not chosen:
            raise ValueError("model must be sparsified (sparseft.sparsify), got one without selected weights; "
                             "in the drop-in door pass the optimizer too")  # fmt: skip
        changes = {}
        for name, s in chosen.items():
            weight = s.weight.detach()
            pattern, base = all_entries(s)
            original = weight.flatten().index_put((pattern.indices(),), base)
            tied = tuple(n for n in names[s.weight] if n != name)
            changes[name] = Change(tuple(weight.shape), pattern.to("cpu"), pattern.gather(weight).cpu(),
                                   base.detach().cpu().clone(), _sha256(original), tied)  # fmt: skip
        return cls(changes, metadata)

    # ---- file -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all: a file that was there stays as it was until then."""
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in change.tensors().items()}
        weights = [{"name": name, "shape": c.shape, "dtype": c.dtype, "tile": c.pattern.tile, "sha256": c.sha256,
                    "tied": c.tied} for name, c in self.changes.items()]  # fmt: skip
        data = _sign(tensors, {"format": FORMAT, "sha256": _UNSIGNED, "weights": weights, "metadata": self.metadata})
        temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """Read and check a file written by `save`; the tensors are on the CPU.

        Raises:
            ValueError: no delta file, another version, truncated, changed, or with content that cannot be
                (an index out of range, a missing tensor, a wrong dtype or length).
        """
        data = Path(path).read_bytes()
        try:
            header = _verify(data)
            tensors = parse_safetensors(data)
            changes = {}
            for entry in header["weights"]:
                name, change = _read_change(entry, tensors)
                if name in changes:
                    raise ValueError(f"weight {name!r} is listed twice")
                changes[name] = change
            if tensors:
                raise ValueError(f"tensor {min(tensors)!r} belongs to no listed weight")
            return cls(changes, header["metadata"])
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            problem = str(error) if type(error) is ValueError else f"not readable: {error!r}"
            raise ValueError(f"{path}: {problem}") from error

    # ---- model ------------------------------------------------------------------------------------------------

    def apply_(self, model: nn.Module) -> nn.Module:
        """Write the new values into a model that holds the base's, in place; returns the model.

        The model may be plain or sparsified, on any device. Before the first write every affected weight is
        compared with the base, all of its bytes: 0.7 s per GB (sha256, one core).

        Raises:
            ValueError: a weight is missing or has another shape, dtype, tie or content (the first is named), or
                the delta is applied already. The model is unchanged then.
        """
        weights = self._find(model)
        self._expect_entries(weights, "base")
        for name, weight in weights.items():
            if _sha256(weight) != self.changes[name].sha256:
                raise ValueError(f"weight {name!r} differs from the delta's base outside the selected entries: "
                                 "it is another model, or this one was changed")  # fmt: skip
        self._write(model, weights, "values")
        return model

    def revert_(self, model: nn.Module) -> nn.Module:
        """Write the base values back, in place, to the bit; returns the model.

        Only the selected entries are read and written.

        Raises:
            ValueError: a weight does not fit or does not hold this delta's values (the first is named), or the
                delta is not applied. The model is unchanged then.
        """
        weights = self._find(model)
        self._expect_entries(weights, "values")
        self._write(model, weights, "base")
        return model

    def _find(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters that this delta is about, checked in all but their content."""
        names = _names(model)
        parameters = {name: parameter for parameter, several in names.items() for name in several}
        missing = [name for name in self.changes if name not in parameters]
        if missing:
            raise ValueError(f"model has no weight {missing[0]!r} ({len(missing)} of {len(self.changes)} are missing)")
        for name, change in self.changes.items():
            weight = parameters[name]
            tied = {n for n in names[weight] if n != name}
            for what, expected, got in (
                ("shape", change.shape, tuple(weight.shape)),
                ("dtype", change.values.dtype, weight.dtype),
                ("other names (tied weights)", sorted(change.tied), sorted(tied)),
                ("contiguous", True, weight.is_contiguous()),
                ("on the meta device", False, weight.is_meta),
            ):
                if expected != got:
                    raise ValueError(f"weight {name!r}: {what} must be {expected} for this delta, got {got}")
        return {name: parameters[name] for name in self.changes}

    def _expect_entries(self, weights: dict[str, nn.Parameter], state: str) -> None:
        """Check that the selected entries hold the `state` ("base" or "values"), bit for bit."""
        other = "values" if state == "base" else "base"
        differing: dict[str, dict[str, int]] = {"base": {}, "values": {}}
        for name, weight in weights.items():
            now = bits(self.changes[name].pattern.to(weight.device).gather(weight.detach()).cpu())
            for side, names in differing.items():
                count = int((now != bits(getattr(self.changes[name], side))).sum())
                if count:
                    names[name] = count
        if not differing[state]:
            return
        if not differing[other]:
            raise ValueError("the delta is applied already" if state == "base" else "the delta is not applied")
        name, count = next(iter(differing[state].items()))
        whose = "its base: it is another model, or this one was changed" if state == "base" else "its new values"
        raise ValueError(f"weight {name!r}: {count} of the delta's {len(self.changes[name].values)} entries "
                         f"differ from {whose}")  # fmt: skip

    def _write(self, model: nn.Module, weights: dict[str, nn.Parameter], state: str) -> None:
        """Write all weights; if one fails, take back those before it."""
        other = "values" if state == "base" else "base"
        written: list[str] = []
        try:
            for name, weight in weights.items():
                _swap(weight, self.changes[name].pattern, getattr(self.changes[name], state))
                written.append(name)
        except BaseException:
            for name in written:
                _swap(weights[name], self.changes[name].pattern, getattr(self.changes[name], other))
            raise
        _refresh_values(model, {weight: self.changes[name].pattern for name, weight in weights.items()})

    # ---- figures ----------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what this delta expects of its base: names, shapes, dtypes and content of its weights."""
        parts = [[name, c.shape, c.dtype, c.sha256] for name, c in self.changes.items()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors; the file adds its header, about 400 bytes per weight."""
        return sum(_stored(change) for change in self.changes.values())

    def __len__(self) -> int:
        """Number of selected entries."""
        return sum(len(change.values) for change in self.changes.values())

    def summary(self) -> Summary:
        """What changed, per weight and in total; `print` shows it as a table."""
        weights = {name: _measure(change) for name, change in self.changes.items()}
        return Summary(weights, _total(weights.values()), self.fingerprint, self.metadata)

    def __repr__(self) -> str:
        return f"Delta({len(self.changes)} weights, {len(self)} entries, base {self.fingerprint[:12]})"


# ---- weights ------------------------------------------------------------------------------------------------------


def _names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter with all its names (tied weights have several)."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in plain(model).named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _sha256(weight: Tensor) -> str:
    """Of the entries' bytes in row-major order."""
    return hashlib.sha256(weight.detach().flatten().cpu().view(torch.uint8).numpy().data).hexdigest()


def _swap(weight: nn.Parameter, pattern: Pattern, values: Tensor) -> None:
    """weight[entries] = values by a swap, which moves bits and never rounds."""
    with torch.no_grad():
        scatter_delta_(weight, values.to(weight.device, copy=True), pattern.to(weight.device), "swap")


def _refresh_values(model: nn.Module, patterns: dict[nn.Parameter, Pattern]) -> None:
    """In a sparsified model: master values of the entries that were written take them from the weight."""
    for chosen in selected(model).values():
        if chosen.weight in patterns:
            mine = chosen.pattern.indices()
            written = torch.isin(mine, patterns[chosen.weight].to(mine.device).indices(), assume_unique=True)
            now = chosen.weight.detach().flatten()[mine].to(chosen.values.dtype)
            with torch.no_grad():
                chosen.values.copy_(torch.where(written, now, chosen.values))


# ---- figures ------------------------------------------------------------------------------------------------------


def _stored(change: Change) -> int:
    return sum(tensor.nbytes for tensor in change.tensors().values())


def _measure(change: Change) -> Figures:
    moved = (change.values.double() - change.base.double()).abs()
    return Figures(
        size=math.prod(change.shape),
        entries=len(moved),
        changed=int((bits(change.values) != bits(change.base)).sum()),
        mean_abs=float(moved.mean()) if len(moved) else 0.0,
        max_abs=float(moved.max()) if len(moved) else 0.0,
        change_norm=float(moved.norm()),
        base_norm=float(change.base.double().norm()),
        nbytes=_stored(change),
    )


def _total(parts: Iterable[Figures]) -> Figures:
    parts = list(parts)
    entries = sum(f.entries for f in parts)
    return Figures(
        size=sum(f.size for f in parts),
        entries=entries,
        changed=sum(f.changed for f in parts),
        mean_abs=sum(f.mean_abs * f.entries for f in parts) / max(entries, 1),
        max_abs=max((f.max_abs for f in parts), default=0.0),
        change_norm=math.hypot(*(f.change_norm for f in parts)),
        base_norm=math.hypot(*(f.base_norm for f in parts)),
        nbytes=sum(f.nbytes for f in parts),
    )


# ---- file ---------------------------------------------------------------------------------------------------------


def _sign(tensors: dict[str, Tensor], header: dict) -> bytes:
    """The file's bytes; the header's `sha256`, 64 zeros until now, becomes the digest of them all."""
    data = to_safetensors(tensors, {"delta": json.dumps(header)})
    return data.replace(_UNSIGNED.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def _verify(data: bytes) -> dict:
    """The header of an intact file. A file's first 8 bytes are the length of its JSON head."""
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or end > len(data):
        raise ValueError(f"no safetensors file, or truncated: {len(data)} bytes")
    try:
        header = json.loads(json.loads(data[8:end])["__metadata__"]["delta"])
        version, digest = header["format"], header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("no delta file, or damaged: it has no delta header") from error
    if version != FORMAT:
        raise ValueError(f"format must be {FORMAT}, got {version!r}")
    state = hashlib.sha256(data[:end].replace(str(digest).encode(), _UNSIGNED.encode(), 1))
    state.update(memoryview(data)[end:])
    if state.hexdigest() != digest:
        raise ValueError("content does not match its sha256: the file was changed, damaged or truncated")
    return header


def _read_change(entry: object, tensors: dict[str, Tensor]) -> tuple[str, Change]:
    """One weight of a file, checked; takes its tensors out of `tensors`."""
    if not isinstance(entry, dict):
        raise ValueError(f"weights must be a list of objects, got {entry!r} in it")
    for key, kind in _WEIGHT_FIELDS.items():
        if not isinstance(entry.get(key), kind):
            raise ValueError(f"weights: {key} must be a {kind.__name__}, got {entry.get(key)!r}")
    name = entry["name"]
    sizes = [*entry["shape"], *entry["tile"]]
    if not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
        raise ValueError(f"weight {name!r}: shape and tile must be sizes, got {entry['shape']} and {entry['tile']}")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"weight {name!r}: dtype must be one of {sorted(DTYPES)}, got {entry['dtype']!r}")
    dtype = DTYPES[entry["dtype"]]
    packed = _take(tensors, f"{name}.pattern", torch.uint8)
    values, base = _take(tensors, f"{name}.values", dtype), _take(tensors, f"{name}.base", dtype)
    try:
        pattern = unpack_pattern(packed, matrix_shape(entry["shape"]), tuple(entry["tile"]))
    except ValueError as error:
        raise ValueError(f"weight {name!r}: {error}") from error
    if not len(pattern) == len(values) == len(base):
        raise ValueError(f"weight {name!r}: values and base must have {len(pattern)} entries, "
                         f"got {len(values)} and {len(base)}")  # fmt: skip
    return name, Change(tuple(entry["shape"]), pattern, values, base, entry["sha256"], tuple(entry["tied"]))


def _take(tensors: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """Remove a 1-D tensor of that dtype from `tensors`."""
    tensor = tensors.pop(name, None)
    if tensor is None or tensor.dtype != dtype or tensor.dim() != 1:
        got = "none" if tensor is None else f"{tensor.dim()}-D {tensor.dtype}"
        raise ValueError(f"tensor {name} must be 1-D {dtype}, got {got}")
    return tensor
