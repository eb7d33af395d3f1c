"""Compiles every Triton kernel for GPUs that are not here and prints what the compiler made of it.

    python -m bench.compile_report            the table
    python -m bench.compile_report --check    exits 1 where a kernel exceeds its budget (bench/compile_budget.json)
    python -m bench.compile_report --update   write the budgets anew

The operations are called as a GPU would see them, on CPU tensors, with the launches intercepted: what is compiled is
what a launch would compile, with its block sizes, its alignment of pointers and its constants.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import triton
from sparseft.kernels import masked_grad, scatter_delta, select_topk, sparse_adamw
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sparseft.pattern import Pattern, pack

ARCHITECTURES = {80: 108, 90: 132, 100: 148}  # compute capability -> processors (A100, H100, B200)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block may use
BUDGET = Path(__file__).with_name("compile_budget.json")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTIONS = {
    "mma": r"\b(HMMA|HGMMA|UTC\w*MMA|DMMA)\b",  # tensor cores: Ampere, Hopper, Blackwell, fp64
    "ld128": r"\bLD(G|GSTS)\.E[\w.]*\.128\b",
    "st128": r"\bSTG\.E[\w.]*\.128\b",
    "cas": r"\bATOM\w*\.[\w.]*CAS\b",
    "local": r"\b(LDL|STL)\b",
}
ODD = "bf16 odd"  # nothing aligned, nothing optional given, sizes of one, which the compiler takes for constants
COLUMNS = ("registers", "spills", "shared", *INSTRUCTIONS)
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
TILES = {  # what masked_grad is compiled for; 64 x 64 is the default
    "fp32": ((64, 64), (128, 128), (128, 16), (16, 16)),
    "bf16": ((64, 64), (128, 128), (128, 16), (16, 16)),
    "fp16": ((64, 64), (128, 128)),
    "fp64": ((64, 64), (128, 128)),
}
MUST_HAVE = {  # instructions without which a kernel is not the one that was meant
    "_tiles": ("mma",),
    "_panels": ("mma",),
    "_scatter": ("ld128",),
    "_adamw": ("ld128", "st128"),
    "_count": ("ld128",),
    "_gather": ("ld128",),
}


# ---- what is compiled: the operations, called on CPU tensors ---------------------------------------------------


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, a call that launches kernels), for every operation, dtype and configuration."""
    for name, dtype in FLOATS.items():
        for tile in TILES[name]:
            yield f"{name} {tile[0]}x{tile[1]}", partial(_masked_grad, dtype, tile)
        yield f"{name} 64x64 first", partial(_masked_grad, dtype, (64, 64), accumulate=False)
        yield f"{name} panels", partial(_masked_grad, dtype, (64, 64), variant="panels")
        yield f"{name} panels first", partial(_masked_grad, dtype, (64, 64), variant="panels", accumulate=False)
        for mode in ("add", "copy", "swap"):
            yield f"{name} {mode}", partial(_scatter_delta, dtype, mode)
        yield name, partial(_sparse_adamw, dtype)
        if dtype.itemsize == 2:
            yield f"{name} no masters", partial(_sparse_adamw, dtype, seed=7)
        for score in ("abs", "product"):
            yield f"{name} {score}", partial(_select_topk, dtype, score)
    for variant in ("tiles", "panels"):
        yield f"tf32 {variant}", partial(_masked_grad, torch.float32, (64, 64), variant=variant, tf32=True)
    for operation in (_odd_masked_grad, _odd_entries, _odd_select_topk):
        yield ODD, operation


def _layout(tile: tuple[int, int] = (64, 64)):
    return pack([Pattern.from_mask(torch.ones(256, 256, dtype=torch.bool), tile=tile)])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _masked_grad(
    dtype: torch.dtype, tile: tuple[int, int], variant: str = "tiles", accumulate: bool = True, tf32: bool = False
) -> None:
    layout, operand = _layout(tile), torch.zeros(512, 256, dtype=dtype)
    out = torch.zeros(len(layout.local), dtype=_wide(dtype))
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    masked_grad.masked_grad_(out, operand, operand, *layout, accumulate, variant=variant)


def _scatter_delta(dtype: torch.dtype, mode: str) -> None:
    layout = _layout()
    values = torch.zeros(len(layout.local), dtype=dtype if mode == "swap" else _wide(dtype))
    scatter_delta.scatter_delta_([torch.zeros(256, 256, dtype=dtype)], values, *layout, mode, 1.0)


def _sparse_adamw(dtype: torch.dtype, seed: int | None = None) -> None:
    layout = _layout()
    k, state = len(layout.local), _wide(dtype)
    values = torch.zeros(k, dtype=state if seed is None else dtype)
    arena = [torch.zeros(k, dtype=state) for _ in range(3)]
    sparse_adamw.sparse_adamw_(
        [torch.zeros(256, 256, dtype=dtype)], values, *arena, torch.zeros(k, dtype=dtype),
        torch.ones(1, dtype=torch.int64), torch.zeros(k, dtype=torch.int32), *layout,
        torch.tensor(1e-3), 0.9, 0.999, 1e-8, 0.1, False, torch.tensor(1.0), torch.tensor(0.0), seed,
    )  # fmt: skip


def _select_topk(dtype: torch.dtype, score: str) -> None:
    scores = [torch.zeros(1 << 20, dtype=dtype)]
    select_topk.select_topk(scores, scores if score == "product" else [], 1000, score)


