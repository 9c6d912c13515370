"""Collectives read from compiled programs that are small enough to count by hand: kinds, bytes, trips."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from iv3jax.hlo import collective_bytes, collectives
from iv3jax.sharding import make_mesh


def text_of(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_collectives_inside_loops_count_each_trip():
    """Two loops in each other, 3 by 5: a sum over 4 devices inside, a gather over 8 outside."""
    mesh = make_mesh(fsdp=4, tensor=2)
    both = ("fsdp", "tensor")

    def part(x):
        def inner(x, _):
            return jax.lax.psum(x, "fsdp") * 0.1, None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=5)[0], None

        x = jax.lax.scan(outer, x, None, length=3)[0]
        return jax.lax.all_gather(x, both, tiled=True)

    program = jax.shard_map(
        part, mesh=mesh, in_specs=PartitionSpec(both), out_specs=PartitionSpec(), check_vma=False
    )
    found = collectives(text_of(program, jnp.zeros((64, 6))))
    assert [(c.kind, c.shapes, c.bytes, c.group, c.times) for c in found] == [
        ("all-reduce", ((8, 6),), 192, 4, 15),
        ("all-gather", ((64, 6),), 1536, 8, 1),
    ]
    # A ring: a sum passes everything around twice, a gather once, without the device's own part.
    assert [c.received for c in found] == [192 * 15 * 2 * 3 / 4, 1536 * 7 / 8]
    assert collective_bytes(text_of(program, jnp.zeros((64, 6)))) == {"all-reduce": 2880, "all-gather": 1536}


TPU = """HloModule jit_step
%add (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %sum = bf16[]{:T(256)} add(%a, %b)
}

%all-reduce-scatter.1.clone (input.2: bf16[128,40]) -> bf16[128,10] {
  %input.2 = bf16[128,40]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.6 = bf16[128,40]{1,0:T(8,128)} all-reduce(%input.2), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %slice = bf16[128,10]{1,0} dynamic-slice(%all-reduce.6, %c, %p), dynamic_slice_sizes={128,10}
}

%body (p: (s32[], bf16[128,40])) -> (s32[], bf16[128,40]) {
  %g = bf16[128,40] all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, metadata={op_name="up_proj"}
  ROOT %scattered = bf16[128,10]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1.clone
}

%condition (p: (s32[], bf16[128,40])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(36), backend_config={}
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

ENTRY %main (x: bf16[128,10]) -> bf16[128,40] {
  %permute = (bf16[96,46]{1,0}, bf16[96,46]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
  %loop = (s32[], bf16[128,40]) while(%t), condition=%condition, body=%body, metadata={op_name="x"}
  ROOT %r = bf16[128,40] get-tuple-element(%loop), index=1
}
"""


def test_a_tpus_text():
    """Its reduce-scatter is a fusion, groups are axes of a mesh, a loop's trips are in its condition."""
    found = collectives(TPU)
    assert [(c.kind, c.bytes, c.group, c.times) for c in found] == [
        ("collective-permute", 96 * 46 * 2, 1, 1),
        ("all-gather", 128 * 40 * 2, 4, 36),
        ("reduce-scatter", 128 * 40 * 2, 2, 36),
    ]
    assert found[1].name == "up_proj"
    unknown = TPU.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="the trips of a loop are not known"):
        collectives(unknown)


GPU = """HloModule jit_step
ENTRY %main (x: bf16[16,8]) -> bf16[64,8] {
  %start = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %done = bf16[64,8]{1,0} all-gather-done(%start)
  %rs = ((bf16[64,8]{1,0}), bf16[16,8]{1,0}) reduce-scatter-start(%done), replica_groups={{0,1,2,3}}
  %ar = f32[4]{0} all-reduce-start(%y), replica_groups={}, to_apply=%add
}
"""


def test_a_gpus_text():
    """Asynchronous ones name their operands before their results."""
    found = [(c.kind, c.shapes, c.bytes, c.group) for c in collectives(GPU)]
    assert found == [
        ("all-gather", ((64, 8),), 1024, 4),
        ("reduce-scatter", ((16, 8),) * 4, 1024, 4),
        ("all-reduce", ((4,),), 16, 1),
    ]


KERNEL = """HloModule jit_step
ENTRY %main (x: bf16[16,8]) -> bf16[64,8] {
  %kernel = bf16[16,8] custom-call(%x), frontend_attributes={kernel_metadata={
"name": "splash", "blocks": {
"q": 512
}}}, metadata={op_name="attention"}
  ROOT %all = bf16[64,8] all-gather(%kernel), replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="main"
"""


def test_a_kernels_attributes_of_several_lines_end_nothing():
    assert [(c.kind, c.bytes) for c in collectives(KERNEL)] == [("all-gather", 1024)]
