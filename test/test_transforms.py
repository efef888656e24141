import dataclasses
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from tinydet.datasets.sample import Sample
from tinydet.datasets.transforms import (LUMA, MEAN_GREY, center_crop_resize, colour_matrix, compose, horizontal_flip, pad_to, photometric_jitter,
                                       random_resized_crop, resize, resize_shorter, scale_jitter)


def sample_with(boxes, size, image=None, content=None) -> Sample:
  boxes = np.array(boxes, np.float32).reshape(-1, 4)
  image = np.zeros((*size, 3), np.uint8) if image is None else image
  return Sample(image, boxes, np.arange(len(boxes), dtype=np.int32), 7, (480, 640), content or size)


def sample_with_rectangle(box, size) -> Sample:
  """A white rectangle on black, so that where the pixels go can be compared with where the box goes."""
  image = np.zeros((*size, 3), np.uint8)
  image[box[1]:box[3], box[0]:box[2]] = 255
  return sample_with([box], size, image)


def extent(image: np.ndarray) -> np.ndarray:
  rows, columns = np.nonzero(image[..., 0] > 127)
  return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def random_sample(size=(48, 64), content=None, seed=0) -> Sample:
  rng = np.random.default_rng(seed)
  corners = rng.uniform(0, 20, (5, 2))
  image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
  return sample_with(np.concatenate([corners, corners + rng.uniform(1, 20, (5, 2))], 1), size, image, content)


sizes = st.tuples(st.integers(20, 90), st.integers(20, 90))


@settings(max_examples=60, deadline=None)
@given(size=sizes, target=sizes, box=st.tuples(*[st.floats(0, 1, width=32)] * 4), seed=st.integers(0, 9), low=st.floats(0.5, 1.9))
def test_boxes_follow_the_pixels(size, target, box, seed, low):
  x0, x1 = sorted(int(v * size[1]) for v in box[::2])
  y0, y1 = sorted(int(v * size[0]) for v in box[1::2])
  x0, y0 = min(x0, size[1] - 8), min(y0, size[0] - 8)
  sample = sample_with_rectangle((x0, y0, max(x1, x0 + 8), max(y1, y0 + 8)), size)
  for transform in (resize(*target), resize_shorter(min(target), max(target)), horizontal_flip(1), scale_jitter(low, 1.9, *target, fill=(0, 0, 0)),
                    random_resized_crop(*target, (0.3, 1)), center_crop_resize(max(target), min(target)),
                    compose(resize_shorter(20, 200), pad_to(200, 200, fill=(0, 0, 0)), horizontal_flip(1))):
    result = transform(sample, np.random.default_rng(seed))
    assert result.image.dtype == np.uint8 and result.boxes.dtype == np.float32 and result.labels.dtype == np.int32
    assert (result.image_id, result.original_size) == (7, (480, 640))
    assert (result.image[result.content_size[0]:] == 0).all() and (result.image[:, result.content_size[1]:] == 0).all()
    if len(result.boxes) and (result.boxes[0, 2:] - result.boxes[0, :2]).min() > 2:
      np.testing.assert_allclose(extent(result.image), result.boxes[0], atol=1.01)


@settings(max_examples=50, deadline=None)
@given(size=sizes, target=sizes, seed=st.integers(0, 99))
def test_resize_scales_boxes_like_float64(size, target, seed):
  sample = random_sample(size, seed=seed)
  result = resize(*target)(sample, np.random.default_rng(0))
  expected = sample.boxes.astype(np.float64) * [target[1] / size[1], target[0] / size[0], target[1] / size[1], target[0] / size[0]]
  np.testing.assert_allclose(result.boxes, expected, rtol=1e-6)
  assert result.image.shape == (*target, 3) and result.content_size == target


def test_resize_is_antialiased_bilinear():
  sample = random_sample((48, 64))

  def weights(old: int, new: int) -> np.ndarray:
    scale = max(old / new, 1.0)
    distance = np.abs((np.arange(new)[:, None] + 0.5) * old / new - (np.arange(old)[None] + 0.5)) / scale
    triangle = np.maximum(1 - distance, 0)
    return triangle / triangle.sum(1, keepdims=True)

  for height, width in ((17, 20), (90, 130)):
    expected = np.einsum("ih,hwc,jw->ijc", weights(48, height), sample.image.astype(np.float64), weights(64, width))
    assert np.abs(resize(height, width)(sample, np.random.default_rng(0)).image - expected).max() <= 1.5


