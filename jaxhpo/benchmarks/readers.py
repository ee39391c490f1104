"""From the files of a source to arrays: inputs ``x``, targets ``y``, and what goes with them.

A reader gets the files and the sizes of the splits, and returns ``x [N, ...]``, ``y [N, ...]``. Where the publisher of the
data fixed the test split, or examples cannot be split freely, it returns ``split`` too, ``i8[N]``: 0 for training, 1 for
validation, 2 for test. ``vocabulary`` names the words or symbols behind the numbers in ``x``.
"""

from __future__ import annotations

import collections
import csv
import gzip
import io

import numpy as np

from jaxhpo.benchmarks.splits import SPLIT_SEED, stratified_splits

Arrays = dict[str, np.ndarray]
Sizes = tuple[int, int, int]

TRAIN, VALID, TEST = 0, 1, 2
MOST_WORDS = 256
"""Words of a document that are kept, the first ones."""

LEAST_COUNT = 5
"""How often a word must occur in the training split to have a number of its own."""

PADDING, UNKNOWN = "<padding>", "<unknown>"
WINDOW = 64
"""Characters of an example of a language model."""


def mnist5k(contents: list[bytes], sizes: Sizes) -> Arrays:
    """Rows of 784 pixels in 0 .. 255 and the label."""
    rows = np.loadtxt(io.BytesIO(gzip.decompress(contents[0])), delimiter=",", dtype=np.float32, ndmin=2)
    return {"x": rows[:, :-1].astype(np.uint8), "y": rows[:, -1].astype(np.uint8)}


def letter(contents: list[bytes], sizes: Sizes) -> Arrays:
    """Lines of sixteen whole numbers and a capital letter, each different line once: a twelfth are repetitions."""
    lines = list(dict.fromkeys(contents[0].decode("ascii").split()))
    rows = [line.split(",") for line in lines]
    x = np.array([[int(cell) for cell in row[:-1]] for row in rows], np.uint8)
    return {"x": x, "y": np.array([ord(row[-1]) - ord("A") for row in rows], np.uint8)}


def idx_images(contents: list[bytes], sizes: Sizes) -> Arrays:
    """Training images and labels, test images and labels; the validation split is taken from the training images."""
    arrays = [_idx_array(content) for content in contents]
    x = np.concatenate([images.reshape(len(images), -1) for images in arrays[::2]])
    y = np.concatenate(arrays[1::2])
    return {"x": x, "y": y, "split": _with_official_test(y, len(arrays[1]), sizes)}


def _idx_array(content: bytes) -> np.ndarray:
    """An array of bytes in the IDX format: two zero bytes, the type (8: unsigned byte), the rank, the big-endian sizes."""
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _with_official_test(y: np.ndarray, num_train: int, sizes: Sizes) -> np.ndarray:
    """Which split each example is in, the first ``num_train`` being the publisher's training examples."""
    split = np.full(len(y), TEST, np.int8)
    for which, index in zip((TRAIN, VALID), stratified_splits(y[:num_train], sizes[:2]), strict=True):
        split[index] = which
    return split


def _tab_rows(content: bytes, num_columns: int) -> list[list[str]]:
    """The rows of a ``.tab`` file of Orange, less its three lines of header and empty rows."""
    before = csv.field_size_limit(2**31 - 1)  # a document is one field
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8")), delimiter="\t"))[3:]
    finally:
        csv.field_size_limit(before)
    return [row for row in rows if len(row) == num_columns]


def documents(contents: list[bytes], sizes: Sizes) -> Arrays:
    """Training and test documents as their label and text: ``x`` is i32[N, MOST_WORDS], numbers of words.

    Words are numbered by how often they occur in the training split, the most frequent first, so that a smaller
    vocabulary is a smaller greatest number; 0 pads, 1 is any word seen fewer than ``LEAST_COUNT`` times there.
    """
    train, test = (_tab_rows(content, 2) for content in contents)
    names = sorted({label for label, _ in train})
    y = np.array([names.index(label) for label, _ in [*train, *test]], np.int32)
    split = _with_official_test(y, len(train), sizes)
    texts = [text.split() for _, text in [*train, *test]]
    counts = collections.Counter(word for text, which in zip(texts, split, strict=True) if which == TRAIN for word in text)
    kept = sorted((word for word, count in counts.items() if count >= LEAST_COUNT), key=lambda word: (-counts[word], word))
    vocabulary = [PADDING, UNKNOWN, *kept]
    number = {word: i for i, word in enumerate(vocabulary)}
    x = np.zeros((len(texts), MOST_WORDS), np.int32)
    for row, text in zip(x, texts, strict=True):
        numbers = [number.get(word, 1) for word in text[:MOST_WORDS]]
        row[: len(numbers)] = numbers
    return {"x": x, "y": y, "split": split, "vocabulary": np.array(vocabulary), "labels": np.array(names)}


def tales(contents: list[bytes], sizes: Sizes) -> Arrays:
    """Tales as windows of characters, ``x`` i32[N, WINDOW], and the character after each, ``y`` of the same shape.

    A tale is wholly in one split, so that no story is both learned and asked for. ``sizes`` are windows: the tales, in a
    fixed random order, fill the test split, then the validation split, with at least so many; all others are trained on.
    The windows of a tale do not overlap, and its end that does not fill one is left out.
    """
    texts = [row[3] + "\n" for row in _tab_rows(contents[0], 6)]
    symbols = sorted(set("".join(texts)))
    number = {symbol: i for i, symbol in enumerate(symbols)}
    x, y, split = [], [], []
    left = {TEST: sizes[2], VALID: sizes[1]}
    for tale in np.random.default_rng(SPLIT_SEED).permutation(len(texts)):
        which = next((name for name, due in left.items() if due > 0), TRAIN)
        coded = np.array([number[symbol] for symbol in texts[tale]], np.int32)
        starts = range(0, len(coded) - WINDOW, WINDOW)
        x += [coded[start : start + WINDOW] for start in starts]
        y += [coded[start + 1 : start + WINDOW + 1] for start in starts]
        split += [which] * len(starts)
        if which in left:
            left[which] -= len(starts)
    return {"x": np.stack(x), "y": np.stack(y), "split": np.array(split, np.int8), "vocabulary": np.array(symbols)}
