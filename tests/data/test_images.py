"""Reading files: every format by its content, every kind of damage by its message."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from gloria_core.data.images import ImageError, decode_gray, read_gray, to_tensor

GRAY = np.arange(20 * 30, dtype=np.int64).reshape(20, 30) * 255 // 599


@pytest.fixture
def gray():
    return GRAY.astype(np.uint8)


def textured(height=64, width=48):
    return np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.uint8)


def encoded(array, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def test_eight_bit_png_is_read_as_it_is(tmp_path, gray):
    Image.fromarray(gray).save(tmp_path / "a.png")
    result = read_gray(tmp_path / "a.png")
    assert result.dtype == np.uint8
    assert (result == gray).all()
    result[0, 0] = 7  # the caller owns the array


def test_sixteen_bit_png_is_stretched(tmp_path):
    wide = (np.arange(600).reshape(20, 30) * 6 + 100).astype(np.uint16)  # 100..3694, 12 bits of 16
    Image.fromarray(wide).save(tmp_path / "a.png")
    result = read_gray(tmp_path / "a.png")
    assert (result.min(), result.max()) == (0, 255)
    assert (result == np.rint((wide - 100.0) * 255 / 3594)).all()
    Image.fromarray(np.full((4, 4), 900, np.uint16)).save(tmp_path / "flat.png")
    assert (read_gray(tmp_path / "flat.png") == 0).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "1"])
def test_other_png_modes_become_luminance(tmp_path, mode):
    colour = np.zeros((4, 6, 3), np.uint8)
    colour[:, :3] = [255, 255, 255]
    picture = Image.fromarray(colour).convert(mode)
    picture.save(tmp_path / "a.png")
    result = read_gray(tmp_path / "a.png")
    assert result.shape == (4, 6)
    assert (result == np.where(np.arange(6) < 3, 255, 0)).all()


def test_red_weighs_as_in_itu_601(tmp_path):
    Image.fromarray(np.full((4, 4, 3), [200, 0, 0], np.uint8)).save(tmp_path / "a.png")
    assert (read_gray(tmp_path / "a.png") == 60).all()  # 0.299 * 200 = 59.8


def test_jpeg_and_its_exif_rotation(tmp_path):
    smooth = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (24, 1))
    (tmp_path / "a.jpg").write_bytes(encoded(smooth, "JPEG", quality=95))
    assert np.abs(read_gray(tmp_path / "a.jpg").astype(int) - smooth).max() <= 6
    exif = Image.Exif()
    exif[274] = 6  # camera turned: the file must be turned clockwise to stand upright
    (tmp_path / "b.jpg").write_bytes(encoded(smooth, "JPEG", quality=95, exif=exif))
    turned = read_gray(tmp_path / "b.jpg")
    assert turned.shape == (40, 24)
    assert turned[-1].mean() > 240 > 20 > turned[0].mean()


def test_content_decides_not_the_suffix(tmp_path, gray):
    (tmp_path / "a.jpg").write_bytes(encoded(gray, "PNG"))
    assert (read_gray(tmp_path / "a.jpg") == gray).all()
    (tmp_path / "noname").write_bytes(encoded(gray, "PNG"))
    assert (read_gray(tmp_path / "noname") == gray).all()


def test_missing_empty_folder_and_foreign_files_say_what_to_do(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png: no such file\. Check the root"):
        read_gray(tmp_path / "gone.png")
    (tmp_path / "zero.png").touch()
    with pytest.raises(ImageError, match=r"zero\.png: the file is empty.*copy"):
        read_gray(tmp_path / "zero.png")
    with pytest.raises(ImageError, match="cannot be opened"):
        read_gray(tmp_path)
    (tmp_path / "page.png").write_text("<html>403 Forbidden</html>")
    with pytest.raises(ImageError, match=r"page\.png: not a PNG, JPEG or DICOM file \(it begins with '<html>"):
        read_gray(tmp_path / "page.png")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[("PNG", {}), ("JPEG", {"quality": 90}), ("JPEG", {"quality": 90, "progressive": True}), ("BMP", {})],
        *[("TIFF", {"compression": name}) for name in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")],
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_file_cut_anywhere_is_refused(tmp_path, kind, options):
    whole = encoded(textured(), kind, **options)
    file = tmp_path / "cut.img"
    file.write_bytes(whole)
    assert read_gray(file).shape == (64, 48)
    cuts = {4, 30, len(whole) // 3, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 20, len(whole) - 1}
    for length in sorted(cuts):
        file.write_bytes(whole[:length])
        with pytest.raises(ImageError, match=r"cut\.img: truncated" if length > 4 else "not a PNG|truncated"):
            read_gray(file)


def test_a_tiff_cut_in_values_beyond_its_directory_is_truncated():
    whole = io.BytesIO()
    Image.fromarray(textured()).convert("RGB").save(whole, "TIFF", compression="tiff_lzw")  # its depths come last
    assert decode_gray(whole.getvalue(), "a").shape == (64, 48)
    for missing in (1, 2, 4, 6):
        with pytest.raises(ImageError, match="truncated"):
            decode_gray(whole.getvalue()[:-missing], "a")


def test_a_flipped_bit_in_a_png_is_noticed(tmp_path):
    whole = bytearray(encoded(textured(), "PNG"))
    whole[len(whole) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(whole)
    with pytest.raises(ImageError, match=r"damaged .broken PNG file .bad header checksum"):
        read_gray(tmp_path / "a.png")


def test_several_frames_are_refused(tmp_path, gray):
    pages = [Image.fromarray(gray), Image.fromarray(gray[::-1].copy())]
    for name in ("a.tif", "a.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(ImageError, match="2 frames in one file"):
            read_gray(tmp_path / name)


def png(values, depth, colour, palette=b""):
    """A PNG of any depth and colour form. Shape: values (H, W) or (H, W, C); colour 0 gray, 2 RGB, 3 palette, 4, 6."""

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = values.reshape(len(values), -1)
    if depth >= 8:
        rows = rows.astype(f">u{depth // 8}")
    else:
        bits = (rows[:, :, None] >> np.arange(depth)[::-1]) & 1
        rows = np.packbits(bits.reshape(len(rows), -1).astype(np.uint8), axis=1)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, colour, 0, 0, 0)
    parts = [part(b"IHDR", header), part(b"PLTE", palette) if palette else b""]
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + part(b"IDAT", content) + part(b"IEND", b"")


def tiff(values, bits, photometric, *, sample_format=1, order="<", planar=False, palette=(), extra=()):
    """An uncompressed TIFF, one strip a plane. Shape: values (H, W, C) or (H, W), which are packed to `bits` each."""
    values = values if values.ndim == 3 else values[..., None]
    height, width, samples = values.shape

    def strip(plane):
        if bits in (8, 16, 32, 64):
            return plane.astype(plane.dtype.newbyteorder(order)).tobytes()
        rows = plane.reshape(height, -1)
        ones = (rows[..., None].astype(int) >> np.arange(bits)[::-1]) & 1
        return np.packbits(ones.reshape(height, -1).astype(np.uint8), axis=1).tobytes()

    strips = [strip(values[..., c]) for c in range(samples)] if planar else [strip(values)]
    tags = {256: ("I", [width]), 257: ("I", [height]), 258: ("H", [bits] * samples), 259: ("H", [1])}
    tags |= {262: ("H", [photometric]), 277: ("H", [samples]), 278: ("I", [height]), 284: ("H", [1 + planar])}
    tags |= {273: ("I", [0] * len(strips)), 279: ("I", [len(one) for one in strips])}
    tags |= {339: ("H", [sample_format] * samples)}
    tags |= {tag: ("H", list(value)) for tag, value in ((320, palette), (338, extra)) if len(value)}
    beyond = 8 + 2 + 12 * len(tags) + 4  # where values go that do not fit into their entry
    first = beyond + sum(struct.calcsize(kind) * len(value) for kind, value in tags.values())
    tags[273] = ("I", [first + sum(map(len, strips[:number])) for number in range(len(strips))])
    directory, outside = struct.pack(order + "H", len(tags)), b""
    for tag, (kind, value) in sorted(tags.items()):
        data = struct.pack(f"{order}{len(value)}{kind}", *value)
        directory += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(value))
        directory += data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(order + "I", beyond + len(outside))
        outside += data if len(data) > 4 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + directory + bytes(4)
    return head + outside.ljust(first - beyond, b"\0") + b"".join(strips)


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("depth", "colour"),
    [
        *[(d, 0) for d in (1, 2, 4, 8, 16)],
        *[(d, 3) for d in (1, 2, 4, 8)],
        *[(d, c) for d in (8, 16) for c in (2, 4, 6)],
    ],
)
def test_every_depth_and_colour_of_png_fills_the_range(depth, colour):
    top = 2**depth - 1
    ramp = np.rint(RAMP * top).astype(int)
    values = {0: ramp, 3: ramp}.get(colour, np.stack([ramp] * {2: 3, 4: 2, 6: 4}.get(colour, 1), axis=-1))
    palette = np.repeat(np.rint(np.arange(top + 1) / top * 255), 3).astype(np.uint8).tobytes() if colour == 3 else b""
    assert np.abs(decode_gray(png(values, depth, colour, palette), "a.png") - ramp / top * 255).max() <= 1


def test_deep_colour_is_stretched_and_weighed_before_it_becomes_bytes():
    narrow = np.rint(RAMP * 500 + 100).astype(int)
    shown = decode_gray(png(np.stack([narrow] * 3, axis=-1), 16, 2), "a.png")
    assert (shown == np.rint((narrow - 100) * 255 / 500)).all()
    red_and_green = np.zeros((1, 3, 3), int)
    red_and_green[0, 1, 0] = red_and_green[0, 2, 1] = 40_000
    assert decode_gray(png(red_and_green, 16, 2), "a.png").tolist() == [[0, round(0.299 / 0.587 * 255), 255]]


FORMS = {"gray": (1, 1, ()), "white is zero": (0, 1, ()), "gray and alpha": (1, 2, [2])}
FORMS |= {"RGB": (2, 3, ()), "RGBA": (2, 4, [2]), "palette": (3, 1, ()), "CMYK": (5, 4, ())}
KINDS = {**{bits: f"u{max(1, bits // 8)}" for bits in (1, 2, 4, 8)}, **dict.fromkeys((10, 12, 14, 16), "u2"), 32: "u4"}
KINDS |= {f"{kind}{bits}": f"{kind[0]}{bits // 8}" for kind in ("int", "float") for bits in (8, 16, 32, 64)}
READ = {(1, "gray"), (2, "gray"), (4, "gray"), (8, "gray"), (16, "gray"), ("float32", "gray"), (8, "RGB"), (8, "RGBA")}
READ |= {(bits, "palette") for bits in (1, 2, 4, 8)} | {(8, "white is zero"), (8, "gray and alpha"), (8, "CMYK")}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [kind for kind in KINDS if kind != "float8"])
def test_every_depth_and_colour_of_tiff_fills_the_range_or_is_named(order, form, depth):
    kind, (photometric, samples, extra) = np.dtype(KINDS[depth]), FORMS[form]
    bits = depth if isinstance(depth, int) else kind.itemsize * 8
    whole = (np.iinfo(kind).min, np.iinfo(kind).max) if kind.kind == "i" else (0, 2**bits - 1)
    low, high = (-1, 3) if kind.kind == "f" else whole
    part = np.rint(RAMP * (high - low)) / (high - low) if kind.kind == "u" else RAMP
    values = np.stack([(part * (high - low) + low).astype(kind)] * samples, axis=-1)
    options = (
        {"palette": np.tile(np.linspace(0, 65535, 2**bits).astype(int), 3)} if form == "palette" and bits < 16 else {}
    )
    expected = {"white is zero": 1 - part, "CMYK": (1 - part) ** 2}.get(form, part) * 255
    for planar in {False, samples > 1}:
        sample_format = "uif".index(kind.kind) + 1
        data = tiff(
            values, bits, photometric, sample_format=sample_format, order=order, planar=planar, extra=extra, **options
        )
        try:
            shown = decode_gray(data, "a.tif").astype(float)
        except ImageError as error:
            assert (depth, form) not in READ or planar
            assert f"TIFF of {samples} x {bits} bits" in str(error) and "export it as 8-bit or 16-bit gray" in str(
                error
            )
        else:
            assert np.abs(shown - expected).max() <= 1.01


def test_a_picture_that_is_not_read_is_named_with_its_depth():
    assert decode_gray(tiff(np.zeros((2, 2), np.uint8), 8, 1), "a.tif").shape == (2, 2)
    for data, described in (
        (tiff(np.zeros((2, 2, 3), np.uint16), 16, 2), "TIFF of 3 x 16 bits, which is not read"),
        (tiff(np.zeros((2, 2), np.float64), 64, 1, sample_format=3), "floating-point TIFF of 1 x 64 bits"),
        (tiff(np.zeros((2, 2, 3), np.int16), 16, 2, sample_format=2), "signed TIFF of 3 x 16 bits"),
        (b"BM" + struct.pack("<IIIIiiHH", 70, 0, 54, 40, 2, 2, 1, 48) + bytes(54), r"BMP pixel depth \(48\).*export"),
        (png(np.zeros((2, 2), int), 8, 0)[:24] + b"\x05" + png(np.zeros((2, 2), int), 8, 0)[25:], "damaged"),
    ):
        with pytest.raises(ImageError, match=described):
            decode_gray(data, "a")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {})]
)
def test_random_damage_never_escapes_as_another_error(kind, options):
    whole = encoded(textured(20, 20), kind, **options)
    rng = np.random.default_rng(0)
    for _ in range(200):
        spoilt = bytearray(whole)
        for place in [*rng.integers(4, min(len(whole), 200), 2), rng.integers(4, len(whole))]:
            spoilt[place] = rng.integers(256)
        try:
            assert decode_gray(bytes(spoilt), "a").dtype == np.uint8
        except ImageError as error:
            assert str(error).startswith("a: ")


def test_pixels_that_are_no_numbers_are_refused():
    with pytest.raises(ImageError, match="NaN"):
        decode_gray(tiff(np.full((4, 4), np.nan, "<f4"), 32, 1, sample_format=3), "a.tif")


def test_a_twelve_bit_jpeg_is_to_be_exported():
    data = bytearray(encoded(textured(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(ImageError, match=r"a JPEG of 1 x 12 bits that is damaged or not read.* or export"):
        decode_gray(bytes(data), "a.jpg")


def test_a_decompression_bomb_is_refused():
    data = bytearray(png(np.zeros((1, 1), int), 8, 0))
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ImageError, match="MAX_IMAGE_PIXELS"):
        decode_gray(bytes(data), "bomb.png")


def test_to_tensor_norms():
    images = np.array([[[0, 255], [128, 51]]], np.uint8)
    half = to_tensor(images)
    assert half.shape == (1, 3, 2, 2)
    assert half.dtype == torch.float32
    assert half.is_contiguous()
    assert torch.allclose(half[0, 1], torch.tensor([[-1.0, 1.0], [128 / 127.5 - 1, -0.6]]), atol=1e-6)
    assert to_tensor(images, channels=1).shape == (1, 1, 2, 2)
    imagenet = to_tensor(images, norm="imagenet")
    assert torch.allclose(
        imagenet[0, :, 0, 1], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    )
    assert to_tensor(np.zeros((2, 3, 4, 4), np.uint8)).shape == (2, 3, 3, 4, 4)


def test_to_tensor_leaves_its_input_alone():
    pixels = torch.full((1, 2, 2), 9, dtype=torch.uint8)
    to_tensor(pixels)
    assert (pixels == 9).all()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"norm": "zscore"}, "'imagenet'"),
        ({"channels": 2}, "1 or 3"),
        ({"channels": 1, "norm": "imagenet"}, "three"),
    ],
)
def test_to_tensor_refuses_unknown_options(options, word):
    with pytest.raises(ValueError, match=word):
        to_tensor(np.zeros((1, 2, 2), np.uint8), **options)


def test_to_tensor_refuses_floats():
    with pytest.raises(ValueError, match="uint8"):
        to_tensor(np.zeros((1, 2, 2), np.float32))


def test_bytes_after_a_jpeg_do_no_harm_but_a_lost_end_does(tmp_path):
    whole = encoded(textured(), "JPEG", quality=90)
    assert decode_gray(whole + b"trailer" * 3000, "a.jpg").shape == (64, 48)
    thumbnail = encoded(textured(8, 8), "JPEG")  # puts an end marker inside the header
    inside = encoded(textured(), "JPEG", quality=90, comment=thumbnail)
    assert decode_gray(inside, "a.jpg").shape == (64, 48)
    with pytest.raises(ImageError, match="truncated"):
        decode_gray(inside[:-2], "a.jpg")
    narrow = encoded(np.zeros((130, 1), np.uint8), "JPEG", quality=80)  # Pillow alone accepts this one
    with pytest.raises(ImageError, match="end marker is missing"):
        decode_gray(narrow[:-2], "a.jpg")
