"""Names of topologies, and what a compiler says that refuses a program."""

import pytest

from iv3jax.chips import GIB, PEAKS, TOPOLOGIES, refused_temporaries, topology
from iv3jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "chip", "shape", "count"),
    [
        ("v5e-256", "v5e", "16x16", 256),
        ("v5e-8", "v5e", "2x4", 8),
        ("v5p-8", "v5p", "2x2x1", 4),
        ("v5p-64", "v5p", "2x4x4", 32),
        ("v5p-128", "v5p", "4x4x4", 64),
        ("v5p-512", "v5p", "4x8x8", 256),
        ("h100x8", "h100", "1x1x8", 8),
        ("h100x64", "h100", "1x8x8", 64),
        ("2*v5p-128", "v5p", "4x4x4", 128),
    ],
)
def test_a_topology_has_the_chips_its_name_says(name, chip, shape, count):
    """A v5p is counted in cores, two a chip."""
    found = topology(name)
    assert (found.name, found.chip, found.shape, found.count) == (name, chip, shape, count)


def test_every_name_counts_its_chips():
    for name, found in TOPOLOGIES.items():
        number = int(name.replace("x", "-").split("-")[1])
        assert found.count == (number // 2 if found.chip == "v5p" else number)
        assert found.chip in PEAKS


@pytest.mark.parametrize("name", ["v5p-100", "v4-8", "", "0*v5p-128", "x*v5p-128", "2*"])
def test_an_unknown_topology_lists_them(name):
    with pytest.raises(UserError, match=r"is unknown; there are v5e-4, .*v5p-128, .*h100x64"):
        topology(name)


def test_gpus_are_not_in_slices():
    with pytest.raises(UserError, match="H100s are not in slices; take h100x16"):
        topology("2*h100x8")


def test_gpus_of_several_machines_share_their_adapters():
    assert topology("h100x8").network == 450e9
    assert topology("h100x16").network == 400e9


def test_bytes_of_a_refusal():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 129.86G of 95.74G hbm. Exceeded hbm capacity by 34.12G."
    )
    assert refused_temporaries(text, 2 * GIB) == round(129.86 * GIB) - 2 * GIB
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(16.21G) exceeds available HBM (15.75G)."
    )
    assert refused_temporaries(text, 2 * GIB) == round(16.21 * GIB)
    assert refused_temporaries("INTERNAL: something else", 2 * GIB) is None
