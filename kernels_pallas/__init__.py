"""Kernels over latents: one folder an operation, with a reference anyone can read. Imports jax only.

choice.py says which implementation runs, blocks.py with what block sizes, latents.py what a cache holds.
"""
