"""How entries are scored. A criterion is one entry of CRITERIA at the end.

w: a weight, g: its gradient of a batch's mean loss, x: an input of its layer, d: the gradient of an output.

| name | score | source |
|---|---|---|
| grad | sum over batches of g | SHiRA-Grad (Bhardwaj et al., 2024); SPEFT's choice (2024, arXiv 2412.13488) |
| sift | the same; its paper shares the entries by layer | SIFT (Song et al., 2024, arXiv 2312.11875) |
| balanced | sum of g over the root of its rank-one second moment | ours (docs/quality.md), after Adafactor (2018) |
| sampled | as balanced, entries drawn with chances in proportion | ours, after Efraimidis & Spirakis (2006) |
| taylor | w times the sum of g, first order | Molchanov et al., 2017 |
| snip | the same | SNIP (Lee et al., 2019); SHiRA-SNIP |
| fisher | sum over batches of g^2 | RoSA's mean_squared (Nikdan et al., 2024, arXiv 2401.04679) |
| fisher-sample | sum over samples (rows of a batch) of g^2 | FISH, empirical (Sung et al., 2021, arXiv 2111.09839) |
| fisher-token | sum over tokens of (d x)^2, a token's share of g squared; linear layers only | after FISH |
| magnitude | w | SHiRA-WM (Bhardwaj et al., 2024); Super-Tuning (2026, arXiv 2607.09287) |
| pafi | the smallest w | PaFi (Liao et al., 2023, arXiv 2305.16742) |
| wanda | w times the norm of x over all tokens, ranked by budget, with allocation="row" by row | Sun et al., 2024 |
| wanda-mean | w times the mean magnitude of x | Super-Tuning's variant of Wanda (2026, arXiv 2607.09287) |
| gallop | large g, small w: see `gallop` | GaLLoP (2025, arXiv 2510.19778) |
| lift, lift-exact | w in its best approximation of low rank: see `lift` | LIFT (Liu et al., 2025, arXiv 2506.00772) |
| lottery | what a short training changes: see `lottery` | LT-SFT (2022), LoTA (2024, arXiv 2406.16797) |
| spiel-ma | product of SM3's row and column accumulators of g^2 | SpIEL-MA (Ansell et al., 2024, arXiv 2401.16405) |
| smt | sum of g, whole blocks of the size of a tile by their mean magnitude | SMT (He et al., 2025, arXiv 2405.15525) |
| losia | smoothed sensitivity times its uncertainty, rows times columns | LoSiA (Wang et al., 2025, arXiv 2507.04487) |
| s2ft | none: heads and channels at random | S2FT (Yang et al., 2024, arXiv 2412.06289) |
| shira-struct | none: the diagonal, then evenly spread rows and columns | SHiRA-Struct (Bhardwaj et al., 2024) |
| random | none: uniform | SHiRA-Rand (Bhardwaj et al., 2024) |

Masks that move (RigL, SpIEL-AG, SpIEL-MA with the optimizer's moments, LIFT's refresh) are in `sparseft.schedules`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparseft.pattern import matrix_shape
from sparseft.selection.criterion import Criterion
from sparseft.selection.draw import generator, sampled
from sparseft.selection.gradients import Samples
from sparseft.selection.inputs import Forward
from sparseft.selection.lift import lift
from sparseft.selection.tokens import Tokens
from sparseft.selection.training import ShortTraining


def _sum(total: Tensor, part: Tensor, weight: Tensor) -> None:
    total.add_(part)


def _sum_of_squares(total: Tensor, gradient: Tensor, weight: Tensor) -> None:
    total.addcmul_(gradient, gradient)  # squared in total's dtype


def _sum_of_squared_inputs(total: Tensor, inputs: Tensor, weight: Tensor) -> None:
    total.add_(inputs.to(total.dtype).square().sum(0).view_as(total))


def _sum_of_squared_products(total: Tensor, factors: tuple[Tensor, Tensor], weight: Tensor) -> None:
    of_rows, of_columns = (factor.to(total.dtype).square() for factor in factors)
    total.addmm_(of_rows.T, of_columns)


def _total(name: str, weight: Tensor, total: Tensor, seed: int) -> Tensor:
    return total


def _taylor(name: str, weight: Tensor, total: Tensor, seed: int) -> Tensor:
    return total.mul_(weight)


def scales(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rows, [N, 1], and columns, [1, K], whose product is 1 / sqrt(rank-one second moment of the matrix).

    The second moment is (row's sum of squares) (column's) / (all), as in Adafactor (Shazeer & Stern, 2018). 0 for rows
    and columns of zeros.
    """
    squares = matrix.square()
    rows, columns = (squares.sum(dim, keepdim=True) for dim in (1, 0))
    norm = rows.sum().sqrt()
    return rows.rsqrt().nan_to_num(posinf=0.0).mul_(norm), columns.rsqrt().nan_to_num(posinf=0.0)


