"""Who may import whom, as DESIGN.md draws it, read from the source of every file; and file lengths.

    cli → bench, serve, eval, agent, train, mcr, conversion, generate → checkpoint, data → models
        → ops, sharding, typing, compiles, chips, hlo, distributed → kernels_pallas → jax

A file belongs to a group: its folder under iv3jax/, or its own name there. An import inside a function
or under TYPE_CHECKING counts like any other.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The rows of the drawing, top to bottom: every group may import all rows below its own.
ROWS = [
    ["cli"],
    ["__init__"],  # iv3jax/__init__.py, the public names
    ["bench", "serve", "eval", "agent", "train", "mcr", "conversion", "generate"],
    ["checkpoint", "data"],
    ["models"],
    ["ops", "sharding", "typing", "compiles", "chips", "hlo", "distributed"],
    ["kernels_pallas"],
]
EVERYONE_MAY = {"errors", "paths"}
GROUPS = {name for row in ROWS for name in row} | EVERYONE_MAY | {"configs"}
# Within a row, only these.
BESIDE = {
    "bench": {"serve", "eval", "agent", "train", "mcr", "conversion", "generate"},
    "serve": {"agent", "generate"},
    "eval": {"agent", "generate"},
    "agent": {"mcr", "generate"},
    "train": {"mcr", "generate"},
    "mcr": {"generate"},
    "checkpoint": {"data"},
    "ops": {"sharding", "typing"},
    "sharding": {"typing"},
}
# Groups narrower than their row: the only modules of the package that they may import, besides their own.
ONLY = {
    "errors": set(),
    "paths": set(),
    "kernels_pallas": set(),
    "data": {"iv3jax.models.config", "iv3jax.models.presets", "iv3jax.models.batch"},
}
# Libraries a group (or a single module) must not import.
NO_JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
NOT_TORCH = {"torch", "torchvision", "transformers"}
NEVER = {
    "data": NO_JAX,
    "errors": NO_JAX,
    "paths": NO_JAX,
    "iv3jax.models.config": NO_JAX,
    "iv3jax.models.presets": NO_JAX,
    "iv3jax.models.batch": NO_JAX,
    "models": {"optax", "orbax", "ml_collections", "jax.sharding"},
}
EVERYONE_NEVER = {"jax.experimental.pjit"}  # deprecated
TORCH_USERS = {"bench", "checkpoint"}  # peers to measure against; the exported folder
# Config files: the standard library, this, each other, and modules of iv3jax named `config`.
CONFIG_LIBRARIES = {"ml_collections"}

MAX_LINES = 500
KERNELS = "kernels_pallas"
FILES = sorted(p for top in ("iv3jax", KERNELS, "configs") for p in (ROOT / top).rglob("*.py"))
OTHER_FILES = sorted(p for top in ("tests", "launch") for p in (ROOT / top).rglob("*.py"))


def module_name(path: Path) -> str:
    """`iv3jax/data/video.py` → `iv3jax.data.video`; a package is named by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def group_of(name: str) -> str:
    """The group of a module or of a name in it; `iv3jax.load` is a name of `iv3jax/__init__.py`."""
    top, *rest = name.split(".")
    if top != "iv3jax":
        return top
    return rest[0] if rest and rest[0] in GROUPS else "__init__"


