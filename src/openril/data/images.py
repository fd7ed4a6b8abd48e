"""Open images from files, memory and URLs safely, and prepare them for requests to servers.

Every image becomes upright 8-bit RGB: EXIF rotation is applied, transparent pixels are put on white, palettes, gray and
CMYK are converted, gray values of 10 to 32 bits and floats are scaled, and of animations the first frame is used. The size
is checked before decoding.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import struct
import time
import urllib.parse
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from openril.errors import DataError
from openril.records import ImageSource, Question

if TYPE_CHECKING:
    import httpx

MAX_PIXELS = 50_000_000
MAX_BYTES = 64 * 2**20
"""Maximum size of a download or data URL."""
FETCH_SECONDS = 30.0
"""Maximum duration of a whole download."""
_ONE_COLOR, _NEARLY = 4, 0.999
"""The largest difference, of 255, that counts as one color, and the share of pixels that makes a picture nearly that."""

# Formats that Pillow decodes itself. Others start external programs (EPS) or contain arbitrary data (PDF).
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# What Pillow raises for damaged bytes, found by changing random bytes of files of each format. AttributeError and NameError
# are missing on purpose: they are errors of this code or of the Pillow version.
_DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, RuntimeError, struct.error, zlib.error
)  # fmt: skip
_SENDABLE = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def _name(source: ImageSource) -> str:
    """Return the name of an image for messages, with the middle of a long path left out."""
    return source.name if len(source.name) <= 200 else f"{source.name[:100]}...{source.name[-97:]}"


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS, allow_urls: bool = False) -> Image.Image:
    """Return the image as upright 8-bit RGB. Raises DataError if it is missing, damaged, too large or must not be fetched."""
    image, _ = _decode(source, read_bytes(source, allow_urls), max_pixels)
    return image


def image_size(source: ImageSource, max_pixels: int = MAX_PIXELS, allow_urls: bool = False) -> tuple[int, int]:
    """Return width and height of what ``load_image`` returns, from the header alone. Raises DataError as it does."""
    image, _ = _decode(source, read_bytes(source, allow_urls), max_pixels, header_only=True)
    return image.size


def to_data_url(source: ImageSource, max_pixels: int = MAX_PIXELS, allow_urls: bool = False) -> str:
    """Return the image as a data URL for a chat request.

    A plain upright PNG, JPEG or WebP file is sent unchanged. Everything that a server could decode differently (rotation
    tags, transparency, animation, 16 bits, other formats) is sent as a PNG of the result of ``load_image``.
    """
    data = read_bytes(source, allow_urls)
    image, kept = _decode(source, data, max_pixels)
    if kept is None:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data, kept = buffer.getvalue(), "image/png"
    return f"data:{kept};base64,{base64.b64encode(data).decode('ascii')}"


def image_url_parts(question: Question, *, max_pixels: int, allow_urls: bool = False) -> list[dict[str, Any]]:
    """Return the images as parts of a chat request. Raises DataError as ``load_image`` does, naming the question."""
    parts = []
    for source in question.images:
        try:
            url = to_data_url(source, max_pixels=max_pixels, allow_urls=allow_urls)
        except DataError as e:
            raise DataError(f"question {question.id!r} ({question.origin}): {e}") from e
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def _decode(
    source: ImageSource, data: bytes, max_pixels: int, *, header_only: bool = False
) -> tuple[Image.Image, str | None]:
    """Return the RGB image, and the media type under which its bytes may be sent unchanged, or None.

    With ``header_only`` the image is blank and only its size is right.
    """
    if not data:
        raise DataError(f"image {_name(source)} is empty (0 bytes)")
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns at a fixed size; the limit here is the recipe's
            opened = Image.open(io.BytesIO(data), formats=[f for f in _FORMATS if f in Image.OPEN])
            with opened:
                width, height = opened.size
                if width * height > max_pixels:
                    raise _bomb(source, f"{width} x {height} pixels", max_pixels)
                orientation = opened.getexif().get(0x0112, 1)
                if header_only:
                    return Image.new("1", (height, width) if orientation in (5, 6, 7, 8) else (width, height)), None
                rotated = orientation not in (0, 1)
                frames = getattr(opened, "n_frames", 1)
                mode, kind = opened.mode, opened.format or ""
                transparent = opened.has_transparency_data
                opened.load()
                image = _to_rgb(ImageOps.exif_transpose(opened))
    except DataError:
        raise
    except _GrayValues as e:
        raise DataError(f"image {source.name}: {e}") from e
    except Image.DecompressionBombError as e:
        raise _bomb(source, str(e), max_pixels) from e
    except UnidentifiedImageError as e:
        raise DataError(f"image {_name(source)} is not an image in a known format ({', '.join(_FORMATS)})") from e
    except MemoryError as e:
        raise DataError(f"image {_name(source)} does not fit into memory; lower data.max_image_pixels") from e
    except _DAMAGED as e:
        raise DataError(f"image {_name(source)} is damaged or truncated ({e})") from e
    plain = kind in _SENDABLE and mode in ("RGB", "L", "P", "1") and not (rotated or transparent or frames > 1)
    return image, _SENDABLE[kind] if plain else None


def _bomb(source: ImageSource, size: str, max_pixels: int) -> DataError:
    return DataError(
        f"image {_name(source)} is too large, possibly a decompression bomb: expected at most data.max_image_pixels "
        f"({max_pixels:,}), got {size}. Scale it down, or raise the limit if you trust it"
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


class _GrayValues(Exception):
    pass


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray values of more bits, or of floats, to 0-255, which Pillow would clip.

    White is 1.0 for floats of at most 1, otherwise the smallest depth of 8, 10, 12, 14 and 16 bits that holds the
    brightest pixel, and beyond them the brightest pixel. Raises _GrayValues for values below 0 and for NaN.
    """
    values = np.asarray(image, np.float64)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)) or low < 0:
        raise _GrayValues(
            f"expected gray values from 0, got values from {low:g} to {high:g}. Scale them to 8 bits with the range that"
            " you want to see"
        )
    whites = [1.0] * (image.mode == "F") + [2.0**bits - 1 for bits in (8, 10, 12, 14, 16)]
    white = next((w for w in whites if high <= w), high)
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def frame_count(data: bytes) -> int:
    """Return the number of frames of an encoded image that ``load_image`` accepts."""
    with Image.open(io.BytesIO(data)) as opened:
        return int(getattr(opened, "n_frames", 1))


