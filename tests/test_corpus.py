"""Pictures as they come: every format, mode and orientation, cut off, damaged and hostile, all made here."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, features

import nst_helpers as nst

# Pillow warns of much that it then refuses or mends.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
SIZE = 64, 48
ORIENTATION = 0x0112  # the EXIF tag
UNDO = [None, None, *(Image.Transpose(x) for x in (0, 3, 1, 5, 2, 6, 4))]  # by orientation, 2 to 8
MODES = {
    "JPEG": ("L", "RGB", "CMYK", "YCCK"),
    "PNG": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P", "animated"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"),
    "BMP": ("1", "L", "P", "RGB"),
    "APNG": ("animated",),
    **({"AVIF": ("RGB", "RGBA")} if features.check("avif") else {}),
}
TURNABLE = ("JPEG", "PNG", "WEBP", "TIFF")


def four_corners() -> Image.Image:
    """Red and green above blue and white."""
    picture = Image.new("RGB", SIZE, "white")
    for color, corner in (("red", (0, 0)), ("lime", (32, 0)), ("blue", (0, 24))):
        picture.paste(color, (*corner, corner[0] + 32, corner[1] + 24))
    return picture


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    if mode in ("I;16", "I", "F"):
        kind, white = {"I;16": (np.uint16, 65535), "I": (np.int32, 65535), "F": (np.float32, 1)}[mode]
        return Image.fromarray((np.asarray(picture.convert("L")) / 255 * white).astype(kind))
    if mode == "LAB":
        return ImageCms.profileToProfile(
            picture, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    if mode == "PA":
        picture = picture.convert("P")
        picture.info["transparency"] = picture.getpixel((0, 0))  # the red corner
        return picture
    if mode == "YCCK":  # Pillow writes CMYK as it is and Adobe's flag says that it is YCCK: see `encoded`
        *colors, black = picture.convert("CMYK").split()
        ycc = Image.merge("RGB", colors).convert("YCbCr")
        return Image.merge("CMYK", [*map(ImageOps.invert, ycc.split()), black])
    return picture.convert(mode)


def encoded(picture: Image.Image, kind: str, mode: str, **options) -> bytes:
    file, picture = io.BytesIO(), in_mode(picture, "RGB" if mode == "animated" else mode)
    if mode == "animated":
        options |= {"save_all": True, "append_images": [Image.new("RGB", SIZE, "black")]}
    if kind == "JPEG":
        options["quality"] = 95
    if mode == "PA":
        options["transparency"] = picture.info["transparency"]
    picture.save(file, "PNG" if kind == "APNG" else kind, **options)
    data = file.getvalue()
    if mode == "YCCK":
        at = data.index(b"Adobe") + 11  # the flag of Adobe's marker: 0 is CMYK, 2 is YCCK
        assert data[at] == 0
        data = data[:at] + b"\2" + data[at + 1 :]
    return data


def corners(image: torch.Tensor) -> torch.Tensor:
    """The colours 4 pixels away from the corners, row by row, (4, 3)."""
    return torch.stack([image[0, :, y, x] for y in (4, -5) for x in (4, -5)])


def expected_corners(mode: str) -> torch.Tensor:
    _, green, blue, white = colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    if mode in ("L", "LA", "I;16", "I", "F"):
        return (colors @ torch.tensor([0.299, 0.587, 0.114]))[:, None].expand(4, 3)
    return torch.stack([white, green, blue, white]) if mode == "PA" else colors


CASES = [(kind, mode) for kind, modes in MODES.items() for mode in modes]


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_every_format_and_mode_comes_in_with_its_colours(kind, mode):
    image = nst.load_image(encoded(four_corners(), kind, mode))
    assert image.shape == (1, 3, 48, 64)
    if mode == "1":  # dithered
        assert set(image.unique().tolist()) == {0, 1} and (corners(image)[3] == 1).all()
    else:
        torch.testing.assert_close(corners(image), expected_corners(mode), atol=0.1, rtol=0)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", TURNABLE)
def test_every_format_and_orientation_comes_in_upright(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for mode in [mode for mode in MODES[kind] if mode not in ("PA", "1")]:
        stored = four_corners().transpose(UNDO[orientation])
        image = nst.load_image(encoded(stored, kind, mode, exif=exif.tobytes()))
        assert image.shape == (1, 3, 48, 64), mode
        torch.testing.assert_close(corners(image), expected_corners(mode), atol=0.1, rtol=0, msg=mode)


# Colour profiles --------------------------------------------------------------------------------


def swapped_profile() -> bytes:
    """sRGB, but what is called red is blue."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)


