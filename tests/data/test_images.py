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
    [("PNG", {}), ("JPEG", {"quality": 90}), ("JPEG", {"quality": 90, "progressive": True}), ("TIFF", {})],
    ids=["png", "jpeg", "progressive-jpeg", "tiff"],
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
        with pytest.raises(ImageError, match=r"cut\.img: (truncated|damaged|not a PNG)"):
            read_gray(file)


def test_a_flipped_bit_in_a_png_is_noticed(tmp_path):
    whole = bytearray(encoded(textured(), "PNG"))
    whole[len(whole) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(whole)
    with pytest.raises(ImageError, match=r"damaged .checksum"):
        read_gray(tmp_path / "a.png")


def test_several_frames_are_refused(tmp_path, gray):
    pages = [Image.fromarray(gray), Image.fromarray(gray[::-1].copy())]
    for name in ("a.tif", "a.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(ImageError, match="2 frames in one file"):
            read_gray(tmp_path / name)


def test_a_decompression_bomb_is_refused(tmp_path):
    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ImageError, match="MAX_IMAGE_PIXELS"):
        read_gray(tmp_path / "bomb.png")


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
    [({"norm": "zscore"}, "unknown"), ({"channels": 2}, "1 or 3"), ({"channels": 1, "norm": "imagenet"}, "three")],
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
