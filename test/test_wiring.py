"""What a run does, against an account of its settings that is not the program's: batches, first weights, what learns, losses, rates, evaluations."""
import importlib.util, json, math, types
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict
from tinydet.config import parse
from tinydet.errors import UserError
from tinydet.runtime.mpi import ALONE
from tinydet.training import detection, run as run_module
from tinydet.training.run import Run
from tinydet.weights import checkpoint

ROOT = Path(__file__).parents[1]
SIZES = ((40, 60), (60, 40), (48, 48))   # of the pictures, height and width
TRAIN, VAL = 10, 7
BASE = "--backbone resnet10_quarter --size 64 --bs 4 --epochs 2 --workers 0 --wandb disabled --flip 0 --pictures 0 --run-name wired".split()

spec = importlib.util.spec_from_file_location("wired_program", ROOT / "examples" / "train_retinanet.py")
spec.loader.exec_module(program := importlib.util.module_from_spec(spec))


def content(split, i):
  """A picture u8 [H,W,3] and its boxes (x, y, w, h, label)."""
  rng = np.random.default_rng((split == "val", i))
  height, width = SIZES[i % 3]
  boxes = [(2 + i, 3, 20, 12, i % 3)] + [(5, 20, 11, 9, 2)] * (i % 2)
  return rng.integers(0, 256, (height, width, 3), np.uint8), boxes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("wired")
  (folder / "annotations").mkdir()
  for split, count in (("train", TRAIN), ("val", VAL)):
    (folder / split).mkdir()
    images, annotations = [], []
    for i in range(count):
      image, boxes = content(split, i)
      Image.fromarray(image).save(folder / split / f"{i}.png")
      images.append({"id": i + 1, "file_name": f"{i}.png", "width": image.shape[1], "height": image.shape[0]})
      for x, y, w, h, label in boxes:
        annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "category_id": label + 5, "bbox": [x, y, w, h], "area": w * h,
                            "iscrowd": 0})
    categories = [{"id": k + 5, "name": name} for k, name in enumerate("abc")]
    (folder / "annotations" / f"instances_{split}.json").write_text(
      json.dumps({"images": images, "annotations": annotations, "categories": categories}))
  return folder


@pytest.fixture
def wired(data, tmp_path, monkeypatch):
  """`wired(*flags)` runs the program's `main` with a step and an evaluation that only look on, and returns what they saw."""
  def call(*flags, score=lambda epoch: 0.1):
    seen = types.SimpleNamespace(batches=[], validation=[], evaluated=0, weights=[], lines=[])

    def make_step(losses, optimizer, buffers, accumulate, start, ranks, wire):
      seen.losses, seen.optimizer, seen.buffers, seen.accumulate, seen.wire = losses, optimizer, buffers, accumulate, wire
      def step(*tensors):
        seen.batches.append([t.numpy() for t in tensors])
        seen.devices = [t.device for t in tensors]
        return lambda: {"loss": 1.0, "skipped": 0.0}
      return step

    def evaluate(find, batches, metric, watch):
      seen.evaluated += 1
      seen.validation.append(list(batches))
      seen.weights.append({key: t.numpy() + 0 for key, t in get_state_dict(seen.detector.network).items()})
      metric.compute = lambda: types.SimpleNamespace(metrics={"mAP": score(seen.evaluated), "mAP50": 0.5}, class_ap={}, table="", precision=None)
      return metric

    def train_detector(run, detector, fit, *rest, **options):
      seen.detector, seen.fit, seen.run = detector, fit, run
      return detection.train_detector(run, detector, fit, *rest, **options)

    monkeypatch.setattr(run_module, "make_step", make_step)
    monkeypatch.setattr(detection, "evaluate", evaluate)
    monkeypatch.setattr(program, "train_detector", train_detector)
    monkeypatch.setattr(run_module.report, "update", lambda *args: None)
    start = [] if "--weights" in flags else ["--weights", "none"]   # a folder's default looks for what is published
    config = parse(program.Config, program.PRESETS, ["--data", str(data), *BASE, *start, "--out", str(tmp_path), *map(str, flags)], {}, "folder")
    run = Run(config, ALONE, config.backbone, 0.0)
    try: program.main(config, run)
    finally: run.close()
    seen.lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return seen
  return call


def order(epoch, seed=0, count=TRAIN): return np.random.default_rng((seed, epoch)).permutation(count)