def appearance(image: Image.Image) -> str:
    """Return why the picture that ``load_image`` returns shows nothing, or ""."""
    if min(image.size) == 1:
        return f"it is {image.width} x {image.height} pixels"
    ranges: Any = image.getextrema()
    if all(high - low <= _ONE_COLOR for low, high in ranges):
        return f"all its pixels have one color, {tuple((low + high) // 2 for low, high in ranges)}"
    pixels = image.width * image.height
    histogram = image.histogram()
    nearly = []
    for channel in range(3):
        counts = histogram[256 * channel : 256 * (channel + 1)]
        most = max(range(256), key=counts.__getitem__)
        nearly.append(sum(counts[max(0, most - _ONE_COLOR) : most + _ONE_COLOR + 1]) >= _NEARLY * pixels)
    return f"more than {_NEARLY:.1%} of its pixels have one color" if all(nearly) else ""


def read_bytes(source: ImageSource, allow_urls: bool = False) -> bytes:
    """Return the encoded image. Raises DataError if it is missing or unreadable, or if it must not be fetched."""
    if source.data is not None:
        return source.data
    if source.path is not None:
        try:
            if source.path.is_file():  # also refuses folders, pipes and devices, which would never end
                return source.path.read_bytes()
            raise DataError(f"image {_name(source)} does not exist" + (" as a file" if source.path.exists() else ""))
        except OSError as e:
            raise DataError(f"image {_name(source)} cannot be read ({e.strerror or e})") from e
    assert source.url is not None
    scheme = source.url.split(":", 1)[0].lower()
    if scheme == "data":
        return _from_data_url(source)
    if scheme not in ("http", "https"):
        raise DataError(
            f"image {_name(source)}: addresses with {scheme}: are refused; use a path, http(s) or a data URL"
        )
    if not allow_urls:
        raise DataError(
            f"image {_name(source)} is on the network. Set data.allow_urls to true to fetch it, or download it"
        )
    return _fetch(source.url, _name(source))


def _from_data_url(source: ImageSource) -> bytes:
    assert source.url is not None
    match = re.match(r"data:([^,]*),", source.url[:200], re.IGNORECASE)
    if match is None:
        raise DataError(f"image {_name(source)} is not a valid data URL (data:image/png;base64,...)")
    body = source.url[match.end() :]
    if len(body) > MAX_BYTES * 4 // 3:
        raise DataError(f"image {_name(source)} is larger than {MAX_BYTES >> 20} MiB")
    try:
        if match[1].lower().endswith(";base64"):
            return base64.b64decode(re.sub(r"\s", "", urllib.parse.unquote(body)), validate=True)
        return urllib.parse.unquote_to_bytes(body)
    except (binascii.Error, ValueError) as e:
        raise DataError(f"image {_name(source)} is a damaged data URL ({e})") from e


def _fetch(url: str, name: str) -> bytes:
    import httpx

    error: Exception | None = None
    for attempt in range(3):
        if attempt:
            time.sleep(0.5 * 2**attempt)
        try:
            with (
                httpx.Client(follow_redirects=True, max_redirects=5, timeout=10.0) as client,
                client.stream("GET", url) as r,
            ):
                if r.status_code in (408, 429) or r.status_code >= 500:
                    error = DataError(f"the server answered {r.status_code}")
                    continue
                if r.status_code != 200:
                    raise DataError(f"image {name}: the server answered {r.status_code}")
                return _read_limited(r, name)
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            error = e
    raise DataError(f"image {name} cannot be fetched ({error or 'no answer'})") from error


def _read_limited(response: httpx.Response, name: str) -> bytes:
    start, data = time.monotonic(), bytearray()
    for chunk in response.iter_bytes():
        data += chunk
        if len(data) > MAX_BYTES:
            raise DataError(f"image {name} is larger than {MAX_BYTES >> 20} MiB")
        if time.monotonic() - start > FETCH_SECONDS:
            raise DataError(f"image {name} takes longer than {FETCH_SECONDS:g} s to fetch")
    return bytes(data)