def _balanced(name: str, weight: Tensor, total: Tensor, seed: int) -> Tensor:
    matrix = total.view(matrix_shape(weight.shape))
    rows, columns = scales(matrix)
    return matrix.mul_(rows).mul_(columns).view(weight.shape)


def _wanda(name: str, weight: Tensor, total: Tensor, seed: int) -> Tensor:
    return weight.abs() * total.sqrt()


def _sum_of_magnitudes(total: Tensor, inputs: Tensor, weight: Tensor) -> None:
    total.add_(inputs.to(total.dtype).abs().sum(0).view_as(total))


def _smallest(name: str, weight: Tensor, total: None, seed: int) -> Tensor:
    """Positive and finite, in exactly the reverse order of |w| (roughly as 4 / |w|): the bits of floating-point numbers
    are in the order of their magnitudes."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
    bits = {4: torch.int32, 8: torch.int64}[wide.itemsize]
    most = torch.tensor(torch.finfo(wide.dtype).max, dtype=wide.dtype, device=wide.device)
    return (most.view(bits) - wide.view(bits)).view(wide.dtype)


def _evenly_spread(name: str, weight: Tensor, total: None, seed: int) -> Tensor:
    """2 on the diagonal (of a matrix that is not square, on the steps next to it), elsewhere what the entry's row or
    column has, the larger: these fall from 1 in the order of van der Corput's sequence, any beginning of which is
    spread evenly."""
    n, m = matrix_shape(weight.shape)
    rows, columns = (_spread(size).to(weight.device) for size in (n, m))
    scores = torch.maximum(rows[:, None], columns)
    steps = torch.arange(max(n, m), device=weight.device)
    scores[steps * n // max(n, m), steps * m // max(n, m)] = 2.0
    return scores.view(weight.shape)


def _spread(size: int) -> Tensor:
    """fp32 [size]: 1 at 0, 1 / 2 in the middle, 1 / 3 and 1 / 4 in the middles of the halves, and so on."""
    digits = (size - 1).bit_length()
    mirrored = [int(f"{i:0{digits}b}"[::-1], 2) for i in range(2**digits)] if digits else [0]
    order = torch.tensor(list(dict.fromkeys(number * size >> digits for number in mirrored)))
    return torch.empty(size).index_copy_(0, order, 1 / torch.arange(1, size + 1))


def _random(name: str, weight: Tensor, total: None, seed: int) -> Tensor:
    """Uniform scores."""
    return torch.rand(weight.shape, generator=generator(name, seed)).to(weight.device)


def gallop(eps: float = 1e-8) -> Criterion:
    """|sum over batches of g| / (|w| + eps): large gradients at small weights, GaLLoP (2025, arXiv 2510.19778).

    The paper's abstract states the two conditions; that they are combined as a quotient is our reading.

    Args:
        eps: keeps weights that are zero from having infinite scores; they come first, ordered by |g|.

    Raises:
        ValueError: `eps` is not positive.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")

    def score(name: str, weight: Tensor, total: Tensor, seed: int) -> Tensor:
        return total.div_(weight.abs().to(total.dtype).add_(eps))

    return Criterion(score, _sum)


