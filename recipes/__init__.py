"""Recipes of trainings, and what made the shipped model; not part of the package."""
