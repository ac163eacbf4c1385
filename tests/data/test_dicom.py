"""DICOM radiographs: the order of transforms of PS3.3, and damage that must be named."""

import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from gloria_core.data.images import ImageError, decode_gray, read_gray

GRAY = (np.arange(20 * 30).reshape(20, 30) * 255 // 599).astype(np.uint8)


def write_dicom(
    path, pixels, *, bits, allocated=0, syntax=ExplicitVRLittleEndian, preamble=b"\0" * 128, element="PixelData", **tags
):
    """A minimal digital radiograph; `bits` are stored in `allocated` bits, or the next whole number of bytes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    coding = {"is_implicit_VR": implicit, "is_little_endian": little}
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=preamble, **coding)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    colour = pixels.shape[-1] == 3
    dataset.Rows, dataset.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = allocated or (
        8 if bits <= 8 else 16 if bits <= 16 else bits if element != "PixelData" else 32
    )
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, 0
    for name, value in tags.items():
        setattr(dataset, name, value)
    order, bytes_each = "<" if little else ">", dataset.BitsAllocated // 8
    if dataset.get("PlanarConfiguration"):
        pixels = np.moveaxis(pixels, -1, 0)
    if element != "PixelData":
        for name in ("BitsStored", "HighBit", "PixelRepresentation"):
            delattr(dataset, name)
        setattr(dataset, element, pixels.astype(f"{order}f{bytes_each}").tobytes())
    else:
        ones = np.packbits(pixels.astype(np.uint8), bitorder="little") if not bytes_each else None
        data = (pixels.astype(np.int64).astype(f"{order}u{bytes_each}") if bytes_each else ones).tobytes()
        dataset.PixelData = data + bytes(len(data) % 2)
        dataset["PixelData"].VR = "OB" if bits <= 8 and dataset.BitsAllocated <= 8 else "OW"
    dataset.save_as(path, enforce_file_format=True)
    return dataset


TWELVE = (np.arange(600).reshape(20, 30) * 7 % 4096).astype(np.uint16)


def linear_window(values, center, width):
    """DICOM PS3.3 C.11.2.1.2.1, with an output range of 0..255."""
    inside = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    inside = np.where(values <= center - 0.5 - (width - 1) / 2, 0, inside)
    return np.where(values > center - 0.5 + (width - 1) / 2, 255, inside)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_dicom_without_a_window_is_stretched(tmp_path, syntax):
    half = TWELVE // 2
    write_dicom(tmp_path / "a.dcm", half + 50, bits=12, syntax=syntax)
    expected = np.rint(half * 255.0 / half.max())
    assert (read_gray(tmp_path / "a.dcm") == expected).all()


def test_dicom_window(tmp_path):
    write_dicom(tmp_path / "a.dcm", TWELVE, bits=12, WindowCenter=1000, WindowWidth=801)
    expected = linear_window(TWELVE.astype(float), 1000, 801)
    assert np.abs(read_gray(tmp_path / "a.dcm") - expected).max() <= 0.5 + 1e-6


def test_first_of_several_windows_is_taken(tmp_path):
    write_dicom(tmp_path / "a.dcm", TWELVE, bits=12, WindowCenter=[1000, 30], WindowWidth=[801, 10])
    expected = linear_window(TWELVE.astype(float), 1000, 801)
    assert np.abs(read_gray(tmp_path / "a.dcm") - expected).max() <= 0.5 + 1e-6


def test_rescale_comes_before_the_window(tmp_path):
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 600, "WindowWidth": 2001}
    write_dicom(tmp_path / "a.dcm", TWELVE, bits=12, **tags)
    expected = linear_window(TWELVE * 2.0 - 1000, 600, 2001)
    assert np.abs(read_gray(tmp_path / "a.dcm") - expected).max() <= 0.5 + 1e-6


def test_a_negative_slope_turns_the_values_not_the_window(tmp_path):
    tags = {"RescaleSlope": -1, "RescaleIntercept": 4095}
    write_dicom(tmp_path / "a.dcm", TWELVE, bits=12, **tags)
    shown = read_gray(tmp_path / "a.dcm")
    assert shown[np.unravel_index(TWELVE.argmin(), TWELVE.shape)] == 255
    assert shown[np.unravel_index(TWELVE.argmax(), TWELVE.shape)] == 0


def test_sigmoid_window(tmp_path):
    write_dicom(tmp_path / "a.dcm", TWELVE, bits=12, WindowCenter=2000, WindowWidth=900, VOILUTFunction="SIGMOID")
    expected = 255 / (1 + np.exp(-4 * (TWELVE - 2000.0) / 900))
    assert np.abs(read_gray(tmp_path / "a.dcm") - expected).max() <= 0.5 + 1e-6


def test_monochrome1_is_turned_around(tmp_path):
    tags = {"WindowCenter": 1000, "WindowWidth": 801}
    write_dicom(tmp_path / "a.dcm", TWELVE, bits=12, **tags)
    write_dicom(tmp_path / "b.dcm", TWELVE, bits=12, PhotometricInterpretation="MONOCHROME1", **tags)
    assert (read_gray(tmp_path / "b.dcm") == 255 - read_gray(tmp_path / "a.dcm")).all()


def voi_table(entries, first, bits, data):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [entries, first, bits])
    item.add_new("LUTData", "US", [int(value) for value in data])
    return Sequence([item])


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_voi_table_is_preferred_to_the_window(tmp_path, bits):
    ramp = np.rint(np.sqrt(np.arange(3000) / 2999) * (2**bits - 1))  # starts at 100, ends at 3099
    table = voi_table(3000, 100, bits, ramp)
    write_dicom(tmp_path / "a.dcm", TWELVE, bits=12, VOILUTSequence=table, WindowCenter=7, WindowWidth=2)
    index = np.clip(TWELVE.astype(int) - 100, 0, 2999)
    expected = ramp[index] / (2**bits - 1) * 255
    assert np.abs(read_gray(tmp_path / "a.dcm") - expected).max() <= 0.5 + 1e-6


def test_modality_table(tmp_path):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 16])
    item.add_new("LUTData", "US", list(range(4095, -1, -1)))
    item.ModalityLUTType = "US"
    write_dicom(tmp_path / "a.dcm", TWELVE, bits=12, ModalityLUTSequence=Sequence([item]))
    spread = TWELVE.max() - TWELVE.min()
    assert np.abs(read_gray(tmp_path / "a.dcm") - (TWELVE.max() - TWELVE) * 255.0 / spread).max() <= 0.5 + 1e-6


def test_signed_pixels(tmp_path):
    values = TWELVE.astype(np.int32) - 2000
    tags = {"PixelRepresentation": 1, "WindowCenter": 0, "WindowWidth": 1001}
    write_dicom(tmp_path / "a.dcm", values.astype(np.int16).view(np.uint16), bits=16, **tags)
    assert np.abs(read_gray(tmp_path / "a.dcm") - linear_window(values.astype(float), 0, 1001)).max() <= 0.5 + 1e-6


def test_pixel_padding_takes_no_part_in_the_stretch(tmp_path):
    pixels = TWELVE // 2 + 200
    pixels[:, :4] = 65535
    write_dicom(tmp_path / "a.dcm", pixels, bits=16, PixelPaddingValue=65535)
    shown = read_gray(tmp_path / "a.dcm")
    assert (shown[:, :4] == 0).all()
    assert shown[:, 4:].max() == 255


def test_old_dicom_without_preamble(tmp_path):
    dataset = write_dicom(tmp_path / "a.dcm", GRAY, bits=8)
    bare = tmp_path / "old.dcm"
    dataset.preamble = None
    pydicom.dcmwrite(bare, dataset, enforce_file_format=False)
    assert bare.read_bytes()[128:132] != b"DICM"
    assert (read_gray(bare) == GRAY).all()


def test_damaged_dicom_is_refused(tmp_path):
    write_dicom(tmp_path / "a.dcm", TWELVE, bits=12)
    whole = (tmp_path / "a.dcm").read_bytes()
    for length in (140, 200, len(whole) // 2, len(whole) - 3):
        (tmp_path / "cut.dcm").write_bytes(whole[:length])
        with pytest.raises(ImageError, match=r"cut\.dcm: (truncated|incomplete|a DICOM file without an image.*or cut)"):
            read_gray(tmp_path / "cut.dcm")


def test_display_elements_that_cannot_be_used_are_named(tmp_path):
    write_dicom(tmp_path / "a.dcm", TWELVE, bits=12, WindowCenter=10, WindowWidth=20, VOILUTFunction="LOGARITHM")
    with pytest.raises(ImageError, match=r"a\.dcm: the pixels are whole.*LOGARITHM"):
        read_gray(tmp_path / "a.dcm")


def test_a_missing_decoder_is_named(tmp_path):
    dataset = write_dicom(tmp_path / "a.dcm", TWELVE, bits=12)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.57"  # lossless JPEG, needs a plug-in
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    with pytest.raises(ImageError, match=r"JPEG Lossless.*pylibjpeg"):
        read_gray(tmp_path / "b.dcm")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_to_a_dicom_header_never_escapes_as_another_error(tmp_path):
    write_dicom(tmp_path / "a.dcm", TWELVE, bits=12)
    whole = (tmp_path / "a.dcm").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        spoilt = bytearray(whole)
        for place in rng.integers(132, 500, 3):
            spoilt[place] = rng.integers(256)
        try:
            assert decode_gray(bytes(spoilt), "a.dcm").dtype == np.uint8
        except ImageError as error:
            refused += 1
            assert str(error).startswith("a.dcm: ")
    assert 10 < refused < 300


def test_the_mark_decides_not_the_suffix(tmp_path):
    for name in ("a.png", "noname", "a.dcm"):
        write_dicom(tmp_path / name, GRAY, bits=8)
        assert (read_gray(tmp_path / name) == GRAY).all()


def test_several_frames_are_refused_in_dicom(tmp_path):
    write_dicom(tmp_path / "a.dcm", np.stack([GRAY, GRAY]), bits=8, NumberOfFrames=2)
    with pytest.raises(ImageError, match="2 frames in one file"):
        read_gray(tmp_path / "a.dcm")


def shown(tmp_path, pixels=TWELVE, **options):
    write_dicom(tmp_path / "a.dcm", pixels, **{"bits": 12, **options})
    return read_gray(tmp_path / "a.dcm").astype(int)


WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


@pytest.mark.parametrize("start", [b"II*\0", b"MM\0*", b"BM", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_the_mark_comes_before_any_picture_signature(tmp_path, start):
    turned = {"PhotometricInterpretation": "MONOCHROME1", **WINDOW}
    assert (shown(tmp_path, preamble=start.ljust(128, b"\0"), **turned) == shown(tmp_path, **turned)).all()


@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("name", ["CR0001.dcm", "CR0001", "CR0001.png"])
def test_a_data_set_without_meta_header(tmp_path, implicit, little, name):
    dataset = write_dicom(tmp_path / "a.dcm", TWELVE, bits=12, **WINDOW)
    expected = read_gray(tmp_path / "a.dcm")
    if not little:
        dataset.PixelData = TWELVE.astype(">u2").tobytes()
    stream = pydicom.filebase.DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = little, implicit
    pydicom.filewriter.write_dataset(stream, Dataset(dataset))
    assert (decode_gray(stream.getvalue(), name) == expected).all()


def test_a_meta_header_without_transfer_syntax(tmp_path):
    expected = shown(tmp_path, **WINDOW)
    whole = (tmp_path / "a.dcm").read_bytes()
    element = b"\x02\0\x10\0UI\x14\x00" + b"1.2.840.10008.1.2.1\0"
    assert element in whole
    length = int.from_bytes(whole[140:144], "little") - len(element)
    assert (
        decode_gray(whole[:140] + length.to_bytes(4, "little") + whole[144:].replace(element, b""), "a") == expected
    ).all()


@pytest.mark.parametrize(
    "tags",
    [
        {"RescaleSlope": None, "RescaleIntercept": None},
        {"RescaleSlope": 1, "RescaleIntercept": None},
        {"RescaleSlope": None},
        {"VOILUTFunction": ""},
        {"VOILUTSequence": Sequence([])},
        {"VOILUTSequence": Sequence([Dataset()])},
        {"ModalityLUTSequence": Sequence([Dataset()])},
        {"WindowCenter": ["", "2048"], "WindowWidth": ["", "4096"]},
        {"WindowCenter": [0, 2048], "WindowWidth": [0, 4096]},
        {"PixelPaddingValue": None},
        {"PixelPaddingRangeLimit": None},
        {"NumberOfFrames": None},
    ],
    ids=str,
)
def test_a_blank_element_is_an_absent_one(tmp_path, tags):
    assert (shown(tmp_path, **{**WINDOW, **tags}) == shown(tmp_path, **WINDOW)).all()


@pytest.mark.parametrize("window", [(0, 0), (None, None), (None, 30), (30, None), (40, 0.5)])
def test_without_a_usable_window_the_values_are_stretched(tmp_path, window):
    assert (shown(tmp_path, WindowCenter=window[0], WindowWidth=window[1]) == shown(tmp_path)).all()


def test_half_a_rescaling_is_applied_and_a_rescaling_by_one_keeps_bytes(tmp_path):
    with_slope = shown(tmp_path, RescaleSlope=2, RescaleIntercept=None, **WINDOW)
    assert (with_slope == shown(tmp_path, RescaleSlope=2, RescaleIntercept=0, **WINDOW)).all()
    narrow = GRAY // 2 + 20
    assert (shown(tmp_path, narrow, bits=8, RescaleSlope=1, RescaleIntercept=0) == narrow).all()


@pytest.mark.parametrize("tags", [{}, {"NumberOfFrames": 1}])
@pytest.mark.parametrize("pages", [2, 3])
def test_more_pages_than_the_header_says_are_refused(tmp_path, tags, pages):
    write_dicom(tmp_path / "a.dcm", np.stack([TWELVE] * pages), bits=12, **tags)
    with pytest.raises(ImageError, match=f"{pages} frames in one file"):
        read_gray(tmp_path / "a.dcm")


@pytest.mark.parametrize(("declared", "top"), [(16, 4095), (16, 255), (12, 1000), (8, 255)])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_a_voi_table_is_scaled_by_its_largest_entry(tmp_path, declared, top, kind):
    ramp = np.rint(np.arange(4096) / 4095 * top)
    given = shown(tmp_path, VOILUTSequence=voi_table(4096, 0, declared, ramp), PhotometricInterpretation=kind)
    expected = ramp[TWELVE] / top * 255
    assert np.abs(given - (255 - expected if kind == "MONOCHROME1" else expected)).max() <= 0.5 + 1e-6


SYNTAXES = {"explicit": ExplicitVRLittleEndian, "implicit": ImplicitVRLittleEndian, "big endian": ExplicitVRBigEndian}


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 16, 24, 32])
@pytest.mark.parametrize("allocated", [1, 8, 16, 32])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_depth_and_colour_fills_the_range(tmp_path, bits, allocated, syntax):
    if bits > allocated:
        return
    top = 2**bits - 1
    ramp = np.rint(np.linspace(0, top, 600).reshape(20, 30)).astype(np.int64)
    options = {"bits": bits, "allocated": allocated, "syntax": SYNTAXES[syntax]}
    expected = ramp / top * 255
    assert np.abs(shown(tmp_path, ramp, **options) - expected).max() <= 1
    assert np.abs(shown(tmp_path, ramp, PhotometricInterpretation="MONOCHROME1", **options) - 255 + expected).max() <= 1
    if bits > 1:
        signed = shown(tmp_path, ramp - 2 ** (bits - 1), PixelRepresentation=1, **options)
        assert np.abs(signed - expected).max() <= 1
    for planar in (0, 1):
        colour = shown(tmp_path, np.stack([ramp] * 3, axis=-1), PlanarConfiguration=planar, **options)
        assert np.abs(colour - expected).max() <= 1
    if allocated in (8, 16):
        for entries in (8, 16):
            order = ">" if syntax == "big endian" else "<"
            table = np.rint(np.linspace(0, 2**entries - 1, top + 1)).astype(f"{order}u{entries // 8}").tobytes()
            tags = {"PhotometricInterpretation": "PALETTE COLOR"}
            for name in ("Red", "Green", "Blue"):
                tags[f"{name}PaletteColorLookupTableDescriptor"] = [(top + 1) % 2**16, 0, entries]
                tags[f"{name}PaletteColorLookupTableData"] = table + bytes(len(table) % 2)
            assert np.abs(shown(tmp_path, ramp, **tags, **options) - expected).max() <= 1


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(("keyword", "kind"), [("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")])
def test_floating_point_pixels_are_stretched_and_are_numbers(tmp_path, syntax, keyword, kind):
    ramp = np.linspace(-1, 3, 600).reshape(20, 30)
    options = {"bits": 8 * int(kind[1]), "syntax": SYNTAXES[syntax], "element": keyword}
    expected = (ramp + 1) / 4 * 255
    assert np.abs(shown(tmp_path, ramp, **options) - expected).max() <= 1
    assert np.abs(shown(tmp_path, ramp, PhotometricInterpretation="MONOCHROME1", **options) - 255 + expected).max() <= 1
    for bad in (np.nan, np.inf):
        ramp[3, 4] = bad
        with pytest.raises(ImageError, match="no numbers"):
            shown(tmp_path, ramp, **options)


def test_a_header_that_no_picture_has_is_named(tmp_path):
    for tags, cause in (
        ({"SamplesPerPixel": 4}, "Samples per Pixel"),
        ({"PhotometricInterpretation": "XYZ"}, "Photometric Interpretation"),
        ({"NumberOfFrames": "1"}, None),
    ):
        if cause is None:
            assert shown(tmp_path, GRAY, bits=8, **tags).shape == GRAY.shape
        else:
            with pytest.raises(ImageError, match=f"a header that does not fit it .*{cause}"):
                shown(tmp_path, GRAY, bits=8, **tags)


def test_an_image_object_without_pixels_and_a_report_are_told_apart(tmp_path):
    dataset = write_dicom(tmp_path / "a.dcm", GRAY, bits=8)
    for name in ("PixelData", "Rows", "Columns"):
        delattr(dataset, name)
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(ImageError, match="truncated DICOM, or without pixels"):
        read_gray(tmp_path / "a.dcm")
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(ImageError, match=r"without an image \(Basic Text SR Storage\)"):
        read_gray(tmp_path / "a.dcm")


def test_a_file_cut_in_compressed_pixels_is_called_truncated():
    whole = (Path(pydicom.data.__file__).parent / "test_files/JPEG2000.dcm").read_bytes()
    with pytest.raises(ImageError, match="truncated"):
        decode_gray(whole[:-100], "a.dcm")


REFUSED = {
    "badVR.dcm": "element NumberOfFrames is no number",
    "GDCMJ2K_TextGBR.dcm": "damaged pixels in .*JPEG 2000.*copy or download",
    "JPEG-lossy.dcm": "without a decoder here.*12-bit precision",
    "JPEG2000-embedded-sequence-delimiter.dcm": "damaged pixels in .*JPEG 2000.*copy or download",
    "JPGExtended.dcm": "without a decoder here.*12-bit precision",
    "MR_truncated.dcm": "truncated",
    "meta_missing_tsyntax.dcm": "Missing required element.*Bits Allocated",
    "nested_priv_SQ.dcm": "Missing required element.*Bits Allocated",
    "examples_ybr_color.dcm": "30 frames",
    "rtdose.dcm": "15 frames",
}
OTHER_REFUSALS = r"pylibjpeg|\d+ frames|without an image|truncated DICOM|not a PNG, JPEG or DICOM"


@pytest.mark.filterwarnings("ignore")
def test_pydicoms_own_files_give_an_image_or_the_cause():
    folder = Path(pydicom.data.__file__).parent / "test_files"
    images = 0
    for file in sorted(folder.glob("*.dcm")):
        try:
            assert read_gray(file).std() > 0 or file.name.startswith("SC_rgb_small_odd"), file.name
            assert file.name not in REFUSED
            images += 1
        except ImageError as error:
            assert re.search(REFUSED.get(file.name, OTHER_REFUSALS), str(error)), error
    assert images >= 40
