"""What a model can do: key facts in its answers, their distance to the reference, multiple choice, loss."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseft.data import IGNORE, Collator, Encoder, Row, plain_question, reference, shift

Progress = Callable[[str, int, int], None]  # what, done, of how many


def normalise(text: str) -> str:
    """Lower case, punctuation to spaces, runs of white space to one space."""
    return " ".join(re.sub(r"[\W_]+", " ", text.lower()).split())


def has_key_facts(answer: str, keys: Iterable[Iterable[str]]) -> bool:
    """Whether every key fact is in the answer, in one of its accepted spellings, at word boundaries.

    Raises:
        TypeError: a fact is a text instead of a list of its spellings.
    """
    keys = list(keys)
    if any(isinstance(spellings, str) for spellings in keys):
        raise TypeError(f"keys must be lists of spellings, got {keys!r}")
    padded = f" {normalise(answer)} "
    return all(any(f" {normalise(spelling)} " in padded for spelling in spellings) for spellings in keys)


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def normalised_edit_distance(answer: str, reference: str) -> float:
    """Edit distance of the normalised texts over the longer one's length: 0 for equal, 1 for nothing in common."""
    a, b = normalise(answer), normalise(reference)
    return edit_distance(a, b) / max(len(a), len(b), 1)


def generate(model: nn.Module, tokenizer, prompts: Sequence[list[int]], *, max_new_tokens: int = 64,
             batch_size: int = 32, progress: Progress | None = None) -> list[str]:  # fmt: skip
    """Greedy answers to prompts (token ids), without special tokens, in the prompts' order."""
    answers = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


@torch.inference_mode()
def continuations(model: nn.Module, tokenizer, prompts: Sequence[list[int]], max_new_tokens: int,
                  batch_size: int = 32, progress: Progress | None = None) -> list[list[int]]:  # fmt: skip
    """Greedy continuations as token ids, each up to and with its first end token if it has one.

    Prompts of similar length share a batch; they are padded on the left.
    """
    collate = Collator.of(tokenizer, side="left")
    ends = {tokenizer.eos_token_id, *_several(model.generation_config.eos_token_id)}
    found: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    # generate hands the head a slice; a frozen head would copy its whole weight for every row of it
    contiguous = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    done = 0
    for batch in _by_length([len(prompt) for prompt in prompts], batch_size):
        padded = collate([{"input_ids": prompts[i]} for i in batch])
        inputs = {name: tensor.to(model.device) for name, tensor in padded.items()}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
                                pad_token_id=collate.pad, temperature=None, top_p=None, top_k=None)  # fmt: skip
        for i, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            found[i] = ids[: next((at for at, token in enumerate(ids, 1) if token in ends), len(ids))]
        done += len(batch)
        _report(progress, "answers", done, len(prompts))
    contiguous.remove()
    model.train(was_training)
    return found


