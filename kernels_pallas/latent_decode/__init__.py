"""Absorbed M²LA attention over the latent cache, for decoding."""
