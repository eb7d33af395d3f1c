"""A small model with sparse layers and with weights whose gradient is gathered, and what tests do with it."""

import torch
from torch import Tensor, nn

from sparseft import Pattern

WEIGHTS = ("embed.weight", "up.weight", "experts", "down.weight")


class Mixed(nn.Module):
    """Sparse layers (one with a bias), and weights whose gradient is gathered: an embedding and 3-D experts."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.up = nn.Linear(7, 13)
        self.experts = nn.Parameter(torch.randn(3, 13, 9) / 4)
        self.down = nn.Linear(9, 5, bias=False)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.up(self.embed(ids)))
        return self.down(torch.tanh(torch.stack([x @ e for e in self.experts]).mean(0)))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).square().mean()


def make(dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    return Mixed(dtype)


def batches(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(11, (6,), generator=generator) for _ in range(count)]


def masks_for(model: nn.Module, seed: int, density: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(model.get_parameter(name).shape, generator=generator) < density for name in WEIGHTS}


def patterns_from(masks: dict[str, Tensor], tile: tuple[int, int] = (4, 8)) -> dict[str, Pattern]:
    return {name: Pattern.from_mask(mask.reshape(-1, mask.shape[-1]), tile=tile) for name, mask in masks.items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> None:
    for ids in data:
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone().contiguous().view(torch.uint8) for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
