"""The recipes' YAML files and data, without code. An installation has this folder as ``lightning_deepr.recipes.data``."""