def loss_positions(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """Arguments that make a model compute logits only where `labels` [B, T] ask for them, and the labels there.

    Empty for a model whose forward has no `logits_to_keep`. (Positions as a tensor, never as a slice: the head
    of a frozen model copies its whole weight when its input is not contiguous.)
    """
    forward = inspect.unwrap(type(model).forward)
    if "logits_to_keep" not in inspect.signature(forward).parameters:
        return {}
    shifted = shift(labels)
    wanted = shifted != IGNORE
    if "slice_logits_to_keep" in forward.__code__.co_names:  # takes a mask: [B, T] -> logits [n, V]
        return {"logits_to_keep": wanted, "shift_labels": shifted[wanted]}
    columns = wanted.any(0).nonzero().squeeze(1)
    return {"logits_to_keep": columns, "shift_labels": shifted[:, columns]}


def answer_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Per row of a batch: the summed cross entropy of its labelled tokens, fp32 [B], and their number, int64 [B]."""
    labels = batch["labels"]
    wanted = shift(labels) != IGNORE
    positions = loss_positions(model, labels)
    target = positions.pop("shift_labels", shift(labels))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **positions).logits
    losses = F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), ignore_index=IGNORE, reduction="none")
    row = wanted.nonzero()[:, 0]
    kept = losses[target.flatten() != IGNORE]
    return torch.zeros(len(labels), device=kept.device).index_add_(0, row, kept), wanted.sum(1)


@torch.inference_mode()
def score(model: nn.Module, tokenizer, examples: Sequence[dict[str, list[int]]], *, batch_size: int = 32,
          progress: Progress | None = None, what: str = "loss") -> tuple[Tensor, Tensor]:  # fmt: skip
    """`answer_losses` of many tokenised examples, in their order: (losses [n], counts [n]) on the CPU."""
    collate = Collator.of(tokenizer)
    losses, counts = torch.zeros(len(examples)), torch.zeros(len(examples), dtype=torch.int64)
    was_training = model.training
    model.eval()
    done = 0
    for batch in _by_length([len(example["input_ids"]) for example in examples], batch_size):
        inputs = {name: tensor.to(model.device) for name, tensor in collate([examples[i] for i in batch]).items()}
        loss, count = answer_losses(model, inputs)
        losses[batch], counts[batch] = loss.cpu(), count.cpu()
        done += len(batch)
        _report(progress, what, done, len(examples))
    model.train(was_training)
    return losses, counts


def choose(model: nn.Module, tokenizer, items: Sequence[Row], *, batch_size: int = 64,
           progress: Progress | None = None) -> list[int]:  # fmt: skip
    """For each multiple-choice item the index of its most likely choice after `plain_question`.

    A choice's likelihood is the mean log probability of its tokens.
    """
    examples = []
    for item in items:
        question = tokenizer(plain_question(item)).input_ids
        for choice in item["choices"]:
            ids = tokenizer(f" {choice}", add_special_tokens=False).input_ids
            examples.append({"input_ids": question + ids, "labels": [IGNORE] * len(question) + ids})
    losses, counts = score(model, tokenizer, examples, batch_size=batch_size, progress=progress, what="choices")
    parts = (losses / counts.clamp(min=1)).split([len(item["choices"]) for item in items])
    return [int(part.argmin()) for part in parts]


@dataclass(frozen=True)
class Result:
    """Metrics of one model on one set of rows; None where the rows do not ask for it.

    Attributes:
        key_fact_accuracy: share of rows with `keys` whose greedy answer holds every key fact.
        edit_distance: mean normalised edit distance of the greedy answers to the references (0 best, 1 worst).
        loss: mean cross entropy per token of the references.
        choice_accuracy: share of the multiple-choice rows answered right.
        answers: the greedy answers, one per row with a reference.
    """

    key_fact_accuracy: float | None = None
    edit_distance: float | None = None
    loss: float | None = None
    choice_accuracy: float | None = None
    answers: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """The numbers that there are."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, float)}


def evaluate(model: nn.Module, encoder: Encoder, rows: Sequence[Row], *, max_new_tokens: int = 64,
             batch_size: int = 32, progress: Progress | None = None) -> Result:  # fmt: skip
    """All metrics that the rows allow (multiple-choice rows and rows with answers may be mixed)."""
    tokenizer = encoder.tokenizer
    items = [row for row in rows if "choices" in row]
    open_rows = [row for row in rows if "choices" not in row]
    found: dict[str, Any] = {}
    if items:
        chosen = choose(model, tokenizer, items, batch_size=2 * batch_size, progress=progress)
        found["choice_accuracy"] = _mean(c == item["answer"] for c, item in zip(chosen, items, strict=True))
    if open_rows:
        examples = [encoder.example(row) for row in open_rows]
        losses, counts = score(model, tokenizer, examples, batch_size=batch_size, progress=progress)
        prompts = [encoder.prompt(row) for row in open_rows]
        answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
                           progress=progress)  # fmt: skip
        found["loss"] = float(losses.sum() / counts.sum())
        found["answers"] = tuple(answers)
        found["edit_distance"] = _mean(map(normalised_edit_distance, answers, map(reference, open_rows)))
        keyed = [(answer, row["keys"]) for answer, row in zip(answers, open_rows, strict=True) if row.get("keys")]
        if keyed:
            found["key_fact_accuracy"] = _mean(has_key_facts(answer, keys) for answer, keys in keyed)
    return Result(**found)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first (a batch that does not fit fails at once)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _several(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else value


def _report(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
