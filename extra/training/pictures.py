"""Pictures with boxes on them, readable on any background and at any size. Pillow and numpy only."""
import colorsys, math
from collections.abc import Sequence
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BRIGHT, DARK = (255, 255, 255), (0, 0, 0)


def class_color(label: int) -> tuple[int, int, int]:
  """A bright RGB colour for a label; neighbouring labels are far apart in hue (steps of the golden ratio)."""
  red, green, blue = colorsys.hsv_to_rgb(0.03 + label * 0.618034 % 1, 0.75, 1.0)
  return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray | None, class_names: Sequence[str], *,
               at_least: int = 480) -> np.ndarray:
  """Draw boxes f32 [M,4] (xyxy, pixels of image) with class name and score onto a copy of image u8 [H,W,3].

  A picture whose longer side is under at_least pixels is enlarged by a whole factor first, so that the text can be read; lines and font grow with the
  picture. Boxes are clipped to it; one without area inside it, or not finite, is left out. Higher scores are drawn over lower ones.
  """
  height, width = image.shape[:2]
  factor = max(1, math.ceil(at_least / max(height, width)))
  canvas = Image.fromarray(np.ascontiguousarray(image)).resize((width * factor, height * factor), Image.Resampling.BICUBIC)
  draw, side = ImageDraw.Draw(canvas), max(canvas.size)
  line, font = max(2, round(side / 320)), ImageFont.load_default(size=max(12, round(side / 42)))
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * factor
  labels = np.asarray(labels).reshape(-1)
  order = range(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
  for i in order:
    if not np.isfinite(boxes[i]).all(): continue
    x1, y1, x2, y2 = np.clip(boxes[i], 0, [canvas.width, canvas.height] * 2)
    if x2 <= x1 or y2 <= y1: continue
    label, edges = int(labels[i]), [x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)]
    draw.rectangle(edges, outline=DARK, width=line + 2)
    draw.rectangle([x1 + 1, y1 + 1, max(x1 + 1, edges[2] - 1), max(y1 + 1, edges[3] - 1)], outline=class_color(label), width=line)
    name = class_names[label] if 0 <= label < len(class_names) else str(label)
    text = name if scores is None else f"{name} {scores[i]:.2f}"
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    wide, high = right - left + 6, bottom - top + 6
    x, y = min(x1, max(0, canvas.width - wide)), y1 - high if y1 >= high else y1
    draw.rectangle([x, y, x + wide, y + high], fill=class_color(label), outline=DARK)
    draw.text((x + 3 - left, y + 3 - top), text, font=font, fill=DARK if np.dot(class_color(label), (0.3, 0.59, 0.11)) > 110 else BRIGHT)
  return np.asarray(canvas)


def truth_and_prediction(image: np.ndarray, truth_boxes: np.ndarray, truth_labels: np.ndarray, boxes: np.ndarray, labels: np.ndarray,
                         scores: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
  """Two copies of image u8 [H,W,3] side by side under captions, left with the ground truth's boxes, right with the predicted ones; u8."""
  halves = [draw_boxes(image, truth_boxes, truth_labels, None, class_names), draw_boxes(image, boxes, labels, scores, class_names)]
  height, width = halves[0].shape[:2]
  gap, font = 4, ImageFont.load_default(size=max(12, round(max(width, height) / 36)))
  strip = font.getbbox("Ag")[3] + 8
  canvas = Image.new("RGB", (2 * width + gap, height + strip), DARK)
  for i, (half, caption) in enumerate(zip(halves, ("ground truth", "prediction"))):
    canvas.paste(Image.fromarray(half), (i * (width + gap), strip))
    ImageDraw.Draw(canvas).text((i * (width + gap) + 6, 4), caption, font=font, fill=BRIGHT)
  return np.asarray(canvas)
