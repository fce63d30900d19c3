"""The folder ``zoo/`` of the repository travels in the wheel as ``lightning_deepr.zoo.data``."""
