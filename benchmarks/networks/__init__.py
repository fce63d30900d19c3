"""The architectures of ``zoo_of_networks.py`` and what is checked of each."""
