"""Any stored image becomes RGB, evaluation equals CLIP's preprocessing, and augmentation can be repeated exactly."""

import io
import pickle

import numpy as np
import pytest
import torch
from conftest import ImageProcessor
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader

from hf_tgpt.data import FewShotImages, ImageTransform, decode_image

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def first_pixel(record):
    image = decode_image(record)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def rng(seed=0):
    return np.random.default_rng(seed)


# Decoding ------------------------------------------------------------------------------------------------------------


def test_an_image_a_path_and_bytes_decode_alike(tmp_path):
    image = noise(5, 4)
    image.save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    records = [image, path, tmp_path / "a.png", {"bytes": None, "path": path}, encoded(image)]
    assert {decode_image(record).tobytes() for record in records} == {image.tobytes()}


def test_greyscale_becomes_three_equal_channels():
    assert first_pixel(encoded(Image.new("L", (3, 2), 77))) == (77, 77, 77)
    assert first_pixel(encoded(Image.new("1", (3, 2), 1))) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("RGBA", (200, 10, 10, 0), (255, 255, 255)),
        ("RGBA", (200, 10, 10, 255), (200, 10, 10)),
        ("LA", (90, 0), (255, 255, 255)),
        ("LA", (90, 255), (90, 90, 90)),
    ],
)
def test_transparent_pixels_are_white_and_opaque_ones_stay(mode, colour, seen):
    assert first_pixel(encoded(Image.new(mode, (3, 2), colour))) == seen


def test_half_transparent_pixels_are_mixed_with_white():
    assert first_pixel(Image.new("RGBA", (3, 2), (0, 0, 0, 128))) == (127, 127, 127)


def test_a_palette_gives_its_colours():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert first_pixel(encoded(image)) == (10, 200, 30)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_transparent_palette_entry_is_white(transparency):
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert first_pixel(encoded(image, transparency=transparency)) == (255, 255, 255)


def test_cmyk_is_converted():
    red, green, blue = first_pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_wide_pixels_that_hold_eight_bits_are_as_bright_as_they_say(mode):
    image = Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint16)).convert(mode)
    assert np.asarray(decode_image(encoded(image, "TIFF"))).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode):
    image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    image = image if mode == "I;16" else image.convert("I").convert(mode)
    assert np.asarray(decode_image(image))[0, :, 0].tolist() == [0, 100, 255]


def test_a_sixteen_bit_file_is_scaled():
    assert first_pixel(encoded(Image.new("I;16", (3, 2), 257 * 100))) == (100, 100, 100)


@pytest.mark.parametrize(
    ("values", "seen"),
    [([0.0, 0.2, 1.0], [0, 51, 255]), ([0.0, 51.0, 255.0], [0, 51, 255]), ([-1.0, 0.0, 4.0], [0, 51, 255])],
)
def test_floats_are_scaled_from_their_range(values, seen):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert np.asarray(decode_image(image))[0, :, 0].tolist() == seen


def test_a_photo_taken_on_its_side_is_turned_upright():
    image = Image.new("RGB", (8, 4), "black")
    image.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored left edge is the top
    upright = decode_image(encoded(image, exif=exif))
    assert upright.size == (4, 8)
    assert upright.getpixel((0, 0)) == (255, 255, 255)
    assert upright.getpixel((0, 7)) == (0, 0, 0)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert first_pixel(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_is_named(tmp_path, format):
    path = tmp_path / "half"
    data = encoded(noise(64, 64), format)["bytes"]
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"cannot read {path}: .+; replace"):
        decode_image(str(path))


