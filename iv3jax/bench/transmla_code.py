"""TransMLA's own code on the windows of `iv3 bench conversion --part text`, to hold our `transmla` against.

    git clone https://github.com/fxmeng/TransMLA
    python -m iv3jax.bench.transmla_code TransMLA

Prints the excess log-perplexity of two layouts of that table, in half an hour on one core and 9 GB; needs
torch and transformers. Nothing of the clone is changed: its functions get our calibration windows, and its
attention is called as today's transformers calls one.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from iv3jax.bench.conversion_text import CALIBRATION, ROWS, TEST_WINDOW, TEXTS, WINDOW, spaced
from iv3jax.bench.packages import CACHE
from iv3jax.bench.smollm2 import smollm2_folder
from iv3jax.bench.texts import read_text, windows
from iv3jax.errors import UserError

LAYOUTS = ((64, 2, 128), (32, 4, 88))
"""RoPE width, frequencies folded, rank: of the table's rows at 50 and 31 %."""

_CODE, _CLASSES = "transmla/transmla", (("partial_rope", "PartialRope"), ("lora_qkv", "LoraQKV"))


def main(arguments: Sequence[str]) -> int:
    """Converts and measures; the exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        measure(Path(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(clone: Path) -> None:
    """Prints a line for each step of each layout.

    Raises:
        UserError: no clone there.
    """
    rotate, factorise = (_module(clone, name, kind) for name, kind in _CLASSES)
    import torch
    from transformers import LlamaForCausalLM

    place = smollm2_folder(CACHE)
    tokenizer = place / "tokenizer.json"
    known = windows(read_text("calibration", CACHE), tokenizer, WINDOW)[:CALIBRATION]
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in torch.tensor(known.astype(np.int64)).split(ROWS)
    ]
    texts = {
        name: torch.tensor(
            spaced(windows(read_text(name, CACHE), tokenizer, TEST_WINDOW), count).astype(np.int64)
        )
        for name, count in TEXTS.items()
    }

    def source() -> Any:
        return LlamaForCausalLM.from_pretrained(place, dtype=torch.float32).eval()

    def losses(model: Any) -> dict[str, float]:
        found = {}
        for name, ids in texts.items():
            rows = [torch.nn.functional.cross_entropy(model(x[None]).logits[0, :-1], x[1:]) for x in ids]
            found[name] = float(torch.stack(rows).mean())
        return found

    with torch.no_grad():
        start = losses(source())
        print("source", *(f"{name} {value:.3f}" for name, value in start.items()), flush=True)

        def say(what: str, model: Any) -> None:
            excess = (f"{name} {value - start[name]:.3f}" for name, value in losses(model).items())
            print(what, *excess, flush=True)

        for e, fold, rank in LAYOUTS:
            model = source()
            collapse = model.config.head_dim // e
            model = rotate.partial_rope(model, None, batches, None, freqfold=fold, collapse=collapse)
            say(f"e {e}, fold {fold}, RoPE step:", model)
            model = factorise.low_rank_qkv(
                model,
                None,
                batches,
                None,
                q_lora_rank=None,
                qk_mqa_dim=e,
                collapse=collapse,
                kv_lora_rank=rank,
                use_qkv_norm=False,
                balance_kv_ratio=1,
            )
            say(f"e {e}, fold {fold}, rank {rank}:", model)


def _module(clone: Path, name: str, kind: str) -> Any:
    """A module of the clone whose attention `kind` takes what transformers gives it.

    Its loading of data sets is not used: a package that it imports for that need not be there.
    """
    folder = clone / _CODE
    if not (folder / f"{name}.py").is_file():
        raise UserError(f"{folder / name}.py: not there; name a clone of github.com/fxmeng/TransMLA")
    sys.path.insert(0, str(folder))
    empty = ModuleType("datasets")
    vars(empty).update(Dataset=object, DatasetDict=object)
    sys.modules.setdefault("datasets", empty)
    logging.disable(logging.INFO)
    module = importlib.import_module(name)
    attention = getattr(module, kind)
    own = attention.forward

    def forward(self: Any, hidden_states: Any, attention_mask: Any = None, **others: Any) -> Any:
        return own(self, hidden_states, attention_mask, position_embeddings=others["position_embeddings"])

    attention.forward = forward
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
