"""Data modules, LightningModules and callbacks of the recipes in ``recipes/``."""
