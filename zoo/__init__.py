"""Checkpoints: data only. In an installation this folder is ``lightning_deepr.zoo.data``."""