def expected(split, i, size=(64, 64)):
  """Picture, boxes and labels at the network's size, by Pillow and plain arithmetic."""
  image, boxes = content(split, i)
  resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
  x, y = size[0] / image.shape[1], size[1] / image.shape[0]
  return resized, np.array([(bx * x, by * y, (bx + w) * x, (by + h) * y) for bx, by, w, h, _ in boxes]), [label for *_, label in boxes]


def same_batch(batch, pictures, split="train", mirrored=lambda i: False):
  images, boxes, labels = batch[:3]
  for row, i in enumerate(pictures):
    image, corners, wanted = expected(split, i)
    if mirrored(i): image, corners[:, [0, 2]] = image[:, ::-1], 64 - corners[:, [2, 0]]
    np.testing.assert_array_equal(images[row], image)
    n = len(wanted)
    np.testing.assert_allclose(boxes[row, :n], corners, atol=1e-4)
    assert labels[row].tolist() == wanted + [-1] * (labels.shape[1] - n)


# ---- data


def test_training_batches_are_the_pictures_in_a_random_order_with_their_boxes_and_labels(wired):
  seen = wired()
  assert len(seen.batches) == 4, "two epochs of two whole batches"
  for epoch in (0, 1):
    for at in (0, 1): same_batch(seen.batches[2 * epoch + at], order(epoch)[4 * at:4 * at + 4])
  assert (order(0)[:8] != order(1)[:8]).any() and sorted(order(0)) == list(range(TRAIN))
  other = wired("--seed", 3)
  same_batch(other.batches[0], order(0, seed=3)[:4])


def test_validation_takes_every_picture_as_it_is_and_in_order(wired):
  batches = wired("--flip", 1, "--photometric", "--scale-jitter").validation[0]
  ids = [i for batch in batches for i in batch.image_ids.tolist()]
  assert ids == [*range(1, VAL + 1), -1], "the last, partial batch too"
  for at, batch in enumerate(batches): same_batch((batch.images, batch.boxes, batch.labels), range(VAL)[4 * at:4 * at + 4], "val")


@pytest.mark.parametrize("chance", [1, 0.5])
def test_mirrored_pictures(wired, chance):
  seen, pictures = wired("--flip", chance), order(0)[:4]
  turned = {int(i): np.random.default_rng((0, 0, i)).random() < chance for i in pictures}
  same_batch(seen.batches[0], pictures, mirrored=lambda i: turned[int(i)])
  assert all(turned.values()) if chance == 1 else 0 < sum(turned.values()) < 4


def test_colours_change_only_where_asked(wired):
  plain, coloured = wired(), wired("--photometric")
  for a, b in zip(plain.batches, coloured.batches):
    assert (a[0] != b[0]).any() and (a[1] == b[1]).all() and (a[2] == b[2]).all()


def test_zoom_only_where_asked(wired):
  plain, zoomed = wired(), wired("--scale-jitter")
  assert all(a[0].shape == b[0].shape and (a[1] != b[1]).any() for a, b in zip(plain.batches, zoomed.batches))


def test_overfitting_evaluates_on_the_training_pictures_unchanged(wired):
  seen = wired("--overfit", "--flip", 1, "--photometric", "--train-images", 4)
  assert [i for b in seen.validation[0] for i in b.image_ids.tolist()] == [1, 2, 3, 4] and len(seen.batches) == 2
  same_batch(seen.batches[0], order(0, count=4))


def test_sizes_and_canvases(wired):
  wide = wired("--size", "96x64")
  assert all(b[0].shape[1:3] == (64, 96) for b in wide.batches) and wide.fit.size == (96, 64)
  kept = wired("--size", 32, "--max-size", 64, "--buckets", 3, "--bs", 2)
  shapes = {b[0].shape[1:3] for b in kept.batches}
  assert shapes == {(32, 64), (64, 32), (32, 32)}
  assert len({b[0].shape[1:3] for b in wired("--size", 32, "--max-size", 64, "--buckets", 1).batches}) == 1
  batch = kept.validation[0][0]
  assert all(min(size) == 32 or max(size) == 64 for size in batch.sizes[batch.image_ids >= 0].tolist())


def test_so_many_pictures(wired):
  assert len(wired("--train-images", 5).batches) == 2 and len(wired("--bs", 2).batches) == 10


def test_strict_refuses_oddities(wired, data, tmp_path):
  file = data / "annotations" / "instances_train.json"
  kept = file.read_text()
  file.write_text(json.dumps((truth := json.loads(kept)) | {"annotations": [*truth["annotations"], truth["annotations"][0] | {"id": 99}]}))
  try:
    wired()
    with pytest.raises(UserError, match="boxes written again"): wired("--strict")
  finally: file.write_text(kept)