def test_what_is_no_image_is_named_by_path_else_hint_else_as_in_memory(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("no image")
    with pytest.raises(ValueError, match=f"cannot read {path}: "):
        decode_image({"bytes": None, "path": str(path)}, name_hint="row 3")
    with pytest.raises(ValueError, match=r"cannot read b\.jpg: "):
        decode_image({"bytes": b"no image", "path": "b.jpg"}, name_hint="row 3")
    with pytest.raises(ValueError, match="cannot read row 3: "):
        decode_image({"bytes": b"no image", "path": None}, name_hint="row 3")
    with pytest.raises(ValueError, match="cannot read image in memory: "):
        decode_image({"bytes": b"", "path": None})
    with pytest.raises(ValueError, match="cannot read row 3: NoneType is not an image"):
        decode_image(None, name_hint="row 3")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        decode_image(tmp_path / "nowhere.png")


# Transforms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(64, 64), (91, 60), (37, 101), (20, 17), (33, 32), (5, 200)])
@pytest.mark.parametrize(("shorter_side", "crop"), [(32, 32), (37, 32), (33, 30)])
def test_evaluation_equals_the_image_processor(width, height, shorter_side, crop):
    processor = ImageProcessor(size={"shortest_edge": shorter_side}, crop_size={"height": crop, "width": crop})
    image = noise(width, height)
    ours = ImageTransform.from_processor(processor, train=False)(image)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    assert ours.dtype == torch.float32
    assert ours.shape == (3, crop, crop)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=0)


def test_the_processors_other_settings_are_taken():
    processor = ImageProcessor(size=16, crop_size=16, image_mean=MEAN, image_std=STD, resample=2)
    transform = ImageTransform.from_processor(processor, train=False)
    assert (transform.mean, transform.std, transform.resample) == (MEAN, STD, Image.Resampling.BILINEAR)
    image = noise(40, 30)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transform(image), theirs.float(), atol=1e-5, rtol=0)


def test_a_crop_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="`crop_size`=30x20 is not square"):
        ImageTransform.from_processor(ImageProcessor(crop_size={"height": 30, "width": 20}), train=True)


def test_a_resize_that_distorts_is_refused():
    with pytest.raises(ValueError, match="names no shortest_edge"):
        ImageTransform.from_processor(ImageProcessor(size={"height": 32, "width": 32}), train=False)


def test_a_processor_without_one_of_clips_steps_is_refused():
    with pytest.raises(ValueError, match="`do_normalize`=False"):
        ImageTransform.from_processor(ImageProcessor(do_normalize=False), train=False)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="`size`=0"):
        ImageTransform(0, MEAN, STD, train=False)
    with pytest.raises(ValueError, match="`shorter_side`=16 but the crop has `size`=32"):
        ImageTransform(32, MEAN, STD, train=False, shorter_side=16)


def test_training_needs_a_generator_and_evaluation_does_not():
    with pytest.raises(ValueError, match="`rng`=None"):
        ImageTransform(16, MEAN, STD, train=True)(noise(20, 20))
    ImageTransform(16, MEAN, STD, train=False)(noise(20, 20))


def test_an_image_that_is_not_rgb_is_refused():
    with pytest.raises(ValueError, match=r"mode L, not RGB; .*decode_image"):
        ImageTransform(16, MEAN, STD, train=False)(Image.new("L", (20, 20)))


def test_training_repeats_under_one_seed_and_varies_over_seeds():
    transform, image = ImageTransform(16, MEAN, STD, train=True), noise(40, 30)
    first = transform(image, rng(1))
    assert first.shape == (3, 16, 16)
    assert first.dtype == torch.float32
    assert torch.equal(first, transform(image, rng(1)))
    assert not torch.equal(first, transform(image, rng(2)))


def test_training_leaves_global_random_states_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    ImageTransform(16, MEAN, STD, train=True)(noise(40, 30), rng())
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


def test_crops_stay_within_the_image_and_fill_the_range_of_areas_and_ratios():
    transform, generator = ImageTransform(16, MEAN, STD, train=True), rng()
    boxes = np.array([transform._random_box(200, 150, generator) for _ in range(2000)])
    left, top, width, height = boxes.T
    assert min(left.min(), top.min()) == 0
    assert (left + width).max() == 200
    assert (top + height).max() == 150
    area, ratio = width * height / (200 * 150), width / height
    assert 0.07 < area.min() < 0.1
    assert 0.95 < area.max() <= 1
    assert 0.7 < ratio.min() < 0.8
    assert 1.3 < ratio.max() < 1.4
    assert abs(np.log(ratio).mean()) < 0.05


def test_about_half_of_the_pictures_are_flipped():
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (16, 0, 32, 32))
    transform, generator = ImageTransform(16, MEAN, STD, train=True, scale=(1.0, 1.0), ratio=(1.0, 1.0)), rng()
    flipped = [bool(p[0, 0, 0] > p[0, 0, -1]) for p in (transform(image, generator) for _ in range(200))]
    assert 70 < sum(flipped) < 130


