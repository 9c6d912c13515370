"""`iv3 bench export`: host memory and time of loading and exporting a random checkpoint of 8B's widths.

The checkpoint is made in a temporary folder, block by block, and loaded and exported by a process of its own,
whose peak memory is read from Linux's /proc. `python -m iv3jax.bench.export FOLDER OUT SIZE` is that process.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from iv3jax.checkpoint.dtypes import DTYPES
from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.names import tensors
from iv3jax.checkpoint.write import Planned, write
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.presets import preset

PRESET = "internvideo3_8b"
MAX_SHARD_SIZE = "2GB"

_STATUS = Path("/proc/self/status")
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Measured:
    """One load and export. Bytes and seconds.

    Attributes:
        peak_bytes: most host memory at one time, beyond what jax and the package take before they load.
        array_bytes: bytes of the parameters; on a CPU they are part of the peak.
        shard_bytes: bytes of the largest file of weights.
        files: files of weights.
        platform: where the parameters are: cpu, gpu, tpu.
        load_seconds: reading into arrays.
        export_seconds: writing, reading back and comparing.
    """

    peak_bytes: int
    array_bytes: int
    shard_bytes: int
    files: int
    platform: str
    load_seconds: float
    export_seconds: float

    @property
    def allowed_bytes(self) -> int:
        """What the peak should stay within: the arrays, if they are in host memory, and two shards."""
        return (self.array_bytes if self.platform == "cpu" else 0) + 2 * self.shard_bytes


def bench_export(layers: int) -> dict[str, Any]:
    """Makes a checkpoint with so many decoder layers, loads and exports it, and removes both.

    Raises:
        UserError: fewer layers than DeepStack needs, a system without /proc, or too little disk.
    """
    config = preset(PRESET)
    assert config.vision_config is not None
    least = len(config.vision_config.deepstack_visual_indexes)
    if not least <= layers <= config.text_config.num_hidden_layers:
        raise UserError(f"--layers {layers}: must be {least} to {config.text_config.num_hidden_layers}")
    config = replace(config, text_config=replace(config.text_config, num_hidden_layers=layers))
    planned = random_checkpoint(config)
    needed = 2 * sum(tensor.nbytes for tensor in planned.values())
    with tempfile.TemporaryDirectory(prefix="iv3-bench-export-") as name:
        folder = Path(name)
        if (free := shutil.disk_usage(folder).free) < 1.05 * needed:
            raise UserError(
                f"{folder.parent}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} needed; "
                "ask for fewer --layers or point TMPDIR at another disk"
            )
        make_checkpoint(folder / "source", config, planned)
        found = measure(folder / "source", folder / "out", MAX_SHARD_SIZE)
    result = {"layers": layers, **asdict(found), "allowed_bytes": found.allowed_bytes}
    return result | {"passed": found.peak_bytes <= found.allowed_bytes}


def format_table(result: dict[str, Any]) -> str:
    """The result of `bench_export` in a few lines."""
    size = {key: f"{value / 1e9:.3f} GB" for key, value in result.items() if key.endswith("_bytes")}
    verdict = "ok" if result["passed"] else "TOO MUCH"
    return "\n".join(
        [
            f"{PRESET} with {result['layers']} layers, random bf16, on {result['platform']}",
            f"arrays   {size['array_bytes']}",
            f"shards   {size['shard_bytes']}, the largest of {result['files']}",
            f"peak     {size['peak_bytes']} of host memory, {size['allowed_bytes']} allowed: {verdict}",
            f"load     {result['load_seconds']:.1f} s",
            f"export   {result['export_seconds']:.1f} s, with reading back and comparing",
        ]
    )


def random_checkpoint(config: ModelConfig, seed: int = 0) -> dict[str, Planned]:
    """bf16 tensors of random bits, finite and below 2 in size, made when they are written."""

    def blocks(number: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([seed, number])
        for start in range(0, shape[0], _BLOCK_ROWS):
            rows = min(_BLOCK_ROWS, shape[0] - start)
            bits = rng.integers(0, 1 << 16, (rows, *shape[1:]), np.uint16)
            # Without the exponent's upper bit there is no infinity and no NaN.
            yield (bits & 0xBFFF).view(DTYPES["BF16"])

    return {
        tensor.name: Planned(tensor.shape, "BF16", partial(blocks, number, tensor.shape))
        for number, tensor in enumerate(tensors(config))
    }


def make_checkpoint(folder: Path, config: ModelConfig, planned: dict[str, Planned]) -> None:
    """Writes a model folder without tokenizer, in files of at most 5 GB."""
    folder.mkdir()
    write(planned, 5 * 10**9, lambda name: (folder / name).open("wb"))
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")


def measure(folder: Path, out: Path, max_shard_size: str) -> Measured:
    """Loads and exports a folder in a process of its own.

    Raises:
        UserError: a system without /proc, or the process failed; its last line is named.
    """
    if not _STATUS.exists():
        raise UserError("peak memory is read from Linux's /proc, which this system does not have")
    argv = [sys.executable, "-m", "iv3jax.bench.export", str(folder), str(out), max_shard_size]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the export failed: {(done.stderr.splitlines() or [f'code {done.returncode}'])[-1]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _peak() -> int:
    """The most memory this process ever held. Not ru_maxrss: a new process starts with its parent's."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def _measured(folder: Path, out: Path, max_shard_size: str) -> Measured:
    # What tracing and the first array take is not the checkpoint's.
    tensors(ModelConfig.from_file(folder))
    jax.numpy.ones(3).block_until_ready()
    before, start = _peak(), time.perf_counter()
    loaded = load(folder)
    middle = time.perf_counter()
    export(loaded, out, max_shard_size=max_shard_size)
    end = time.perf_counter()
    arrays = jax.tree.leaves(loaded.params)
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    return Measured(
        peak_bytes=_peak() - before,
        array_bytes=sum(array.nbytes for array in arrays),
        shard_bytes=max(sizes),
        files=len(sizes),
        platform=next(iter(arrays[0].devices())).platform,
        load_seconds=middle - start,
        export_seconds=end - middle,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_measured(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))))
