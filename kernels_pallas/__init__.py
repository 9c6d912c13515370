"""Kernels over the latent cache: one folder each, with a reference anyone can read.

So far the plain XLA forms that the Pallas kernels are tested against. Imports jax only.
"""
