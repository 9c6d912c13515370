"""The plan of a step: its arguments, its advice, what it says; and real ones, compiled for chips (slow)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import even_config
from models.steps import fake_mesh, needs_compilers, step_of

from iv3jax.errors import UserError
from iv3jax.models.batch import fake_batch
from iv3jax.models.presets import preset
from iv3jax.sharding import make_mesh
from iv3jax.train import plan as plan_module
from iv3jax.train.config import MeshConfig, TrainConfig, experiment
from iv3jax.train.feeds import place_batch
from iv3jax.train.plan import Plan, RolloutPlan, advice, as_json, batch_shapes, format_plan, plan, planned
from iv3jax.train.plan_rollouts import planned_rollouts
from iv3jax.train.plan_table import BEGIN, END, HEAD, place, program_of, row

GIB = 1 << 30
STAGES = ("cpt", "sft:short", "sft:long", "lora")


def made(**changes) -> Plan:
    given = dict(
        topology="v5p-128",
        chip="v5p",
        devices=64,
        mesh=dict(data=1, fsdp=64, context=1, tensor=1),
        rows=64,
        accumulate=2,
        length=65536,
        fits=True,
        argument_bytes=2 * GIB,
        temporary_bytes=60 * GIB,
        peak_bytes=50 * GIB,
        limit_bytes=96 * GIB,
        collective_bytes_per_step=10**11,
        collectives={"all-gather": 10**11},
        flops_per_token=1e11,
        executed_flops_per_token=2e11,
        bound_seconds={"compute": 50.0, "memory": 1.0, "network": 2.0},
        tokens_per_second=1e5,
        advice=(),
        compile_seconds=60.0,
    )
    return Plan(**given | changes)


def test_the_shapes_of_a_batch_are_those_that_are_fed():
    """Names, sizes, dtypes and places, with and without a context axis."""
    shape = preset("tiny")
    for sizes in (dict(fsdp=8), dict(fsdp=4, context=2)):
        mesh = fake_mesh(**sizes)
        rows = mesh.shape["fsdp"]
        config = TrainConfig(rows=rows, length=64, chunks=2, chunk_patches=16)
        fed = place_batch(fake_batch(shape, rows, 64, 2), mesh)
        expected = batch_shapes(config, shape, mesh)
        assert jax.tree.structure(fed) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(fed), jax.tree.leaves(expected), strict=True):
            assert (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)


@pytest.mark.slow
def test_a_planned_step_runs_and_takes_the_bytes_it_says(monkeypatch):
    """On fake devices: the arguments that were planned are what the program takes, and it computes a loss."""
    step = step_of(monkeypatch, even_config(), fake_mesh(fsdp=4, context=2), accumulate=2)
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), step.arguments)
    places = jax.tree.map(lambda x: x.sharding, step.arguments[0])
    with jax.set_mesh(step.mesh):
        jitted = jax.jit(step.function, donate_argnums=(0,), out_shardings=(places, None))
        compiled = jitted.lower(*step.arguments).compile()
        _, metrics = compiled(*zeros)
    assert compiled.memory_analysis().argument_size_in_bytes == step.argument_bytes
    # All logits are 0, all segments padding with label 0: log 96 for each token.
    assert float(metrics.loss) == pytest.approx(np.log(96), rel=1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_the_shapes_of_the_8b_stages(name):
    """Shapes and shardings of the real recipes, on as many parts as eight devices allow."""
    config = experiment(name)
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=8, context=1, tensor=1), rows=8)
    step = planned(config, make_mesh(fsdp=8))
    state, frozen, batch = step.arguments
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    whole = trained + sum(x.size for x in jax.tree.leaves(frozen))
    if name == "lora":
        assert trained < 0.03 * whole
        assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    else:
        assert trained == whole == 9_484_672_240
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    tokens = batch.patches.shape[1] * batch.patches.shape[2] // 4
    assert tokens == config.length == batch.input_ids.shape[1]
    batch_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))
    if name == "lora":
        # The base is split eight ways, of each addition only the half whose width is.
        split = (2 * (whole - trained) + batch_bytes) / 8
        assert split + 12 * trained / 8 < step.argument_bytes < split + 12 * trained
    else:
        # Weights and moments are split eight ways, up to norms and biases.
        assert step.argument_bytes == pytest.approx((12 * trained + batch_bytes) / 8, rel=0.03)


def test_batches_are_those_of_the_paper():
    """SPEC §6: 128 packs of 64 K, and 8 of 256 K."""
    for name, packs, length in (("cpt", 128, 65536), ("sft:short", 128, 65536), ("sft:long", 8, 262144)):
        config = experiment(name)
        assert (config.rows * config.accumulate, config.length) == (packs, length)


def test_rows_that_the_mesh_does_not_divide():
    with pytest.raises(UserError, match="rows 6 is no multiple of the 8 parts of a batch"):
        planned(TrainConfig(rows=6), make_mesh(fsdp=8))


def test_an_unknown_topology():
    with pytest.raises(UserError, match="topology 'v5p-127' is unknown; there are v5e-4"):
        plan(TrainConfig(), "v5p-127")


def test_advice_names_what_would_help():
    config = TrainConfig(rows=16, accumulate=1, length=65536, remat="none", mesh=MeshConfig(data=2, fsdp=4))
    mesh = dict(data=2, fsdp=4, context=1, tensor=1)
    first, *others = advice(config, mesh, 50 * GIB, 96 * GIB)
    assert first.startswith("remat=full")
    found = " · ".join(others)
    for text in (
        "rows=8 accumulate=2",
        "dtype=bfloat16",
        "mesh.data=1",
        "moment_dtype=bfloat16",
        "mesh.context=2",
    ):
        assert text in found
    small = TrainConfig(rows=4, length=4096, remat="full", dtype="bfloat16")
    assert advice(small, dict(data=1, fsdp=4, context=1, tensor=1), GIB, 96 * GIB) == (
        "more chips, or a shorter length",
    )


def test_what_is_said():
    text = format_plan(made())
    assert "v5p-128: 64 v5p chips as fsdp 64" in text and "fits             yes" in text
    assert "at least 50.00: a roofline model of peak numbers, not measured" in text
    assert "rollouts" not in text
    rolled = RolloutPlan(False, 1 * GIB, 90 * GIB, 80 * GIB, 20 * GIB, 60.0)
    text = format_plan(made(fits=False, rollouts=rolled))
    assert "rollouts         do not fit; GiB a device: arguments 1.00, temporaries 90.00" in text
    assert "the step's state beside them 20.00" in text
    refused = made(
        fits=False,
        temporary_bytes=None,
        collective_bytes_per_step=None,
        collectives=None,
        tokens_per_second=None,
        advice=("x",),
    )
    text = format_plan(refused)
    assert "fits             no" in text and "temporaries ?" in text and "to make it fit   x" in text
    assert {"fits", "argument_bytes", "temporary_bytes", "limit_bytes", "collective_bytes_per_step"} <= set(
        json.loads(json.dumps(as_json(refused)))
    )


def test_rows_of_the_table_take_their_places(tmp_path):
    path = tmp_path / "plan.md"
    path.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    place(path, row("cpt", "v5p-128", "", made()))
    place(path, row("cpt", "v5e-256", "", made(topology="v5e-256")))
    place(path, row("cpt", "v5p-128", "rows=32", made(fits=False, advice=("more chips",))))
    lines = path.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and lines[2] == HEAD
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:6]]
    assert [cells[:3] for cells in rows] == [["cpt", "v5p-128", "rows=32"], ["cpt", "v5e-256", ""]]
    assert rows[0][5] == "no: more chips" and {len(cells) for cells in rows} == {HEAD.count("|") - 1}
    path.write_text("nothing")
    with pytest.raises(UserError, match="between which the table goes"):
        place(path, row("cpt", "v5p-128", "", made()))


@pytest.mark.slow
@needs_compilers
def test_a_tiny_step_on_real_chips(monkeypatch):
    """Two layers of the 8B's width and of its tower, on four v5p: it fits, and the numbers agree."""
    shape = preset("internvideo3_8b")
    text = dataclasses.replace(shape.text_config, num_hidden_layers=2)
    tower = dataclasses.replace(shape.vision_config, depth=2, deepstack_visual_indexes=(0, 1))
    small = dataclasses.replace(shape, text_config=text, vision_config=tower)
    monkeypatch.setattr(plan_module, "preset", lambda _: small)
    config = experiment(
        "cpt", ["rows=4", "accumulate=1", "length=8192", "chunks=8", "chunk_patches=4096", "mesh.fsdp=4"]
    )
    lines: list[str] = []
    found = plan(config, "v5p-8", lines.append)
    assert found.fits and found.devices == 4 and "compiling the step for v5p-8" in lines[0]
    # 1.8 G parameters, three numbers of 4 bytes each, a quarter on each chip.
    trained = planned(config, make_mesh(jax.devices()[:4])).arguments[0].params

    def size(*names: str) -> int:
        return sum(x.size for name in names for x in jax.tree.leaves(trained[name]))

    params = size(*trained)
    assert 12 * params / 4 < found.argument_bytes < 13 * params / 4
    assert 0 < found.temporary_bytes < found.limit_bytes - found.argument_bytes
    received = found.collective_bytes_per_step
    # In bf16 the layers' weights are gathered twice, head and tower once, embeddings never, each from three
    # of four chips; gradients come on top.
    assert received == sum(found.collectives.values())
    gathered = 2 * (2 * size("language_model") + size("lm_head", "visual")) * 3 / 4
    assert gathered < received < 8 * params
    assert found.tokens_per_second == pytest.approx(4 * 8192 / max(found.bound_seconds.values()))
    with pytest.raises(UserError, match="no multiple"):
        plan(dataclasses.replace(config, rows=2), "v5p-8", lines.append)


