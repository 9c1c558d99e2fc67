"""vireo: train video models with one `train.py` and small YAML files."""

__version__ = "0.1.0"
