"""Detection as its users run it and call it: what is found, where it is written, and what is said to bad input."""
import csv, importlib.util, itertools, json, os, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
import numpy as np, pytest
from PIL import Image, ImageDraw, ImageFont
from tinydet.datasets.files import walk
from tinydet.datasets.shapes import Shapes
from tinydet.detection import tiles
from tinydet.predict import detect, predictor
from tinydet.errors import UserError
from tinydet.config import parse
from tinydet.reporting.pictures import _fitting, class_color, draw_boxes
from tinydet.weights.weights import SHIPPED

ROOT = Path(__file__).parents[1]
SET = Shapes("val", 1, 128, count=13)
IMAGES = [SET[i].image for i in range(len(SET))]


def load(name):
  spec = importlib.util.spec_from_file_location(f"program_{name}", ROOT / "examples" / f"{name}.py")
  sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


program, evaluate = load("detect"), load("evaluate")


def run(*words, out, **environ):
  """The program in this process, with batches of four so that all tests share a network; returns (detections, images.json, rows of the CSV)."""
  free, flags = program.split_words([*map(str, words), "--weights", "shapes", "--bs", "4", "--out", str(out)])
  config = parse(program.Config, program.PRESETS, flags, environ)
  config.source = free or None
  program.main(config)
  with open(out / "detections.csv", newline="") as f: rows = list(csv.DictReader(f))
  return json.loads((out / "detections.json").read_text()), json.loads((out / "images.json").read_text()), rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Five pictures with their boxes as a COCO data set whose category ids have gaps."""
  root = tmp_path_factory.mktemp("coco")
  (root / "val").mkdir()
  (root / "annotations").mkdir()
  truth = Shapes("val", 1, 128, count=5).ground_truth()
  for image, pixels in zip(truth["images"], IMAGES):
    image |= {"file_name": f"picture {image['id']}.png", "id": image["id"] * 7}
    Image.fromarray(pixels).save(root / "val" / image["file_name"])
  for annotation in truth["annotations"]:
    annotation |= {"image_id": annotation["image_id"] * 7, "category_id": annotation["category_id"] * 10}
  for category in truth["categories"]: category["id"] *= 10
  (root / "annotations" / "instances_val.json").write_text(json.dumps(truth))
  return root


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
  """What the program finds in the folder of the pictures, at its default thresholds."""
  return run(folder / "val", out=tmp_path_factory.mktemp("found") / "out")


def test_detections_of_a_data_set_are_those_of_its_evaluation_to_the_last_digit(folder, tmp_path, capsys):
  data = ["--data", str(folder), "--weights", "shapes", "--bs", "4", "--workers", "0"]
  evaluate.main(parse(evaluate.Config, {}, [*data, "--to-json", str(tmp_path / "evaluated.json")], {}))
  own = [line for line in capsys.readouterr().out.splitlines() if "Average" in line]
  detections, images, _ = run("--data", folder, out=tmp_path / "out")
  assert (tmp_path / "out" / "detections.json").read_bytes() == (tmp_path / "evaluated.json").read_bytes() and len(detections) > 20
  assert [image["id"] for image in images["images"]] == [7, 14, 21, 28, 35] and images["categories"][0] == {"id": 10, "name": "circle"}
  capsys.readouterr()
  evaluate.main(parse(evaluate.Config, {}, [*data, "--from-json", str(tmp_path / "out" / "detections.json")], {}))
  scored = [line for line in capsys.readouterr().out.splitlines() if "Average" in line]
  assert len(own) == 12 and scored == own and "= 0.000" not in own[0]


def test_json_csv_and_pictures_tell_the_same(found, folder):
  detections, images, rows = found
  files = {image["id"]: image["file_name"] for image in images["images"]}
  names = {category["id"]: category["name"] for category in images["categories"]}
  assert files == {i: str(folder / "val" / f"picture {i}.png") for i in range(1, 6)} and names[1] == "circle" and len(names) == 6
  assert len(rows) == len(detections) > 20 and min(d["score"] for d in detections) > 0.05
  for row, d in zip(rows, detections):
    x, y, w, h = d["bbox"]
    assert (row["file"], row["class"], row["frame"]) == (files[d["image_id"]], names[d["category_id"]], "")
    np.testing.assert_allclose([float(row[k]) for k in ("score", "x1", "y1", "x2", "y2")], [d["score"], x, y, x + w, y + h], atol=0.006)


def test_pictures_show_the_surer_detections(folder, tmp_path):
  run(folder / "val", "--draw-threshold", "0.5", out=tmp_path / "out")
  for i, pixels in enumerate(IMAGES[:5], 1):
    drawn = np.asarray(Image.open(tmp_path / "out" / f"picture {i}.png"))
    sure = detect(pixels, "shapes", score_threshold=0.5, batch_size=4)[0]
    np.testing.assert_array_equal(drawn, draw_boxes(pixels, sure.boxes, sure.labels, sure.scores, list(Shapes().class_names)))


def test_a_call_gives_what_the_program_writes(found, folder):
  detections, _, _ = found
  paths = sorted((folder / "val").iterdir())
  calls = [detect(given, "shapes", score_threshold=0.05, batch_size=4) for given in
           (paths, [str(p) for p in paths], IMAGES[:5], np.stack(IMAGES[:5]), [Image.open(p) for p in paths])]
  assert detect(paths[0], "shapes", batch_size=4)[0].names == detect(IMAGES[0], "shapes", batch_size=4)[0].names != []
  for results in calls:
    assert len(results) == 5
    mine = np.array([(i, label + 1, score, *box) for i, r in enumerate(results, 1) for *box, score, label in zip(*r.boxes.T.astype(float), *r[1:3])])
    theirs = [(d["image_id"], d["category_id"], d["score"], *d["bbox"]) for d in detections]
    mine[:, 5:] -= mine[:, 3:5]
    np.testing.assert_array_equal(mine, theirs)
  first = calls[0][0]
  assert (first.boxes.dtype, first.scores.dtype, first.labels.dtype) == (np.float32, np.float32, np.int32)
  assert first.names == [SET.class_names[label] for label in first.labels]


def test_filters_keep_the_part_they_name(found, folder, tmp_path):
  detections, images, _ = found
  ids = {category["name"]: category["id"] for category in images["categories"]}
  kept, _, _ = run(folder / "val", "--classes", "Ring, star", "--score-threshold", "0.4", out=tmp_path / "out")
  assert kept == [d for d in detections if d["category_id"] in (ids["ring"], ids["star"]) and d["score"] > np.float32(0.4)] != []
  best, _, _ = run(folder / "val", "--max-detections", "1", out=tmp_path / "best")
  assert best == [next(d for d in detections if d["image_id"] == i) for i in range(1, 6)]
  with pytest.raises(UserError, match=r"--classes: .*shapes\.safetensors does not know unicorn; it knows circle, .*ring$"):
    run(folder / "val", "--classes", "ring,unicorn", out=tmp_path / "none")
  assert not (tmp_path / "none").exists()


def test_sizes_mix_and_a_photo_counts_as_it_is_held(tmp_path):
  upright = np.ascontiguousarray(IMAGES[2][:96])
  exif = Image.Exif()
  exif[0x0112] = 6   # shown turned clockwise by 90 degrees
  Image.fromarray(np.rot90(upright)).save(tmp_path / "phone.png", exif=exif)
  Image.fromarray(np.rot90(upright, 2)).save(tmp_path / "plain.png")
  phone, plain, array, grey = detect([tmp_path / "phone.png", tmp_path / "plain.png", upright, Image.fromarray(IMAGES[1]).convert("LA")], "shapes",
                                     batch_size=4)
  with Image.open(tmp_path / "phone.png") as stored: assert stored.size == (96, 128)
  for mine, theirs in zip(phone, array): np.testing.assert_array_equal(mine, theirs)
  assert len(array.boxes) and (array.boxes <= [128, 96, 128, 96]).all() and plain.boxes.tolist() != array.boxes.tolist() and grey.labels.ndim == 1
  with pytest.raises(TypeError, match=r"u8 \[H,W,3\] RGB, not float32"): detect(np.zeros((8, 8, 3), np.float32), "shapes", batch_size=4)
  with pytest.raises(UserError, match=r"nowhere\.png: cannot be read"): detect(tmp_path / "nowhere.png", "shapes", batch_size=4)


def test_a_detector_is_kept_until_its_file_changes(tmp_path):
  shutil.copy(SHIPPED["shapes"], path := tmp_path / "mine.safetensors")
  first = predictor(path)
  assert predictor(str(path), batch_size=1) is first
  os.utime(path, ns=(0, 0))
  assert predictor(path) is not first


# ---- sources

def test_folders_patterns_and_names(tmp_path, capsys):
  (tmp_path / "in" / "b").mkdir(parents=True)
  for name in ("z.PNG", "b/z.png", "a.bmp", ".hidden.png", "notes.txt"): Image.fromarray(IMAGES[0]).save(tmp_path / "in" / name, format="png")
  (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
  _, images, _ = run(tmp_path / "in", tmp_path / "in" / "*.PNG", out=tmp_path / "in" / "out")
  names = [(Path(image["file_name"]).relative_to(tmp_path / "in").as_posix(), image["drawn"], image["id"]) for image in images["images"]]
  assert names == [("a.bmp", "a.jpg", 1), ("b/z.png", "z.png", 2), ("z.PNG", "z-2.PNG", 4)]
  said = capsys.readouterr()
  assert said.err.count("warning: passed over") == 1 and "broken.jpg: cannot be read" in said.err and "3 pictures, 1 passed over" in said.out
  assert {p.name for p in (tmp_path / "in" / "out").iterdir()} == {"a.jpg", "z.png", "z-2.PNG", "detections.json", "detections.csv", "images.json"}
  assert len(walk(tmp_path / "in")) == 4, "what the program wrote is no source"


def test_a_taken_folder_gets_a_number_and_a_stop_keeps_what_was_found(tmp_path, monkeypatch):
  for i, pixels in enumerate(IMAGES): Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
  (tmp_path / "out").mkdir()
  add = program.Results.add
  def add_and_stop(*args):
    program.STOP.set()
    return add(*args)
  monkeypatch.setattr(program.Results, "add", add_and_stop)
  monkeypatch.setattr(program, "STOP", type(program.STOP)())
  with pytest.raises(SystemExit, match="130"): run(tmp_path, out=tmp_path / "out")
  detections, images = (json.loads((tmp_path / "out-2" / name).read_text()) for name in ("detections.json", "images.json"))
  assert 4 <= len(images["images"]) < len(IMAGES) and {d["image_id"] for d in detections} <= {image["id"] for image in images["images"]}


def test_words_belong_to_flags_or_not():
  assert program.split_words("a.jpg --bs 4 b/ --weights=x c.jpg -h d".split()) == (("a.jpg", "b/", "c.jpg", "d"), ["--bs", "4", "--weights=x", "-h"])


@pytest.mark.parametrize(("words", "message"), [
  (["nowhere.jpg"], "nowhere.jpg: no such file or folder"), (["no/*.jpg"], "no/*.jpg: matches no file"), (["empty"], "empty: holds no pictures"),
  (["a.png", "--data", "shapes"], "--data shapes: takes its pictures from the data set; leave out a.png")])
def test_bad_sources(words, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError) as e: run(*words, out=tmp_path / "out")
  assert message in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_exit_codes(tmp_path):
  (tmp_path / "broken.png").write_bytes(b"nothing")
  environ = {key: os.environ[key] for key in ("PATH", "HOME", "CC", "DEV", "NOOPT", "XDG_CACHE_HOME", "CACHEDB") if key in os.environ}
  done = subprocess.run([sys.executable, str(ROOT / "examples" / "detect.py"), "broken.png", "--weights", "shapes"], cwd=tmp_path,
                        env=environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=120)
  assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: nothing could be read" and "broken.png: cannot be read" in done.stderr
  assert [p.name for p in tmp_path.iterdir()] == ["broken.png"]


# ---- tiles

def test_windows_cover_the_picture_and_overlap():
  cases = (900, 1300, (256, 200), 0.2), (300, 301, (300, 300), 0.5), (100, 5000, (640, 640), 0.0), (257, 256, (256, 256), 0.9)
  for height, width, tile, overlap in cases:
    windows = tiles.windows(height, width, tile, overlap)
    assert windows[0].tolist() == [0, 0, width, height]
    for low, high, side, length in ((0, 2, tile[0], width), (1, 3, tile[1], height)):
      spans = sorted({(int(w[low]), int(w[high])) for w in windows[1:]})
      assert spans[0][0] == 0 and spans[-1][1] == length and all(b - a == min(side, length) for a, b in spans)
      assert all(end - start >= overlap * side - 1 for (_, end), (start, _) in itertools.pairwise(spans))
  assert len(tiles.windows(100, 100, (100, 120))) == len(tiles.windows(900, 900, None)) == 1


@pytest.mark.parametrize("seed", range(8))
def test_objects_seen_in_parts_by_several_tiles_are_found_once(seed):
  rng, height, width = np.random.default_rng(seed), 1000, 1400
  windows, objects = tiles.windows(height, width, (300, 300), 0.2), np.zeros((0, 4))
  for side in (*rng.uniform(310, 560, 20), *rng.uniform(70, 290, 40), *rng.uniform(20, 60, 60)):   # larger than a tile, than the overlap, smaller
    w, h = side, side * rng.uniform(0.6, 1)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    apart = (objects[:, 2] + 12 < x) | (x + w + 12 < objects[:, 0]) | (objects[:, 3] + 12 < y) | (y + h + 12 < objects[:, 1])
    if apart.all(): objects = np.concatenate([objects, [[x, y, x + w, y + h]]])
  labels, best = rng.integers(0, 2, len(objects)), np.zeros(len(objects), np.float32)
  seen = []
  for v, window in enumerate(windows):
    for n, box in enumerate(objects):
      part = np.clip(box, np.tile(window[:2], 2), np.tile(window[2:], 2))
      share = np.maximum(part[2:] - part[:2], 0).prod() / (box[2:] - box[:2]).prod()
      if share < 0.1 or (v == 0 and (box[2:] - box[:2]).max() < 400): continue   # the whole picture shows the largest ones only
      short = rng.uniform(0, 0.1, 4) * np.tile(part[2:] - part[:2], 2).clip(0, 50) * [1, 1, -1, -1]   # of the tile's border
      score = np.float32(rng.uniform(0.5, 1) * share ** 0.5)
      seen.append((np.where(part == box, part + rng.uniform(-1, 1, 4), part + short), score, labels[n], window))
      best[n] = max(best[n], score)
  boxes, scores, classes, where = (np.array(column) for column in zip(*seen))
  merged, merged_scores, merged_labels = tiles.merge(boxes.astype(np.float32), scores, classes, where, height, width)
  assert len(merged) == len(objects) > 12 and merged_scores.tolist() == sorted(merged_scores.tolist(), reverse=True)
  nearest = np.abs(merged[:, None] - objects).max(-1).argmin(0)
  assert sorted(nearest) == list(range(len(objects)))
  np.testing.assert_allclose(merged[nearest], objects, atol=1.1)
  np.testing.assert_array_equal(merged_scores[nearest], best)
  np.testing.assert_array_equal(merged_labels[nearest], labels)


def test_a_cut_box_leaves_only_for_a_better_whole_one():
  windows = np.array([[0, 0, 160, 100], [140, 0, 300, 100]])   # of a picture of 300 x 100 pixels
  def merged(first, second, *scores):
    return tiles.merge(np.array([first, second], np.float32), np.array(scores, np.float32), np.zeros(2, np.int32), windows, 100, 300)[0].tolist()
  whole, poor, good = [60, 20, 155, 80], [140, 40, 154, 60], [140, 20, 154, 80]
  assert merged(whole, poor, 0.9, 0.8) == [whole], "it lies in a better one"
  assert merged(whole, poor, 0.8, 0.9) == [poor, whole]
  assert merged(whole, good, 0.8, 0.9) == merged(whole, good, 0.9, 0.8) == [whole], "it is what the second tile sees of the whole one"
  assert merged([60, 20, 139, 80], good, 0.8, 0.9) == [good, [60, 20, 139, 80]]
  assert merged([60, 20, 160, 80], [140, 21, 250, 80], 0.8, 0.9) == [[60, 20, 250, 80]], "two parts"


def test_tiles_find_small_objects_where_they_are(tmp_path):
  picture = Image.new("RGB", (768, 640), (70, 90, 110))
  draw, truth = ImageDraw.Draw(picture), []
  for name, x, y, side in (("square", 40, 40, 60), ("circle", 180, 60, 60), ("ring", 600, 50, 60), ("square", 225, 470, 60), ("circle", 60, 380, 60),
                           ("ring", 680, 540, 60), ("square", 330, 180, 260)):
    area = [x, y, x + side, y + side]
    if name == "square": draw.rectangle(area, fill=(240, 200, 40))
    if name == "circle": draw.ellipse(area, fill=(220, 40, 60))
    if name == "ring": draw.ellipse(area, outline=(30, 230, 120), width=side // 4)
    truth.append((name, area))
  (whole,), (tiled,) = (detect(picture, "shapes", score_threshold=0.8, tile=tile, batch_size=4) for tile in (None, 256))
  assert sorted(whole.names) == ["square"], "at this size only the large one can be seen"
  assert sorted(tiled.names) == sorted(name for name, _ in truth)
  for name, area in truth:
    distances = [np.abs(box - area).max() for box, other in zip(tiled.boxes, tiled.names) if other == name]
    assert min(distances) < 0.2 * (area[2] - area[0]), (name, area)
  picture.save(tmp_path / "large.png")
  _, _, rows = run(tmp_path, "--tile", "256x256", "--score-threshold", "0.8", out=tmp_path / "out")
  assert [(row["class"], row["x1"], row["y2"]) for row in rows] == [(n, f"{b[0]:.2f}", f"{b[3]:.2f}") for n, b in zip(tiled.names, tiled.boxes)]


# ---- videos

def test_a_video_keeps_its_frames_rate_and_size(tmp_path, capsys):
  av = pytest.importorskip("av")
  with av.open(str(tmp_path / "clip.mp4"), "w") as container:
    track = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=Fraction(30000, 1001))
    track.width, track.height, track.pix_fmt = 128, 128, "yuv420p"
    for i in range(9): container.mux(track.encode(av.VideoFrame.from_ndarray(IMAGES[i // 3 + 1], format="rgb24")))
    container.mux(track.encode(None))
  (tmp_path / "broken.mp4").write_bytes(b"nothing")
  detections, images, rows = run(tmp_path / "clip.mp4", tmp_path / "broken.mp4", out=tmp_path / "out")
  assert "broken.mp4: cannot be opened" in capsys.readouterr().err and {p.suffix for p in (tmp_path / "out").iterdir()} == {".mp4", ".json", ".csv"}

  def read(path):
    with av.open(str(path)) as container:
      track = container.streams.video[0]
      frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(track)]
      return frames, track.average_rate, (track.width, track.height)
  (before, *shape), (after, *same) = read(tmp_path / "clip.mp4"), read(tmp_path / "out" / "clip.mp4")
  assert len(after) == len(before) == 9 and shape == same == [Fraction(30000, 1001), (128, 128)]
  assert [image["frame"] for image in images["images"]] == list(range(9)) == sorted({int(row["frame"]) for row in rows})
  for n, (old, new) in enumerate(zip(before, after)):
    x, y, w, _ = next(d["bbox"] for d in detections if d["image_id"] == n + 1)
    line = np.abs(new - old)[int(y):int(y) + 3, int(x) + 8:int(x + w) - 8]
    assert line.max() > 60, "the best box's upper edge is drawn"


def test_videos_without_pyav(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "av", None)
  (tmp_path / "clip.mp4").touch()
  for source in (tmp_path / "clip.mp4", "webcam", "3"):
    with pytest.raises(UserError, match=r"videos and cameras need PyAV: pip install av"): run(source, out=tmp_path / "out")


# ---- labels

def test_labels_do_not_cover_each_other_where_there_is_room():
  image, boxes = np.full((480, 640, 3), 128, np.uint8), np.array([[100, 100, 400, 300]] * 4, np.float32)
  def ink(drawn, label): return (drawn == class_color(label)).all(-1).sum()
  together = draw_boxes(image, boxes, np.arange(4), np.linspace(0.9, 0.3, 4), ["thing"] * 4)
  alone = draw_boxes(image, boxes[:1], [0], [0.9], ["thing"])
  label = ink(alone, 0) - ink(draw_boxes(image, boxes[:1], [0], None, [""]), 0)
  assert label > 500
  for i in range(1, 4): assert ink(together, i) > 0.7 * label, i


def test_a_long_name_leaves_room_for_the_score():
  font = ImageFont.load_default(size=12)
  assert _fitting("cat", " 0.50", font, 100) == "cat 0.50"
  short = _fitting("Kitchen & dining room table", " 0.50", font, 100)
  assert short.startswith("Kit") and short.endswith("… 0.50") and 80 < font.getlength(short) <= 100


@pytest.mark.parametrize("seed", range(6))
def test_objects_nearly_as_large_as_a_tile_that_overlap_each_other(seed):
  """Parts of two neighbours look like parts of one; the whole picture tells them apart."""
  rng, height, width = np.random.default_rng(seed), 1400, 1700
  rows = [[(150 * column + rng.uniform(0, 9), 20 + 310 * row, 0, 0) for column in range(9)] for row in range(4)]
  objects = np.array([(x, y, x + 250, y + 250 * rng.uniform(0.9, 1)) for line in rows for x, y, _, _ in line])
  seen = []
  for window in tiles.windows(height, width, (300, 300), 0.2):
    for box in objects:
      part = np.clip(box, np.tile(window[:2], 2), np.tile(window[2:], 2))
      if (share := np.maximum(part[2:] - part[:2], 0).prod() / (box[2:] - box[:2]).prod()) >= 0.1:
        seen.append((part + np.where(part == box, rng.uniform(-1, 1, 4), 0), np.float32(rng.uniform(0.5, 1) * share ** 0.5), window))
  boxes, scores, where = (np.array(column) for column in zip(*seen))
  merged, _, _ = tiles.merge(boxes.astype(np.float32), scores, np.zeros(len(boxes), np.int32), where, height, width)
  assert len(merged) == len(objects)
  np.testing.assert_allclose(merged[np.abs(merged[:, None] - objects).max(-1).argmin(0)], objects, atol=1.1)


def test_threads_find_what_one_finds():
  """As a service calls it; the detector is built and its graphs captured by whoever comes first."""
  def found_on(i: int) -> tuple[bytes, ...]:
    found, = detect(IMAGES[i % len(IMAGES)], "shapes", score_threshold=0.1)
    return found.boxes.tobytes(), found.scores.tobytes(), found.labels.tobytes()
  with ThreadPoolExecutor(4) as pool: found = list(pool.map(found_on, range(200)))
  serial = [found_on(i) for i in range(len(IMAGES))]
  assert any(boxes for boxes, _, _ in serial) and sum(a != serial[i % len(serial)] for i, a in enumerate(found)) == 0
