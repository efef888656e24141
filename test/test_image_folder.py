"""Data sets for classifiers: a folder for each class, and the embedded cut-outs of the shapes."""
import os
import numpy as np, pytest
from PIL import Image
from tinydet.datasets import open_classes
from tinydet.datasets.crops import Crops
from tinydet.datasets.image_folder import ImageFolder
from tinydet.datasets.loader import Loader
from tinydet.datasets.shapes import Shapes
from tinydet.datasets.subset import Subset
from tinydet.datasets.transforms import center_crop_resize, compose, horizontal_flip, random_resized_crop
from tinydet.errors import UserError


def write(path, size=(6, 8), colour=None, seed=0) -> np.ndarray:
  """A picture of noise, or of one colour, in the format that the suffix names; returns its pixels."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8) if colour is None else np.full((*size, 3), colour, np.uint8)
  Image.fromarray(image).save(path)
  return image


@pytest.fixture
def folder(tmp_path):
  """Three classes, written in no order: 6 cats, 3 dogs, 1 Eel to train, one of each to validate."""
  for i in (3, 1, 5, 0, 4, 2): write(tmp_path / "pets" / "train" / "cat" / f"{i}.png", seed=i)
  for i in (2, 0, 1): write(tmp_path / "pets" / "train" / "dog" / f"{i}.png", size=(7, 5), seed=10 + i)
  write(tmp_path / "pets" / "train" / "Eel" / "x.png", seed=20)
  for name in ("dog", "Eel", "cat"): write(tmp_path / "pets" / "val" / name / "v.png", seed=30)
  return tmp_path / "pets"


def test_labels_are_the_sorted_class_folders(folder):
  train, val = open_classes(folder, "train"), open_classes(folder, "val")
  assert train.class_names == val.class_names == ["Eel", "cat", "dog"] and train.category_ids == [0, 1, 2]
  assert (len(train), len(val), train.max_boxes, train.warnings, train.name) == (10, 3, 1, [], "pets/train")
  seen = {}
  for i in range(10):
    sample, path = train[i], train.image_name(i)
    stored = np.asarray(Image.open(path))
    np.testing.assert_array_equal(sample.image, stored)
    assert train.class_names[sample.labels[0]] == path.split(os.sep)[-2] and sample.labels.dtype == np.int32 and sample.boxes.dtype == np.float32
    assert sample.boxes.tolist() == [[0, 0, stored.shape[1], stored.shape[0]]]
    assert sample.original_size == sample.content_size == stored.shape[:2] and sample.image_id == i + 1
    seen.setdefault(int(sample.labels[0]), set()).add(path)
  assert {label: len(paths) for label, paths in seen.items()} == {0: 1, 1: 6, 2: 3}


def test_the_first_so_many_pictures_are_a_fair_part(tmp_path):
  for name, count in (("a", 20), ("b", 40), ("c", 100)):
    for i in range(count): write(tmp_path / "train" / name / f"{i:03}.ppm", size=(1, 1), seed=i)
    write(tmp_path / "val" / name / "0.ppm", size=(1, 1))
  part = Subset(ImageFolder(tmp_path, "train"), 16)
  counts = np.bincount([part[i].labels[0] for i in range(16)], minlength=3)
  assert np.abs(counts - [2, 4, 10]).max() <= 1 and len({part.image_name(i) for i in range(16)}) == 16


def test_the_loader_serves_it(folder):
  train = ImageFolder(folder, "train")
  augment = compose(random_resized_crop(5, 6, (0.1, 1)), horizontal_flip())
  plain, pooled = ([*Loader(train, 4, augment, workers=workers, max_boxes=1).epoch(0)] for workers in (0, 2))
  labels = np.concatenate([batch.labels[:, 0] for batch in plain])
  np.testing.assert_array_equal(labels, [*(train[i].labels[0] for i in range(10)), -1, -1])
  for one, other in zip(plain, pooled, strict=True):
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.labels.shape == (4, 1) and one.images.shape == (4, 5, 6, 3)
    real = one.image_ids > 0
    assert (one.boxes[real, 0] == [0, 0, 6, 5]).all()


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_names_of_the_second_split(folder, name):
  (folder / "val").rename(folder / name)
  val = ImageFolder(folder, "val")
  assert len(val) == 3 and val.image_name(0).split(os.sep)[-3] == name and len(ImageFolder(folder, "train")) == 10


def test_val_comes_before_test(folder):
  write(folder / "test" / "cat" / "1.png")
  assert len(ImageFolder(folder, "val")) == 3


def test_oddities_of_folders(folder):
  write(folder / "train" / "dog" / "deeper" / "still" / "d.jpg", seed=40)
  for name in ("UP.JPEG", "UP.Png", "g.bmp", "t.tif", "w.webp", "p.PPM"): write(folder / "train" / "Eel" / name, seed=41)
  (folder / "train" / "Eel" / "notes.txt").write_text("not a picture")
  (folder / "train" / "Eel" / ".hidden.png").write_text("not a picture")
  (folder / "train" / "cat" / "Thumbs.db").write_text("not a picture")
  (folder / "train" / ".cache").mkdir()
  write(folder / "train" / "loose.png")
  (folder / "train" / "README").write_text("fine")
  (folder / "train" / "cat" / "loop").symlink_to(folder / "train" / "cat")
  (folder / "elsewhere").mkdir()
  write(folder / "elsewhere" / "linked.png", seed=42)
  (folder / "train" / "dog" / "link").symlink_to(folder / "elsewhere")
  train = ImageFolder(folder, "train")
  names = sorted(os.path.relpath(train.image_name(i), folder / "train") for i in range(len(train)))
  assert names == sorted([*(f"cat/{i}.png" for i in range(6)), *(f"dog/{i}.png" for i in range(3)), "dog/deeper/still/d.jpg", "dog/link/linked.png",
                          "Eel/x.png", *(f"Eel/{n}" for n in ("UP.JPEG", "UP.Png", "g.bmp", "t.tif", "w.webp", "p.PPM"))])
  assert train.class_names == ["Eel", "cat", "dog"]
  assert all(train[i].image.ndim == 3 for i in range(len(train)))
  assert [w.removeprefix(f"{folder / 'train'}: ") for w in train.warnings] == [
    "2 files left out, not named as a picture (first: Eel/notes.txt)", "1 file left out, not in the folder of a class (first: loose.png)"]


def test_names_in_any_script_and_grey_pictures(folder):
  write(folder / "train" / "dog" / "größe 犬.png", seed=50)
  Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(folder / "train" / "dog" / "zz-grey.png")
  train = ImageFolder(folder, "train")
  index = {os.path.basename(train.image_name(i)): i for i in range(len(train))}
  assert train[index["größe 犬.png"]].labels[0] == 2
  np.testing.assert_array_equal(train[index["zz-grey.png"]].image[..., 1], np.arange(48).reshape(6, 8))


def says(words, make) -> None:
  with pytest.raises(UserError) as error: make()
  assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


def test_broken_folders_are_named_with_the_mend(folder, tmp_path):
  says(["nowhere", "neither a folder", "crops:1"], lambda: open_classes(tmp_path / "nowhere", "train"))
  (tmp_path / "bare" / "cats").mkdir(parents=True)
  says(["bare", "no folder train/", "train/<class>/*.jpg", "found cats/"], lambda: open_classes(tmp_path / "bare", "train"))
  (tmp_path / "bare" / "train").mkdir()
  says(["bare", "val/ or valid/ or validation/ or test/"], lambda: open_classes(tmp_path / "bare", "train"))
  (tmp_path / "bare" / "val").mkdir()
  says(["bare/train", "no folder for a class"], lambda: open_classes(tmp_path / "bare", "train"))

  (folder / "train" / "fox").mkdir()
  says(["pets", "same class folders", "fox in", "train only"], lambda: ImageFolder(folder, "val"))
  (folder / "val" / "gnu").mkdir()
  says(["fox in", "train only", "gnu in", "val only"], lambda: ImageFolder(folder, "train"))
  (folder / "val" / "fox").mkdir()
  (folder / "train" / "gnu").mkdir()
  says(["pets/train", "fox, gnu hold no picture", ".png"], lambda: ImageFolder(folder, "train"))
  (folder / "train" / "fox" / "note.txt").write_text("")
  write(folder / "train" / "gnu" / "g.png")
  says(["pets/train", "fox holds no picture"], lambda: ImageFolder(folder, "train"))


def test_a_broken_picture_is_named(folder):
  (folder / "val" / "cat" / "v.png").write_bytes(b"\x89PNG but no more")
  val = ImageFolder(folder, "val")
  with pytest.raises(UserError, match=r"val/cat/v\.png: cannot be read as an image"): [val[i] for i in range(3)]


# crops

def place(picture: np.ndarray, part: np.ndarray) -> tuple[int, int]:
  """(left, top) of the one place at which `part` is in `picture`; the grain makes it unique."""
  side = part.shape[0]
  corners = np.argwhere((picture[:len(picture) - side + 1, :len(picture) - side + 1] == part[0, 0]).all(2))
  found = [(int(x), int(y)) for y, x in corners if (picture[y:y + side, x:x + side] == part).all()]
  assert len(found) == 1
  return found[0]


@pytest.mark.parametrize("family, split", [(1, "train"), (2, "val")])
def test_crops_show_what_their_label_says(family, split):
  count = 400
  crops, shapes = Crops(split, family, count=count), Shapes(split, family, count=count)
  assert crops.class_names == [*shapes.class_names, "background"] and crops.category_ids == [*shapes.category_ids, 0] and len(crops) == count
  labels, centred = [], []
  for i in range(count):
    crop, whole = crops[i], shapes[i]
    side = crop.image.shape[0]
    left, top = place(whole.image, crop.image)
    assert crop.image.shape == (side, side, 3) and crop.boxes.tolist() == [[0, 0, side, side]] and crop.image_id == i + 1
    assert crop.original_size == crop.content_size == (side, side) and crop.labels.dtype == np.int32
    labels.append(int(crop.labels[0]))
    if labels[-1] == 6:
      shared = np.minimum(whole.boxes[:, 2:], [left + side, top + side]) - np.maximum(whole.boxes[:, :2], [left, top])
      assert (shared <= 0).any(1).all(), "no shape reaches into background"
      continue
    box = whole.boxes[-1]
    cut = np.maximum([left, top] - box[:2], box[2:] - [left + side, top + side])
    assert labels[-1] == whole.labels[-1] and cut.max() <= 0.05 * side + 1, "nearly all of it is in the picture"
    if side < 128: assert 0.44 < (box[2:] - box[:2]).max() / side < 0.98
    if left and top and left + side < 128 and top + side < 128: centred.append((box[:2] + box[2:]) / 2 / side - [left / side + 0.5, top / side + 0.5])
  shares = np.bincount(labels, minlength=7) / count
  assert shares.min() > 0.08 and shares.max() < 0.22, "all classes about alike"
  assert 0.05 < np.abs(centred).max() < 0.16 and np.abs(np.mean(centred, 0)).max() < 0.03 and len(centred) > 50


def test_crops_depend_on_seed_family_split_and_index_only():
  first = Crops("train", 1, count=20)
  forwards = [first[i].image for i in range(20)]
  assert all((Crops("train", 1, count=9)[i].image == forwards[i]).all() for i in reversed(range(9)))
  others = [Crops("val", 1, count=20), Crops("train", 2, count=20), Crops("train", 1, count=20, seed=1)]
  assert len({image.tobytes() for image in forwards} | {d[i].image.tobytes() for d in others for i in range(20)}) == 80
  with pytest.raises(IndexError): first[20]


def test_crops_by_name():
  assert open_classes("crops", "val", count=3).class_names[0] == "circle" and open_classes("crops:2", "train", count=3).class_names[0] == "kite"
  says(["crops:3", "crops:1 and crops:2"], lambda: open_classes("crops:3", "train"))
  says(["crops:x", "crops:1 and crops:2"], lambda: open_classes("crops:x", "train"))
  says(["split 'test'", "train or val"], lambda: open_classes("crops", "test"))
  loader = Loader(open_classes("crops:1", "train", count=16), 8, center_crop_resize(32, 32), workers=2, max_boxes=1)
  batches = [*loader.epoch(0)]
  loader.close()
  assert [b.images.shape for b in batches] == [(8, 32, 32, 3)] * 2 and all((b.labels >= 0).all() for b in batches)
