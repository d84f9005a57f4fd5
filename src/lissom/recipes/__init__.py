"""A recipe: a model, how it runs, and the methods that are applied to it, as a YAML file."""

from lissom.models.registry import method_class, method_names
from lissom.recipes.recipe import Dtype, Recipe

__all__ = ["Dtype", "Recipe", "method_class", "method_names"]
