"""Training recipes, and the scripts that made the shipped model; not part of the package."""
