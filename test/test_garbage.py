"""Garbage in, never garbage out: each row spoils one thing, and says what the user sees and, where it is mended, what the network then gets."""
import contextlib, hashlib, importlib.util, io, json, os, signal, struct, subprocess, sys, time, unicodedata, zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from tinydet.datasets import check, image, open_dataset
from tinydet.errors import UserError
from tinydet.weights import checkpoint
from tinydet.config import parse

ROOT = Path(__file__).parent.parent
SIDE = 32
SECONDS = 30   # no input may take longer


@pytest.fixture(autouse=True)
def no_hang():
  if not hasattr(signal, "SIGALRM"): yield; return
  def late(*_): pytest.fail(f"more than {SECONDS} s")   # not an Exception: nothing in the product catches it
  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(SECONDS)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


def pixels(seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------------------------------- good data, to be spoilt
NAMES = ("a", "b", "c")
BOXES = {"a": [[2, 3, 10, 12], [5, 6, 7, 8]], "b": [[0, 0, 32, 32]], "c": [[1.5, 2.5, 4, 4]]}   # xywh


def coco_content() -> dict[str, Any]:
  objects = [(image, k, box) for image, name in enumerate(NAMES, 1) for k, box in enumerate(BOXES[name])]
  return {"info": {}, "licenses": [], "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
          "images": [{"id": i, "file_name": f"{name}.png", "width": SIDE, "height": SIDE} for i, name in enumerate(NAMES, 1)],
          "annotations": [{"id": n, "image_id": image, "category_id": (3, 7)[k], "bbox": [*box], "area": box[2] * box[3], "iscrowd": 0}
                          for n, (image, k, box) in enumerate(objects, 1)]}


def write_coco(folder: Path, spoil: Callable | None = None, splits=("train",)) -> None:
  """`spoil(content, images)` changes the annotations or the pictures; what it returns is written in place of the annotations, if not None."""
  (folder / "annotations").mkdir(parents=True)
  for split in splits:
    (folder / split).mkdir()
    for i, name in enumerate(NAMES): Image.fromarray(pixels(i)).save(folder / split / f"{name}.png")
    content = coco_content()
    raw = spoil(content, folder / split) if spoil and split == "train" else None
    if callable(raw): raw(folder / "annotations" / f"instances_{split}.json"); continue
    (folder / "annotations" / f"instances_{split}.json").write_bytes(raw if isinstance(raw, bytes) else json.dumps(content).encode())


def xml(name: str = "a") -> str:
  objects = "".join(f"<object><name>{('cat', 'dog')[k]}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
                    f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>" for k, (x, y, w, h) in enumerate(BOXES[name]))
  return f"<annotation><size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>{objects}</annotation>"


def write_voc(folder: Path, spoil: Callable[[Path], Any] | None = None) -> None:
  """`spoil(folder)` changes any file of it."""
  for sub in ("Annotations", "JPEGImages", "ImageSets/Main"): (folder / sub).mkdir(parents=True)
  for i, name in enumerate(NAMES):
    Image.fromarray(pixels(i)).save(folder / "JPEGImages" / f"{name}.png")
    (folder / "Annotations" / f"{name}.xml").write_text(xml(name))
  for split in ("train", "val"): (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(NAMES) + "\n")
  if spoil: spoil(folder)


def assert_whole(dataset) -> None:
  """Every sample can be read and is what a network can be trained on; the ground truth speaks of the same images."""
  truth = dataset.ground_truth()
  json.dumps(truth, allow_nan=False)
  assert [i["id"] for i in truth["images"]] == [dataset[i].image_id for i in range(len(dataset))]
  assert len({i["id"] for i in truth["images"]}) == len(dataset) and -1 not in {i["id"] for i in truth["images"]}
  for i in range(len(dataset)):
    sample = dataset[i]
    height, width = sample.image.shape[:2]
    assert sample.image.dtype == np.uint8 and sample.image.shape == (*sample.original_size, 3)
    assert np.isfinite(sample.boxes).all() and (sample.boxes[:, 2:] > sample.boxes[:, :2]).all() and (sample.boxes >= 0).all()
    assert (sample.boxes <= [width, height] * 2).all() and len(sample.boxes) == len(sample.labels) <= dataset.max_boxes
    assert ((sample.labels >= 0) & (sample.labels < len(dataset.class_names))).all()


def assert_printable(error: UserError) -> None:
  assert all(c.isprintable() or c == "\n" for c in str(error)) and len(str(error)) < 20_000


# ------------------------------------------------------------------------------------------------------------------------- pictures
def png_chunk(kind: bytes, data: bytes) -> bytes: return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def lying_png(width: int, height: int) -> bytes:
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


def encoded(picture: Image.Image, format: str, **options) -> bytes:
  picture.save(buffer := io.BytesIO(), format, **options)
  return buffer.getvalue()


def put(data: bytes) -> Callable:
  return lambda c, d: (d / "a.png").write_bytes(data) and None


def saved(picture: Image.Image, format: str = "PNG", **options) -> Callable:
  return put(encoded(picture, format, **options))


def replace_by(make: Callable[[Path], Any]) -> Callable:
  def spoil(c, d):
    (d / "a.png").unlink()
    make(d / "a.png")
  return spoil


def rename(name: str, declared: str | None = None) -> Callable:
  def spoil(c, d):
    (d / name).parent.mkdir(exist_ok=True)
    (d / "a.png").rename(d / name)
    c["images"][0]["file_name"] = declared or name
  return spoil


def sized(width: Any, height: Any) -> Callable: return lambda c, d: c["images"][0].update(width=width, height=height)


def both(*spoils: Callable) -> Callable:
  def spoil(c, d):
    for s in spoils: s(c, d)
  return spoil


def link_out(path: Path) -> None:
  outside = path.parent.parent.parent / f"outside-{path.parent.parent.name}.png"
  Image.fromarray(pixels(0)).save(outside)
  path.symlink_to(outside)


def linked_folder(c, d) -> None:
  d.rename(d.parent.parent / f"elsewhere-{d.parent.name}")
  d.symlink_to(d.parent.parent / f"elsewhere-{d.parent.name}")


RGB, GREY, FINE = Image.fromarray(pixels(0)), Image.fromarray(pixels(0)[..., 0]), pixels(0).astype(np.float64)
JPEG, GIF, WEBP = encoded(RGB, "JPEG"), encoded(RGB, "GIF"), encoded(RGB, "WEBP", lossless=True)
PNG = encoded(RGB, "PNG")
DEEP = np.random.default_rng(9).integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
ALPHA = np.random.default_rng(8).integers(0, 256, (SIDE, SIDE, 1), dtype=np.uint8)
TURNED = Image.Exif()
TURNED[0x0112] = 6   # to be turned by a quarter clockwise
UNREAD, BROKEN = "pictures that cannot be read (1): a.png", "pictures that cannot be read (1): a.png (not a picture, or its header is broken)"
LATE = "a.png: cannot be read as an image"


class Bad(NamedTuple):
  name: str
  spoil: Callable
  says: str
  late: bool = False   # pixels that end too early are found when they are decoded, by `check` or in their turn


class Odd(NamedTuple):
  name: str
  spoil: Callable
  says: str                                   # "" where nothing is odd
  boxes: Any = ([2, 3, 12, 15], [5, 6, 12, 14])   # xyxy of image a, then
  image: Any = None                           # its pixels, those of the good data set if None
  tolerance: float = 0
  note: bool = False                          # no fault even under --strict


BAD_PICTURES = [
  Bad("cut in its header", put(PNG[:20]), UNREAD + " ("),
  Bad("signature only", put(PNG[:8]), BROKEN),
  Bad("zero bytes", put(b""), UNREAD + " (zero bytes)"),
  Bad("a text", put(b"not a picture"), BROKEN),
  Bad("a web page", put(b"<!DOCTYPE html><html>404</html>"), BROKEN),
  Bad("noise", put(np.random.default_rng(3).bytes(5000)), BROKEN),
  Bad("zeros", put(bytes(5000)), BROKEN),
  Bad("PostScript, a program", put(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(x) run\n"), BROKEN),
  Bad("SVG", put(b"<?xml version='1.0'?><svg width='32' height='32'/>"), BROKEN),
  Bad("missing", lambda c, d: (d / "a.png").unlink(), "(1): a.png"),
  Bad("a folder", replace_by(Path.mkdir), UNREAD + " (not a regular file)"),
  Bad("a pipe", replace_by(os.mkfifo), UNREAD + " (not a regular file)"),
  Bad("an endless device", replace_by(lambda p: p.symlink_to("/dev/zero")), UNREAD + " (not a regular file)"),
  Bad("a dangling link", replace_by(lambda p: p.symlink_to("nowhere.png")), UNREAD + " (No such file or directory)"),
  Bad("a link to itself", replace_by(lambda p: p.symlink_to("a.png")), UNREAD + " (Too many levels"),
  Bad("a link to a text", replace_by(lambda p: p.symlink_to("/etc/passwd")), BROKEN),
  Bad("another size", saved(Image.fromarray(pixels(0, 30, 31))), "pictures of another size than annotated (1): a.png is 31x30, not 32x32"),
  Bad("sides swapped without EXIF", both(saved(Image.fromarray(pixels(0, 20, 30))), sized(20, 30)), "a.png is 30x20, not 20x30"),
  Bad("EXIF does not explain the size", both(saved(Image.fromarray(pixels(0, 20, 30)), exif=TURNED), sized(20, 31)), "a.png is 20x30, not 20x31"),
  Bad("decompression bomb", both(put(lying_png(60_000, 60_000)), sized(60_000, 60_000)), UNREAD + " (more than 100 million pixels)"),
  Bad("just too large", both(put(lying_png(10_100, 10_000)), sized(10_100, 10_000)), UNREAD + " (10100x10000, more than 100 million pixels)"),
  Bad("two thousand million wide", put(lying_png(2_000_000_000, 1)), UNREAD + " (more than 100 million pixels)"),
  Bad("zero wide", put(lying_png(0, 32)), "a.png"),
  Bad("a text that unpacks to much", put(PNG[:33] + png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80_000_000))) + PNG[33:]), UNREAD),
  Bad("floating-point pixels", saved(Image.fromarray(pixels(0)[..., 0].astype(np.float32)), "TIFF"), "pixels of kind F have no agreed range"),
  Bad("32-bit pixels", saved(Image.fromarray(DEEP.astype(np.int32) * 1000), "TIFF"), "pixels of 32 bits have no agreed range", late=True),
  Bad("PNG cut in its pixels", put(PNG[:len(PNG) // 2]), LATE, late=True),
  Bad("JPEG cut in its pixels", put(JPEG[:len(JPEG) * 3 // 4]), LATE, late=True),
  Bad("GIF cut in its pixels", put(GIF[:len(GIF) * 3 // 4]), LATE, late=True),
  Bad("lying PNG", put(lying_png(SIDE, SIDE)), LATE, late=True),
  Bad("BMP cut in its pixels", put(encoded(RGB, "BMP")[:1000]), LATE, late=True),
  Bad("WebP cut", put(WEBP[:len(WEBP) // 2]), UNREAD),
]

ODD_PICTURES = [
  Odd("grey-scale", saved(GREY), "pictures grey-scale, converted (1): a.png", image=FINE[..., :1]),
  Odd("one bit", saved(Image.fromarray(pixels(0)[..., 0] > 127)), "pictures grey-scale, converted (1): a.png", image=(FINE[..., :1] > 127) * 255.0),
  Odd("palette", saved(RGB.quantize(16)), "pictures of a palette, converted (1): a.png", image=np.asarray(RGB.quantize(16).convert("RGB"))),
  Odd("CMYK", saved(Image.fromarray(np.concatenate([pixels(0), 0 * ALPHA], 2), "CMYK"), "TIFF"), "pictures CMYK, converted (1): a.png",
      image=255 - FINE, tolerance=1),
  Odd("16 bits", saved(Image.fromarray(DEEP)), "pictures of 16 bits, converted (1): a.png", image=DEEP[..., None] / 257, tolerance=0.51),
  Odd("alpha", saved(Image.fromarray(np.concatenate([pixels(0), ALPHA], 2))), "pictures with transparency, laid on white (1): a.png",
      image=FINE * (ALPHA / 255) + 255 * (1 - ALPHA / 255), tolerance=1.01),
  Odd("grey with alpha", saved(Image.merge("LA", [GREY, Image.fromarray(ALPHA[..., 0])])), "pictures with transparency, laid on white (1): a.png",
      image=FINE[..., :1] * (ALPHA / 255) + 255 * (1 - ALPHA / 255), tolerance=1.01),
  Odd("one colour transparent", saved(Image.fromarray(np.full((SIDE, SIDE, 3), 9, np.uint8)), transparency=(9, 9, 9)),
      "pictures with transparency, laid on white (1): a.png", image=np.full((1, 1, 3), 9.0)),
  Odd("animated PNG", saved(RGB, save_all=True, append_images=[Image.fromarray(pixels(7))]),
      "pictures of several frames, of which the first is used"),
  Odd("animated GIF", saved(RGB.quantize(16), "GIF", save_all=True, append_images=[Image.fromarray(pixels(7)).quantize(16)]),
      "pictures of several frames, of which the first is used", image=np.asarray(RGB.quantize(16).convert("RGB"))),
  Odd("turned by EXIF", both(saved(Image.fromarray(pixels(0, 20, 30)), exif=TURNED), sized(20, 30)),
      "pictures turned as their EXIF orientation says", image=np.rot90(pixels(0, 20, 30), -1)),
  Odd("EXIF passed over", both(saved(Image.fromarray(pixels(0, 30, 20)), exif=TURNED), sized(20, 30)),
      "pictures left as stored in spite of an EXIF orientation", image=pixels(0, 30, 20)),
  Odd("EXIF of a square", saved(RGB, exif=TURNED), "nothing tells whether their boxes were drawn so, and they may lie elsewhere (1): a.png",
      image=np.rot90(np.asarray(RGB), -1)),
  Odd("broken EXIF", saved(RGB, exif=b"Exif\0\0garbage"), ""),
  Odd("upper-case suffix", rename("a.PNG", "a.png"), "found in another spelling (1): a.png"),
  Odd("lower-case suffix", rename("a.png", "a.PNG"), "found in another spelling (1): a.PNG"),
  Odd("other Unicode form", rename(unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
      "found in another spelling (1): é.png"),
  Odd("backslashes", rename("sub/a.png", "sub\\a.png"), "found in another spelling (1): sub\\\\a.png"),
  Odd("non-ASCII name", rename("картинка 画像 🐈.png"), ""),
  Odd("very long name", rename("x" * 250 + ".png"), ""),
  Odd("no suffix", rename("a"), ""),
  Odd("suffix of another format", saved(RGB, "BMP"), ""),
  Odd("name that begins with dots", rename("..a.png"), ""),
  Odd("name like a flag", rename("--strict.png"), ""),
  Odd("a link out of the folder", replace_by(link_out), "pictures behind symbolic links out of the data set, followed (1): a.png"),
  Odd("a link inside the folder", both(rename("sub/a.png", "a.png"), lambda c, d: (d / "a.png").symlink_to("sub/a.png")), ""),
  Odd("the folder is a link", linked_folder, ""),
  Odd("one pixel", both(saved(Image.fromarray(pixels(0, 1, 1))), sized(1, 1),
                        lambda c, d: [a.update(bbox=[0, 0, 1, 1]) for a in c["annotations"][:2]]), "", boxes=[[0, 0, 1, 1]] * 2,
                          image=pixels(0, 1, 1)),
  Odd("20,000 pixels wide", both(saved(Image.fromarray(pixels(0, 16, 20_000))), sized(20_000, 16)), "", image=pixels(0, 16, 20_000)),
  Odd("other files beside it", lambda c, d: [(d / n).write_bytes(PNG) for n in ("z.png", "notes.txt")] and None, "images[] does not list (1): z.png",
      note=True),
]


# ------------------------------------------------------------------------------------------------------------------------- COCO's annotations
def table(name: str, /, **values) -> Callable: return lambda c, d: c[name][0].update(values)


def without(name: str, key: str) -> Callable: return lambda c, d: c[name][0].pop(key) and None


def box(*values) -> Callable: return table("annotations", bbox=list(values))


def raw(change: Callable[[bytes], bytes]) -> Callable: return lambda c, d: change(json.dumps(c, ensure_ascii=False).encode())


def many(count: int) -> Callable:
  one = b'{"id":1,"image_id":1,"category_id":3,"bbox":[2,3,10,12]}'
  return lambda c, d: json.dumps({**c, "annotations": []}).encode()[:-2] + b",".join([one] * count) + b"]}"


def corners_for_sizes(c, d) -> None:
  rng = np.random.default_rng(0)
  c["annotations"] = [{"id": i, "image_id": 1, "category_id": 3, "bbox": [x, y, x + 13, y + 13]} for i,
    (x, y) in enumerate(rng.integers(0, 18, (20, 2)).tolist())]


NO_BOX = "annotations[].bbox is not four numbers [x, y, width, height] of at most a million pixels (1): annotations[0]"
UNSAFE = "images[].file_name is no path inside the image folder (1): "
BAD_COCO = [
  *(Bad(f"no {key}", lambda c, d, key=key: c.pop(key) and None, f"has no list '{key}'") for key in ("images", "annotations", "categories")),
  *(Bad(f"{name} without {key}", without(name, key), f"{name}[].{key} missing (1): {name}[0]")
    for name, keys in (("images", ("id", "file_name", "width", "height")), ("annotations", ("id", "image_id", "category_id", "bbox")),
                       ("categories", ("id", "name"))) for key in keys),
  *(Bad(f"{name}[].{key} = {value!r}", table(name, **{key: value}), f"{name}[].{key} is not {expected}")
    for name, key, value, expected in (
      ("images", "id", "1", "a whole number"), ("images", "id", 1.0, "a whole number"), ("images", "id", True, "a whole number"),
      ("images", "id", -1, "a whole number from 0"), ("images", "id", 2 ** 63, "a whole number"), ("images", "id", None, "a whole number"),
      ("images", "width", "32", "a positive whole number"), ("images", "width", 32.0, "a positive whole number"),
      ("images", "width", True, "a positive whole number"), ("images", "width", 0, "a positive whole number"),
      ("images", "height", -32, "a positive whole number"), ("images", "height", 2 ** 40, "a positive whole number"),
      ("images", "height", float("nan"), "a positive whole number"), ("images", "file_name", 5, "a text"),
        ("images", "file_name", ["a.png"], "a text"),
      ("annotations", "id", "1", "a whole number"), ("annotations", "id", 10 ** 30, "a whole number"),
        ("annotations", "image_id", "1", "a whole number"),
      ("annotations", "image_id", True, "a whole number"), ("annotations", "category_id", 3.0, "a whole number"),
      ("annotations", "bbox", None, "a list"), ("annotations", "bbox", "1,2,3,4", "a list"), ("annotations", "bbox", {"x": 1}, "a list"),
      ("annotations", "area", "big", "a number"), ("annotations", "area", True, "a number"),
      ("categories", "id", 3.5, "a whole number"), ("categories", "name", 3, "a text"), ("categories", "name", None, "a text"))),
  Bad("box of three", box(1, 2, 3), NO_BOX + " [1, 2, 3]"),
  Bad("box of five", box(1, 2, 3, 4, 5), NO_BOX),
  Bad("empty box", box(), NO_BOX + " []"),
  Bad("nested box", box([1], 2, 3, 4), NO_BOX),
  Bad("text in a box", box("1", 2, 3, 4), NO_BOX),
  Bad("bool in a box", box(True, 2, 3, 4), NO_BOX),
  Bad("null in a box", box(None, 2, 3, 4), NO_BOX),
  Bad("NaN box", box(float("nan"), 2, 3, 4), NO_BOX + " [nan, 2, 3, 4]"),
  Bad("infinite box", box(1, 2, float("inf"), 4), NO_BOX + " [1, 2, inf, 4]"),
  Bad("minus infinity", box(float("-inf"), 2, 3, 4), NO_BOX),
  Bad("box of 1e400", raw(lambda b: b.replace(b"[2, 3, 10, 12]", b"[2, 3, 1e400, 12]")), NO_BOX),
  Bad("box of 400 digits", box(2, 3, 10 ** 400, 12), NO_BOX),
  Bad("box of a thousand million", box(2, 3, 1e9, 12), NO_BOX),
  Bad("negative width", box(12, 3, -10, 12), "bbox of negative width or height (1): annotations[0] [12, 3, -10, 12]"),
  Bad("negative height", box(2, 3, 10, -0.5), "bbox of negative width or height (1)"),
  Bad("boxes relative to the image", lambda c, d: [a.update(bbox=[0.1, 0.2, 0.3, 0.4]) for a in c["annotations"]] and None,
      "bbox all between 0 and 1"),
  Bad("corners for sizes", corners_for_sizes, "bbox over the border as if they were corners"),
  Bad("unknown image", table("annotations", image_id=9), "annotations[].image_id not in the file's lists (1): annotations[0] says 9"),
  Bad("unknown category", table("annotations", category_id=4), "annotations[].category_id not in the file's lists (1): annotations[0] says 4"),
  Bad("crowd flag is a text", table("annotations", iscrowd="0"), "annotations[].iscrowd is neither 0 nor 1 (1): annotation id 1"),
  Bad("image id twice", table("images", id=2), "images[].id used more than once (1): 2"),
  Bad("category id twice", table("categories", id=7), "categories[].id used more than once (1): 7"),
  Bad("class name twice", table("categories", name="dog"), "class names used more than once (1): dog"),
  Bad("class name empty", table("categories", name=" "), "class names empty or with control characters (1): ' '"),
  Bad("class name of two lines", table("categories", name="cat\n\x1b[2J"), r"class names empty or with control characters (1): 'cat\n\x1b[2J'"),
  Bad("half a character", table("categories", name="\ud83d"), r"class names empty or with control characters (1): '\ud83d'"),
  Bad("file name twice", table("images", file_name="b.png"), "files that images[].file_name names more than once (1): b.png"),
  Bad("file name twice, spelt differently", table("images", file_name="./b.png"), "names more than once (1): b.png"),
  Bad("file name twice, in another case", both(lambda c, d: (d / "a.png").unlink(), table("images", file_name="b.PNG")),
      "names more than once (1): b.png"),
  Bad("ambiguous suffix", both(rename("a.PNG", "a.png"), lambda c, d: (d / "a.Png").write_bytes(PNG)), "images[].file_name missing in"),
  Bad("absolute path", table("images", file_name="/etc/passwd"), UNSAFE + "/etc/passwd"),
  Bad("climbing path", table("images", file_name="../../z.png"), UNSAFE + "../../z.png"),
  Bad("climbing from within", table("images", file_name="sub/../../train/z.png"), UNSAFE),
  Bad("climbing with backslashes", table("images", file_name="..\\z.png"), UNSAFE),
  Bad("path of another system", table("images", file_name="C:\\z.png"), UNSAFE),
  Bad("empty path", table("images", file_name=""), UNSAFE + "''"),
  Bad("NUL in a path", table("images", file_name="a.png\0.txt"), UNSAFE + r"a.png\x00.txt"),
  Bad("control characters in a path", table("images", file_name="\x1b]0;x\x07a.png"), UNSAFE),
  Bad("half a character in a path", table("images", file_name="\ud800.png"), UNSAFE + r"\ud800.png"),
  Bad("a path of 5,000 letters", table("images", file_name="x" * 5000), "missing in"),
  Bad("a folder of 5,000 letters", table("images", file_name="x" * 5000 + "/z.png"), "missing in"),
  Bad("folder for a path", table("images", file_name="."), "a"),
  Bad("URL for a path", table("images", file_name="http://example.com/z.png"), "missing in"),
  Bad("10,001 boxes on an image", many(10_001), "images with more than 10,000 boxes (1): a.png has 10,001"),
  Bad("a million boxes on an image", many(1_000_000), "images with more than 10,000 boxes (1): a.png has 1,000,000"),
  Bad("no images", lambda c, d: c["images"].clear(), "the list 'images' is empty"),
  Bad("no categories", lambda c, d: c["categories"].clear(), "the list 'categories' is empty"),
  Bad("an image that is none", lambda c, d: c["images"].append("d.png"), "images[3] is 'd.png', not an object"),
  Bad("an annotation that is a list", lambda c, d: c["annotations"].append([1, 2]), "annotations[4] is [1, 2], not an object"),
  Bad("empty file", raw(lambda b: b""), "it is empty, zero bytes"),
  Bad("blank file", raw(lambda b: b" \n"), "is not a JSON file that can be read (Expecting value"),
  Bad("cut short", raw(lambda b: b[:-9]), "is not a JSON file that can be read"),
  Bad("more after its end", raw(lambda b: b + b"]"), "Extra data"),
  Bad("a list", raw(lambda b: b"[]"), "has no list 'images'"),
  Bad("a number", raw(lambda b: b"1"), "has no list 'images'"),
  Bad("UTF-16", raw(lambda b: b.decode().encode("utf-16")), "it is not UTF-8 text, see byte 0"),
  Bad("Latin-1", lambda c, d: json.dumps({**c, "x": "chéri"}, ensure_ascii=False).encode("latin-1"), "it is not UTF-8 text, see byte"),
  Bad("NUL bytes", raw(lambda b: bytes(len(b))), "is not a JSON file that can be read"),
  Bad("compressed", raw(lambda b: b"\x1f\x8b" + zlib.compress(b)), "it is not UTF-8 text"),
  Bad("nested too deep", raw(lambda b: b"[" * 200_000), "it is nested too deeply"),
  Bad("a number of 5,000 digits", raw(lambda b: b.replace(b'"id": 1,', b'"id": ' + b"9" * 5000 + b",", 1)), "is not a JSON file that can be read"),
  Bad("a field twice", raw(lambda b: b.replace(b'"image_id": 1,', b'"image_id": 1, "image_id": 2,', 1)), "two fields of one name"),
  Bad("a list twice", raw(lambda b: b[:-1] + b', "annotations": []}'), "two fields of one name"),
  Bad("annotations are a folder", lambda c, d: Path.mkdir, "it is not a regular file"),
  Bad("annotations are a pipe", lambda c, d: os.mkfifo, "it is not a regular file"),
  Bad("annotations never end", lambda c, d: lambda p: p.symlink_to("/dev/zero"), "it is not a regular file"),
  Bad("annotations are a dangling link", lambda c, d: lambda p: p.symlink_to("nowhere"), "annotations"),
]

ODD_COCO = [
  Odd("nothing", lambda c, d: None, ""),
  Odd("byte order mark", raw(lambda b: b"\xef\xbb\xbf" + b), ""),
  Odd("box without width", box(2, 3, 0, 12), "boxes without area inside their image, dropped (1): annotation id 1", boxes=[[5, 6, 12, 14]]),
  Odd("box outside", box(40, 3, 10, 12), "boxes without area inside their image, dropped (1): annotation id 1", boxes=[[5, 6, 12, 14]]),
  Odd("box over the border", box(20, -9, 30, 25), "boxes more than 1 pixel over the border of their image, clipped (1): annotation id 1",
      boxes=[[20, 0, 32, 16], [5, 6, 12, 14]]),
  Odd("box half a pixel over", box(20.5, 20, 12, 12.5), "", boxes=[[20.5, 20, 32, 32], [5, 6, 12, 14]]),
  Odd("box thinner than any number of 32 bits", box(20, 20, 1e-12, 5), "boxes without area inside their image, dropped", boxes=[[5, 6, 12, 14]]),
  Odd("annotation id twice", table("annotations", id=2), "annotations[].id used more than once, all renumbered (1): 2"),
  Odd("annotation id zero", table("annotations", id=0), ""),
  Odd("the same box twice", lambda c, d: c["annotations"].append({**c["annotations"][0], "id": 99}),
      "boxes written again, same image, class and corners, "
      "kept (1): annotation id 99", boxes=[[2, 3, 12, 15], [5, 6, 12, 14], [2, 3, 12, 15]]),
  Odd("the same box of two classes", lambda c, d: c["annotations"].append({**c["annotations"][0], "id": 99, "category_id": 7}), "",
      boxes=[[2, 3, 12, 15], [5, 6, 12, 14], [2, 3, 12, 15]]),
  Odd("a crowd", table("annotations", iscrowd=1), "", boxes=[[5, 6, 12, 14]]),
  Odd("no crowd flag", without("annotations", "iscrowd"), ""),
  Odd("crowd flag null", table("annotations", iscrowd=None), "iscrowd is neither 0 nor 1, taken as 1 unless false, null or 0 (1): annotation id 1"),
  Odd("crowd flag true", table("annotations", iscrowd=True), "iscrowd is neither 0 nor 1, taken as 1 unless", boxes=[[5, 6, 12, 14]]),
  Odd("crowd flag 2", table("annotations", iscrowd=2), "iscrowd is neither 0 nor 1, taken as 1 unless", boxes=[[5, 6, 12, 14]]),
  Odd("no area", without("annotations", "area"), "area missing, negative or not finite, taken as the box's (1): annotation id 1"),
  Odd("area NaN", table("annotations", area=float("nan")), "area missing, negative or not finite, taken as the box's (1)"),
  Odd("area negative", table("annotations", area=-4), "area missing, negative or not finite, taken as the box's (1)"),
  Odd("area of 400 digits", table("annotations", area=10 ** 400), "area missing, negative or not finite, taken as the box's (1)"),
  Odd("a path of another machine", table("images", file_name="/content/train/a.png"), "found elsewhere (1): /content/train/a.png is a.png"),
  Odd("an address", table("images", file_name="https://example.com/data/a.png?x=1"), "images[].file_name found elsewhere (1)"),
  Odd("percent signs", table("images", file_name="%61.png"), "images[].file_name found elsewhere (1): %61.png is a.png"),
  Odd("a climbing path", table("images", file_name="../../a.png"), "images[].file_name found elsewhere (1)"),
  Odd("a path from the data set's folder", table("images", file_name="train/a.png"), "that begin at another folder", note=True),
  Odd("unknown fields", lambda c, d: [c["annotations"][0].update(score=1), c["images"][1].update({"\x1b[2J": 0})] and None,
      r"fields that COCO does not have, passed over (2): images[].\x1b[2J, annotations[].score"),
  Odd("large ids", lambda c, d: [c["images"][0].update(id=2 ** 53 + 1), *(a.update(image_id=2 ** 53 + 1) for a in c["annotations"][:2])] and None,
      ""),
  Odd("class name in another script", table("categories", name="кошка 猫"), ""),
  Odd("image without objects", lambda c, d: c["annotations"].__delitem__(slice(2)), "images without objects, which are background (1): a.png",
      boxes=[],
      note=True),
  Odd("no annotations at all", lambda c, d: c["annotations"].clear(), "images without objects, which are background (3)", boxes=[], note=True),
  Odd("class without a box", lambda c, d: c["categories"].append({"id": 1, "name": "ant"}), "classes without a box (1): ant", note=True),
]

# ------------------------------------------------------------------------------------------------------------------------- VOC's annotations
def edit(old: str, new: str, file: str = "Annotations/a.xml") -> Callable:
  def spoil(d: Path) -> None:
    text = (d / file).read_text()
    assert old in text
    (d / file).write_text(text.replace(old, new, 1))
  return spoil


def write(data: bytes | str, file: str = "Annotations/a.xml") -> Callable:
  return lambda d: (d / file).write_bytes(data if isinstance(data, bytes) else data.encode())


def instead(make: Callable[[Path], Any], file: str = "Annotations/a.xml") -> Callable:
  def spoil(d: Path) -> None:
    (d / file).unlink()
    make(d / file)
  return spoil


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
UNREAD_XML, SPLIT = "annotations that cannot be read (1): a.xml", "ImageSets/Main/train.txt"
REFUSED = UNREAD_XML + " (a DOCTYPE declaration is refused, remove it)"
BAD_VOC = [
  Bad("entities that expand", write(f'<!DOCTYPE x [<!ENTITY l0 "ha">{LAUGHS}]>' + xml().replace("cat", "&l9;")), REFUSED),
  Bad("an entity that reads a file", write('<!DOCTYPE x [<!ENTITY f SYSTEM "/etc/passwd">]>' + xml().replace("cat", "&f;")), REFUSED),
  Bad("a document type from elsewhere", write('<!DOCTYPE x SYSTEM "http://example.com/x.dtd">' + xml()), REFUSED),
  Bad("entities in UTF-16", write(('<?xml version="1.0" encoding="utf-16"?><!DOCTYPE x [<!ENTITY a "b">]>' + xml()).encode("utf-16")), REFUSED),
  Bad("an entity that nobody declared", edit("cat", "&cat;"), UNREAD_XML + " (is not XML: undefined entity"),
  Bad("empty file", write(b""), UNREAD_XML + " (it is empty, zero bytes)"),
  Bad("not XML", write(b"{}"), UNREAD_XML + " (is not XML"),
  Bad("cut short", write(xml()[:100]), UNREAD_XML + " (is not XML"),
  Bad("two roots", write(xml() * 2), UNREAD_XML + " (is not XML: junk"),
  Bad("bytes that are not its encoding", write(xml().replace("cat", "chéri").encode("latin-1")), UNREAD_XML + " (is not XML: not well-formed"),
  Bad("unknown encoding", write(b'<?xml version="1.0" encoding="klingon"?>' + xml().encode()), UNREAD_XML),
  Bad("encoding of many bytes", write(b'<?xml version="1.0" encoding="big5"?>' + xml().encode()), UNREAD_XML),
  Bad("NUL bytes", write(bytes(500)), UNREAD_XML),
  Bad("too large", instead(lambda p: [p.touch(), os.truncate(p, 33_000_000)]), UNREAD_XML + " (its 33,000,000 bytes are more than 32,000,000)"),
  Bad("nested too deep", write("<a>" * 300_000 + "</a>" * 300_000), "annotations with no <size>, <object> or <filename> in their <a> (1): a.xml"),
  Bad("a pipe", instead(os.mkfifo), UNREAD_XML + " (it is not a regular file)"),
  Bad("a folder", instead(Path.mkdir), UNREAD_XML + " (it is not a regular file)"),
  Bad("an endless device", instead(lambda p: p.symlink_to("/dev/zero")), UNREAD_XML + " (it is not a regular file)"),
  Bad("a name space", edit("<annotation>", '<annotation xmlns="http://example.com">'), "in their <{http://example.com}annotation> (1): a.xml"),
  Bad("size negative", edit(f"<width>{SIDE}<", "<width>-32<"), "<size> of an annotation is not of positive whole numbers (1): a.xml"),
  Bad("size with a fraction", edit(f"<width>{SIDE}<", "<width>31.5<"), "<size> of an annotation is not of positive whole numbers (1): a.xml"),
  Bad("size a text", edit(f"<width>{SIDE}<", "<width>wide<"), "<size/width> is no number of at most a million (1): a.xml wide"),
  Bad("size too large", edit(f"<width>{SIDE}<", "<width>1e30<"), "<size/width> is no number of at most a million (1): a.xml 1e30"),
  Bad("another size than the picture", edit(f"<width>{SIDE}<", "<width>31<"),
      "pictures of another size than annotated (1): a.png is 32x32, not 31x32"),
  Bad("no name", edit("<name>cat</name>", ""), "<object> without <name> (1): a.xml"),
  Bad("empty name", edit("<name>cat<", "<name> <"), "<object> without <name> (1): a.xml"),
  Bad("control character in a name", edit("<name>cat<", "<name>c\x7fat<"), "class names empty or with control characters (1)"),
  Bad("no box", edit("<xmin>3</xmin>", ""), "<object> without <bndbox/xmin> (1): a.xml"),
  Bad("box a text", edit("<xmin>3<", "<xmin>three<"), "<bndbox/xmin> is no number of at most a million (1): a.xml three"),
  Bad("box NaN", edit("<xmin>3<", "<xmin>nan<"), "<bndbox/xmin> is no number of at most a million (1): a.xml nan"),
  Bad("box infinite", edit("<xmax>12<", "<xmax>inf<"), "<bndbox/xmax> is no number of at most a million (1): a.xml inf"),
  Bad("box of 1e9", edit("<xmax>12<", "<xmax>1e9<"), "<bndbox/xmax> is no number of at most a million (1): a.xml 1e9"),
  Bad("box of Python's digits", edit("<xmax>12<", "<xmax>1_2<"), "<bndbox/xmax> is no number of at most a million (1): a.xml 1_2"),
  Bad("box of a decimal comma", edit("<xmax>12<", "<xmax>12,5<"), "<bndbox/xmax> is no number of at most a million (1): a.xml 12,5"),
  Bad("corners reversed", edit("<xmin>3<", "<xmin>13<"), "<bndbox> of negative width or height (1): a.xml"),
  Bad("no object in any file", lambda d: [(d / f"Annotations/{n}.xml").write_text(xml(n).split("<object>")[0] + "</annotation>") for n in NAMES],
      "no file there has an <object>"),
  Bad("10,001 boxes", edit("</annotation>", xml("c").split("</size>")[1].split("</annotation>")[0] * 10_000 + "</annotation>"),
      "images with more than 10,000 boxes (1): a.png has 10,002"),
  Bad("picture missing", lambda d: (d / "JPEGImages/a.png").unlink(),
      "listed in the split 'train', but the file is missing in JPEGImages (1): a.jpg"),
  Bad("picture empty", write(b"", "JPEGImages/a.png"), "pictures that cannot be read (1): a.png (zero bytes)"),
  Bad("picture a bomb", write(lying_png(60_000, 60_000), "JPEGImages/a.png"), "more than 100 million pixels"),
  Bad("picture cut short", write(PNG[:len(PNG) // 2], "JPEGImages/a.png"), LATE, late=True),
  Bad("two pictures", write(JPEG, "JPEGImages/a.jpg"), "annotations with more than one picture; keep one (1): a.jpg, a.png"),
  Bad("split missing", lambda d: (d / SPLIT).unlink(), "no data set with a split 'train' is here"),
  Bad("split empty", write(b"", SPLIT), "train.txt: is not a list of names (it is empty"),
  Bad("split blank", write(b"\n \n", SPLIT), "the split 'train' has no image"),
  Bad("split in UTF-16", write("a\nb\n".encode("utf-16"), SPLIT), "train.txt: is not a list of names (it is not UTF-8 text"),
  Bad("split names what is not there", write(b"a\nz\n", SPLIT), "but the file is missing in JPEGImages (1): z.jpg"),
  Bad("split a pipe", instead(os.mkfifo, SPLIT), "it is not a regular file"),
  Bad("two names", edit("<name>cat</name>", "<name>cat</name><name>dog</name>"), "<object> with more than one <name> (1): a.xml"),
  Bad("two left sides", edit("<xmin>3</xmin>", "<xmin>3</xmin><xmin>4</xmin>"), "<bndbox/xmin> more than once (1): a.xml"),
  Bad("two sizes", edit("</size>", "</size><size><width>32</width><height>32</height></size>"), "annotations with more than one <size> (1): a.xml"),
]

ODD_VOC = [
  Odd("nothing", lambda d: None, ""),
  Odd("corners that coincide", edit("<xmax>12<", "<xmax>3<"), "boxes without area inside their image, dropped (1): a.xml", boxes=[[5, 6, 12, 14]]),
  Odd("box outside", lambda d: [edit("<xmin>3<", "<xmin>40<")(d), edit("<xmax>12<", "<xmax>50<")(d)],
      "boxes without area inside their image, dropped (1): a.xml", boxes=[[5, 6, 12, 14]]),
  Odd("box over the border", edit("<xmax>12<", "<xmax>40<"), "boxes more than 1 pixel over the border of their image, clipped (1): a.xml",
      boxes=[[2, 3, 32, 15], [5, 6, 12, 14]]),
  Odd("no width", edit(f"<width>{SIDE}</width>", ""), "annotations without a <size>, or of 0 pixels, which is taken from the picture (1): a.xml"),
  Odd("width zero", edit(f"<width>{SIDE}<", "<width>0<"), "annotations without a <size>, or of 0 pixels, which is taken from the picture (1): a.xml"),
  Odd("box with a fraction", edit("<xmax>12<", "<xmax>12.5<"), "", boxes=[[2, 3, 12.5, 15], [5, 6, 12, 14]]),
  Odd("box counted from 0", edit("<xmin>3<", "<xmin>0<"), "corners counted from 0", boxes=[[0, 4, 12, 15], [6, 7, 12, 14]]),
  Odd("annotation missing", lambda d: (d / "Annotations/a.xml").unlink(),
      "listed in the split 'train' without an XML file, taken as background (1): a", boxes=[], note=True),
  Odd("split climbs", write(b"../JPEGImages/a\n", SPLIT), "lines of train.txt with more than a name"),
  Odd("split with columns", write(b"a 1\nb -1\n", SPLIT), "lines of train.txt with more than a name, of which the name is taken (2): a 1, b -1"),
  Odd("split with suffixes", write(b"a.png\nb.png\n", SPLIT), "lines of train.txt with more than a name"),
  Odd("difficult", edit("<difficult>0<", "<difficult>1<"), "", boxes=[[5, 6, 12, 14]]),
  Odd("difficult true", edit("<difficult>0<", "<difficult>True<"), "<difficult> is neither 0 nor 1, taken as 1 where it is true or yes",
      boxes=[[5, 6, 12, 14]]),
  Odd("difficult no", edit("<difficult>0<", "<difficult>no<"),
      "<difficult> is neither 0 nor 1, taken as 1 where it is true or yes, else as 0 (1): a.xml no"),
  Odd("difficult empty", edit("<difficult>0<", "<difficult><"), ""),
  Odd("the same box twice", edit("</annotation>", xml().split("</size>")[1]), "boxes written again, same image, class and corners, kept (2): a.xml",
      boxes=[[2, 3, 12, 15], [5, 6, 12, 14]] * 2),
  Odd("listed twice", write(b"a\nb\na\nc\n", SPLIT), "listed more than once in train.txt, taken once (1): a"),
  Odd("split with a byte order mark and foreign line ends", write(b"\xef\xbb\xbfa\r\nb\r\nc\r\n", SPLIT), ""),
  Odd("declared Latin-1", write(b'<?xml version="1.0" encoding="latin-1"?>' + xml().replace("cat", "chéri").encode("latin-1")), ""),
  Odd("UTF-16", write(xml().encode("utf-16")), ""),
  Odd("comments and sections", edit("<name>cat<", "<!-- x --><name><![CDATA[cat]]><"), ""),
  Odd("parts of an object", edit("<name>cat</name>", "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part><name>cat</name>"), ""),
  Odd("upper-case suffix", lambda d: (d / "JPEGImages/a.png").rename(d / "JPEGImages/a.PNG"), ""),
  Odd("thumbnail database", write(b"x", "JPEGImages/a.db"), ""),
  Odd("grey-scale", write(encoded(GREY, "PNG"), "JPEGImages/a.png"), "pictures grey-scale, converted (1): a.png", image=FINE[..., :1]),
  Odd("image without objects", write(xml().split("<object>")[0] + "</annotation>"), "images without objects, which are background (1): a.png",
      boxes=[],
      note=True),
  Odd("picture without annotation", write(PNG, "JPEGImages/z.png"), "pictures without an annotation, passed over (1): z", note=True),
]


def row_ids(rows: list) -> dict: return {"argvalues": rows, "ids": [row.name for row in rows]}


def open_and_read(folder: Path, strict: bool = False):
  dataset = open_dataset(folder, "train", strict=strict)
  assert_whole(dataset)
  return dataset


def assert_bad(folder: Path, row: Bad) -> None:
  if row.late:
    open_dataset(folder, "train")   # the header is sound
    with pytest.raises(UserError) as error: check.check(str(folder), ["train"], strict=False, fast=False)
    assert row.says in str(error.value)
  with pytest.raises(UserError) as error: open_and_read(folder) if row.late else open_dataset(folder, "train")
  assert row.says in str(error.value), str(error.value)
  assert str(folder) in str(error.value)
  assert_printable(error.value)


def assert_odd(folder: Path, row: Odd) -> None:
  dataset = open_and_read(folder)
  if row.says: assert any(row.says in line for line in dataset.warnings), dataset.warnings
  else: assert not dataset.warnings
  sample = dataset[0]
  np.testing.assert_allclose(sample.boxes, np.reshape(row.boxes, (-1, 4)), atol=1e-5)
  wanted = pixels(0) if row.image is None else row.image
  assert np.abs(sample.image - np.asarray(wanted, np.float64)).max() <= row.tolerance
  if row.says and not row.note:
    with pytest.raises(UserError) as error: open_dataset(folder, "train", strict=True)
    assert row.says in str(error.value)
  else: assert open_dataset(folder, "train", strict=True).warnings == dataset.warnings


@pytest.mark.parametrize("row", **row_ids(BAD_PICTURES + BAD_COCO))
def test_a_bad_coco_data_set_is_refused(tmp_path, row):
  write_coco(tmp_path / "d", row.spoil)
  assert_bad(tmp_path / "d", row)


@pytest.mark.parametrize("row", **row_ids(ODD_PICTURES + ODD_COCO))
def test_an_odd_coco_data_set_is_mended_and_the_oddity_counted(tmp_path, row):
  write_coco(tmp_path / "d", row.spoil)
  assert_odd(tmp_path / "d", row)


@pytest.mark.parametrize("row", **row_ids(BAD_VOC))
def test_a_bad_voc_data_set_is_refused(tmp_path, row):
  write_voc(tmp_path / "d", row.spoil)
  assert_bad(tmp_path / "d", row)


@pytest.mark.parametrize("row", **row_ids(ODD_VOC))
def test_an_odd_voc_data_set_is_mended_and_the_oddity_counted(tmp_path, row):
  write_voc(tmp_path / "d", row.spoil)
  assert_odd(tmp_path / "d", row)


def test_all_errors_come_at_once_with_counts_and_the_first_ten_names(tmp_path):
  def spoil(c, d):
    c["images"] += [{"id": 10 + i, "file_name": f"gone{i:02}.png", "width": 5, "height": 5} for i in range(25)]
    c["annotations"][0]["bbox"], c["annotations"][1]["image_id"] = [1, 2, float("nan"), 4], 77
    c["categories"][0]["name"] = "dog"
    (d / "b.png").write_bytes(b"")
  write_coco(tmp_path, spoil)
  with pytest.raises(UserError) as error: open_dataset(tmp_path, "train")
  head, *lines = str(error.value).splitlines()
  assert head == f"{tmp_path / 'annotations/instances_train.json'}: 29 problems of 5 kinds"
  assert lines == ["  class names used more than once (1): dog",
                   f"  images[].file_name missing in {tmp_path / 'train'} (25): {', '.join(f'gone{i:02}.png' for i in range(10))}, ...",
                   "  pictures that cannot be read (1): b.png (zero bytes)",
                   "  annotations[].image_id not in the file's lists (1): annotations[1] says 77",
                   "  annotations[].bbox is not four numbers [x, y, width, height] of at most a million pixels (1): annotations[0] [1, 2, nan, 4]"]


def test_of_many_pictures_an_even_part_is_looked_at_and_that_is_said(tmp_path, monkeypatch):
  monkeypatch.setattr(image, "MAX_HEADERS", 2)
  write_coco(tmp_path, lambda c, d: (d / "b.png").write_bytes(b"") and None)   # a and c are looked at
  dataset = open_dataset(tmp_path, "train")
  assert dataset.warnings == [f"{tmp_path}/annotations/instances_train.json: pictures, of which 2 were looked at, evenly spread; "
                              "python -m tinydet.datasets.check reads all (3)"]
  with pytest.raises(UserError, match=r"b\.png: cannot be read as an image \(zero bytes\)"): dataset[1]


@pytest.mark.parametrize("spec",
  ["", "x" * 5000, "nowhere", "shapes:", "shapes:3", "shapes:" + "9" * 5000, "shapes:١", "a\0b", "/dev/null", "\udcff"])
def test_a_spec_that_is_no_data_set_is_refused(spec, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  if spec == "shapes:": assert open_dataset(spec, "val").name == "shapes:1"; return
  with pytest.raises(UserError): open_dataset(spec, "train")


# ------------------------------------------------------------------------------------------------------------------------- check
def run(*args: str, **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS,
                        env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


CHECK = ("-m", "tinydet.datasets.check")


def test_check_prints_tables_that_agree_with_the_data(tmp_path, capsys):
  write_coco(tmp_path, lambda c, d: [c["annotations"][0].update(iscrowd=1), c["annotations"][3].update(bbox=[0, 0, 32, 40], area=1280)] and None,
             splits=("train", "val"))
  check.main([str(tmp_path), "--page", str(tmp_path / "page.html")])
  out = capsys.readouterr().out
  train, val = out.split(f"\n{tmp_path}, ")[1:]
  assert "3 pictures, 3 boxes, 1 crowd regions" in train and "3 pictures, 4 boxes, 0 crowd regions" in val
  assert "most common 32x32 (3)" in train and "clipped (1): annotation id 4" in out and out.endswith("A run would accept it.\n")
  cells = {line[:16].strip(): line.replace("#", "").split() for line in train.splitlines()}
  assert cells["1"][1:] == ["3"] and cells["0"][1:] == ["0"]
  assert cells["small"][1:] == ["1"] and cells["medium"][1:] == ["2"] and cells["large"][1:] == ["0"]
  assert cells["cat (id 3)"][-2:] == ["2", "2"] and cells["dog (id 7)"][-2:] == ["1", "1"]


def test_check_without_traceback_on_the_real_command_line(tmp_path):
  write_coco(tmp_path / "odd", table("categories", name="кошка 猫"), splits=("train", "val"))
  odd = run(*CHECK, str(tmp_path / "odd"), "--split", "train", "--page", str(tmp_path / "page.html"), PYTHONIOENCODING="ascii")
  assert odd.returncode == 0 and r"\u043a" in odd.stdout and "Traceback" not in odd.stderr
  write_coco(tmp_path / "cut", put(PNG[:len(PNG) // 2]), splits=("train", "val"))
  fast, slow = run(*CHECK, str(tmp_path / "cut"), "--fast"), run(*CHECK, str(tmp_path / "cut"))
  assert fast.returncode == 0 and slow.returncode == 2 and "cannot be read to their end (1)" in slow.stderr and "a.png" in slow.stderr
  assert run(*CHECK, str(tmp_path / "odd"), "--split", "neither").returncode == 2
  assert "tinygrad" not in run("-X", "importtime", "-c", "import tinydet.datasets.check").stderr


def test_check_tells_the_errors_of_both_splits(tmp_path):
  write_coco(tmp_path, both_bad, splits=("train", "val"))
  (tmp_path / "val/c.png").write_bytes(b"")
  with pytest.raises(UserError, match=r"(?s)2 problems of 2 kinds.*\nerror: .*instances_val.*c\.png \(zero bytes\)"): check.main([str(tmp_path)])


def both_bad(c, d) -> None:
  c["annotations"][0]["bbox"], c["annotations"][1]["image_id"] = [1, 2, float("nan"), 4], 77


PROGRAM_ROWS = [
  ("several kinds", lambda d: write_coco(d, both_bad, splits=("train", "val")), [], ["2 problems of 2 kinds", "annotations[0] [1, 2, nan, 4]"]),
  ("a bomb", lambda d: write_coco(d, put(lying_png(60_000, 60_000)), splits=("train", "val")), [], ["more than 100 million pixels"]),
  ("a pipe", lambda d: write_coco(d, replace_by(os.mkfifo), splits=("train", "val")), [], ["not a regular file"]),
  ("entities", lambda d: write_voc(d, BAD_VOC[0].spoil), [], ["DOCTYPE declaration is refused"]),
  ("strict", lambda d: write_voc(d, ODD_VOC[1].spoil), ["--strict"], ["boxes without area inside their image, dropped (1): a.xml"]),
  ("nothing", lambda d: None, [], ["is neither a folder nor"]),
]


@pytest.mark.parametrize("name, make, flags, says", PROGRAM_ROWS, ids=[row[0] for row in PROGRAM_ROWS])
def test_programs_end_with_one_error_and_code_2(tmp_path, name, make, flags, says):
  make(tmp_path / "d")
  training = ["examples/train_retinanet.py", "--data", str(tmp_path / "d"), "--epochs", "0", "--out", str(tmp_path / "runs"), "--wandb", "disabled",
              "--workers", "0", "--size", "64", *flags]
  for command in (training, [*CHECK, str(tmp_path / "d"), *flags]):
    begun = time.monotonic()
    done = run(*command)
    assert done.returncode == 2 and "Traceback" not in done.stderr and time.monotonic() - begun < SECONDS, done.stderr
    assert done.stderr.startswith("error: ") and all(text in done.stderr for text in says), done.stderr
  assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------------------------- flags and environment
def program():
  spec = importlib.util.spec_from_file_location("train_retinanet", ROOT / "examples/train_retinanet.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules.setdefault("train_retinanet", module)
  spec.loader.exec_module(module)
  return module


FLAGS = [
  ("--bs 0", {}), ("--bs -1", {}), ("--bs 1.5", {}), ("--bs many", {}), ("--bs=", {}), ("--bs", {}), ("--bs 0x10", {}), ("--bs 1_0", {}),
    ("--bs nan", {}),
  ("--bs " + "9" * 40, {}), ("--lr nan", {}), ("--lr inf", {}), ("--lr -1", {}), ("--lr 1e400", {}), ("--lr 0,1", {}), ("--size 0x0", {}),
  ("--size -5", {}), ("--size 5x", {}), ("--size 99999999", {}), ("--size", {}), ("--epochs -1", {}), ("--epochs 1e3", {}), ("--flip 2", {}),
  ("--workers 1000", {}), ("--seed -1", {}), ("--seed " + "9" * 30, {}), ("--backbone resnet9000", {}), ("--norm \udcff", {}),
    ("--preset nothing", {}),
  ("--preset", {}), ("--nonsense 1", {}), ("--batch-size 4", {}), ("-bs 4", {}), ("folder", {}), ("--no-strict=1", {}), ("--strict=maybe", {}),
  ("--no-bs", {}), ("--", {}), ("--dtype float7", {}), ("--wandb perhaps", {}), ("--milestones a,b", {}), ("--box-loss l7", {}),
  ("", {"BS": "0"}), ("", {"TINYDET_SIZE": "0x0"}), ("", {"LR": "nan"}), ("", {"LR": "\udcff\udcfe"}), ("", {"EPOCHS": "many"}),
  ("", {"TINYDET_STRICT": "perhaps"}),
  ("", {"TINYDET_PRESET": "nothing"}), ("", {"TINYDET_WORKERS": "-1"}), ("", {"TINYDET_BACKBONE": "\x1b[2J"}),
  ("", {"BS": " "}), ("", {"BS": "9" * 5000}),
]


def test_bad_flags_and_variables_are_refused_in_one_line():
  train = program()
  for words, environment in FLAGS:
    with pytest.raises(UserError) as error: parse(train.Config, train.PRESETS, words.split(" ") if words else [], environment, "demo")
    flag = words.split(" ")[0].split("=")[0] if words else next(iter(environment))
    assert "\n" not in str(error.value) and flag in str(error.value), (words, environment, str(error.value))
  for environment in ({"BS": ""}, {"TINYDET_SIZE": ""}, {"UNRELATED": "\udcff"}):   # empty counts as unset
    assert parse(train.Config, train.PRESETS, [], environment, "demo") == parse(train.Config, train.PRESETS, [], {}, "demo")


# ------------------------------------------------------------------------------------------------------------------------- checkpoints
TENSORS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(5, dtype=np.int64), "c": np.ones(3, np.uint8)}


def file_of(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def tensor(shape: Any = (2,), dtype: Any = "F32", offsets: Any = (0, 8), **more) -> dict:
  return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


CHECKPOINTS = {
  "empty": b"", "seven bytes": bytes(7), "header of nothing": bytes(8), "a text": b"not a checkpoint at all",
    "noise": np.random.default_rng(1).bytes(4096),
  "header longer than the file": file_of(tensor(), bytes(8), 10 ** 6), "header of 2^63 bytes": file_of(tensor(), bytes(8), 2 ** 63),
  "header not JSON": file_of(b"{" * 8, bytes(8)), "header a list": file_of([], bytes(8)), "header not UTF-8": file_of(b'{"\xff":1}', bytes(8)),
  "header nested too deep": file_of(b"[" * 200_000), "metadata not text": file_of({"__metadata__": {"a": 1}, **tensor()}, bytes(8)),
  "metadata a list": file_of({"__metadata__": [], **tensor()}, bytes(8)), "tensor a number": file_of({"x": 1}, bytes(8)),
  "tensor without shape": file_of({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "more fields": file_of(tensor(odd=1), bytes(8)),
  "unknown dtype": file_of(tensor(dtype="F7"), bytes(8)), "dtype a list": file_of(tensor(dtype=["F32"]), bytes(8)),
  "negative shape": file_of(tensor([-2]), bytes(8)), "shape of fractions": file_of(tensor([2.0]), bytes(8)),
    "shape a bool": file_of(tensor([True, 2]), bytes(8)),
  "shape a text": file_of(tensor("2"), bytes(8)), "shape of 17": file_of(tensor([1] * 16 + [2]), bytes(8)),
    "shape of 2^70": file_of(tensor([2 ** 70]), bytes(8)),
  "shape 0 by 2^70": file_of(tensor([0, 2 ** 70], offsets=[0, 0])), "shape that overflows": file_of(tensor([2 ** 32, 2 ** 32]), bytes(8)),
  "offsets reversed": file_of(tensor(offsets=[8, 0]), bytes(8)), "offsets beyond the end": file_of(tensor(offsets=[8, 16]), bytes(8)),
  "offsets negative": file_of(tensor(offsets=[-8, 0]), bytes(8)), "one offset": file_of(tensor(offsets=[8]), bytes(8)),
  "offsets that do not fit": file_of(tensor(offsets=[0, 4]), bytes(8)), "a gap": file_of(tensor(offsets=[8, 16]), bytes(16)),
  "bytes left over": file_of(tensor(), bytes(9)),
  "overlap": file_of({**tensor(), "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
  "a name twice": file_of(b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
  "our metadata without checksum": file_of({"__metadata__": {"tinydet": "{}"}, **tensor()}, bytes(8)),
  "zip": b"PK\3\4" + bytes(100), "pickle": b"\x80\x04cos\nsystem\n(X\x04\0\0\0exittR.",
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_broken_checkpoint_is_refused(tmp_path, name):
  (path := tmp_path / "x.safetensors").write_bytes(CHECKPOINTS[name])
  with pytest.raises(UserError) as error: checkpoint.load(path)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_cut_anywhere_or_with_any_byte_changed_is_refused(tmp_path):
  path = tmp_path / "x.safetensors"
  checkpoint.save(path, TENSORS, {"step": 3})
  whole = path.read_bytes()
  length = 8 + int.from_bytes(whole[:8], "little")
  for end in (*range(0, 12), length - 1, length, length + 1, (length + len(whole)) // 2, len(whole) - 1):
    path.write_bytes(whole[:end])
    with pytest.raises(UserError, match="not a whole safetensors file"): checkpoint.load(path)
  for at in range(len(whole)):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1:])
    with pytest.raises(UserError): checkpoint.load(path)
  path.write_bytes(whole + b"\0")
  with pytest.raises(UserError): checkpoint.load(path)
  path.write_bytes(whole)
  tensors, metadata = checkpoint.load(path)
  assert metadata == {"step": 3} and all(np.array_equal(tensors[k], v) for k, v in TENSORS.items())


@pytest.mark.parametrize("make", [Path.mkdir, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to("/dev/null"),
                                  lambda p: p.symlink_to(p), lambda p: None], ids=["folder", "zeros", "null", "loop", "missing"])
def test_what_is_no_file_is_no_checkpoint(tmp_path, make):
  make(path := tmp_path / "x.safetensors")
  with pytest.raises(UserError, match=r"x\.safetensors"): checkpoint.load(path)


def test_a_pipe_is_no_checkpoint(tmp_path):
  os.mkfifo(path := tmp_path / "x.safetensors")
  signal.alarm(3)
  with pytest.raises(UserError, match=r"x\.safetensors"): checkpoint.load(path)


def test_metadata_nested_too_deep_under_a_good_checksum(tmp_path):
  about = {"tinydet": "[" * 200_000, "tinydet_sha256": "0" * 64}
  text = json.dumps({"__metadata__": about, **tensor()}, separators=(",", ":")).encode()
  digest = hashlib.sha256(text + bytes(8)).hexdigest().encode()
  (path := tmp_path / "x.safetensors").write_bytes(file_of(text.replace(b"0" * 64, digest, 1), bytes(8)))
  with pytest.raises(UserError, match=r"x\.safetensors"): checkpoint.load(path)


def test_a_checkpoint_that_may_not_be_read(tmp_path):
  checkpoint.save(path := tmp_path / "x.safetensors", TENSORS)
  path.chmod(0)
  if os.access(path, os.R_OK): pytest.skip("this user may read everything")
  with pytest.raises(UserError, match="Permission denied"): checkpoint.load(path)


# ------------------------------------------------------------------------------------------------------------------------- anything at all
JSON = st.recursive(st.none() | st.booleans() | st.integers(-3, 40) | st.integers() | st.floats() | st.text(max_size=6) |
                    st.sampled_from(["a.png", "b.png", "../a.png", "cat", "", float("nan"), 2 ** 63, -1, 1e300]),
                    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["id", "bbox", "images", "name", "x"]), inner,
                      max_size=4),
                    max_leaves=8)
ANYTHING = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory) -> Path:
  write_coco(folder := tmp_path_factory.mktemp("coco") / "d")
  return folder


@pytest.fixture(scope="module")
def voc_folder(tmp_path_factory) -> Path:
  write_voc(folder := tmp_path_factory.mktemp("voc") / "d")
  return folder


def assert_whole_or_refused(folder: Path) -> None:
  try: dataset = open_and_read(folder)
  except UserError as error: assert_printable(error)
  else: assert all(line.isprintable() for line in dataset.warnings)


def places(value: Any) -> list[tuple[Any, Any]]:
  """(container, key) of everything inside a JSON value."""
  items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
  return [(value, key) for key, _ in items] + [place for _, inner in items for place in places(inner)]


@ANYTHING
@given(st.data())
def test_any_change_of_a_coco_file_gives_a_whole_data_set_or_an_error(coco_folder, data):
  content = coco_content()
  for _ in range(data.draw(st.integers(1, 3))):
    container, key = data.draw(st.sampled_from(places(content)))
    change = data.draw(st.sampled_from(["replace", "remove", "repeat", "exchange"]))
    if change == "replace": container[key] = data.draw(JSON)
    elif change == "remove": del container[key]
    elif change == "repeat" and isinstance(container, list): container.append(container[key])
    else:
      other, at = data.draw(st.sampled_from(places(content)))
      other[at] = json.loads(json.dumps(container[key]))
  (coco_folder / "annotations/instances_train.json").write_text(json.dumps(content))
  assert_whole_or_refused(coco_folder)


@ANYTHING
@given(JSON)
def test_any_json_is_a_whole_data_set_or_an_error(coco_folder, value):
  (coco_folder / "annotations/instances_train.json").write_text(json.dumps(value))
  assert_whole_or_refused(coco_folder)


def mutated(data, original: bytes, tokens: list[bytes]) -> bytes:
  for _ in range(data.draw(st.integers(1, 4))):
    start = data.draw(st.integers(0, len(original)))
    stop = data.draw(st.integers(start, min(len(original), start + 30)))
    original = original[:start] + data.draw(st.sampled_from(tokens) | st.binary(max_size=6)) + original[stop:]
  return original


@ANYTHING
@given(st.data())
def test_any_bytes_changed_in_a_coco_file(coco_folder, data):
  changed = mutated(data, json.dumps(coco_content()).encode(),
    [b"", b"[", b"}", b"null", b"NaN", b"-1", b'"', b"1e999", b"true", b"\\ud800", b",", b"0"])
  (coco_folder / "annotations/instances_train.json").write_bytes(changed)
  assert_whole_or_refused(coco_folder)


@ANYTHING
@given(st.data())
def test_any_bytes_changed_in_a_voc_file(voc_folder, data):
  tokens = [b"", b"<object>", b"</object>", b"<name>", b"nan", b"-5", b"1e9", b"&amp;", b"&#1;", b"&#x85;", b"<!DOCTYPE a>", b"<size/>", b"0",
    b"\xff", b"1"]
  (voc_folder / "Annotations/a.xml").write_bytes(mutated(data, xml().encode(), tokens))
  (voc_folder / SPLIT).write_bytes(mutated(data, b"a\nb\nc\n", [b"\n", b"/", b"..", b"\0", b"a", b"z"]) if data.draw(st.booleans()) else b"a\nb\nc\n")
  assert_whole_or_refused(voc_folder)


@ANYTHING
@given(st.data())
def test_any_bytes_changed_in_a_picture(tmp_path_factory, data):
  """A picture is read at the size that its header tells, or refused; pixels that a damaged file still holds cannot be judged."""
  whole = data.draw(st.sampled_from([PNG, JPEG, GIF, WEBP, encoded(RGB, "BMP"), encoded(RGB, "TIFF"), encoded(RGB, "PPM")]))
  (path := tmp_path_factory.getbasetemp() / "any.png").write_bytes(mutated(data, whole, [b"", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f"]))
  with contextlib.suppress(UserError):
    found = np.asarray(image.read_image(path, None, ""))
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.shape[0] * found.shape[1] <= image.MAX_PIXELS