@pytest.mark.parametrize(("width", "height"), [(300, 2), (2, 300), (1, 1)])
def test_elongated_images_fall_back_to_a_centred_crop(width, height):
    transform = ImageTransform(8, MEAN, STD, train=True, scale=(1.0, 1.0))
    left, top, w, h = transform._random_box(width, height, rng())
    assert abs(2 * left + w - width) <= 1
    assert abs(2 * top + h - height) <= 1
    assert w <= width
    assert h <= height
    assert transform(noise(width, height), rng()).shape == (3, 8, 8)


def test_a_pickled_transform_is_the_same_transform():
    transform = ImageTransform.from_processor(ImageProcessor(size=16, crop_size=16), train=True)
    again = pickle.loads(pickle.dumps(transform))
    assert again == transform
    assert torch.equal(again(noise(40, 30), rng(1)), transform(noise(40, 30), rng(1)))


# Datasets ------------------------------------------------------------------------------------------------------------


def make_dataset(rows=6, captions=True):
    features = {"image": ImageFeature(), "label": ClassLabel(names=["ant", "bee"])}
    columns = {"image": [noise(24, 20)] * rows, "label": [row % 2 for row in range(rows)]}
    if captions:
        features["caption"] = Value("string")
        columns["caption"] = [f"caption {row}" for row in range(rows)]
    return Dataset.from_dict(columns, features=Features(features))


def make_images(dataset=None, seed=0, train=True):
    return FewShotImages(dataset or make_dataset(), ImageTransform(16, MEAN, STD, train=train), seed)


def collected(loader):
    return torch.cat([batch["pixel_values"] for batch in loader])


def test_rows_have_pixel_values_labels_and_captions():
    images = make_images()
    assert len(images) == 6
    item = images[3]
    assert set(item) == {"pixel_values", "labels", "caption"}
    assert item["pixel_values"].shape == (3, 16, 16)
    assert (item["labels"], item["caption"]) == (1, "caption 3")
    assert set(make_images(make_dataset(captions=False))[0]) == {"pixel_values", "labels"}


def test_evaluation_rows_are_the_transformed_images():
    images = make_images(train=False)
    assert torch.equal(images[2]["pixel_values"], images.transform(noise(24, 20)))


def test_augmentation_depends_on_seed_epoch_and_row_alone():
    images = make_images(seed=1)
    first = [item["pixel_values"] for item in images]
    assert len({tensor.numpy().tobytes() for tensor in first}) == len(images)  # one picture, six crops
    images.set_epoch(1)
    assert not torch.equal(images[0]["pixel_values"], first[0])
    images.set_epoch(0)
    assert torch.equal(images[4]["pixel_values"], first[4])  # asked alone, as after a resume
    assert torch.equal(images[-1]["pixel_values"], first[5])
    assert torch.equal(make_images(seed=1)[4]["pixel_values"], first[4])
    assert not torch.equal(make_images(seed=2)[4]["pixel_values"], first[4])


def test_a_row_beyond_the_last_is_an_index_error():
    with pytest.raises(IndexError):
        make_images()[6]


def test_workers_see_the_same_pictures_and_the_new_epoch():
    images = make_images()
    # A persistent worker keeps its copy of the dataset over epochs.
    loader = DataLoader(images, batch_size=2, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        images.set_epoch(epoch)
        assert torch.equal(collected(loader), collected(DataLoader(images, batch_size=3)))


def test_a_pickled_dataset_gives_the_same_pictures():
    images = make_images()
    images.set_epoch(3)
    assert torch.equal(pickle.loads(pickle.dumps(images))[1]["pixel_values"], images[1]["pixel_values"])


def test_an_unreadable_image_is_named_by_its_path_or_row(tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    records = [{"bytes": None, "path": str(tmp_path / "bad.jpg")}, {"bytes": b"no image", "path": None}, None]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["ant"])})
    images = make_images(Dataset.from_dict({"image": records, "label": [0, 0, 0]}, features=features))
    for row, name in enumerate((r"bad\.jpg", "row 1", "row 2")):
        with pytest.raises(ValueError, match=f"cannot read .*{name}: "):
            images[row]


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="lacks the column 'image'; available: picture, label, caption"):
        make_images(make_dataset().rename_column("image", "picture"))
