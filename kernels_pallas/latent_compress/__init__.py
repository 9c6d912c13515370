"""Hidden states → latents with a rotated RoPE key, and into the cache."""
