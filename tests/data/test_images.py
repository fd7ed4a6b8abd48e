"""Images of every kind become upright RGB; everything else raises a DataError that names the image."""

from __future__ import annotations

import base64
import http.server
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import BmpImagePlugin, Image

from openril.data import images
from openril.data.images import appearance, load_image, to_data_url
from openril.errors import DataError
from openril.records import ImageSource


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> ImageSource:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return ImageSource(data=buffer.getvalue())


def decoded(url: str) -> bytes:
    return base64.b64decode(url.split(",", 1)[1])


RED = Image.new("RGB", (6, 4), (200, 0, 0))


def test_rotation_tag_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert load_image(encoded(RED, "JPEG", exif=exif)).size == (4, 6)


def test_transparent_pixels_become_white() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert load_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_color_is_white() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30] + [0] * 765)
    assert load_image(encoded(image, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "kind"), [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG")])
def test_modes_become_rgb(mode: str, kind: str) -> None:
    image = load_image(encoded(Image.new("RGB", (3, 3), (255, 255, 255)).convert(mode), kind))
    assert image.mode == "RGB" and image.getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bit_gray_keeps_its_range() -> None:
    gray = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    image = load_image(encoded(gray))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("uint16", (0, 2048, 4095), (0, 128, 255)),  # 12 bits
        ("uint16", (0, 512, 1023), (0, 128, 255)),  # 10 bits
        ("int32", (0, 100, 255), (0, 100, 255)),
        ("int32", (0, 32896, 65535), (0, 128, 255)),
        ("int32", (0, 50_000, 100_000), (0, 128, 255)),  # the brightest is white
        ("float32", (0, 0.5, 1), (0, 128, 255)),
        ("float32", (0, 100, 255), (0, 100, 255)),
    ],
)
def test_gray_values_of_any_depth_are_scaled(dtype: str, values: tuple[float, ...], expected: tuple[int, ...]) -> None:
    image = load_image(encoded(Image.fromarray(np.array([values], dtype)), "TIFF"))
    assert tuple(image.getpixel((x, 0))[0] for x in range(3)) == expected


@pytest.mark.parametrize("values", [(-1.0, 0.5, 1.0), (0.0, float("nan"), 1.0)])
def test_gray_values_without_a_meaning_are_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match=r"image .*: expected gray values from 0, got values from .*Scale"):
        load_image(encoded(Image.fromarray(np.array([values], "float32")), "TIFF"))


def test_pictures_that_show_nothing_are_told_from_others() -> None:
    speck = Image.new("RGB", (100, 100), (250, 250, 250))
    speck.putpixel((5, 5), (0, 0, 0))
    line = Image.new("RGB", (100, 100), (250, 250, 250))
    line.paste((0, 0, 0), (0, 50, 20, 51))
    assert "one color" in appearance(RED) and "one color" in appearance(speck) and appearance(line) == ""
    assert "1 x 1" in appearance(Image.new("RGB", (1, 1)))
    assert "(255, 255, 255)" in appearance(load_image(encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)))))


def test_animation_gives_its_first_frame() -> None:
    source = encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4), (0, 0, 200))])
    assert load_image(source).getpixel((0, 0))[2] == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_off_files_are_refused(kind: str) -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    data = encoded(noise, kind).data or b""
    with pytest.raises(DataError, match=r"damaged|not an image"):
        load_image(ImageSource(data=data[: len(data) // 2]))


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4", b"<svg/>"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"empty|not an image"):
        load_image(ImageSource(data=data))


@pytest.mark.parametrize("error", [OSError, SyntaxError, TypeError, IndexError, RuntimeError, struct.error, zlib.error])
def test_errors_of_decoders_mean_a_damaged_image(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(self: Image.Image) -> None:
        raise error("bad bytes")

    source = encoded(RED, "BMP")
    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", fail)
    with pytest.raises(DataError, match=r"damaged.*bad bytes"):
        load_image(source)


@pytest.mark.parametrize("error", [AttributeError, NameError, AssertionError])
def test_errors_of_our_own_are_not_called_a_damaged_image(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(image: Image.Image) -> None:
        raise error("has_transparency_data")

    monkeypatch.setattr(images, "_to_rgb", fail)
    with pytest.raises(error, match="has_transparency_data"):
        load_image(encoded(RED))


def test_bomb_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    source = encoded(Image.new("L", (3000, 3000)))  # 9 million pixels in a few kilobytes
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"bomb.*3000 x 3000"):
        load_image(source, max_pixels=1_000_000)


def test_the_bomb_error_of_pillow_becomes_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(DataError, match="bomb"):
        load_image(encoded(RED))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.png", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            load_image(ImageSource(path=path))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a.png", "gopher://x"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(DataError, match="refused"):
        load_image(ImageSource(url=url), allow_urls=True)


def test_data_url_of_a_plain_file_keeps_its_bytes() -> None:
    for kind, media in (("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp")):
        source = encoded(RED, kind)
        url = to_data_url(source)
        assert url.startswith(f"data:image/{media};base64,") and decoded(url) == source.data
        assert load_image(ImageSource(url=url)).size == (6, 4)


def test_what_servers_decode_differently_is_sent_as_we_see_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (4, 6), (0, 0, 0, 0))
    for source in (encoded(RED, "JPEG", exif=exif), encoded(clear), encoded(RED.rotate(90, expand=True), "BMP")):
        sent = Image.open(io.BytesIO(decoded(to_data_url(source))))
        assert sent.format == "PNG" and sent.size == (4, 6)
        assert sent.tobytes() == load_image(source).tobytes()


@pytest.mark.parametrize("url", ["data:image/png;base64,@@@", "data:nothing", "data:image/png;base64,"])
def test_damaged_data_urls_are_refused(url: str) -> None:
    with pytest.raises(DataError):
        load_image(ImageSource(url=url))


class _Handler(http.server.BaseHTTPRequestHandler):
    failures = 0

    def do_GET(self) -> None:
        if self.path == "/flaky.png" and _Handler.failures < 1:
            _Handler.failures += 1
            self.send_error(503)
            return
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        if not self.path.endswith(".png"):
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        body = b"\0" * 5000 if self.path == "/large.png" else encoded(RED).data or b""
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(images.time, "sleep", lambda s: None)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_urls_are_fetched_only_when_allowed(server: str) -> None:
    with pytest.raises(DataError, match=r"data\.allow_urls"):
        load_image(ImageSource(url=f"{server}/a.png"))
    assert load_image(ImageSource(url=f"{server}/a.png"), allow_urls=True).size == (6, 4)


def test_a_failing_server_is_asked_again(server: str) -> None:
    _Handler.failures = 0
    assert load_image(ImageSource(url=f"{server}/flaky.png"), allow_urls=True).size == (6, 4)


def test_downloads_have_a_limit(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="larger than"):
        load_image(ImageSource(url=f"{server}/large.png"), allow_urls=True)


def test_redirects_cannot_leave_http(server: str) -> None:
    with pytest.raises(DataError, match="cannot be fetched"):
        load_image(ImageSource(url=f"{server}/away"), allow_urls=True)


def test_missing_pages_and_dead_servers_are_named(server: str) -> None:
    with pytest.raises(DataError, match="404"):
        load_image(ImageSource(url=f"{server}/gone"), allow_urls=True)
    with pytest.raises(DataError, match="cannot be fetched"):
        load_image(ImageSource(url="http://127.0.0.1:9/a.png"), allow_urls=True)
