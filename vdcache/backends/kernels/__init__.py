"""Kernels of our own, each imported only where it is used."""
