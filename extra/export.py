"""A detector as an ONNX file or in C, held against the detector itself."""
import contextlib, ctypes, json, os, secrets, shutil, subprocess, tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
import numpy as np
from tinygrad import Context, Tensor, dtypes
from tinydet.detectors import Detector
from tinydet.detectors.detector import Canvas
from tinydet.errors import UserError
from tinydet.runtime.c_source import c_program
from tinydet.runtime.onnx_graph import Graph, model_of, to_onnx

HINT = "pip install onnx onnxruntime, or pip install -e '.[onnx]'"
TOLERANCE = 1e-3   # of the largest number of an output


@contextlib.contextmanager
def write_onnx(out: str | Path, detector: Detector, canvas: Canvas, about: Mapping[str, Any], *, outputs: str = "decoded", preprocess: bool = True,
               score_threshold: float = 0.05, nms_threshold: float | None = None, max_detections: int = 300) -> Iterator[Path]:
  """Write `detector`, for pictures on `canvas` (height, width), to the ONNX file `out`, which gets its name at the end of the block: inside, what was
  written lies at the path that is given. `about` goes into its metadata as JSON. The options are those of `examples/export.py`.

  UserError where the packages are missing or the file cannot be written."""
  try: import onnx
  except ImportError as e: raise UserError(f"--out {out}: an ONNX file needs the package {e.name}: {HINT}") from None
  detector.fold()
  for constant in detector.constants(canvas): constant.realize()
  shape, kind = ((*canvas, 3), dtypes.uint8) if preprocess else ((3, *canvas), dtypes.float32)

  def function(images: Tensor) -> dict[str, Tensor]:
    found = detector.head(detector.features(detector.prepare(images) if preprocess else images))
    if outputs == "raw": return {f"output{i}": t.float() for i, t in enumerate(found)}
    boxes, scores = detector.decoded(found, canvas)
    if outputs == "detections" and detector.options({}).get("clip", True):
      boxes = boxes.maximum(0).minimum(Tensor(np.float32([canvas[1], canvas[0]] * 2)))
    return {"boxes": boxes, "scores": scores}
  graph, results = to_onnx(function, shape, kind)
  if outputs == "detections":
    threshold = detector.options({"nms_threshold": nms_threshold}).get("nms_threshold", 0.5)
    results = {"detections": _detections(graph, results, score_threshold, threshold, max_detections)}
  float32, sides = onnx.TensorProto.FLOAT, {"detections": ["rows", 7], "boxes": ["batch", None, 4], "scores": ["batch", None, detector.num_classes]}
  known = {key: value for key, value in about.items() if key in ("model", "class_names", "category_ids", "size", "input", "mAP", "licence")}
  model = model_of(graph, {"images": (onnx.TensorProto.UINT8 if preprocess else float32, ["batch", *shape])},
                   {name: (inner, float32, sides.get(name)) for name, inner in results.items()}, {"tinydet": json.dumps(known)})
  partial = Path(out).with_name(f".{Path(out).name}.{secrets.token_hex(4)}.partial")
  try:
    onnx.save(model, str(partial))
    yield partial
    os.replace(partial, out)
  except OSError as e: raise UserError(f"cannot write {out}: {e.strerror or e}") from e
  finally:
    with contextlib.suppress(OSError): partial.unlink(missing_ok=True)


def _detections(graph: Graph, results: Mapping[str, str], score_threshold: float, nms_threshold: float | None, most: int) -> str:
  """Rows f32 [R,7], picture, x1, y1, x2, y2, score, class, of what `results`, boxes and scores, come to."""
  def numbers(*values: int) -> str: return graph.store(np.array(values, np.int64))
  def number(value: float) -> str: return graph.store(np.array([value], np.float32))
  by_class = graph.node("Transpose", [results["scores"]], perm=[0, 2, 1])
  if nms_threshold is None: by_class = _best_cells(graph, by_class, most)
  # a threshold of 1 keeps whatever overlaps, which a one-to-one head's boxes do by right
  picked = graph.node("NonMaxSuppression", [results["boxes"], by_class, numbers(most), number(1.0 if nms_threshold is None else nms_threshold),
                                            number(score_threshold)])
  picture, label, cell = (graph.node("Slice", [picked, numbers(i), numbers(i + 1), numbers(1)]) for i in range(3))
  box = graph.node("GatherND", [results["boxes"], graph.node("Concat", [picture, cell], axis=1)])
  score = graph.node("Unsqueeze", [graph.node("GatherND", [by_class, picked]), numbers(1)])
  first, last = (graph.node("Cast", [value], to=graph.types.FLOAT) for value in (picture, label))
  return graph.node("Concat", [first, box, score, last], axis=1)


def _best_cells(graph: Graph, by_class: str, most: int) -> str:
  """The scores [B,K,N] of each picture's `most` best cells, by their best class; 0 elsewhere."""
  best = graph.node("ReduceMax", [by_class], axes=[1], keepdims=1)
  count = graph.store(np.array([most], np.int64))
  sides = graph.node("Slice", [graph.node("Shape", [best]), *(graph.store(np.array([i], np.int64)) for i in (2, 3))])
  graph.nodes.append(graph.helper.make_node("TopK", [best, graph.node("Min", [count, sides])], [top := f"v{len(graph.nodes)}", f"{top}_i"], axis=2))
  least = graph.node("ReduceMin", [top], axes=[2], keepdims=1)
  return graph.node("Where", [graph.node("Less", [best, least]), graph.store(np.float32(0)), by_class])


