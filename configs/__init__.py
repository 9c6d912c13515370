"""Experiments: one file each. `get_config(variant)` returns a ConfigDict of plain values."""
