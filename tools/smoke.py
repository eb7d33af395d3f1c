"""What an installed wheel must do beside the torch that runs this; tools/wheels.py starts it, without a GPU.

    python smoke.py VERSION       (in an environment of its own, outside the checkout)

Trains a small model by the compiled kernels and by the reference, and lists the CUDA kernels that the wheel registered.
"""

import ctypes
import json
import os
import sys
from importlib import metadata
from pathlib import Path

import torch

import sparseft
from sparseft import backend


def train(name: str) -> tuple[sparseft.Delta, torch.nn.Module]:
    """Two steps on 10 % of the weights, every operation served by implementation `name`; the change is undone again."""
    with backend.forced(name):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(48, 80), torch.nn.GELU(), torch.nn.Linear(80, 24))
        inputs = torch.randn(4, 32, 48)

        def loss_of(model, batch):
            return model(batch).square().mean()

        patterns = sparseft.select(model, [inputs[0]], density=0.1, tile=(16, 16), tile_budget=0.5, loss_fn=loss_of)
        sparseft.sparsify(model, patterns)  # select_topk
        optimizer = sparseft.SparseAdamW(model, lr=1e-2)
        for batch in inputs[1:3]:
            loss_of(model, batch).backward()  # masked_grad
            optimizer.step()  # sparse_adamw
            optimizer.zero_grad()
        delta = sparseft.Delta.from_model(model)
        delta.revert_(model)  # scatter_delta
    return delta, model


def main() -> None:
    (version,) = sys.argv[1:]
    package = Path(sparseft.__file__).parent
    assert package.is_relative_to(sys.prefix), f"{package} is not the installed wheel"
    assert metadata.version("sparseft") == version, f"installed is {metadata.version('sparseft')}, not {version}"

    (compiled, model), (reference, same) = train("cpu"), train("reference")
    for name, change in reference.changes.items():
        assert torch.equal(compiled.changes[name].pattern.indices(), change.pattern.indices()), name
        torch.testing.assert_close(compiled.changes[name].values, change.values)
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, other)

    if torch.version.cuda:  # the CUDA library asks torch for its stream in this way (csrc/cuda/common.cuh)
        loaded = ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
        assert loaded.aoti_torch_get_current_cuda_stream

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    kernels = [op for op in backend.OPERATIONS if has(f"sparseft_cuda::{op}", "CUDA")]
    print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "cuda kernels": kernels}))


if __name__ == "__main__":
    os.environ.pop("SPARSEFT_BACKEND", None)
    main()
