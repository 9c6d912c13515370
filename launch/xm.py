"""XManager: `iv3 train` once for each seed, on this machine or on Vertex AI. Imports nothing of iv3jax.

XManager wants other versions of common packages than training does, so it gets an environment of its own; uv
makes it in seconds (pip looks for versions that fit for over ten minutes):

    uvx --from xmanager==0.8.5 xmanager launch launch/xm.py -- \
        --config=sft:short --out=runs/short --seeds=0,1,2 steps=100

What follows the flags are overrides, as for `iv3 train`. Each seed's run is in OUT/seed-N. On this machine
runs take turns, since each takes all chips, and are the checkout's own `.venv/bin/iv3`.

The cloud executor starts a container image that has iv3jax in it, each seed on one machine:

    … --executor=vertex --image=gcr.io/PROJECT/iv3jax --accelerator=H100 --count=8 --out=/gcs/BUCKET/short

It needs a project, credentials and a bucket (GOOGLE_CLOUD_BUCKET_NAME), and knows NVIDIA GPUs and TPU v2 and
v3 on single machines. For TPU pods: launch/tpu; for several GPU machines: launch/slurm.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from xmanager import xm, xm_local

ROOT = Path(__file__).resolve().parents[1]

_CONFIG = flags.DEFINE_string("config", None, "Experiment: NAME or NAME:VARIANT.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder; seed N's run goes to OUT/seed-N.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds, one run each.")
_IV3 = flags.DEFINE_string("iv3", str(ROOT / ".venv" / "bin" / "iv3"), "local: the command.")
_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "vertex"], "Where the runs are.")
_IMAGE = flags.DEFINE_string("image", None, "vertex: container image with `iv3` as its entry point.")
_ACCELERATOR = flags.DEFINE_string("accelerator", "H100", "vertex: what a machine has, as XManager names it.")
_COUNT = flags.DEFINE_integer("count", 8, "vertex: how many of them.")


def main(argv: Sequence[str]) -> None:
    """Launches the runs and waits for them; a run that fails ends with its error."""
    overrides = [word for word in argv[1:] if word != "--"]
    if malformed := [word for word in overrides if "=" not in word]:
        raise app.UsageError(f"{malformed[0]!r} is no override; write key=value")
    asyncio.run(_launch(overrides))


async def _launch(overrides: list[str]) -> None:
    async with xm_local.create_experiment(experiment_title=f"iv3 {_CONFIG.value}") as experiment:
        executor, packageable = _vertex() if _EXECUTOR.value == "vertex" else _local()
        [executable] = experiment.package([packageable])
        for seed in _SEEDS.value:
            out = f"{_OUT.value}/seed-{seed}"
            words = ["train", "--config", _CONFIG.value, "--out", out, *overrides, f"seed={seed}"]
            unit = await experiment.add(xm.Job(executable, executor, args=words))
            if _EXECUTOR.value == "local":
                await unit.wait_until_complete()
                print(f"[xm] seed {seed} is done: {out}", flush=True)


def _local() -> tuple[xm.Executor, xm.Packageable]:
    if not Path(_IV3.value).is_file():
        raise app.UsageError(f"there is no {_IV3.value}; run `bash launch/setup_env.sh dev` or set --iv3")
    spec = xm_local.Local.Spec()
    return xm_local.Local(), xm.Packageable(xm.Binary(path=_IV3.value), spec)


def _vertex() -> tuple[xm.Executor, xm.Packageable]:
    if _IMAGE.value is None:
        raise app.UsageError(
            "--executor=vertex needs --image, a container image with `iv3` as its entry point"
        )
    needs = xm.JobRequirements(resources={xm.ResourceType[_ACCELERATOR.value]: _COUNT.value})
    spec = xm_local.Vertex.Spec()
    return xm_local.Vertex(needs), xm.Packageable(xm.Container(image_path=_IMAGE.value), spec)


if __name__ == "__main__":
    app.run(main)
