"""Set up before JAX is imported: the CPU, four virtual devices, and a compile cache that outlives the run.

Compiling takes most of the time of these small tests, so LLVM is told to optimize little; `make test-slow` and
`make test-newest` leave its optimizations on, as users have them.
"""

import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest


@pytest.fixture
def x64():
    """Double precision within one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def programs_are_given_up():
    """Every compiled program holds memory and memory mappings; Linux lets a process have 65,530 of those."""
    yield
    jax.clear_caches()
    gc.collect()
