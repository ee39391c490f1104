"""Fixed splits of the examples of a data set."""

from __future__ import annotations

import numpy as np

SPLIT_SEED = 2024
"""The seed of every split; the splits are part of a data set and never change."""


def stratified_splits(labels: np.ndarray, sizes: tuple[int, ...], seed: int = SPLIT_SEED) -> list[np.ndarray]:
    """Disjoint random index sets of the given sizes, each with the classes in the proportions of the whole.

    Every example gets a random place within its class, as a fraction; examples in the order of these fractions
    keep the proportions in any stretch. The indices within a set are shuffled.

    Raises:
        ValueError: if the sizes add up to more than there are examples.
    """
    if sum(sizes) > len(labels):
        raise ValueError(f"splits of {sizes} need more than the {len(labels)} examples there are")
    rng = np.random.default_rng(seed)
    place = np.empty(len(labels))
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        place[of_class] = (rng.permutation(len(of_class)) + rng.random()) / len(of_class)
    order = np.argsort(place, kind="stable")
    ends = np.cumsum(sizes)
    return [rng.permutation(order[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