def compare(file: Path, detector: Detector, image: np.ndarray, *, outputs: str, preprocess: bool, score_threshold: float,
            nms_threshold: float | None, max_detections: int) -> float:
  """Run the ONNX file in onnxruntime on one picture u8 [H,W,3] that is on the canvas already, and return how far its outputs are from the detector's
  own, in shares of the largest number. UserError where they are not the same."""
  try: import onnxruntime
  except ImportError as e: raise UserError(f"the file is compared in onnxruntime, and {e.name} is not installed: {HINT}") from None
  canvas, batch = image.shape[:2], image[None]
  given = batch if preprocess else detector.prepare(Tensor(np.ascontiguousarray(batch))).numpy()
  session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
  found = dict(zip([output.name for output in session.get_outputs()], session.run(None, {"images": given})))
  ours = detector.infer(Tensor(np.ascontiguousarray(batch)).realize())
  if outputs == "raw": wanted = {f"output{i}": t.numpy() for i, t in enumerate(ours)}
  elif outputs == "decoded": wanted = dict(zip(("boxes", "scores"), detector.predict(batch)))
  else:
    size, options = np.array([canvas]), {"score_threshold": score_threshold, "nms_threshold": nms_threshold, "max_detections": max_detections}
    own = detector.detect(ours, canvas, size, **options)
    n, rows = int(own.counts[0]), found["detections"]
    order = np.argsort(-rows[:, 5], kind="stable")[:n]
    if len(order) < n: raise UserError(f"{file}: finds {len(rows)} objects on the picture, this program {n}")
    wanted, found = {"scores": own.scores[0, :n]}, {"scores": rows[order, 5]}
  return _furthest(file, found, wanted)


def _furthest(file: Path, found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
  """How far the outputs of a file are from those `wanted`, in shares of the largest number; UserError where that is too far."""
  worst = max(float(np.abs(found[key] - value).max(initial=0) / max(np.abs(value).max(initial=0), 1.0)) for key, value in wanted.items())
  if not worst <= TOLERANCE: raise UserError(f"{file}: its outputs are off by {worst:.2g} of the largest number; the file is not kept")
  return worst


def write_c(out: str | Path, detector: Detector, image: np.ndarray, nms_threshold: float | None = None) -> float | None:
  """Write `detector`, for pictures of the canvas that `image` u8 [H,W,3] is on, as C to `out`, with what it learned beside it in a .bin.
  The file has a function `run(weights, image, boxes, scores)` of the decoded candidates and, unless NO_MAIN is defined, a program that prints
  the objects on a .ppm.

  Returns how far its numbers on `image` are from the detector's own, in shares of the largest, or None where there is no compiler to try it with.
  UserError where they are not the same or a file cannot be written; then neither is kept."""
  out, canvas, batch = Path(out), image.shape[:2], Tensor(np.ascontiguousarray(image[None])).realize()
  for path in (out, out.with_suffix(".bin")):   # two files get their names one after the other: neither may fail
    if path.is_dir(): raise UserError(f"cannot write {path}: is a folder; choose another --out")
  detector.fold()
  for constant in detector.constants(canvas): constant.realize()

  def function(images: Tensor) -> dict[str, Tensor]:
    return dict(zip(("boxes", "scores"), detector.decoded(detector(images), canvas)))
  with Context(TRAINING=0): program = c_program(function, batch)
  wanted = detector.predict(image[None])
  threshold = detector.options({"nms_threshold": nms_threshold}).get("nms_threshold", 0.5)
  facts = {"HEIGHT": canvas[0], "WIDTH": canvas[1], "CANDIDATES": wanted.boxes.shape[1], "CLASSES": detector.num_classes,
           "WEIGHTS": len(program.weights), "WEIGHTS_FILE": json.dumps(out.with_suffix(".bin").name),
           "OVERLAP": 1.0 if threshold is None else threshold}
  main = Path(__file__).with_name("export_main.c").read_text()
  with _refused(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
    code, weights = Path(name) / "network.c", Path(name) / "network.bin"
    code.write_text(program.code + "\n" + "".join(f"#define {key} {value}\n" for key, value in facts.items()) + main)
    weights.write_bytes(program.weights)
    worst = _compare_c(out, code, program.weights, image, dict(zip(("boxes", "scores"), wanted)))
    os.replace(weights, out.with_suffix(".bin"))
    os.replace(code, out)
  return worst


@contextlib.contextmanager
def _refused(out: Path) -> Iterator[None]:
  try: yield
  except OSError as e: raise UserError(f"cannot write {out}: {e.strerror or e}") from e


def _compare_c(out: Path, code: Path, weights: bytes, image: np.ndarray, wanted: Mapping[str, np.ndarray]) -> float | None:
  compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
  if compiler is None: return None
  library = code.with_suffix(".so")
  made = subprocess.run([compiler, "-O2", "-w", "-shared", "-fPIC", "-DNO_MAIN", str(code), "-o", str(library), "-lm"],
                        check=False, capture_output=True, text=True)
  if made.returncode: raise UserError(f"{out}: {compiler} refuses it: {made.stderr.strip()[:300]}")
  found = {name: np.empty_like(value) for name, value in wanted.items()}
  inputs = [_aligned(np.frombuffer(weights, np.uint8)), _aligned(np.ascontiguousarray(image).reshape(-1))]
  ctypes.CDLL(str(library)).run(*(array.ctypes.data_as(ctypes.c_void_p) for array in (*inputs, *found.values())))
  return _furthest(out, found, wanted)


def _aligned(values: np.ndarray) -> np.ndarray:
  """A copy of u8 [n] at a multiple of 64 bytes."""
  room = np.empty(len(values) + 64, np.uint8)
  start = -room.ctypes.data % 64
  room[start:start + len(values)] = values
  return room[start:start + len(values)]
