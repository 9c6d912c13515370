"""A conversion at the 8B's widths: the host holds a layer, the embeddings and one batch, not the model."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from models.peers import even_config, table, write_folder

from iv3jax.models.config import ModelConfig
from iv3jax.models.presets import preset

TOKENS, LENGTH, VOCAB, LAYERS = 512, 128, 4096, 2

_CONVERT = """
import json, sys, time
sys.path[:0] = [{root!r}]
import numpy as np
from iv3jax.conversion.calibration import from_samples, text_sample
from iv3jax.conversion import convert
from iv3jax.conversion.config import ConvertConfig
from iv3jax.models.config import ModelConfig

def peak():
    # Not ru_maxrss: a new process starts with its parent's.
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) * 1024

rng = np.random.default_rng(0)
rows = [text_sample(rng.integers(0, {vocab}, {length})) for _ in range({tokens} // {length})]
calibration = from_samples(rows, ModelConfig.from_file({folder!r}), length={length}, rows=2)
convert_layer, peaks = convert.convert_layer, []

def watched(*given):
    report = convert_layer(*given)
    peaks.append(peak())
    return report

convert.convert_layer = watched
before, start = peak(), time.time()
asked = ConvertConfig(rank=896, tokens={tokens}, length={length})
done = convert.convert({folder!r}, {folder!r} + "-m2la", asked, calibration)
seconds = time.time() - start
print(json.dumps(dict(before=before, layers=peaks, peak=peak(), seconds=seconds, ranks=done.report.ranks)))
"""


def wide(folder: Path) -> ModelConfig:
    """The 8B's decoder with two layers and a small vocabulary, random, in bf16: 0.84 GB; a tiny tower."""
    full, small = preset("qwen3_vl_8b"), even_config("gqa")
    assert small.vision_config is not None
    text = replace(full.text_config, num_hidden_layers=LAYERS, vocab_size=VOCAB)
    tower = replace(small.vision_config, out_hidden_size=text.hidden_size)
    config = replace(small, text_config=text, vision_config=tower)
    rng = np.random.default_rng(0)
    values = {}
    for tensor in table(config):
        shape = tensor.shape
        value = rng.standard_normal(shape, np.float32) * np.float32(np.prod(shape[1:]) ** -0.5)
        values[tensor.name] = (value if len(shape) > 1 else np.ones(shape, np.float32)).astype(
            ml_dtypes.bfloat16
        )
    write_folder(folder, config, values)
    return config


@pytest.mark.slow
def test_peak_memory_at_the_widths_of_the_8b(tmp_path):
    """Six layers in fp32 (0.77 GB each), and none for another layer.

    At one time there are the source's layer as read and as placed, the converted one, its attention in
    float64, sums of 4096 × 4096 and what a compiled pass needs: 5.3 layers are seen.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("reads a process's peak memory from Linux's /proc")
    config = wide(tmp_path / "wide")
    layer = sum(
        4 * np.prod(t.shape) for t in table(config) if ".layers.0." in t.name and "language" in t.name
    )
    script = _CONVERT.format(
        root=str(Path(__file__).parents[2]),
        folder=str(tmp_path / "wide"),
        vocab=VOCAB,
        length=LENGTH,
        tokens=TOKENS,
    )
    # Not the tests' eight fake devices, each of which would have the layer.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    print(f"a layer in fp32 {layer / 1e9:.2f} GB; {found}")
    assert found["ranks"] == [896] * LAYERS
    assert found["peak"] - found["before"] <= 6 * layer
    # What the second layer adds.
    assert found["peak"] - found["layers"][0] <= layer / 4
