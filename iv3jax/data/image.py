"""A picture file read, turned upright, made RGB and resized. Videos are in video.py."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from iv3jax.data.sizes import image_size
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath, PathArgument, make_path

# Pillow also opens MPEG, and takes other videos for Targa.
_PICTURES = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")


def read_image(path: PathArgument, *, min_pixels: int, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Reads one picture (of an animation, the first).

    EXIF orientation is applied. Palettes, greys and CMYK become RGB; transparency is dropped as
    Pillow's `convert("RGB")` does it, which is also what the released processor does.

    Args:
        path: any picture Pillow reads, local or on a store.
        min_pixels, max_pixels: budget for height · width of the result (`sizes.image_size`).

    Returns:
        (h, w, 3) uint8 RGB, resized with antialiased bicubic.

    Raises:
        UserError: no such file, a folder, no picture, damaged, too large to open safely, or an
            aspect ratio above 200. The text names the file.
    """
    path = make_path(path)
    try:
        with path.open("rb") as file, Image.open(file) as image:
            image.load()
            picture = to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path of the picture") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a picture file inside it") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read; change its permissions") from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path}: not a picture that can be read; convert it to PNG or JPEG, or pass it as a video"
        ) from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large to open safely ({error}); scale it down first") from None
    # Pillow's decoders raise any of these on bad bytes.
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path}: the picture is truncated or damaged ({error}); fetch it again") from None
    try:
        height, width = image_size(picture.height, picture.width, min_pixels, max_pixels)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return resize(picture, height, width)


def is_picture(path: AnyPath) -> bool:
    """Whether a file is a still picture; animated GIF and PNG count as videos."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            moves = image.format in ("GIF", "PNG") and getattr(image, "is_animated", False)
            return image.format in _PICTURES and not moves
    # What Pillow cannot open is no picture.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any picture to mode RGB."""
    if image.mode.startswith("I;16"):
        # convert() would clip at 255 and leave a white picture; 16-bit colour files lose their low
        # byte in Pillow's reader too.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def resize(picture: Image.Image, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Antialiased bicubic of an RGB picture to (height, width, 3) uint8."""
    return np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