def test_resize_leaves_padding_out():
  sample = random_sample((40, 60), content=(20, 30))
  sample.image[20:] = sample.image[:, 30:] = 255
  bare = sample_with(sample.boxes, (20, 30), sample.image[:20, :30])
  one, other = (resize(33, 44)(s, np.random.default_rng(0)) for s in (sample, bare))
  np.testing.assert_array_equal(one.image, other.image)
  np.testing.assert_array_equal(one.boxes, other.boxes)


@pytest.mark.parametrize("size, expected", [((480, 640), (800, 1066)), ((640, 480), (1066, 800)), ((427, 640), (800, 1199)),
                                            ((300, 1200), (333, 1333)), ((100, 100), (800, 800)), ((10, 4000), (3, 1333))])
def test_resize_shorter_has_torchvisions_sizes(size, expected):
  assert resize_shorter(800, 1333)(sample_with([], size), np.random.default_rng(0)).image.shape[:2] == expected


def test_pad_to_keeps_the_picture_at_the_top_left():
  sample = random_sample((20, 30))
  result = pad_to(25, 40)(sample, np.random.default_rng(0))
  np.testing.assert_array_equal(result.image[:20, :30], sample.image)
  assert (result.image[20:] == MEAN_GREY).all() and (result.image[:, 30:] == MEAN_GREY).all()
  np.testing.assert_array_equal(result.boxes, sample.boxes)
  assert result.content_size == (20, 30)
  with pytest.raises(ValueError, match=r"20x30.*20x29"): pad_to(20, 29)(sample, np.random.default_rng(0))


@pytest.mark.parametrize("content", [(48, 64), (31, 41)])
def test_flip_twice_is_the_identity(content):
  sample = random_sample((48, 64), content)
  before = sample.image.copy()
  once = horizontal_flip(1)(sample, np.random.default_rng(0))
  twice = horizontal_flip(1)(once, np.random.default_rng(0))
  assert (once.image != sample.image).any() and (once.boxes[:, 0] < once.boxes[:, 2]).all()
  np.testing.assert_array_equal(once.image[:content[0], :content[1]], sample.image[:content[0], :content[1]][:, ::-1])
  np.testing.assert_array_equal(once.image[content[0]:], sample.image[content[0]:])
  np.testing.assert_array_equal(twice.image, sample.image)
  np.testing.assert_allclose(twice.boxes, sample.boxes, atol=1e-5)
  np.testing.assert_array_equal(sample.image, before)


def test_flip_has_its_probability():
  sample = random_sample()
  rng = np.random.default_rng(0)
  flipped = sum((horizontal_flip(0.25)(sample, rng).boxes != sample.boxes).any() for _ in range(400))
  assert 70 <= flipped <= 130


def test_scale_jitter_drops_what_is_left_of_cropped_boxes():
  """At twice the canvas the crop's place is read off a ramp of grey; which of 25 boxes stay, and where, follows from it in float64."""
  ramp = np.stack([*np.meshgrid(np.arange(100) * 2, np.arange(100) * 2), np.zeros((100, 100))], 2).astype(np.uint8)
  starts = np.array([[x, y] for x in range(0, 100, 20) for y in range(0, 100, 20)])
  sides = np.array([[18, 18]] * 24 + [[0.4, 18]])
  sample = sample_with(np.concatenate([starts, starts + sides], 1), (100, 100), ramp)
  dropped_in_part = 0
  for seed in range(20):
    result = scale_jitter(2, 2, 100, 100)(sample, np.random.default_rng(seed))
    left, top = result.image[50, 50, :2] - 50.0  # the ramp is left + 49.5 there and rounds up
    whole = sample.boxes.astype(np.float64) * 2 - [left, top, left, top]
    clipped = whole.clip(0, 100)
    kept, full = (clipped[:, 2:] - clipped[:, :2]), (whole[:, 2:] - whole[:, :2])
    keep = (kept.min(1) >= 1) & (kept.prod(1) >= 0.1 * full.prod(1))
    np.testing.assert_array_equal(result.labels, np.flatnonzero(keep))
    np.testing.assert_allclose(result.boxes, clipped[keep], atol=1e-4)
    assert result.content_size == (100, 100)
    dropped_in_part += ((kept.min(1) > 0) & ~keep).sum()
  assert dropped_in_part > 0


def test_scale_jitter_draws_the_whole_range():
  rng = np.random.default_rng(0)
  heights = np.array([scale_jitter(0.25, 1, 64, 64)(sample_with([], (64, 32)), rng).content_size[0] for _ in range(200)])
  assert heights.min() < 22 and heights.max() > 58 and abs(heights.mean() - 40) < 3
  assert {scale_jitter(0.25, 2, 64, 64)(sample_with([[0, 0, 9, 9]], (64, 32)), rng).image.shape for _ in range(20)} == {(64, 64, 3)}


