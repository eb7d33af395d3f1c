"""How likely each label is after its prompt: one row per question, the prompt and common beginnings computed once.

And how likely plain text is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from bench.quality.tasks import Item, Task


@dataclass(frozen=True)
class Tree:
    """A prompt and its labels as a tree of tokens: the prompt is the trunk, equal beginnings of labels share a branch.

    Attributes:
        tokens: one per node, parents before their children.
        parents: the node before each; -1 for the first. `depths`: how many nodes come before each on its way.
        labels: per label the nodes of its tokens.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    labels: list[list[int]]

    @classmethod
    def of(cls, prompt: Sequence[int], labels: Sequence[Sequence[int]]) -> "Tree":
        """From token ids; the prompt must not be empty."""
        size = len(prompt)
        tokens, parents, depths = list(prompt), list(range(-1, size - 1)), list(range(size))
        children: dict[tuple[int, int], int] = {}  # (node, token) -> node
        paths = []
        for label in labels:
            node, path = size - 1, []
            for token in label:
                if (node, token) not in children:
                    children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    depths.append(depths[node] + 1)
                node = children[node, token]
                path.append(node)
            paths.append(path)
        return cls(tokens, parents, depths, paths)

    @property
    def trunk(self) -> int:
        """How many nodes the prompt has."""
        return min((path[0] for path in self.labels if path), default=len(self.tokens))

    def label_tokens(self, label: int) -> list[int]:
        return [self.tokens[node] for node in self.labels[label]]

    def only(self, labels: Sequence[int]) -> "Tree":
        """The tree of some of the labels, in the order given."""
        return Tree.of(self.tokens[: self.trunk], [self.label_tokens(label) for label in labels])

    def visible(self) -> Tensor:
        """bool [n, n]: row i marks the nodes on the way to i, and i."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def language_model(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper, with the adapters still in it."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def logits_at(model: nn.Module, where: Tensor, **inputs: Tensor) -> Tensor:
    """[n, vocabulary]: the logits at the n marked positions of `where` (bool [B, T]), and no others.

    The head gets a contiguous matrix: behind a frozen head PyTorch otherwise copies the whole weight for every row.
    """
    inner = language_model(model)
    hidden = inner.base_model(use_cache=False, **inputs).last_hidden_state
    return inner.get_output_embeddings()(hidden[where])


def tree_inputs(trees: Sequence[Tree], pad: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """input_ids and position_ids [B, T] and the additive attention mask [B, 1, T, T]; padding sees itself alone."""
    length = max(len(tree.tokens) for tree in trees)
    ids = torch.full((len(trees), length), pad)
    positions = torch.zeros(len(trees), length, dtype=torch.int64)
    visible = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1, 1)
    for row, tree in enumerate(trees):
        n = len(tree.tokens)
        ids[row, :n], positions[row, :n] = torch.tensor(tree.tokens), torch.tensor(tree.depths)
        visible[row, 0, :n, :n] = tree.visible()
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


Edge = tuple[int, int, int]  # (number of the tree, node, token behind it)


@torch.inference_mode()
def edge_log_probabilities(model: nn.Module, trees: Sequence[Tree], edges: Sequence[Edge], pad: int) -> list[float]:
    """Per edge the log probability of its token after the way to its node; logits are computed at these nodes only."""
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    inputs = {name: tensor.to(device) for name, tensor in tree_inputs(trees, pad, dtype).items()}
    where = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    rows, nodes, tokens = torch.tensor(edges, device=device).T
    where[rows, nodes] = True
    logits = logits_at(model, where, **inputs)
    number = (where.flatten().cumsum(0) - 1).view(where.shape)[rows, nodes]  # of the edge's row of logits
    total = torch.cat([part.float().logsumexp(-1) for part in logits.split(256)])  # fp32 copies of a few rows
    return (logits[number, tokens].float() - total[number]).tolist()


def tree_likelihoods(model: nn.Module, trees: Sequence[Tree], pad: int) -> list[list[float]]:
    """Per tree and label the summed log probability of the label's tokens after the prompt."""
    nodes = [(row, n) for row, tree in enumerate(trees) for n in sorted({n for path in tree.labels for n in path})]
    edges = [(row, trees[row].parents[node], trees[row].tokens[node]) for row, node in nodes]
    known = dict(zip(nodes, edge_log_probabilities(model, trees, edges, pad), strict=True))
    return [[sum(known[row, n] for n in path) for path in tree.labels] for row, tree in enumerate(trees)]


def bounds(model: nn.Module, trees: Sequence[Tree], right: Sequence[int], pad: int) -> list[list[float]]:
    """Per tree and label an upper bound of what `tree_likelihoods` gives; that itself for the tree's label `right`.

    Another label's bound is its likelihood up to the token that leaves the right label's way, that one included. No
    token of the other labels goes through the model, and they are most of a tree.
    """
    ways = [tree.only([label]) for tree, label in zip(trees, right, strict=True)]
    edges: list[Edge] = []
    counts = []
    for row, (tree, way) in enumerate(zip(trees, ways, strict=True)):
        nodes, goal = [way.trunk - 1, *way.labels[0]], way.label_tokens(0)
        for label in map(tree.label_tokens, range(len(tree.labels))):
            common = next((i for i, (a, b) in enumerate(zip(label, goal, strict=False)) if a != b), len(goal))
            known = label[: min(common + 1, len(goal))]  # behind the goal's end no logits are computed
            edges += [(row, node, token) for node, token in zip(nodes, known, strict=False)]
            counts.append(len(known))
    values = iter(edge_log_probabilities(model, ways, edges, pad))
    sums = iter([sum(next(values) for _ in range(count)) for count in counts])
    return [[next(sums) for _ in tree.labels] for tree in trees]


