"""Few-shot learning is a ridge regression: the closed form, both ways to choose a penalty, and what counts as right."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.objectives import fewshot
from pipeline.objectives.fewshot import BIAS, EPSILON, leave_self_out, probe, ridge, ridges, right, shots

pytestmark = pytest.mark.timeout(300)

SHAPES = [(12, 40), (40, 12), (13, 12), (12, 12), (11, 12)]  # either closed form, and where they meet


def drawn(count: int, width: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count * 100 + width)
    features = torch.randn(count, width, generator=generator) * 3 + 1
    return features, torch.arange(count) % classes


def prepared(features: torch.Tensor, by: torch.Tensor) -> np.ndarray:
    mean, deviation = by.double().numpy().mean(0), by.double().numpy().std(0)
    scaled = (features.double().numpy() - mean) / (deviation + EPSILON)
    return np.concatenate([scaled, np.full((len(features), 1), BIAS)], 1)


@pytest.mark.parametrize(("count", "width"), SHAPES)
@pytest.mark.parametrize("penalty", [2.0**-10, 1.0, 1024.0])
def test_every_head_is_the_ridge_of_scikit_learn(count: int, width: int, penalty: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = drawn(count, width)
    unseen, _ = drawn(30, width)
    targets = 2.0 * np.eye(4)[labels.numpy()] - 1
    theirs: Any = linear_model.Ridge(alpha=penalty, fit_intercept=False, solver="svd")
    theirs.fit(prepared(features, features), targets)
    ours = ridge(features, labels, 4, penalty)
    np.testing.assert_allclose(ours.weights.numpy(), theirs.coef_.T, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        ours.scores(unseen).numpy(), theirs.predict(prepared(unseen, features)), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_every_penalty_gives_the_head_that_it_gives_alone_and_solves_the_normal_equations(
    count: int, width: int
) -> None:
    features, labels = drawn(count, width)
    x = torch.from_numpy(prepared(features, features))
    y = 2 * torch.nn.functional.one_hot(labels, 4).double() - 1
    penalties = [0.01, 1.0, 1024.0, 2.0**19]
    for penalty, head in zip(penalties, ridges(features, labels, 4, penalties), strict=True):
        left = (x.T @ x + penalty * torch.eye(width + 1)) @ head.weights
        torch.testing.assert_close(left, x.T @ y, rtol=1e-7, atol=1e-6)
        torch.testing.assert_close(head.weights, ridge(features, labels, 4, penalty).weights)


def test_a_feature_that_never_changes_says_nothing() -> None:
    features, labels = drawn(12, 6)
    more = torch.cat([features, torch.full((12, 1), 7.0)], 1)
    torch.testing.assert_close(ridge(more, labels, 4).scores(more), ridge(features, labels, 4).scores(features))


def test_a_picture_with_several_labels_is_right_by_each_of_them_and_one_without_by_none() -> None:
    features, labels = drawn(8, 20)
    head = ridge(features, labels, 4, 1e-3)
    assert right(head, features, labels).all()  # so much is learnt by heart
    other = (labels + 1) % 4
    several = torch.stack([other, labels, torch.full_like(labels, -1)], 1)
    assert right(head, features, several).all()
    assert not right(head, features, torch.stack([other, torch.full_like(labels, -1)], 1)).any()
    assert not right(head, features, torch.full((8, 2), -1)).any()


def test_a_probe_is_the_accuracy_of_what_the_shots_teach() -> None:
    features, labels = drawn(20, 10)
    unseen, theirs = drawn(33, 10)
    expected = fewshot.accuracy(ridge(features, labels, 4, 1024.0), unseen, theirs)
    assert probe(features, labels, unseen, theirs, 4) == expected
    assert probe(features, labels, features, labels, 4, penalty=1e-3) > expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 12), st.integers(0, 9))
def test_every_class_gives_as_many_shots_as_it_has_and_few_are_among_more(
    labels: list[int], count: int, seed: int
) -> None:
    every = np.array(labels, np.int64)
    chosen = shots(every, count, seed)
    assert len(set(chosen.tolist())) == len(chosen)
    for one in set(labels):
        assert (every[chosen] == one).sum() == min(count, labels.count(one))
    assert set(chosen.tolist()) <= set(shots(every, count + 1, seed).tolist())
    assert (shots(every, count, seed) == chosen).all()


def test_every_seed_has_other_shots() -> None:
    labels = np.arange(400) % 4
    assert len({tuple(shots(labels, 5, seed)) for seed in range(5)}) == 5


rows = st.integers(2, 5).flatmap(
    lambda count: st.lists(st.lists(st.integers(0, 4), min_size=count, max_size=count), min_size=2, max_size=5)
)


@given(rows, st.data())
@settings(max_examples=200, deadline=None)
def test_a_penalty_is_chosen_by_all_other_sets_whatever_its_own_says(given_rows: list, data: st.DataObject) -> None:
    accuracies = {f"set {i}": [value / 4 for value in row] for i, row in enumerate(given_rows)}
    chosen = leave_self_out(accuracies)
    own = data.draw(st.sampled_from(sorted(accuracies)))
    other = data.draw(st.permutations(accuracies[own]))
    assert leave_self_out({**accuracies, own: other})[own] == chosen[own]


def test_a_penalty_has_the_best_mean_rank_and_of_equals_the_first() -> None:
    accuracies = {"a": [0.9, 0.1, 0.2], "b": [0.1, 0.5, 0.4], "c": [0.1, 0.5, 0.4]}
    assert leave_self_out(accuracies) == {"a": 1, "b": 0, "c": 0}
    assert leave_self_out({"a": [0.5, 0.5], "b": [0.1, 0.1]}) == {"a": 0, "b": 0}
    # One far better result is one rank: the mean accuracy would have chosen the first.
    ranked = {"a": [1.0, 0.1, 0.0], "b": [0.0, 0.1, 0.05], "c": [0.0, 0.1, 0.05], "d": [0.5, 0.5, 0.5]}
    assert leave_self_out(ranked)["d"] == 1


def test_every_mistake_is_named() -> None:
    features, labels = drawn(8, 4)
    mistakes = [
        (lambda: ridge(features[:0], labels[:0], 4), "0 pictures do not teach 4 classes"),
        (lambda: ridge(features, labels, 3), "8 pictures do not teach 3 classes"),
        (lambda: ridge(features, labels - 1, 4), "each needs a label"),
        (lambda: ridge(features, labels, 4, 0.0), "a penalty of 0"),
        (lambda: leave_self_out({"a": [0.5]}), "there are 1: name two or more"),
        (lambda: leave_self_out({"a": [0.5], "b": [0.5, 0.6]}), "the same penalties"),
    ]
    for made, said in mistakes:
        with pytest.raises(ValueError, match=said):
            made()
