"""Studies as TOML files, each mistake told at once: read and checked without JAX, then built."""

from jaxhpo.config.building import build
from jaxhpo.config.fields import ConfigError
from jaxhpo.config.reading import Config, load
from jaxhpo.config.smoke import smoke

__all__ = ["Config", "ConfigError", "build", "load", "smoke"]