def test_random_resized_crop_shows_parts_of_the_right_size_and_place():
  """All 10,608 parts of a small picture are cut and resized by Pillow: the transform must give one of them, of a fitting area and shape."""
  size, target = (12, 16), (7, 9)
  sample = random_sample(size, seed=3)
  sample.boxes[:] = [[0, 0, 16, 12], [2, 3, 9, 7.5], [0, 0, 1.5, 1], [12, 8, 16, 12], [5, 5, 6, 6]]
  picture = Image.fromarray(sample.image)
  parts = {}
  for top, left in np.ndindex(*size):
    for bottom, right in np.ndindex(size[0] - top, size[1] - left):
      part = (left, top, left + right + 1, top + bottom + 1)
      parts[picture.crop(part).resize(target[::-1], Image.Resampling.BILINEAR).tobytes()] = part
  found = []
  for seed in range(400):
    result = random_resized_crop(*target, (0.2, 0.6))(sample, np.random.default_rng(seed))
    assert result.image.tobytes() in parts
    left, top, right, bottom = parts[result.image.tobytes()]
    expected = sample.boxes.astype(np.float64).clip([left, top] * 2, [right, bottom] * 2) - [left, top] * 2
    keep = (expected[:, 2:] > expected[:, :2]).all(1)
    np.testing.assert_allclose(result.boxes, expected[keep] * ([9 / (right - left), 7 / (bottom - top)] * 2), atol=1e-4)
    np.testing.assert_array_equal(result.labels, np.flatnonzero(keep))
    np.testing.assert_array_equal(result.boxes[0], [0, 0, 9, 7])
    assert (result.content_size, result.original_size, result.image_id) == (target, (480, 640), 7)
    found.append((left, top, right, bottom))
  left, top, right, bottom = np.array(found).T
  width, height = right - left, bottom - top
  # a side is rounded by up to a half
  assert ((width + 0.5) * (height + 0.5) >= 0.2 * 192).all() and ((width - 0.5) * (height - 0.5) <= 0.6 * 192).all()
  assert ((width + 0.5) / (height - 0.5) >= 3 / 4).all() and ((width - 0.5) / (height + 0.5) <= 4 / 3).all()
  assert 0.36 < (width * height).mean() / 192 < 0.44 and abs(np.log(width / height).mean()) < 0.03
  assert left.min() == top.min() == 0 and right.max() == 16 and bottom.max() == 12
  assert abs(np.mean(left + right) - 16) < 0.7 and abs(np.mean(top + bottom) - 12) < 0.5, "all places alike"


@pytest.mark.parametrize("size, part", [((4, 100), (47, 0, 52, 4)), ((100, 4), (0, 47, 4, 52)), ((16, 16), (0, 0, 16, 16))])
def test_random_resized_crop_falls_back_to_the_middle(size, part):
  sample = random_sample(size, content=size)
  expected = np.asarray(Image.fromarray(sample.image).crop(part).resize((9, 7), Image.Resampling.BILINEAR))
  for seed in range(5):
    np.testing.assert_array_equal(random_resized_crop(7, 9, (1, 1))(sample, np.random.default_rng(seed)).image, expected)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (50, 333), (33, 33), (9, 100)])
def test_center_crop_resize_is_pillows_resize_and_crop(size):
  sample = random_sample(size, seed=5)
  sample.boxes[0] = [0, 0, size[1], size[0]]
  for shorter, side in ((40, 35), (32, 32), (75, 50), (20, 17)):
    scale = shorter / min(size)
    width, height = (shorter if n == min(size) else int(n * scale) for n in size[::-1])
    left, top = round((width - side) / 2), round((height - side) / 2)
    expected = Image.fromarray(sample.image).resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    result = center_crop_resize(shorter, side)(sample, np.random.default_rng(0))
    assert result.image.shape == (side, side, 3) and result.content_size == (side, side)
    assert np.abs(result.image.astype(int) - np.asarray(expected)).max() <= 1
    boxes = (sample.boxes.astype(np.float64) * ([width / size[1], height / size[0]] * 2) - [left, top, left, top]).clip(0, side)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    np.testing.assert_allclose(result.boxes, boxes[keep], atol=1e-3)
    np.testing.assert_array_equal(result.labels, np.flatnonzero(keep))
    np.testing.assert_allclose(result.boxes[0], [0, 0, side, side], atol=1e-4)
  with pytest.raises(ValueError, match="33"): center_crop_resize(32, 33)


