"""Unlearn language models: data, objectives, a training loop, evaluation and a command line over unlearn_kernels."""

__version__ = "0.1.0"
