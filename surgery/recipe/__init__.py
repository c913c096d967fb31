"""Recipes: YAML of named steps that become one lazy chain, checked as a whole before any work. Also
what a user says of a model's anatomy, in YAML too."""

from surgery.recipe.anatomy import anatomy_yaml, correct_anatomy
from surgery.recipe.load import load_recipe
from surgery.recipe.run import Outcome, run_recipe
from surgery.recipe.schema import Recipe

__all__ = [
    "Outcome",
    "Recipe",
    "anatomy_yaml",
    "correct_anatomy",
    "load_recipe",
    "run_recipe",
]
