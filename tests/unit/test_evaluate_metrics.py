"""The figures of an evaluation, on features whose answers are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cogvit.errors import ConfigError
from cogvit.evaluation.examples import principal_colors
from cogvit.evaluation.metrics import (
    explain,
    knn_accuracy,
    linear_accuracy,
    recall,
    recall_chance,
    zeroshot_accuracy,
)
from cogvit.evaluation.results import read_evaluation, score, table, write_evaluation

CLASSIFIERS = (knn_accuracy, linear_accuracy)


def blobs(seed: int, per_class: int, spread: float) -> tuple[Tensor, Tensor]:
    """Three clouds around fixed points of 8 dimensions, far from the origin, with labels 2, 5 and 9."""
    center = 100.0 + 4.0 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    place = torch.arange(3).repeat(per_class)
    noise = torch.randn(len(place), 8, generator=torch.Generator().manual_seed(seed))
    return center[place] + spread * noise, torch.tensor([2, 5, 9])[place]


@pytest.mark.parametrize("classify", CLASSIFIERS)
def test_classifiers_separate_what_is_separable(classify) -> None:
    assert classify(*blobs(1, 30, 0.3), *blobs(2, 20, 0.3)) == 1.0


@pytest.mark.parametrize("classify", CLASSIFIERS)
def test_classifiers_see_differences_beside_a_large_mean(classify) -> None:
    label = torch.arange(80) % 2
    train, test = (1000.0 + label.unsqueeze(1) + 0.05 * torch.randn(80, 4) for _ in range(2))
    assert classify(train, label, test, label) == 1.0


@pytest.mark.parametrize("classify", CLASSIFIERS)
def test_classifiers_count_what_they_miss(classify) -> None:
    test, label = blobs(2, 20, 0.3)
    wrong = label.clone()
    wrong[:15] = 77  # a class that the training set lacks
    assert classify(*blobs(1, 30, 0.3), test, wrong) == pytest.approx(45 / 60)


@pytest.mark.parametrize("classify", CLASSIFIERS)
def test_classifiers_guess_where_features_say_nothing(classify) -> None:
    train, test = torch.randn(600, 8), torch.randn(600, 8)
    label = torch.arange(600) % 3
    assert 0.2 < classify(train, label, test, label) < 0.47


@pytest.mark.parametrize("classify", CLASSIFIERS)
def test_constant_channels_do_no_harm(classify) -> None:
    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full((len(x), 2), 3.0)], dim=1)

    (train, train_label), (test, test_label) = blobs(1, 30, 0.3), blobs(2, 20, 0.3)
    assert classify(padded(train), train_label, padded(test), test_label) == 1.0


def test_linear_probe_uses_small_channels() -> None:
    train, label = blobs(1, 60, 0.3)
    scale = torch.tensor([1e-3] * 7 + [1e3])
    train, test = train * scale, blobs(2, 30, 0.3)[0] * scale
    train[:, 7], test[:, 7] = torch.randn(len(train)) * 1e3, torch.randn(len(test)) * 1e3
    assert linear_accuracy(train, label, test, blobs(2, 30, 0.3)[1]) > 0.95


def test_zeroshot_takes_the_mean_of_a_class_prompts() -> None:
    image = torch.eye(3)
    prompt = torch.eye(3)[[2, 0, 1, 1]]
    assert zeroshot_accuracy(image, torch.tensor([7, 4, 9]), prompt, torch.tensor([9, 7, 4, 4])) == 1.0
    assert zeroshot_accuracy(image, torch.tensor([4, 4, 9]), prompt, torch.tensor([9, 7, 4, 4])) == pytest.approx(2 / 3)


def equal(query_id: Tensor, gallery_id: Tensor) -> Tensor:
    """The pairs of a query and an item of its own id."""
    return (query_id.unsqueeze(1) == gallery_id).nonzero()


def test_recall_of_identical_embeddings_is_one() -> None:
    embedding, own = torch.eye(2000), equal(torch.arange(2000), torch.arange(2000))  # more than one block of queries
    assert recall(embedding, embedding, own, 1) == 1.0
    assert recall(embedding.roll(1, dims=0), embedding, own, 1) == 0.0


def test_recall_looks_at_k_answers() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    query = torch.tensor([[1.0, 0.0]])
    assert [recall(query, gallery, torch.tensor([[0, 2]]), k) for k in (1, 2, 3)] == [0.0, 0.0, 1.0]


def test_equal_captions_are_equally_right() -> None:
    query, gallery = torch.eye(4)[:1], torch.eye(4)
    assert recall(query, gallery, torch.tensor([[0, 3], [0, 0]]), 1) == 1.0
    assert recall(query, gallery, torch.tensor([[0, 3], [0, 2]]), 1) == 0.0


def test_an_image_with_several_captions_finds_any_of_them() -> None:
    image, text = torch.eye(3), torch.eye(3)[[0, 1, 1, 2]]
    right = torch.tensor([[1, 0], [1, 1], [0, 2], [2, 3]])  # the second image has two captions, the first one's is off
    assert recall(image, text, right, 1) == pytest.approx(2 / 3)
    assert recall(text, image, right.flip(1), 1) == pytest.approx(2 / 4)
    assert recall_chance(right, 3, 4, 1) == pytest.approx((1 + 2 + 1) / 4 / 3)
    assert recall_chance(right.flip(1), 4, 3, 1) == pytest.approx(1 / 3)


def test_chance_of_recall() -> None:
    own = equal(torch.arange(1377), torch.arange(1377))
    assert recall_chance(own, 1377, 1377, 5) == pytest.approx(5 / 1377)
    assert recall_chance(own, 1377, 1377, 2000) == 1.0
    assert recall_chance(torch.tensor([[0, 0], [0, 1]]), 1, 4, 2) == pytest.approx(1 - (2 / 4) * (1 / 3))
    assert recall_chance(equal(torch.zeros(7), torch.zeros(7)), 7, 7, 1) == 1.0


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.integers(1, 6))
def test_chance_is_what_random_orders_give(labels: list[int], k: int) -> None:
    ids = torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    orders = torch.rand(3000, len(ids), generator=generator).argsort(dim=1)[:, :k]
    hits = (ids[orders].unsqueeze(2) == ids).any(dim=1).float().mean()
    assert recall_chance(equal(ids, ids), len(ids), len(ids), k) == pytest.approx(float(hits), abs=0.05)


def test_explained_share() -> None:
    target = torch.randn(500, 6) * torch.arange(1, 7) + 5
    mean = target.mean(dim=0).expand_as(target)
    assert explain(target, target).share() == 1.0
    assert explain(target, mean).share() == pytest.approx(0.0, abs=1e-6)
    assert explain(target, (target + mean) / 2).share() == pytest.approx(0.75, abs=1e-6)
    assert explain(target, torch.zeros_like(target)).share() < -1.0


def test_explained_share_of_parts_is_that_of_the_whole() -> None:
    target, predicted = torch.randn(90, 4) + 3, torch.randn(90, 4)
    parts = explain(target[:20], predicted[:20]) + explain(target[20:], predicted[20:])
    assert parts.share() == pytest.approx(explain(target, predicted).share(), abs=1e-12)


def test_principal_colors_follow_the_features() -> None:
    x = torch.zeros(60, 16)
    x[:30, 3], x[30:, 3] = 50.0, -50.0
    x += torch.randn(60, 16) * 0.1
    colors = principal_colors(x)
    assert colors.shape == (60, 3) and colors.dtype == torch.uint8
    assert (colors[:30, 0] > 200).all() and (colors[30:, 0] < 55).all()
    assert torch.equal(colors, principal_colors(x))
    assert principal_colors(torch.ones(2, 16)).shape == (2, 3)


def test_figures_survive_their_file_and_fit_the_table(tmp_path: Path) -> None:
    results = {"knn_digits": {"accuracy": score(0.9375, 0.1)}, "distill_dinov3": {"explained_all": score(-0.5, 0.0)}}
    path = tmp_path / "deep" / "eval.json"
    write_evaluation(path, results)
    assert read_evaluation(path) == results
    lines = [line.split() for line in table(results).splitlines()]
    assert lines == [
        ["task", "metric", "value", "chance"],
        ["knn_digits", "accuracy", "93.8%", "10.0%"],
        ["distill_dinov3", "explained_all", "-50.0%", "0.0%"],
    ]


@pytest.mark.parametrize("text", ["", "[]", '{"task": 1}', '{"task": {"metric": {"value": 1}}}'])
def test_file_that_is_no_evaluation_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(ConfigError, match="does not hold an evaluation"):
        read_evaluation(tmp_path / "eval.json")
