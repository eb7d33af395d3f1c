"""How entries are scored. A criterion is one entry of the table at the end.

w: a weight, g: its gradient of a batch's mean loss, x: an input of its layer, d: the gradient of an output.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparseft.pattern import matrix_shape
from sparseft.selection.criterion import Criterion
from sparseft.selection.gradients import Samples
from sparseft.selection.inputs import Forward
from sparseft.selection.lift import generator, lift
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
    rows, columns = (matrix.square().sum(dim, keepdim=True) for dim in (1, 0))
    norm = rows.sum().sqrt()
    return rows.rsqrt().nan_to_num(posinf=0.0).mul_(norm), columns.rsqrt().nan_to_num(posinf=0.0)


def _balanced(name: str, weight: Tensor, total: Tensor, seed: int) -> Tensor:
    matrix = total.view(matrix_shape(weight.shape))
    rows, columns = scales(matrix)
    return matrix.mul_(rows).mul_(columns).view(weight.shape)


def _wanda(name: str, weight: Tensor, total: Tensor, seed: int) -> Tensor:
    return weight.abs() * total.sqrt()


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
    # |sum over batches of g|: SHiRA-Grad (Bhardwaj et al., 2024), SPEFT's choice (2024, arXiv 2412.13488)
    "grad": Criterion(_total, _sum),
    # the same under SIFT's name (Song et al., 2024), which shares the entries by layer (allocation="layer")
    "sift": Criterion(_total, _sum),
    # |sum over batches of g| / sqrt(its factored second moment, see `scales`): what is large for its row and column.
    # |g| alone falls on the few columns whose inputs are large for any text (docs/quality.md, H19)
    "balanced": Criterion(_balanced, _sum),
    # |w * sum over batches of g|: first-order Taylor (Molchanov et al., 2017)
    "taylor": Criterion(_taylor, _sum),
    # the same under the name of SNIP (Lee et al., 2019), as SHiRA-SNIP uses it
    "snip": Criterion(_taylor, _sum),
    # sum over batches of g^2: RoSA's mean_squared (Nikdan et al., 2024)
    "fisher": Criterion(_total, _sum_of_squares),
    # sum over samples of g^2, a sample being a row of a batch: the empirical Fisher diagonal of FISH (Sung et al.,
    # 2021); one backward pass per sample
    "fisher-sample": Criterion(_total, _sum_of_squares, Samples),
    # sum over tokens of (d x)^2, a token's share of g squared: one product of squared factors, linear layers only
    "fisher-token": Criterion(_total, _sum_of_squared_products, Tokens),
    # |w|: SHiRA-WM (Bhardwaj et al., 2024)
    "magnitude": Criterion(lambda name, weight, total, seed: weight),
    # |w| * |x|, x the input that w multiplies, its norm over all tokens: Wanda (Sun et al., 2024); ranked within
    # budgets instead of output rows
    "wanda": Criterion(_wanda, _sum_of_squared_inputs, Forward),
    "gallop": gallop(),
    # |W_r| of rank 64, by the randomised range finder and exactly
    "lift": lift(),
    "lift-exact": lift(exact=True),
    "lottery": lottery(),
    # product of SM3's row and column accumulators of g^2: how SpIEL-MA chooses what to grow (Ansell et al., 2024).
    # There they come from the optimizer and the active entries; here from the batches, all entries being active.
    "spiel-ma": Criterion(_row_times_column, _sm3, state=lambda shape: (sum(matrix_shape(shape)),)),
    # whole blocks (of the size of a tile) by the mean of |sum over batches of g|: SMT (He et al., 2025), in 256 x 256
    "smt": Criterion(_total, _sum, structure="blocks"),
    "losia": losia(),
    # whole heads of v_proj and o_proj and channels of up_proj and down_proj, at random: S2FT (Yang et al., 2024); its
    # other variants are structure="channels" with the criteria magnitude, wanda and grad
    "s2ft": Criterion(_random, structure="channels"),
    # uniform: SHiRA-Rand (Bhardwaj et al., 2024)
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
