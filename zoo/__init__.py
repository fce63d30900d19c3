"""The zoo's sparse files, without code. An installation has this folder as ``lightning_deepr.zoo.data``."""
