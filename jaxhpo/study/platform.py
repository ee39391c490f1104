"""Setting JAX up before its first use: the compile cache, and one virtual CPU device a core."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Where jaxhpo keeps what it may lose: ``$XDG_CACHE_HOME/jaxhpo`` or ``~/.cache/jaxhpo``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "jaxhpo"


def num_cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def prepare_jax(devices: int | None = None) -> None:
    """Keep compiled programs on disk and split the CPU into one virtual device a core, so that lanes use all cores.

    Call it before JAX is first used (``import jax`` is no use; making an array or a key is). What the user has
    set in the environment (``JAX_COMPILATION_CACHE_DIR``, ``JAX_NUM_CPU_DEVICES``, ``XLA_FLAGS``) stays.

    Args:
        devices: number of virtual CPU devices; by default one a core. Other platforms ignore it.

    Raises:
        RuntimeError: if JAX has already started and another number of CPU devices is asked for.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if devices is None and chosen:
        return
    wanted = devices or num_cores()
    if jax.config.jax_num_cpu_devices != wanted:  # ty: ignore[missing-attribute]
        try:
            jax.config.update("jax_num_cpu_devices", wanted)
        except RuntimeError:
            raise RuntimeError(
                f"prepare_jax: JAX has started already, so that the CPU cannot be split into {wanted} devices any more; "
                "call it before the first array, key or device"
            ) from None


def environment() -> dict[str, Any]:
    """What the bits of a study depend on beside its config: versions, device kind, precision, XLA flags."""
    import jax

    versions = {name: metadata.version(name) for name in ("jaxhpo", "jax", "jaxlib", "flax", "optax", "numpy")}
    device = jax.local_devices()[0]
    return {
        **versions,
        "python": platform.python_version(),
        "system": f"{sys.platform} {platform.machine()}",
        "device": f"{device.platform} {device.device_kind}",
        "x64": bool(jax.config.jax_enable_x64),  # ty: ignore[missing-attribute]
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
