"""Loading and exporting: the host holds the arrays and little beside them."""

from pathlib import Path

import pytest
from models.peers import wide_folder

from iv3jax.bench.export import bench_export, format_table, measure
from iv3jax.errors import UserError


@pytest.mark.medium
def test_peak_memory_of_load_and_export(tmp_path):
    """At most the arrays and two shards. 240 MB in shards of 50 MB, the largest tensor 41 MB.

    Slack is 40 MB, for threads and allocator, as where loading alone is measured: 295 to 299 MB are seen of
    379 allowed; a second copy of the arrays would take 480.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("reads a process's peak memory from Linux's /proc")
    wide_folder(tmp_path / "wide")
    found = measure(tmp_path / "wide", tmp_path / "out", "50MB")
    assert found.array_bytes > 200e6 and found.files >= 5 and found.shard_bytes <= 50e6 + 1e5
    assert found.peak_bytes <= found.allowed_bytes + 40e6


def test_bench_of_too_few_layers():
    with pytest.raises(UserError, match="--layers 2: must be 3 to 36"):
        bench_export(2)


def test_bench_table():
    result = {"layers": 3, "platform": "cpu", "files": 2, "passed": True, "load_seconds": 1.0}
    sizes = dict.fromkeys(("array_bytes", "shard_bytes", "peak_bytes", "allowed_bytes"), 2_500_000_000)
    table = format_table(result | sizes | {"export_seconds": 2.0})
    assert "peak     2.500 GB of host memory, 2.500 GB allowed: ok" in table
