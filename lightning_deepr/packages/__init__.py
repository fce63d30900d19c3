"""Lightning comes as two packages with the same classes, ``lightning`` and ``pytorch_lightning``: at home in both."""