def linear_grey_profile() -> bytes:
    """A grey profile without a gamma: 0.5 is half as much light as white."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)  # D50
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, 256, 0)  # gamma 1.0, padded
    tags = struct.pack(">I", 2) + struct.pack(">4sII", b"wtpt", 156, 20) + struct.pack(">4sII", b"kTRC", 176, 16)
    header = struct.pack(">II", 192, 0) + b"\2\x10\0\0mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + tags + white + curve


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_embedded_profile_is_converted_to_srgb(kind):
    image = nst.load_image(encoded(four_corners(), kind, "RGB", icc_profile=swapped_profile()))
    red, green, blue, white = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    torch.testing.assert_close(corners(image), torch.stack([blue, green, red, white]), atol=0.06, rtol=0)


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "PA"), ("TIFF", "RGBA")])
def test_a_profile_leaves_the_transparency_alone(kind, mode):
    picture = four_corners().convert("RGBA")
    if mode == "RGBA":
        picture.paste((0, 0, 0, 0), (0, 0, 32, 24))
    source = picture if mode == "RGBA" else four_corners()
    image = nst.load_image(encoded(source, kind, mode, icc_profile=swapped_profile()))
    red, green, white = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 1]])
    torch.testing.assert_close(corners(image), torch.stack([white, green, red, white]), atol=0.06, rtol=0)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile_is_converted_too(mode):
    grey = Image.new("RGB", SIZE, (128, 128, 128))
    plain, linear = (
        nst.load_image(encoded(grey, "PNG", mode, **options)).mean()
        for options in ({}, {"icc_profile": linear_grey_profile()})
    )
    assert plain == pytest.approx(0.5, abs=0.01) and linear == pytest.approx(0.735, abs=0.01)


@pytest.mark.parametrize(
    "profile", [b"no profile", swapped_profile()[:200], linear_grey_profile().replace(b"kTRC", b"XTRC")]
)
def test_a_profile_that_cannot_be_used_is_said_and_the_picture_comes_in(profile, tmp_path):
    path = tmp_path / "odd.png"
    path.write_bytes(encoded(four_corners(), "PNG", "RGB", icc_profile=profile))
    with pytest.warns(UserWarning, match=r"colour profile of '.*odd\.png' cannot be used"):
        image = nst.load_image(path)
    torch.testing.assert_close(corners(image), expected_corners("RGB"), atol=0.01, rtol=0)


# Damage -----------------------------------------------------------------------------------------


def damaged() -> dict[str, bytes]:
    """A small file of each format, with enough detail that each cut-off byte is missed."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    files = {"TIFF, packed": encoded(noise, "TIFF", "RGB", compression="tiff_lzw")}
    files["JPEG, progressive"] = encoded(noise, "JPEG", "RGB", progressive=True)
    for kind, modes in MODES.items():
        mode = "animated" if kind == "APNG" else "RGB" if "RGB" in modes else "P"
        files[kind] = encoded(noise.resize(SIZE) if mode == "animated" else noise, kind, mode)
    return files


DAMAGED = damaged()


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_cut_off_at_any_tenth_byte_is_refused_by_name_or_whole(kind, tmp_path):
    """Whole: some formats end with bytes that no pixel needs."""
    data = DAMAGED[kind]
    path = tmp_path / "cut.picture"
    path.write_bytes(data)
    whole, refused = nst.load_image(path), 0
    for end in range(0, len(data), 10):
        path.write_bytes(data[:end])
        try:
            image = nst.load_image(path)
        except ValueError as error:
            assert "cut.picture' " in str(error), error
            refused += 1
        else:
            assert torch.equal(image, whole), f"{kind} is half a picture at {end} of {len(data)} bytes"
    assert refused * 10 > 0.5 * len(data)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_flipped_bit_gives_a_picture_or_one_sentence(kind):
    data = DAMAGED[kind]
    random = np.random.default_rng(0)
    for _ in range(150):
        at, bit = random.integers(len(data)), random.integers(8)
        flipped = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nst.check_image("picture", nst.load_image(flipped, 64))
        except ValueError as error:
            assert str(error).startswith("the uploaded picture ") and str(error).endswith("."), error


# Hostility --------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A grey PNG that claims to be of this size, and holds next to nothing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    )


def gif(width: int, height: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\0\0\0,\0\0\0\0"
        + struct.pack("<HH", width, height)
        + b"\0\2\0;"
    )


NO_PICTURES = {
    "a drawing": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "a program for Linux": b"\x7fELF\2\1\1" + bytes(200),
    "a program for Windows": b"MZ\x90\0" + bytes(200),
    "a script": b"#!/bin/sh\nrm -rf /\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n(x) run showpage\n",
    "a PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "an archive": b"PK\3\4" + bytes(200),
    "an icon": b"\0\0\1\0\1\0\x40\x30\0\0\1\0\x20\0" + bytes(200),
    "a film": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(200),
    "nothing": b"",
    "a line feed": b"\n",
}


@pytest.mark.parametrize("data", NO_PICTURES.values(), ids=NO_PICTURES)
def test_what_is_no_picture_is_refused_whatever_its_name_says(data, tmp_path, monkeypatch):
    def run(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", run)  # as Pillow does for PostScript
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"holiday\.jpg' is not a picture in a format that is read here \(JPEG, "):
        nst.load_image(path)


BOMBS = {"a PNG of 10 gigapixels": png(100_000, 100_000), "a PNG of 90 megapixels": png(10_000, 9_000)}
BOMBS |= {"a GIF of 4 gigapixels": gif(65535, 65535)}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(data, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="the uploaded picture has more than the 89,478,485 pixels"):
        nst.load_image(data)


HOSTILE = {
    "no pixels": png(0, 0),
    "a side of 2 ** 31": png(2**31, 1),
    "too few pixels for its size": png(64, 48),
    "a text that swells": png(64, 48, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))),
    "a profile that swells": png(64, 48, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**7)))),
    "a chunk of 4 GB": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 8, 0, 0, 0, 0))
    + b"\xff" * 64,
    "tags that lead nowhere": b"II*\0" + struct.pack("<I", 2**32 - 8) + bytes(64),
    "a JPEG of markers": b"\xff\xd8" + b"\xff\xe1\0\2" * 1000,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_gets_one_sentence(data):
    with pytest.raises(ValueError, match=r"^the uploaded picture .*\.$"):
        nst.load_image(data)


def test_the_corpus_is_as_large_as_it_should_be():
    turned = sum(len(MODES[kind]) for kind in TURNABLE) * 7
    assert len(CASES) + turned + len(NO_PICTURES) + len(BOMBS) + len(HOSTILE) >= 150
