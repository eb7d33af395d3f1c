"""One short run of each kernel against the reference, for the planted faults and the sanitizer builds.

python tests/emulator/probe.py LIBRARY SEED OPERATION...    fails, with a message, if the library is wrong.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sparseft import reference
from sparseft.pattern import Pattern, pack

EMULATED = torch.ops.sparseft_cuda


def patterns(shapes: list[tuple[int, int]], tile: tuple[int, int], density: float) -> list[Pattern]:
    return [Pattern.from_mask(torch.rand(shape) < density, tile=tile) for shape in shapes]


def both(operation: str, arguments: tuple, changed: list[Tensor]) -> None:
    """Run the kernel and the reference on copies and compare what they changed."""
    results = []
    for function in (getattr(EMULATED, operation), getattr(reference, operation)):
        copies = {id(t): t.clone() for t in changed}

        def take(x, copies=copies):
            return [take(y) for y in x] if isinstance(x, list) else copies.get(id(x), x) if isinstance(x, Tensor) else x

        function(*(take(x) for x in arguments))
        results.append(list(copies.values()))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@contextmanager
def way(name: str) -> Iterator[None]:
    """masked_grad_ by "tiles" or "panels", whatever its rule would choose."""
    before = os.environ.get("SPARSEFT_MASKED_GRAD", "")
    os.environ["SPARSEFT_MASKED_GRAD"] = name
    try:
        yield
    finally:
        os.environ["SPARSEFT_MASKED_GRAD"] = before


def masked_grad_() -> None:
    for dtype, tile, shape, tokens, accumulate in (
        (torch.float32, (64, 64), (70, 90), 37, True),
        (torch.bfloat16, (64, 64), (128, 136), 170, True),
        (torch.float16, (128, 128), (130, 140), 70, False),
        (torch.bfloat16, (16, 16), (20, 30), 33, False),
    ):
        (pattern,) = patterns([shape], tile, 0.1)
        layout = [*pattern.layout[:4], list(pattern.tile)]
        out, grad_out, input = torch.randn(len(pattern)), torch.randn(tokens, shape[0]), torch.randn(tokens, shape[1])
        with way("tiles"):
            both("masked_grad_", (out, grad_out.to(dtype), input.to(dtype), *layout, accumulate), [out])


def masked_grad_panels() -> None:
    """Several chunks, stages used again, blocks with several bands of tiles, panels without entries."""
    for tile, shape, density, tokens in (((16, 200), (20, 300), 0.1, 330), ((32, 16), (330, 1700), 0.004, 20)):
        (pattern,) = patterns([shape], tile, density)
        layout = [*pattern.layout[:4], list(pattern.tile)]
        out, grad_out, input = torch.randn(len(pattern)), torch.randn(tokens, shape[0]), torch.randn(tokens, shape[1])
        with way("panels"):
            both("masked_grad_", (out, grad_out.bfloat16(), input.bfloat16(), *layout, True), [out])


def entries(dtype: torch.dtype) -> tuple[list[Tensor], list]:
    chosen = patterns([(40, 70), (33, 31), (64, 64)], (16, 16), 0.2)
    layout = pack(chosen)
    tiles = layout.tiles[torch.rand(len(layout.tiles)) < 0.9]
    weights = [torch.randn(p.shape).to(dtype) for p in chosen]
    return weights, [layout.rows, layout.cols, tiles, layout.local, list(layout.tile)]


def scatter_delta_() -> None:
    for dtype, mode in ((torch.float32, "add"), (torch.bfloat16, "copy"), (torch.float16, "swap")):
        weights, layout = entries(dtype)
        values = torch.randn(len(layout[3])).to(dtype)
        both("scatter_delta_", (weights, values, *layout, mode, 0.5), [*weights, values])


def sparse_adamw_() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weights, layout = entries(dtype)
        k = len(layout[3])
        values, grad, exp_avg, exp_avg_sq = torch.randn(4, k).abs().unbind()
        base, born = torch.randn(k).to(dtype), torch.randint(0, 3, (k,), dtype=torch.int32)
        step, lr = torch.tensor([3, 7, 20]), torch.tensor(0.01)
        hyper = (lr, 0.9, 0.999, 1e-8, 0.1, False, torch.tensor(0.5), torch.tensor(0.0))
        arguments = (weights, values, grad, exp_avg, exp_avg_sq, base, step, born, *layout, *hyper)
        both("sparse_adamw_", arguments, [*weights, values, exp_avg, exp_avg_sq])
    grad, exp_avg, narrow = grad * 0, exp_avg * 0, values.bfloat16()  # decay alone, exact in fp32: the same bits
    lr = torch.tensor(2.0**-4)
    hyper = (lr, 0.9, 0.999, 1e-8, 2.0**-4, False, None, None, 99)
    arguments = (weights, narrow, grad, exp_avg, exp_avg_sq, None, step, None, *layout, *hyper)
    both("sparse_adamw_", arguments, [*weights, narrow, exp_avg, exp_avg_sq])


def select_topk() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sizes = (50000, 0, 777, 9001)  # two blocks of the histogram
        scores = [torch.randn(n).to(dtype) for n in sizes]
        others = [torch.randn(len(s)).to(dtype) for s in scores]
        for k, score, second in ((3001, "abs", []), (500, "product", others)):
            arguments = (scores, second, k, score)
            assert torch.equal(EMULATED.select_topk(*arguments), reference.select_topk(*arguments)), "other positions"


def offsets_beyond_int32() -> None:
    """Weights and operands whose elements lie past 2^31 (virtual memory only: two rows of each are touched)."""
    columns = 2**30
    weight = torch.empty(3, columns, dtype=torch.bfloat16)
    rows, cols, local = torch.tensor([0, 2]).int(), torch.tensor([5, 9]).int(), torch.tensor([0, 3]).short()
    tiles = torch.tensor([[0, 0, 0, 0, 2]])  # entries (0, 5) and (2, 9)
    EMULATED.scatter_delta_([weight], torch.tensor([1.0, 2.0]), rows, cols, tiles, local, [2, 2], "copy", 1.0)
    got = [float(weight[0, 5]), float(weight[2, 9])]
    assert got == [1.0, 2.0], f"weights beyond 2^31: {got}"
    small = Pattern.from_mask(torch.ones(3, 3, dtype=torch.bool), tile=(8, 8))
    layout = [*small.layout[:4], list(small.tile)]
    memory = torch.empty(3 * columns, dtype=torch.bfloat16)
    by_rows, by_columns = memory.as_strided((3, 3), (columns, 1)), memory.as_strided((16, 3), (1, columns))
    for matrix in (by_rows, by_columns):
        matrix.copy_(torch.randn(matrix.shape))
        out = torch.zeros(9)
        with way("panels"):
            both("masked_grad_", (out, matrix, matrix, *layout, False), [out])
    with way("tiles"):
        both("masked_grad_", (out, by_rows, by_rows, *layout, False), [out])


def scores_beyond_int32() -> None:
    """For a library whose select_topk was told that every tensor's first 2^31 scores have been passed over."""
    for dtype in (torch.float32, torch.bfloat16):
        scores, far = torch.randint(0, 50, (9001,)).to(dtype), 2**31
        for k in (1, 3001, 9001):
            got = EMULATED.select_topk([scores], [], k, "abs")
            assert torch.equal(got, reference.select_topk([scores], [], k, "abs") + far), "positions beyond 2^31"


OPERATIONS = (masked_grad_, masked_grad_panels, scatter_delta_, sparse_adamw_, select_topk)
PROBES = {f.__name__: f for f in (*OPERATIONS, offsets_beyond_int32, scores_beyond_int32)}


def probe(name: str) -> None:
    """Raises if the kernels are wrong; the same inputs every time."""
    torch.manual_seed(5)
    PROBES[name]()


def main() -> None:
    from build import Emulator

    library, seed, *names = sys.argv[1:]
    emulator = Emulator(Path(library))
    emulator.configure(seed=int(seed))
    for name in names:
        probe(name)


if __name__ == "__main__":
    main()