def imported_modules(module: str, source: str, is_package: bool = False) -> set[str]:
    """Full names of what a source imports; `from a import b` gives `a.b`, which may be a module or a name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join(package + ([base] if base else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def is_within(name: str, modules: set[str]) -> bool:
    """Whether a dotted name is one of the modules or lies inside one."""
    return any(name == m or name.startswith(m + ".") for m in modules)


def allowed_groups(group: str) -> set[str]:
    """Which groups a group may import from, its own, errors and paths included."""
    row = next((i for i, names in enumerate(ROWS) if group in names), len(ROWS))
    below = {name for names in ROWS[row + 1 :] for name in names}
    return below | BESIDE.get(group, set()) | {group} | EVERYONE_MAY


def violation(module: str, name: str) -> str | None:
    """Why `module` may not import `name`, or None where it may."""
    group, target, top = group_of(module), group_of(name), name.split(".")[0]
    ours = top in ("iv3jax", KERNELS, "configs")
    if is_within(name, EVERYONE_NEVER):
        return "nobody may"
    if is_within(name, NEVER.get(group, set()) | NEVER.get(module, set())):
        return f"{group} never imports it"
    if is_within(name, NOT_TORCH) and group not in TORCH_USERS:
        return f"only {' and '.join(sorted(TORCH_USERS))} may"
    if group == "configs":
        known = top in CONFIG_LIBRARIES or top == "configs" or top in sys.stdlib_module_names
        is_config = ours and "config" in name.split(".")[-2:]
        return None if known or is_config else "configs import config classes only"
    if not ours or target == group:
        return None
    if group in ONLY:
        allowed = is_within(name, ONLY[group]) or (target in EVERYONE_MAY and group != KERNELS)
        return None if allowed else f"{group} may import only {sorted(ONLY[group]) or 'nothing of ours'}"
    return None if target in allowed_groups(group) else f"{group} may not import {target}"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """One line for each import of a source that its group may not make."""
    found = []
    for name in sorted(imported_modules(module, source, is_package)):
        reason = violation(module, name)
        if reason:
            found.append(f"{module} imports {name}: {reason}")
    return found


def test_imports_follow_the_drawing() -> None:
    assert FILES, f"no source files under {ROOT}"
    found = []
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        found += violations(module_name(path), source, path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_every_module_has_a_place_in_the_drawing() -> None:
    parts = [module_name(path).split(".") for path in FILES]
    unknown = {name[1] for name in parts if name[0] == "iv3jax" and len(name) > 1} - GROUPS
    assert not unknown, f"add {sorted(unknown)} to ROWS and to DESIGN.md"


def test_every_folder_is_a_package() -> None:
    """Without an `__init__.py` a folder is missing from the wheel, silently."""
    missing = {str(p.parent.relative_to(ROOT)) for p in FILES if not (p.parent / "__init__.py").exists()}
    assert not missing, f"no __init__.py in {sorted(missing)}"


def test_files_are_short() -> None:
    lengths = {p.relative_to(ROOT): p.read_text(encoding="utf-8").count("\n") for p in FILES + OTHER_FILES}
    long = [f"{path}: {n} lines" for path, n in lengths.items() if n > MAX_LINES and path.parts[0] != KERNELS]
    assert not long, f"over {MAX_LINES} lines: {long}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("iv3jax.models.decoder", "from iv3jax.data import video"),
        ("iv3jax.models.decoder", "from iv3jax import train"),
        ("iv3jax.models.decoder", "def f():\n    from ..generate.decode import step"),
        ("iv3jax.models.decoder", "import optax"),
        ("iv3jax.models.decoder", "from jax.sharding import Mesh"),
        ("iv3jax.models.decoder", "from jax import sharding"),
        ("iv3jax.models.decoder", "from iv3jax import load"),
        ("iv3jax.models.batch", "import jax.numpy as jnp"),
        ("iv3jax.data.video", "import jax"),
        ("iv3jax.data.video", "from iv3jax.models import decoder"),
        ("iv3jax.data.video", "from iv3jax.typing import Array"),
        ("iv3jax.generate.decode", "import iv3jax.mcr.rollout"),
        ("iv3jax.generate.decode", "import torch"),
        ("iv3jax.serve.server", "from iv3jax.train import loop"),
        ("iv3jax.train.loop", "from iv3jax.cli import main"),
        ("iv3jax.train.loop", "from jax.experimental.pjit import pjit"),
        ("iv3jax.typing", "from iv3jax.ops import attend"),
        ("iv3jax.errors", "from iv3jax.models import config"),
        ("iv3jax.paths", "import jax"),
        ("iv3jax.paths", "from iv3jax.data import video"),
        ("kernels_pallas.latent_decode.ops", "from iv3jax.paths import make_path"),
        ("kernels_pallas.latent_decode.ops", "from iv3jax.errors import UserError"),
        ("configs.sft", "from iv3jax.train import loop"),
        ("configs.sft", "import jax"),
    ],
)
def test_a_planted_violation_is_caught(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("iv3jax", "from iv3jax.generate.ask import ask"),
        ("iv3jax.cli", "from iv3jax import bench, load"),
        ("iv3jax.train.loop", "import optax, orbax.checkpoint, jax\nfrom iv3jax.mcr import rollout"),
        ("iv3jax.generate.ask", "from iv3jax.data.video import read\nfrom iv3jax.checkpoint import load"),
        ("iv3jax.checkpoint.load", "from iv3jax.data import synthetic"),
        ("iv3jax.models.decoder", "import jax\nfrom iv3jax import ops\nfrom . import layers"),
        ("iv3jax.ops", "import kernels_pallas.latent_decode.ops\nfrom iv3jax.errors import UserError"),
        ("iv3jax.paths", "import fsspec\nfrom iv3jax.errors import UserError"),
        ("iv3jax.data.image", "from iv3jax.paths import make_path"),
        ("iv3jax.data.chat", "from iv3jax.models.config import ModelConfig\nimport numpy"),
        ("kernels_pallas.latent_decode.ops", "from kernels_pallas.latent_decode import tpu\nimport jax"),
        ("configs.sft", "import ml_collections\nfrom iv3jax.train.config import TrainConfig"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_data_workers_do_without_jax() -> None:
    """Every module a data worker imports, in a process where importing jax fails.

    grain imports jax by itself where it can, and does without where it cannot.
    """
    without_jax = [
        m for m in map(module_name, FILES) if group_of(m) in ("data", "paths") or NEVER.get(m) is NO_JAX
    ]
    assert "iv3jax.models.batch" in without_jax
    script = "import sys, importlib\nsys.modules['jax'] = sys.modules['jaxlib'] = None\n" + "".join(
        f"importlib.import_module({name!r})\n" for name in without_jax
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
