"""Figures from features: classification, retrieval and explained variance, as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_NUM_NEIGHBORS = 20
_KNN_TEMPERATURE = 0.07  # both of the DINO papers' protocol
_PROBE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # on the squared weights, beside the mean cross entropy
_PROBE_HELD_BACK = 10  # every so many-th training sample says which penalty is best
_PROBE_ITERATIONS = 100
_BLOCK = 1024  # queries compared at a time


def knn_accuracy(train: Tensor, train_label: Tensor, test: Tensor, test_label: Tensor) -> float:
    """Classify by the nearest neighbors' votes, weighted by their cosine around the training mean.

    Args:
        train: [m, D].
        train_label: [m] int64.
        test: [n, D].
        test_label: [n] int64.
    """
    classes, train_class = train_label.unique(return_inverse=True)
    mean = train.mean(dim=0)
    train, test = F.normalize(train - mean, dim=1), F.normalize(test - mean, dim=1)
    hits = 0
    for start in range(0, len(test), _BLOCK):
        cosine, neighbor = (test[start : start + _BLOCK] @ train.T).topk(min(_NUM_NEIGHBORS, len(train)), dim=1)
        votes = torch.zeros(len(cosine), len(classes))
        votes.scatter_add_(1, train_class[neighbor], (cosine / _KNN_TEMPERATURE).exp())
        hits += int((classes[votes.argmax(dim=1)] == test_label[start : start + _BLOCK]).sum())
    return hits / len(test)


def linear_accuracy(train: Tensor, train_label: Tensor, test: Tensor, test_label: Tensor) -> float:
    """Classify by logistic regression on standardized features; the arguments are those of `knn_accuracy`.

    The penalty is the best of several for a tenth of the training samples, which the others learn; test samples choose
    nothing.
    """
    classes, train_class = train_label.unique(return_inverse=True)
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    scale = torch.where(std > 1e-6 * std.max(), std, torch.inf)  # constant channels say nothing
    train, test = (train - mean) / scale, (test - mean) / scale
    back = torch.zeros(len(train), dtype=torch.bool)
    # In a fixed random order: samples may be sorted by their class.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    back[order[: len(train) // _PROBE_HELD_BACK]] = True
    right = {}
    if back.any():
        for penalty in _PROBE_PENALTIES:
            scores = _probe(train[~back], train_class[~back], len(classes), penalty)(train[back])
            right[penalty] = int((scores.argmax(dim=1) == train_class[back]).sum())
    best = max(right, key=lambda penalty: (right[penalty], penalty)) if right else 1e-3
    found = _probe(train, train_class, len(classes), best)(test).argmax(dim=1)
    return float((classes[found] == test_label).float().mean())


def _probe(train: Tensor, train_class: Tensor, num_classes: int, penalty: float) -> Callable[[Tensor], Tensor]:
    """Fit logistic regression; returns the function from features to scores."""
    weight = torch.zeros(num_classes, train.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_PROBE_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(train, weight, bias), train_class) + penalty * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return lambda features: F.linear(features, weight.detach(), bias.detach())


def zeroshot_accuracy(image: Tensor, label: Tensor, prompt: Tensor, prompt_label: Tensor) -> float:
    """Classify images by the nearest of the classes' prompts.

    Args:
        image: [n, E] unit vectors.
        label: [n] int64.
        prompt: [p, E] unit vectors, any number of each class; a class is their mean direction.
        prompt_label: [p] int64.
    """
    classes, prompt_class = prompt_label.unique(return_inverse=True)
    mean = torch.zeros(len(classes), prompt.shape[1]).index_add(0, prompt_class, prompt)
    found = (image @ F.normalize(mean, dim=1).T).argmax(dim=1)
    return float((classes[found] == label).float().mean())


def recall(query: Tensor, gallery: Tensor, right: Tensor, k: int) -> float:
    """Return the share of queries that find a right item among the k most similar of the gallery.

    Args:
        query: [q, E] unit vectors.
        gallery: [g, E] unit vectors.
        right: [p, 2] int64, pairs of a query and an item that is right for it, each once.
        k: items looked at.
    """
    pair = (right[:, 0] * len(gallery) + right[:, 1]).sort().values
    hits = 0
    for start in range(0, len(query), _BLOCK):
        found = (query[start : start + _BLOCK] @ gallery.T).topk(min(k, len(gallery)), dim=1).indices
        asked = torch.arange(start, start + len(found)).unsqueeze(1) * len(gallery) + found
        at = torch.searchsorted(pair, asked).clamp(max=len(pair) - 1)
        hits += int((pair[at] == asked).any(dim=1).sum())
    return hits / len(query)


def recall_chance(right: Tensor, num_queries: int, num_items: int, k: int) -> float:
    """Return what `recall` expects of a random order: k / g where one item is right for each query."""
    num_right = right[:, 0].bincount(minlength=num_queries).double()
    miss = torch.ones_like(num_right)
    for drawn in range(min(k, num_items)):
        miss *= (num_items - drawn - num_right).clamp(min=0) / (num_items - drawn)
    return float(1 - miss.mean())


@dataclass(frozen=True)
class Explained:
    """Sums over tokens from which the explained share of their variance follows; made by `explain`."""

    count: int
    total: Tensor  # [C] float64
    squares: Tensor  # [C] float64
    errors: Tensor  # [C] float64, squared

    def __add__(self, other: Explained) -> Explained:
        return Explained(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            self.errors + other.errors,
        )

    def share(self) -> float:
        """Return 1 - (squared error) / (squared deviation from each channel's mean), summed over the channels.

        Predicting the mean explains 0, a perfect prediction 1.
        """
        deviation = self.squares - self.total.square() / self.count
        return float(1 - self.errors.sum() / deviation.sum())


def explain(target: Tensor, predicted: Tensor) -> Explained:
    """Return the sums of some tokens, both [n, C]."""
    target, predicted = target.double(), predicted.double()
    errors = (target - predicted).square().sum(dim=0)
    return Explained(len(target), target.sum(dim=0), target.square().sum(dim=0), errors)
