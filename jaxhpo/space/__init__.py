"""Spaces of hyperparameters: leaves, and the map between them and the unit cube."""

from jaxhpo.space.leaves import Bool, Choice, Float, Int, Leaf, label_of
from jaxhpo.space.space import Slot, Space, as_space

__all__ = ["Bool", "Choice", "Float", "Int", "Leaf", "Slot", "Space", "as_space", "label_of"]