@pytest.mark.by_hand
def test_a_batch_is_divided_among_devices(wired):
  assert {d for d in wired("--gpus", 2).devices} == {("CPU", "CPU:1")} and {d for d in wired().devices} == {"CPU"}


# ---- network


STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4")


def stage(key): return next((s for s in STAGES if key.startswith((f"backbone.body.{s}.", "backbone.body.bn1." if s == "conv1" else "-"))), "above")


@pytest.mark.parametrize("layers", range(6))
def test_stages_are_frozen_from_the_bottom(wired, layers):
  seen = wired("--weights", "shapes", "--trainable-layers", layers, "--norm", "batch", "--epochs", 0)
  learns = {stage(key) for key in seen.optimizer.params}
  assert learns == {*STAGES[5 - layers:], "above"}


def test_random_layers_all_learn(wired):
  assert {stage(key) for key in wired("--trainable-layers", 1, "--epochs", 0).optimizer.params} == {*STAGES, "above"}


def test_where_the_weights_come_from(wired):
  stored, _ = checkpoint.load(ROOT / "extra" / "models" / "shapes.safetensors")
  started = wired("--weights", "shapes", "--epochs", 0).weights[0]
  for key, values in started.items():
    if "cls_logits" in key: assert values.shape[0] == 27, "the data's three classes, none of which the file knows"
    elif not key.endswith("num_batches_tracked"): np.testing.assert_array_equal(values, stored[key].astype(values.dtype), err_msg=key)
  key, drawn = "backbone.body.conv1.weight", [wired("--epochs", 0, "--seed", seed).weights[0] for seed in (0, 0, 1)]
  assert (drawn[0][key] == drawn[1][key]).all() and (drawn[0][key] != drawn[2][key]).any() and (drawn[0][key] != stored[key]).any()


def test_norms_and_variants(wired):
  norms = {norm: wired("--epochs", 0, *flags) for norm, flags in (("batch", ()), ("frozen", ("--weights", "shapes")), ("group", ("--norm", "group")))}
  assert [type(seen.detector.network.backbone.body.bn1).__name__ for seen in norms.values()] == ["BatchNorm", "FrozenBatchNorm", "GroupNorm"]
  for variant, source in (("v1", 64), ("v2", 128)):
    assert wired("--epochs", 0, "--variant", variant).detector.network.backbone.fpn.extra_blocks.p6.weight.shape[1] in (32, source)
  assert wired("--epochs", 0, "--variant", "v2").detector.name == "retinanet_resnet10_quarter_fpn_v2"
  assert wired("--epochs", 0).detector.name == "retinanet_resnet10_quarter_fpn"
  assert [wired("--epochs", 0, *flags).detector.assigner for flags in ((), ("--assigner", "atss"))] == ["iou", "atss"]


def test_losses(wired):
  """Each box loss against numpy, from the network's own outputs; and what the network computes in."""
  totals = {}
  for name, flags in {"l1": (), "smooth_l1": ("--box-loss", "smooth_l1"), "giou": ("--box-loss", "giou"), "bf16": ("--dtype", "bf16")}.items():
    seen = wired("--train-images", 4, "--epochs", 1, *flags)
    images, boxes, labels = (Tensor(array).realize() for array in seen.batches[0])
    with Context(TRAINING=0): totals[name] = {key: value.item() for key, value in seen.losses(images, boxes, labels).items()}
    assert totals[name]["loss"] == pytest.approx(totals[name]["classification"] + totals[name]["bbox_regression"], rel=1e-5)
  regression = {name: t["bbox_regression"] for name, t in totals.items()}
  assert len({round(value, 5) for value in regression.values()}) == 4
  assert totals["l1"]["classification"] == pytest.approx(totals["giou"]["classification"], rel=1e-5)
  assert regression["bf16"] == pytest.approx(regression["l1"], rel=0.05) and 0 < regression["giou"] < 2 and regression["smooth_l1"] < regression["l1"]


# ---- optimisation


def rates(optimizer, count): return [optimizer.rate(Tensor([float(i)])).item() for i in range(count)]