@dataclass(frozen=True)
class Answers:
    """What a model chose: `hits`, one per item, and `loss`, the mean negative log likelihood of the right labels."""

    hits: list[bool]
    loss: float

    @property
    def accuracy(self) -> float:
        return sum(self.hits) / len(self.hits)


def answer(
    model: nn.Module, tokenizer, task: Task, items: Sequence[Item], *, tokens: int = 1024,
    progress: Callable[[str, int, int], None] | None = None,
) -> Answers:  # fmt: skip
    """The most likely label of every item, by the task's rule.

    Where likelihoods are plain sums, a first pass over the right labels alone decides most items: no other label can be
    as likely. Only what is left of the labels of the others is computed.

    Args:
        tokens: a batch has at most so many, padding included; one row at least.
    """
    trees = [encode(tokenizer, item, ends=task.ends) for item in items]
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    right = [item.answer for item in items]
    was_training = model.training
    model.eval()
    if task.per_character:
        rivals = [list(range(len(tree.labels))) for tree in trees]
        losses = [0.0] * len(items)
    else:
        rivals, losses = likely_enough(model, trees, right, pad, tokens)
    hits = [labels == [label] for labels, label in zip(rivals, right, strict=True)]
    undecided = [number for number, hit in enumerate(hits) if not hit]
    done = len(items) - len(undecided)
    small = {number: trees[number].only(rivals[number]) for number in undecided}
    for group in batches_by_length([len(small[number].tokens) for number in undecided], tokens):
        batch = [undecided[i] for i in group]
        for number, sums in zip(batch, tree_likelihoods(model, [small[i] for i in batch], pad), strict=True):
            labels = [items[number].labels[i] for i in rivals[number]]
            scale = [len(label) if task.per_character else 1 for label in labels]
            likelihoods = [s / n for s, n in zip(sums, scale, strict=True)]
            place = rivals[number].index(right[number])
            hits[number] = max(range(len(sums)), key=likelihoods.__getitem__) == place
            losses[number] = -sums[place]
        done += len(batch)
        if progress is not None:
            progress(task.name, done, len(items))
    model.train(was_training)
    return Answers(hits, sum(losses) / len(losses))


def likely_enough(
    model: nn.Module, trees: Sequence[Tree], right: Sequence[int], pad: int, tokens: int
) -> tuple[list[list[int]], list[float]]:
    """Per tree the labels whose bound reaches the right label's likelihood, that one among them, and its negative."""
    lengths = [tree.trunk + len(tree.labels[label]) for tree, label in zip(trees, right, strict=True)]
    rivals: list[list[int]] = [[]] * len(trees)
    losses = [0.0] * len(trees)
    for batch in batches_by_length(lengths, tokens):
        found = bounds(model, [trees[i] for i in batch], [right[i] for i in batch], pad)
        for number, highest in zip(batch, found, strict=True):
            mine = highest[right[number]]
            losses[number] = -mine
            rivals[number] = [label for label, bound in enumerate(highest) if bound >= mine]
    return rivals, losses


@torch.inference_mode()
def text_loss(model: nn.Module, tokenizer, texts: Sequence[str], *, tokens: int = 1024) -> float:
    """Mean negative log likelihood of a token of plain text, in nats; what the model has forgotten raises it.

    Args:
        tokens: a batch has at most so many, padding included; one row at least.
    """
    device = next(model.parameters()).device
    rows = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in batches_by_length([len(row) for row in rows], tokens):
        ids = pad_sequence([rows[i] for i in batch], batch_first=True).to(device)
        there = torch.arange(ids.shape[1])[None] < torch.tensor([len(rows[i]) for i in batch])[:, None]
        follows = (there & there.roll(-1, dims=1)).to(device)  # the last position of a row has no next token
        follows[:, -1] = False
        logits = logits_at(model, follows, input_ids=ids, attention_mask=there.long().to(device))
        total += F.cross_entropy(logits.float(), ids.roll(-1, dims=1)[follows], reduction="sum").item()
    model.train(was_training)
    return total / sum(len(row) - 1 for row in rows)


def encode(tokenizer, item: Item, *, ends: bool) -> Tree:
    """The item's tree; with `ends` every label is followed by the end-of-text token."""
    end = [tokenizer.eos_token_id] if ends else []
    prompt = tokenizer(item.prompt, add_special_tokens=False).input_ids
    return Tree.of(prompt, [tokenizer(label, add_special_tokens=False).input_ids + end for label in item.labels])


def batches_by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Item numbers in batches of similar length, the longest first, none with more than `tokens` after padding."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
