"""Backward passes that hand over each weight's gradient and free it before the next one exists."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # PyTorch's label of a token without a loss


class Backward:
    """Runs backward passes of a model for some of its weights.

    Args:
        weights: the parameters whose gradients are wanted, by name.
        loss_fn: (model, batch) -> scalar loss; None: `model(**batch).loss`.
    """

    one_part = True
    in_groups = True

    def __init__(
        self, model: nn.Module, weights: dict[str, nn.Parameter], loss_fn: Callable[[nn.Module, Any], Tensor] | None
    ):
        self.model = model
        self.weights = weights
        self._loss_fn = loss_fn
        self._number = 0
        self._take: Callable[[str, Tensor], None] = lambda name, gradient: None
        self._seen: set[str] = set()  # weights whose gradient of this batch has come
        self._lock = threading.Lock()  # autograd runs one thread per device

    @contextmanager
    def prepared(self, seed: int) -> Iterator[None]:
        """Passes run inside; afterwards the model is as it was.

        Meanwhile only the weights require gradients, and the random generators start from `seed`.
        """
        before = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        wanted = {id(weight) for weight in self.weights.values()}
        handles = []
        try:
            for parameter, requires_grad, _ in before:
                parameter.grad = None
                if requires_grad != (id(parameter) in wanted):
                    parameter.requires_grad_(not requires_grad)
            for name, weight in self.weights.items():
                handles.append(weight.register_post_accumulate_grad_hook(partial(self._arrived, name)))
            with unchanged_buffers(self.model), seeded(self.model, seed), gradients_on():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, requires_grad, grad in before:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
                parameter.grad = grad

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a sum of gradients: the weight's."""
        return tuple(self.weights[name].shape)

    def __call__(self, number: int, batch: Any, take: Callable[[str, Tensor], None]) -> None:
        """One forward and backward pass, in which `take(name, gradient)` gets every gradient as it arises.

        Args:
            number: names the batch in errors.

        Raises:
            TypeError, ValueError: the batch gives no scalar loss, no gradient, or a gradient that is not finite.
            RuntimeError: a gradient came in parts.
        """
        self._number, self._take = number, take
        self._seen.clear()
        loss = loss_of(self.model, batch, number, self._loss_fn)
        if loss.requires_grad:
            loss.backward()
        check_finite(loss, number)
        if not self._seen:
            raise ValueError(
                f"batch {number}: the loss gives no gradient for any eligible weight (with reentrant gradient "
                "checkpointing call model.enable_input_require_grads() first)"
            )

    def _arrived(self, name: str, weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        with self._lock:
            if gradient is None:
                raise RuntimeError(f"another hook on {name} took its gradient; remove that hook before selecting")
            if name in self._seen:
                raise RuntimeError(
                    f"batch {self._number}: the gradient of {name} came in parts (a shared weight under reentrant "
                    "gradient checkpointing?); set use_reentrant=False"
                )
            self._seen.add(name)
            if not is_finite(gradient):
                raise ValueError(f"batch {self._number}: the gradient of {name} is not finite")
            self._take(name, gradient)


class Samples(Backward):
    """As Backward, but each row of a batch is a batch of its own: the gradients of single samples.

    Rows whose "labels" are all ignored (-100) have no loss and are left out.
    """

    one_part = False

    def __call__(self, number: int, batch: Any, take: Callable[[str, Tensor], None]) -> None:
        """A forward and backward pass per row.

        Raises:
            TypeError: the batch is neither a tensor nor a mapping or sequence of tensors.
            ValueError: it has no row with a loss.
        """
        rows = [row for row in rows_of(batch, number) if not _without_loss(row)]
        if not rows:
            raise ValueError(f"batch {number} must have a row whose labels are not all {IGNORED}, got none")
        for row in rows:
            super().__call__(number, row, take)


def _without_loss(row: Any) -> bool:
    labels = row.get("labels") if isinstance(row, Mapping) else None
    return isinstance(labels, Tensor) and bool((labels == IGNORED).all())


def rows_of(batch: Any, number: int) -> Iterator[Any]:
    """The batch's rows, each a batch of one; what is no tensor, or has no dimension, goes along with every row.

    Raises:
        TypeError: the batch is neither a tensor nor a mapping or sequence of tensors.
        ValueError: its tensors differ in their first dimension.
    """
    mapping = isinstance(batch, Mapping)
    parts = list(batch.values()) if mapping else list(batch) if isinstance(batch, list | tuple) else [batch]
    sizes = {len(part) for part in parts if isinstance(part, Tensor) and part.dim()}
    if not sizes:
        raise TypeError(f"batch {number} must hold tensors to be split in samples, got {type(batch).__name__}")
    if len(sizes) > 1:
        raise ValueError(f"batch {number} must have as many rows in every tensor, got {sorted(sizes)}")
    for i in range(sizes.pop()):
        row = [part[i : i + 1] if isinstance(part, Tensor) and part.dim() else part for part in parts]
        yield dict(zip(batch, row, strict=True)) if mapping else row[0] if isinstance(batch, Tensor) else tuple(row)


def loss_of(model: nn.Module, batch: Any, number: int, loss_fn: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    """The scalar loss of a batch, `model(**batch).loss` unless there is a `loss_fn`; `number` names it in errors.

    Raises:
        TypeError, ValueError: the batch is no mapping and there is no loss_fn; it gives no scalar.
    """
    loss: Any
    if loss_fn is not None:
        loss, source = loss_fn(model, batch), "loss_fn(model, batch)"
    else:
        output = model(**moved_to(model, batch, number))
        loss, source = getattr(output, "loss", None), "model(**batch).loss (has the batch labels? else give a loss_fn)"
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"batch {number}: {source} must be a scalar tensor, got {got}")
    return loss


def check_finite(loss: Tensor, number: int) -> None:
    """
    Raises:
        ValueError: the loss is not finite. Its gradient may be: that of a mean over no label is zero.
    """
    if not torch.isfinite(loss.detach()).all():
        raise ValueError(f"batch {number}: the loss must be finite, got {loss.item()} (is no label counted?)")


def moved_to(model: nn.Module, batch: Any, number: int) -> dict[str, Any]:
    """The batch as arguments of the model, tensors on its device.

    Raises:
        TypeError: it is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch {number} must be a mapping for model(**batch), got {type(batch).__name__}; "
            "for other batches give a loss_fn"
        )
    device = next(model.parameters()).device
    return {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}


@contextmanager
def gradients_on() -> Iterator[None]:
    """Autograd records, whatever the caller switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's buffers hold what they held before."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in buffers:
                if not torch.equal(buffer, old):  # batch norm changes them without a new version number
                    buffer.copy_(old)


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """The generators of the model's devices start from `seed` and are put back afterwards."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        # not torch.manual_seed: it would also seed devices that are not put back
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; needs no temporary of the tensor's size."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