@pytest.mark.parametrize("transform", [random_resized_crop(20, 24, (0.9, 1)), center_crop_resize(20, 18)])
def test_crops_leave_padding_out(transform):
  sample = random_sample((40, 60), content=(20, 30))
  sample.image[20:] = sample.image[:, 30:] = 255
  bare = sample_with(sample.boxes, (20, 30), sample.image[:20, :30])
  one, other = (transform(s, np.random.default_rng(4)) for s in (sample, bare))
  np.testing.assert_array_equal(one.image, other.image)
  np.testing.assert_array_equal(one.boxes, other.boxes)


def test_pictures_of_pillow_and_arrays_are_transformed_alike():
  sample = random_sample((48, 64))
  for transform in (resize(20, 30), resize(48, 64), resize_shorter(20, 30), pad_to(60, 70), horizontal_flip(1), scale_jitter(0.5, 2, 64, 64),
                    random_resized_crop(20, 30), center_crop_resize(30, 20), photometric_jitter(p=1),
                    compose(resize_shorter(30, 40), pad_to(50, 50), horizontal_flip(1), photometric_jitter(p=1), resize(20, 20))):
    given = dataclasses.replace(sample, image=Image.fromarray(sample.image))
    result, expected = (transform(s, np.random.default_rng(1)) for s in (given, sample))
    np.testing.assert_array_equal(result.image, expected.image)
    np.testing.assert_array_equal(result.boxes, expected.boxes)
    assert result.content_size == expected.content_size
    np.testing.assert_array_equal(given.image, sample.image)
  assert isinstance(given.image, np.ndarray) and given.image is given.image


def test_transforms_take_images_without_boxes():
  sample = sample_with([], (40, 50))
  for transform in (resize(20, 30), resize_shorter(20, 30), pad_to(60, 60), horizontal_flip(1), scale_jitter(0.1, 2, 64, 64),
                    random_resized_crop(20, 30), center_crop_resize(30, 20), photometric_jitter(p=1)):
    result = transform(sample, np.random.default_rng(1))
    assert result.boxes.shape == (0, 4) and result.labels.shape == (0,)


@pytest.mark.parametrize("contrast_first", [True, False])
@pytest.mark.parametrize("change", [(0.1, 0, 0, 0), (0, -0.3, 0, 0), (0, 0, 0.5, 0), (0, 0, 0, 0.05), (-0.1, 0.4, -0.5, -0.04)])
def test_colour_matrix_is_the_steps_one_by_one(change, contrast_first):
  colours = np.random.default_rng(0).uniform(60, 190, (50, 3))
  brightness, contrast, saturation, hue = change
  axis, angle = np.ones(3) / np.sqrt(3), 2 * np.pi * hue

  def change_contrast(x): return (x.mean(0) @ LUMA) + (x - x.mean(0) @ LUMA) * (1 + contrast)
  def change_saturation(x): return (x @ LUMA)[:, None] + (x - (x @ LUMA)[:, None]) * (1 + saturation)
  def change_hue(x):
    turned = x * np.cos(angle) + np.cross(axis, x) * np.sin(angle) + axis * (x @ axis)[:, None] * (1 - np.cos(angle))
    return turned + (x @ LUMA - turned @ LUMA)[:, None]

  steps = [change_saturation, change_hue]
  steps = [change_contrast, *steps] if contrast_first else [*steps, change_contrast]
  expected = colours * (1 + brightness)
  for step in steps: expected = step(expected)
  matrix = colour_matrix(colours.mean(0), *change, contrast_first=contrast_first)
  np.testing.assert_allclose(colours @ matrix[:, :3].T + matrix[:, 3], expected, atol=1e-9)


def test_photometric_jitter_changes_the_content_only_and_within_limits():
  sample = random_sample((48, 64), content=(40, 50))
  sample.image[:40, :50] = sample.image[:40, :50] // 2 + 40
  content = sample.image[:40, :50].astype(np.float64)
  factors = []
  for seed in range(60):
    result = photometric_jitter(contrast=0, saturation=0, hue=0, p=1)(sample, np.random.default_rng(seed))
    factor = (result.image[:40, :50] * content).sum() / (content ** 2).sum()
    assert np.abs(result.image[:40, :50] - content * factor).max() < 1.5
    factors.append(factor)
    np.testing.assert_array_equal(result.image[40:], sample.image[40:])
    np.testing.assert_array_equal(result.image[:, 50:], sample.image[:, 50:])
  assert 0.87 < min(factors) < 0.9 and 1.1 < max(factors) < 1.13
  np.testing.assert_array_equal(photometric_jitter(p=0)(sample, np.random.default_rng(0)).image, sample.image)
  full = photometric_jitter(p=1)(sample, np.random.default_rng(3))
  assert (full.image[:40, :50] != content).mean() > 0.5 and full.image.dtype == np.uint8
