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
  picture. Boxes are clipped to it; one without area inside it, or not finite, is left out. Higher scores are drawn over lower ones, and labels over
  boxes, each where it covers no better one if it can; a name wider than the picture is shortened.
  """
  height, width = image.shape[:2]
  factor = max(1, math.ceil(at_least / max(height, width)))
  canvas = Image.fromarray(np.ascontiguousarray(image)).resize((width * factor, height * factor), Image.Resampling.BICUBIC)
  draw, side = ImageDraw.Draw(canvas), max(canvas.size)
  line, rim, font = max(2, round(side / 320)), max(1, side // 1280), ImageFont.load_default(size=max(12, round(side / 42)))
  margin = 2 + rim   # around a label's text
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * factor
  labels = np.asarray(labels).reshape(-1)
  order = np.arange(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
  clipped = np.clip(boxes, 0, [canvas.width, canvas.height] * 2)
  order = order[np.isfinite(boxes[order]).all(1) & (clipped[order, 2:] > clipped[order, :2]).all(1)]
  for i in order:
    x1, y1, x2, y2 = clipped[i]
    edges = [x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)]
    draw.rectangle(edges, outline=DARK, width=line + 2 * rim)
    inner = [x1 + rim, y1 + rim, max(x1 + rim, edges[2] - rim), max(y1 + rim, edges[3] - rim)]
    draw.rectangle(inner, outline=class_color(labels[i]), width=line)

  placed, texts = np.zeros((0, 4)), []
  for i in order[::-1]:
    name = class_names[labels[i]] if 0 <= labels[i] < len(class_names) else str(labels[i])
    text = _fitting(name, "" if scores is None else f" {scores[i]:.2f}", font, canvas.width - 2 * margin)
    left, top, right, bottom = font.getbbox(text)
    (x1, y1, x2, y2), wide, high = clipped[i], right - left + 2 * margin, bottom - top + 2 * margin
    # above the box, below it, then inside at its corners
    places = np.array([(x, y) for y in (y1 - high, y2, y1, y2 - high) for x in (x1, x2 - wide)])
    inside = np.clip(places, 0, np.maximum(0, [canvas.width - wide - 1, canvas.height - high - 1]))
    areas = np.concatenate([inside, inside + (wide, high)], 1)
    free = (inside[:, 1] == places[:, 1]) & ~_overlap(areas, placed)
    x, y = inside[free.argmax()] if free.any() else inside[0] if y1 >= high else inside[4]
    placed = np.concatenate([placed, [[x, y, x + wide, y + high]]])
    texts.append((x, y, wide, high, left, top, text, class_color(labels[i])))
  for x, y, wide, high, left, top, text, color in reversed(texts):
    draw.rectangle([x, y, x + wide, y + high], fill=color, outline=DARK, width=rim)
    draw.text((x + margin - left, y + margin - top), text, font=font, fill=DARK if np.dot(color, (0.3, 0.59, 0.11)) > 110 else BRIGHT)
  return np.asarray(canvas)


def draw_heat(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
  """A copy of image u8 [H,W,3], its colours faded, with heat, [H,W] in 0..1, laid over it: black through purple and orange to pale yellow."""
  faded = 0.35 * image + 0.65 * (image @ np.array([0.299, 0.587, 0.114]))[..., None]
  stops = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])   # of matplotlib's inferno
  color = np.stack([np.interp(heat, np.linspace(0, 1, len(stops)), channel) for channel in stops.T], -1)
  part = 0.15 + 0.6 * heat[..., None]   # more of the picture where there is little heat
  return (faded * (1 - part) + color * part).round().astype(np.uint8)


def _fitting(name: str, score: str, font: ImageFont.FreeTypeFont, width: int) -> str:
  """`name` and `score`, the name cut to what `width` pixels hold."""
  length = next((n for n in range(len(name), 0, -1) if font.getlength((name[:n] + "…" * (n < len(name))) + score) <= width), 0)
  return (name if length == len(name) else name[:length] + "…") + score


def _overlap(areas: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Which of areas [N,4] xyxy share pixels with any of others [M,4]."""
  apart = (areas[:, None, 2:] <= others[None, :, :2]) | (others[None, :, 2:] <= areas[:, None, :2])
  return ~apart.any(-1).all(1)


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
