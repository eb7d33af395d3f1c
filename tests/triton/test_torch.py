"""The Triton kernels behind torch's machinery: opcheck, and a compiled model without graph breaks."""

import pytest
import torch

from sparseft import backend
from sparseft.pattern import Pattern, pack

from . import hardened, strict  # noqa: F401 (the kernels run in the strict interpreter)


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


@pytest.mark.parametrize(
    ("fault", "noticed"),
    [
        (lambda grad_out, *rest: grad_out.new_empty(rest[4].shape, dtype=torch.float64), "Dtypes .* are not equal"),
        (lambda grad_out, *rest: grad_out.new_empty(len(rest[4]) + 1), "Shapes .* are not equal"),
    ],
    ids=["dtype", "shape"],
)
def test_opcheck_notices_a_wrong_fake(fault, noticed):
    """The fake kernel of masked_grad with another dtype or shape than what Triton's kernel returns."""
    right = torch._library.simple_registry.singleton.find("sparseft::masked_grad").fake_impl.kernel.func
    torch.library.register_fake("sparseft::masked_grad", fault, allow_override=True)
    try:
        with backend.forced("triton"), pytest.raises(Exception, match=noticed):
            torch.library.opcheck(torch.ops.sparseft.masked_grad.default, arguments()["masked_grad"])
    finally:
        torch.library.register_fake("sparseft::masked_grad", right, allow_override=True)


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
        with backend.forced("triton"), hardened.recorded() as launches:
            forward(input_ids=tokens, use_cache=False).logits.square().mean().backward()
        assert len([launch for launch in launches if launch.kernel in ("_tiles", "_panels")]) == len(patterns)
        grads.append([p.grad.clone() for p in parameters(model)])
        model.zero_grad(set_to_none=True)
    assert len(grads[0]) > 10
    torch.testing.assert_close(grads[1], grads[0])
