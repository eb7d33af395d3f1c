"""The Triton kernels behind torch's machinery: opcheck, and a compiled model without graph breaks."""

import pytest
import torch

from sparseft import backend
from sparseft.pattern import Pattern, pack

from . import strict  # noqa: F401 (the kernels run in the strict interpreter)


def arguments() -> dict[str, tuple]:
    pattern = Pattern.from_mask(torch.rand(20, 36) < 0.3, tile=(16, 16))
    layout, k = pack([pattern]), len(pattern)
    weight, state = torch.randn(20, 36), [torch.rand(k) for _ in range(4)]
    operands = torch.randn(9, 20), torch.randn(9, 36)
    hyper = torch.tensor(0.01), 0.9, 0.999, 1e-8, 0.1, False, None, torch.tensor(0.0)
    return {
        "masked_grad": (*operands, *layout),
        "masked_grad_": (torch.zeros(k), *operands, *layout, True),
        "scatter_delta_": ([weight], torch.randn(k), *layout, "swap", 1.0),
        "sparse_adamw_": ([weight], *state, None, torch.ones(1, dtype=torch.int64), None, *layout, *hyper),
        "select_topk": ([torch.randn(500)], [], 50, "abs"),
    }


@pytest.mark.parametrize("name", ["masked_grad", "masked_grad_", "scatter_delta_", "sparse_adamw_", "select_topk"])
def test_opcheck(name):
    with backend.forced("triton"):
        torch.library.opcheck(getattr(torch.ops.sparseft, name).default, arguments()[name])


def test_a_llama_compiles_without_graph_breaks():
    """Forward and backward, fullgraph: the gradients of the compiled model are the eager one's."""
    pytest.importorskip("transformers")
    from sparseft.layers import parameters, sparsify
    from sparseft.selection import eligible

    from ..tiny import llama

    torch._dynamo.reset()
    model = llama()
    patterns = {n: Pattern.from_mask(torch.rand(w.shape) < 0.2, tile=(16, 16)) for n, w in eligible(model).items()}
    model, tokens = sparsify(model, patterns).eval(), torch.randint(50, (2, 6))
    compiled, grads = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for forward in (model, compiled):
        with backend.forced("triton"):
            forward(input_ids=tokens, use_cache=False).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in parameters(model)])
        model.zero_grad(set_to_none=True)
    assert len(grads[0]) > 10
    torch.testing.assert_close(grads[1], grads[0])
