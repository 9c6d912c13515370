"""The axis legend and the array aliases. Shapes in docstrings are written with these letters.

B  rows of a batch                T  tokens of a row (queries)     S  slots of a cache (keys)
D  hidden_size                    H  query heads                   G  key/value heads
r  kv_lora_rank                   n  qk_nope_head_dim              e  qk_rope_head_dim
v  v_head_dim                     L  decoder layers                K  DeepStack levels
V  vision chunks of a row         C  patches of a chunk            P  numbers of a patch
N  vision tokens of a row, V·C/merge²
"""

from collections.abc import Mapping
from typing import Any

import jax

Array = jax.Array
DType = Any
"""What jnp takes as a dtype."""
Params = Mapping[str, Any]
"""Nested dicts of arrays, as Flax makes them, without boxes."""
