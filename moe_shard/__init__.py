"""Mixture-of-Experts training in JAX whose expert parallelism is AllToAll, with the evidence."""

__version__ = "0.1.0"
