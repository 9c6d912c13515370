"""Pictures: every mode becomes RGB, upright; bicubic as PyTorch does it; every refusal names the file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iv3jax.data.image import is_picture, read_image, resize
from iv3jax.errors import UserError

BUDGET = {"min_pixels": 1024, "max_pixels": 1 << 20}


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def natural(name: str) -> np.ndarray:
    return pytest.importorskip("sklearn.datasets").load_sample_image(name)


@pytest.mark.parametrize("size", [(96, 160), (32, 64), (448, 640), (200, 300)])
@pytest.mark.parametrize("name", ["noise", "china.jpg", "flower.jpg"])
def test_bicubic_as_in_torch(name, size):
    torch = pytest.importorskip("torch")
    picture = noise(240, 320, 3) if name == "noise" else natural(name)
    ours = resize(Image.fromarray(picture), *size)
    planes = torch.from_numpy(picture.transpose(2, 0, 1).copy())[None]

    def torch_resize(planes):
        result = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True)
        return result.float().round().clamp(0, 255)[0].numpy().transpose(1, 2, 0)

    assert ours.shape == (*size, 3)
    assert np.abs(ours - torch_resize(planes)).max() <= 1
    if name != "noise":
        # In floats nothing is clipped between the two passes, so that hard edges overshoot further.
        off = np.abs(ours - torch_resize(planes.float()))
        assert off.mean() < 0.15
        assert (off > 1).mean() < 1e-3


def test_reads_and_resizes(tmp_path):
    picture = noise(70, 130, 3)
    image = read_image(save(tmp_path / "a.png", picture), **BUDGET)
    assert (image.shape, image.dtype) == ((64, 128, 3), np.uint8)
    np.testing.assert_array_equal(image, resize(Image.fromarray(picture), 64, 128))
    small = read_image(save(tmp_path / "b.png", noise(10, 20, 3)), min_pixels=4096, max_pixels=8192)
    assert small.shape == (64, 96, 3)


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1"])
def test_modes(tmp_path, mode):
    path = save(tmp_path / "a.png", noise(64, 96, 3), mode)
    with Image.open(path) as image:
        expect = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read_image(path, **BUDGET), expect)


def test_sixteen_bits_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = read_image(save(tmp_path / "a.png", ramp), **BUDGET)
    np.testing.assert_array_equal(image, np.repeat((ramp >> 8)[..., None], 3, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(save(tmp_path / "a.png", picture, exif=exif), **BUDGET)
    assert image.shape == ((64, 96, 3) if orientation < 5 else (96, 64, 3))
    # Where the EXIF standard puts the first pixel of the first row.
    top, left = orientation in (1, 2, 5, 6), orientation in (1, 4, 5, 8)
    assert image[0 if top else -1, 0 if left else -1].tolist() == [255, 255, 255]
    assert (image == 255).all(-1).sum() == 32 * 32


def test_refusals(tmp_path, monkeypatch):
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    cut = save(tmp_path / "cut.png", noise(200, 200, 3))
    cut.write_bytes(cut.read_bytes()[:20000])
    jpeg = save(tmp_path / "cut.jpg", noise(200, 200, 3))
    jpeg.write_bytes(jpeg.read_bytes()[:5000])
    empty = tmp_path / "empty.png"
    empty.touch()
    cases = {
        tmp_path / "missing.png": "no such file",
        tmp_path: "folder",
        text: "not a picture",
        empty: "not a picture",
        cut: "truncated",
        jpeg: "truncated",
        save(tmp_path / "long.png", noise(2, 402, 3)): "aspect",
    }
    for path, reason in cases.items():
        with pytest.raises(UserError, match=reason) as error:
            read_image(path, **BUDGET)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    bomb = save(tmp_path / "bomb.png", noise(100, 100, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"bomb.png: too large"):
        read_image(bomb, **BUDGET)


def test_is_picture(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert not is_picture(tmp_path / name)
        frames[0].save(tmp_path / name)
        assert is_picture(tmp_path / name)
    assert not is_picture(tmp_path / "missing.png")
