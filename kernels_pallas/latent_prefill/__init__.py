"""M²LA of many new tokens over a cache of latents."""
