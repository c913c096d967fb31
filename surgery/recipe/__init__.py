"""Recipes: YAML of named steps that become one lazy chain, checked as a whole before any work."""

from surgery.recipe.load import load_recipe
from surgery.recipe.run import Outcome, run_recipe
from surgery.recipe.schema import Recipe

__all__ = ["Outcome", "Recipe", "load_recipe", "run_recipe"]