def losia(decay: float = 0.85, uncertainty_decay: float = 0.85) -> Criterion:
    """Smoothed sensitivity times its uncertainty, chosen as a row set times a column set: LoSiA (Wang et al., 2025).

    With s = |w g - (w g)^2 / 2| of each batch (a second-order Taylor estimate whose Hessian is g^2), in the batches'
    order: I = decay I + (1 - decay) s, then U = uncertainty_decay U + (1 - uncertainty_decay) |s - I|; the score is
    I U. Processes that select together score the products of their summed I and U.

    Raises:
        ValueError: a decay lies outside [0, 1).
    """
    for name, value in (("decay", decay), ("uncertainty_decay", uncertainty_decay)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")

    def accumulate(total: Tensor, gradient: Tensor, weight: Tensor) -> None:
        product = gradient.to(total.dtype) * weight
        sensitivity = (product - product.square() / 2).abs_()
        total[0].lerp_(sensitivity, 1 - decay)
        total[1].lerp_(sensitivity.sub_(total[0]).abs_(), 1 - uncertainty_decay)

    return Criterion(lambda name, weight, total, seed: total[0] * total[1], accumulate,
                     state=lambda shape: (2, *shape), structure="subnet")  # fmt: skip


def lottery(lr: float = 1e-4) -> Criterion:
    """|w after - w before| a short dense training, one AdamW step per batch, after which all weights are rewound.

    LT-SFT (Ansell et al., 2022) and LoTA (Panda et al., 2024); there everything trains, here the eligible weights. It
    holds all gradients, fp32 masters, moments and changes: 20 bytes per eligible entry and a copy of the weights.
    Processes that select together train apart and add up their changes.

    Args:
        lr: a rate for dense training.

    Raises:
        ValueError: `lr` is not positive.
    """
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    return Criterion(_total, _sum, partial(ShortTraining, lr=lr))


def _sm3(total: Tensor, gradient: Tensor, weight: Tensor) -> None:
    """One step of SM3's accumulators (Anil et al., 2019, SM3-II), those of the rows first in `total`."""
    rows, columns = total.split(matrix_shape(weight.shape))
    seen = torch.minimum(rows[:, None], columns)
    gradient = gradient.reshape(seen.shape)
    seen.addcmul_(gradient, gradient)
    rows.copy_(seen.amax(1))
    columns.copy_(seen.amax(0))


def _row_times_column(name: str, weight: Tensor, total: Tensor, seed: int) -> Tensor:
    rows, columns = total.split(matrix_shape(weight.shape))
    return (rows[:, None] * columns).view(weight.shape)


CRITERIA: dict[str, Criterion] = {
    "grad": Criterion(_total, _sum),
    "sift": Criterion(_total, _sum),
    "balanced": Criterion(_balanced, _sum),
    "sampled": sampled(Criterion(_balanced, _sum)),
    "taylor": Criterion(_taylor, _sum),
    "snip": Criterion(_taylor, _sum),
    "fisher": Criterion(_total, _sum_of_squares),
    "fisher-sample": Criterion(_total, _sum_of_squares, Samples),  # one backward pass per sample
    "fisher-token": Criterion(_total, _sum_of_squared_products, Tokens),  # one product of squared factors
    "magnitude": Criterion(lambda name, weight, total, seed: weight),
    "pafi": Criterion(_smallest),
    "wanda": Criterion(_wanda, _sum_of_squared_inputs, Forward),
    "wanda-mean": Criterion(lambda name, weight, total, seed: weight.abs() * total, _sum_of_magnitudes, Forward),
    "gallop": gallop(),
    "lift": lift(),  # |W_r| of rank 64, by the randomised range finder
    "lift-exact": lift(exact=True),
    "lottery": lottery(),
    # SpIEL-MA's accumulators come from the optimizer and the active entries; here from the batches, all being active
    "spiel-ma": Criterion(_row_times_column, _sm3, state=lambda shape: (sum(matrix_shape(shape)),)),
    "smt": Criterion(_total, _sum, structure="blocks"),  # with tile=(256, 256) as in the paper
    "losia": losia(),
    # the paper's other variants are structure="channels" with the criteria magnitude, wanda and grad
    "s2ft": Criterion(_random, structure="channels"),
    "shira-struct": Criterion(_evenly_spread),
    "random": Criterion(_random),
}


def find(criterion: str | Criterion | Callable[[str, Tensor, Tensor], Tensor]) -> Criterion:
    """A criterion by its name; a function (name, weight, summed gradient) -> scores becomes one.

    Raises:
        ValueError: no criterion has that name.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        return Criterion(lambda name, weight, total, seed: criterion(name, weight, total), _sum)
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be a function or one of {sorted(CRITERIA)}, got {criterion!r}")
    return CRITERIA[criterion]