def _unaligned(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(count + 1, dtype=dtype)[1:]


def _odd_masked_grad() -> None:
    """One token, operands that are compact already, sums of squares."""
    layout = pack([Pattern.from_mask(torch.ones(3, 5, dtype=torch.bool), tile=(3, 5))])
    out, squares = _unaligned(15, torch.float32), _unaligned(1, torch.float32)
    operands = [_unaligned(n, torch.bfloat16).view(1, n) for n in (3, 5)]
    for variant in ({"squares": squares}, {"variant": "panels"}):
        masked_grad.masked_grad_(out, *operands, None, None, *layout[2:], False, **variant)


def _odd_entries() -> None:
    """A single entry; then a worklist with a gap."""
    for mask, keep in ((torch.ones(1, 1), 1), (torch.ones(3, 5), 2)):
        layout = pack([Pattern.from_mask(mask.bool(), tile=(2, 3))])
        layout = layout._replace(tiles=layout.tiles[:keep].clone())
        k, weights = len(layout.local), [_unaligned(mask.numel(), torch.bfloat16).view(mask.shape)]
        scatter_delta.scatter_delta_(weights, _unaligned(k, torch.float32), *layout, "add", 1.0)
        arena = [_unaligned(k, torch.float32) for _ in range(4)]
        sparse_adamw.sparse_adamw_(weights, *arena, None, torch.ones(1, dtype=torch.int64), None, *layout,
                                   torch.tensor(1e-3), 0.9, 0.999, 1e-8, 0.1, True, None, None)  # fmt: skip


def _odd_select_topk() -> None:
    scores = [_unaligned(3, torch.bfloat16)]
    select_topk.select_topk(scores, scores, 1, "product")


# ---- compiling ------------------------------------------------------------------------------------------------


class FakeDriver:
    """As much of a driver as compiling for an absent GPU takes."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compiled(arch: int) -> dict[str, dict[str, int]]:
    """{kernel and label: what the compiler made of it} for one architecture."""
    driver.set_active(FakeDriver(arch))
    found: dict[str, dict[str, int]] = {}
    known: list[object] = []
    run, label = JITFunction.run, ""

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel not in known:
            name = f"{self.fn.__name__} {label}"
            found[name if name not in found else f"{name} {sum(n.startswith(name) for n in found)}"] = facts(kernel)
            known.append(kernel)
        return kernel

    JITFunction.run = compile_only
    masked_grad.architecture = lambda device: arch
    masked_grad.processors = select_topk.processors = lambda device: ARCHITECTURES[arch]
    select_topk._bin = lambda histograms, rank: (0, 0, 1)  # nothing has been counted
    for label, call in calls():  # noqa: B007 (compile_only reads it)
        call()
    return found


def facts(kernel) -> dict[str, int]:
    """Registers and bytes of spilled registers per thread, bytes of shared memory per block, counts of instructions."""
    usage, code = (
        _tool("cuobjdump", kernel.asm["cubin"], "--dump-resource-usage"),
        _tool("nvdisasm", kernel.asm["cubin"]),
    )
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found)
    counts = {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}
    return {"registers": registers, "spills": stack + local, "shared": kernel.metadata.shared, **counts}


def _tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


# ---- the table and the budget ----------------------------------------------------------------------------------


def complaints(arch: int, found: dict[str, dict[str, int]], budget: dict[str, dict[str, int]] | None) -> list[str]:
    """Where the kernels exceed their budgets (None: another compiler's) or are not what they were meant to be."""
    wrong = []
    if budget is not None:
        wrong += [f"{name}: in the budget, but no longer compiled" for name in budget if name not in found]
        wrong += [f"{name}: not in the budget (--update)" for name in found if name not in budget]
    for name, fact in found.items():
        limits = (budget or {}).get(name, {}).items()
        wrong += [f"{name}: {fact[what]} {what}, budget {limit}" for what, limit in limits if fact[what] > limit]
        needed = MUST_HAVE.get(name.split()[0], ())
        wrong += [f"{name}: no {what}" for what in needed if not fact[what] and not (what != "mma" and ODD in name)]
        if budget is not None and (fact["spills"] or fact["local"]):
            wrong.append(f"{name}: spills {fact['spills']} bytes of registers")
        if fact["shared"] > SHARED_LIMIT[arch]:
            wrong.append(f"{name}: {fact['shared']} bytes of shared memory, the GPU has {SHARED_LIMIT[arch]}")
    return [f"sm_{arch} {line}" for line in wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed budgets")
    parser.add_argument("--update", action="store_true", help="write the budgets")
    options = parser.parse_args()
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:  # a process compiles for one GPU only
        reports = dict(zip(ARCHITECTURES, pool.map(compiled, ARCHITECTURES), strict=True))
    print(f"triton {triton.__version__}; bytes per thread (spills) and block (shared); counts of instructions")
    print(f"{'':34}" + "".join(f"{c:>10}" for c in COLUMNS))
    for arch, found in reports.items():
        for name, fact in found.items():
            print(f"sm_{arch:<4}{name:<27}" + "".join(f"{fact[c]:>10}" for c in COLUMNS))
    if options.update:
        keep = ("registers", "spills", "shared")
        budget = {"triton": triton.__version__}
        budget |= {f"sm_{a}": {n: {w: f[w] for w in keep} for n, f in r.items()} for a, r in reports.items()}
        lines = json.dumps(budget, indent=1)
        BUDGET.write_text(
            re.sub(r"\{\n\s+(\"registers[^}]*?)\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", lines) + "\n"
        )
    if options.check:
        budget = json.loads(BUDGET.read_text())
        if budget["triton"] != triton.__version__:
            print(f"the budgets are triton {budget['triton']}'s: registers, spills and shared memory are not compared")
            budget = {}
        wrong = [line for arch, found in reports.items() for line in complaints(arch, found, budget.get(f"sm_{arch}"))]
        print("\n".join(wrong) or "every kernel is within its budget")
        return 1 if wrong else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
