"""What the tests of the exported PyTorch code share: a place for its modules, and folders that hold it."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from iv3jax.checkpoint import remote_code

os.environ.setdefault("HF_HUB_OFFLINE", "1")
dynamic_module_utils = pytest.importorskip("transformers.dynamic_module_utils")


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory) -> Iterator[None]:
    """A fresh place for the copies of remote code that transformers imports."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", place)
        # A test before this one may have left transformers' usual place in the path, which would hide ours.
        others = [folder for folder in sys.path if not Path(folder, "transformers_modules").is_dir()]
        patch.setattr(sys, "path", others)
        yield
    forget()


def add_code(folder: Path) -> Path:
    """Puts the remote code into a folder, and what names it into its config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    kind = config["model_type"]
    for name in remote_code.FILES[kind]:
        shutil.copy(remote_code.FOLDER / name, folder)
    config |= {"auto_map": remote_code.AUTO_MAP[kind], "architectures": [remote_code.ARCHITECTURES[kind]]}
    path.write_text(json.dumps(config))
    return folder
