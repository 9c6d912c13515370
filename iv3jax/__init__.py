"""iv3jax: InternVideo3, the open video-language agent, in JAX. The few names a user imports.

Names are looked up on first use, so that `import iv3jax.data` in a worker process imports no jax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iv3jax.checkpoint.export import export as export
    from iv3jax.checkpoint.load import load as load
    from iv3jax.conversion.config import ConvertConfig as ConvertConfig
    from iv3jax.conversion.convert import convert as convert
    from iv3jax.generate.ask import ask as ask

__version__ = "0.1.0"
__all__ = ["ConvertConfig", "ask", "convert", "export", "load"]

_HOMES = {
    "ConvertConfig": "iv3jax.conversion.config",
    "convert": "iv3jax.conversion.convert",
    "ask": "iv3jax.generate.ask",
    "export": "iv3jax.checkpoint.export",
    "load": "iv3jax.checkpoint.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'iv3jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
