"""What a criterion is, and what the runs over batches that feed it have in common."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from sparseft.selection.gradients import Backward


class Run(Protocol):
    """Passes over batches that hand over something about every weight.

    Attributes:
        one_part: each batch gives one part per weight, and once a weight's part has come it is all that the batch has
            to say about it: with a single batch scores need no sums.
        in_groups: running for some of the weights gives the same parts as running for all of them.
    """

    one_part: bool
    in_groups: bool

    def prepared(self, seed: int) -> AbstractContextManager[None]:
        """Passes run inside; afterwards the model is as it was."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a sum of parts."""

    def __call__(self, number: int, batch: Any, take: Callable[[str, Any], None]) -> None:
        """One batch, in which `take(name, part)` gets the parts."""


@dataclass(frozen=True)
class Criterion:
    """Entries with the largest |score| are selected.

    Args:
        score: (name, weight, total, seed) -> scores of the weight's shape; may be computed in place in `total`.
        accumulate: (total, part, weight) adds one part to `total`, in place; `total` (fp32, fp64 if a weight is fp64)
            starts at zero. None: no batch is needed, and the score gets None for `total`. Processes that select
            together add up their totals.
        run: makes what hands over the parts, from (model, weights by name, loss_fn): `Backward` gives the gradient of
            every batch, `Samples` of every row of a batch, `Tokens` the two factors [tokens, rows] and
            [tokens, columns] whose product is a layer's gradient, `Forward` the inputs [tokens, features] of its
            layer, `ShortTraining` the change of the weight by a training step.
        state: the shape of a sum of parts -> the shape of `total`; None: the same.
        structure: what is chosen unless `select` is told otherwise.
        sampled: entries are drawn with chances proportional to |score| instead (see `sampled`).
    """

    score: Callable[..., Tensor]
    accumulate: Callable[[Tensor, Any, Tensor], object] | None = None
    run: Callable[[nn.Module, dict[str, nn.Parameter], Any], Run] = Backward
    state: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None
    structure: str = "entries"
    sampled: bool = False
