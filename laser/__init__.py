"""LASER attention (arXiv 2411.03493), and pretraining with it: see `laser.attention`."""

__version__ = "0.1.0"
