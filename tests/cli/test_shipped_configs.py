"""The configs that come with the project: each builds, and those that are to be compared differ only where they say."""

import sys
from pathlib import Path

import pytest

from jaxhpo.config import build, load
from jaxhpo.errors import JaxhpoError

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.toml"))


@pytest.fixture(autouse=True)
def paths():
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_shipped_config_builds(path):
    header = path.read_text().partition("\n[")[0]
    assert header.startswith("# ")
    assert "COST" not in header, "the header says what the study costs and reaches"
    pytest.importorskip("sklearn")
    try:
        study = build(load(path))
    except JaxhpoError as error:
        if "jaxhpo data fetch" in str(error):
            pytest.skip(str(error))  # its data do not come with scikit-learn
        raise
    assert study.name == path.stem
    assert study.num_trials is None or study.num_trials >= study.optimizer.num_lanes
    assert load(path).report.seeds >= 5  # an interval worth its name


def test_pso_and_random_search_do_the_same_study():
    pso, random = (load(FOLDER / f"digits_{name}.toml").to_dict() for name in ("pso", "random"))
    assert pso["optimizer"].pop("name") == "PSO"
    assert random["optimizer"].pop("name") == "RandomSearch"
    assert pso["study"].pop("name") != random["study"].pop("name")
    assert pso == random


def test_flax_nnx_and_linen_are_searched_in_the_same_space():
    nnx, linen = (load(FOLDER / f"digits_{name}.toml") for name in ("pso", "linen"))
    assert nnx.space == linen.space
    assert nnx.task["num_steps"] == linen.task["num_steps"]