def test_what_the_optimiser_is(wired):
  usual = wired("--epochs", 0).optimizer
  assert (usual.kind, usual.clip_norm, usual.ema_decay, usual.loss_scale) == ("adamw", 10.0, 0.0, None)
  seen = wired("--epochs", 0, "--optimizer", "sgd", "--momentum", 0.7, "--weight-decay", 0.02, "--norm-weight-decay", 0.003, "--clip-norm", 1.5,
               "--ema", 0.9)
  o = seen.optimizer
  assert (o.kind, o.momentum, o.clip_norm, o.ema_decay, o.second) == ("sgd", 0.7, 1.5, 0.9, {}) and o.ema.keys() == o.params.keys()
  assert {o.decay[key] for key, p in o.params.items() if p.ndim == 4} == {0.02}
  assert {o.decay[key] for key, p in o.params.items() if p.ndim == 1} == {0.003}
  assert wired("--epochs", 0, "--dtype", "half").optimizer.loss_scale is not None
  assert wired("--epochs", 1, "--accumulate", 2).accumulate == 2 and wired("--epochs", 0, "--wire", "half").wire == "half"


@pytest.mark.parametrize(("flags", "factor"), [
  (["--schedule", "constant", "--warmup", 0], lambda t: 1),
  (["--schedule", "cosine", "--warmup", 0], lambda t: 0.5 * (1 + math.cos(math.pi * t / 8))),
  (["--schedule", "step", "--milestones", "2,3", "--warmup", 0], lambda t: 0.1 ** ((t >= 4) + (t >= 6))),
  (["--schedule", "constant", "--warmup", 2], lambda t: 0.001 + 0.999 * min(t / 4, 1))])
def test_rates(wired, flags, factor):
  """Four epochs of two steps."""
  found = rates(wired("--epochs", 4, "--lr", 0.25, *flags).optimizer, 8)
  np.testing.assert_allclose(found, [0.25 * factor(t) for t in range(8)], rtol=1e-5, atol=1e-7)


def test_warm_up_is_on_by_default(wired):
  found = rates(wired("--epochs", 4).optimizer, 2)
  assert found[0] == pytest.approx(5e-7, rel=1e-3) and found[1] > 100 * found[0]


# ---- the run


def test_averaged_weights_are_what_is_scored_and_kept(wired):
  seen = wired("--ema", 0.9, "--epochs", 1)
  key = "backbone.body.conv1.weight"
  seen.optimizer.ema[key].assign(seen.optimizer.ema[key] * 0 + 7).realize()
  evaluation = detection.Evaluation(seen.run, seen.detector, types.SimpleNamespace(epoch=lambda _: []), types.SimpleNamespace(
    ground_truth=lambda: {"images": [], "annotations": [], "categories": []}, category_ids=[], class_names=[]), seen.optimizer.averaged,
    types.SimpleNamespace(evaluated=lambda *_: ""), ())
  kept = []
  seen.run.keep_if_best = lambda value, epoch, step, weights: kept.append(weights)
  evaluation.after_epoch(1, 2, log=False)
  assert (seen.weights[-1][key] == 7).all() and (kept[0][key] == 7).all()
  assert (seen.detector.network.backbone.body.conv1.weight.numpy() != 7).any(), "and training goes on with its own"


def test_when_it_evaluates_and_ends(wired):
  assert wired("--epochs", 4, "--eval-every", 2).evaluated == 2 and wired("--epochs", 3).evaluated == 3
  assert wired("--epochs", 4, "--target", 0.3, score=lambda n: 0.2 * n).evaluated == 4
  seen = wired("--epochs", 4, "--target", 0.3, "--stop-at-target", score=lambda n: 0.2 * n)
  assert seen.evaluated == 2 and len(seen.batches) == 4


def test_what_it_leaves_behind(wired, tmp_path):
  seen = wired("--epochs", 3, "--keep", 1, "--save-half", "--log-every", 1)
  folder = seen.run.folder
  assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-6.safetensors"] and folder.parent == tmp_path
  tensors, about = checkpoint.load(folder / "best.safetensors")
  assert tensors["backbone.body.conv1.weight"].dtype == np.float16 and about["class_names"] == ["a", "b", "c"] and about["category_ids"] == [5, 6, 7]
  assert about["step"] == 2, "the first of equals"
  assert [line["step"] for line in seen.lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
  other = wired("--epochs", 3, "--keep", 2, "--save-steps", 1, "--log-every", 2)
  assert len(list(other.run.folder.glob("checkpoint-*"))) == 2 and other.run.folder.name == "wired-2"
  assert [line["step"] for line in other.lines if "train/loss" in line] == [2, 4, 6]
  assert checkpoint.load(other.run.folder / "best.safetensors")[0]["backbone.body.conv1.weight"].dtype == np.float32