@pytest.mark.slow
@needs_compilers
def test_what_cannot_fit_is_refused_with_its_bytes():
    """All of the 8B's state on four v5e: 28 GB of arguments a chip that has 16."""
    config = experiment("cpt", ["rows=4", "accumulate=1", "length=2048", "chunks=1", "mesh.fsdp=4"])
    found = plan(config, "v5e-4", lambda _: None)
    assert not found.fits and found.argument_bytes > found.limit_bytes
    assert found.collective_bytes_per_step is None and found.tokens_per_second is None
    assert any("moment_dtype=bfloat16" in text for text in found.advice)


def test_the_short_stage_is_pretrainings_program():
    """So the table compiles it once; the long one is another."""
    short, long, cpt = (program_of(experiment(name)) for name in ("sft:short", "sft:long", "cpt"))
    assert short == cpt != long and hash(short) == hash(cpt)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("config", "overrides", "fields"),
    [
        ("rl:tiny", [], {"advantages", "reference"}),
        ("opd:tiny", [], {"teacher", "teacher_index"}),
        ("opd:tiny", ["distill.kind=top_k"], {"top_ids", "top_logprobs"}),
        ("opd:tiny", ["distill.kind=sampled"], {"reference"}),
        ("opd:tiny", ["distill.kind=sequence"], set()),
    ],
)
def test_steps_that_learn_from_rollouts(config, overrides, fields):
    """They trace with what a collector gives, the other model's parameters among the arguments."""
    step = planned(experiment(config, overrides), make_mesh(jax.devices()[:1]))
    state, frozen, batch = step.arguments
    optional = {"advantages", "reference", "teacher", "teacher_index", "top_ids", "top_logprobs"}
    assert {name for name in optional if getattr(batch, name) is not None} == fields
    assert "teacher" in frozen and "teacher" not in step.policy[0]
    after, metrics = jax.eval_shape(step.function, *step.arguments)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert "entropy" in metrics.terms


@pytest.mark.medium
def test_rollouts_are_planned_as_they_are_made():
    """The whole policy, the frozen tower too, goes in, as many questions as are collected at one time; every
    rollout of them comes out.
    """
    config = experiment("rl:tiny")
    step = planned(config, make_mesh(jax.devices()[:1]))
    rollouts = planned_rollouts(config, step.model, *step.policy)
    assert "visual" in rollouts.given.params and "teacher" not in rollouts.given.params
    with jax.set_mesh(step.mesh):
        found, _ = rollouts.lower().out_info
    assert found.record.tokens.shape == (16 * 8, config.length)
    with pytest.raises(UserError, match="the budget of 20"):
        planned_rollouts(experiment("rl:tiny", ["rollout.budget=20"]), step.model, *step.policy)
