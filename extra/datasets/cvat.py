"""CVAT's own XML, "CVAT for images": one file with an <image> for each picture."""
import math, re
from pathlib import Path
from xml.etree import ElementTree
from tinydet.datasets.listed import FARTHEST, OBJECT, Entry, Listing, listing_of
from tinydet.datasets.native import NO_BOX, stated_size
from tinydet.datasets.outlines import around_points, around_turned
from tinydet.datasets.problems import Problems, reason, shown
from tinydet.datasets.tables import SPLIT_WORDS
from tinydet.datasets.voc import parse_xml
from tinydet.errors import UserError

MAX_XML = 2 ** 30   # bytes; a task of 100,000 boxes has some 20 million


def is_cvat(file: Path) -> bool:
  """Whether an XML file begins as CVAT's do: <annotations> with a <version>, a <meta>, an <image> or a <track>."""
  try:
    with open(file, "rb") as f:
      for _, element in ElementTree.iterparse(f, ("start",)):
        if element.tag in ("version", "meta", "image", "track"): return True
        if element.tag != "annotations": return False
  except (OSError, ValueError, LookupError, ElementTree.ParseError): pass
  return False


def read_cvat(file: Path, folder: Path, roots: list[Path], problems: Problems) -> Listing:
  """The pictures of an annotations.xml. Boxes, polygons and ellipses are objects, and a skeleton is the box around its points; points, lines and
  masks have no extent. A picture without shapes is background. UserError for the tracks of a video, which name no pictures."""
  try: root = parse_xml(file, MAX_XML)
  except (OSError, ValueError, LookupError) as e: raise UserError(f"{file}: cannot be read ({reason(e)})") from e
  if root.find("track") is not None:
    raise UserError(f"{file}: has <track>, a video's; export the task from CVAT as 'CVAT for images' or COCO")
  entries = []
  for row, image in enumerate(root.iter("image"), 1):
    if not (name := (image.get("name") or "").strip()):
      problems.error("<image> without a name", [f"image {row}"])
      continue
    size = (int(text) if re.fullmatch("[0-9]{1,9}", text := image.get(key, "")) else text or None for key in ("height", "width"))
    entry = Entry(name, stated_size(*size, name, problems), f"{file.name} {shown(name)}",
                  split=SPLIT_WORDS.get((image.get("subset") or "").strip().lower(), ""))
    for number, shape in enumerate(image, 1):
      if shape.tag == "tag": continue   # of the whole picture
      where = f"{shown(name)} shape {number}"
      if not (label := (shape.get("label") or "").strip()): problems.error("shapes without a label", [where])
      elif (corners := _corners(shape, where, problems)) is not None: entry.boxes.append((label, corners, number, OBJECT))
    entries.append(entry)
  if not entries: raise UserError(f"{file}: has no <image>")
  return listing_of(entries, folder, roots, problems, "<image name>", row_word="shape")


def _corners(shape: ElementTree.Element, where: str, problems: Problems) -> list[float] | None:
  """xyxy pixels of the upright box around a shape; None after reporting that it has none."""
  def numbers(*keys: str) -> list[float] | None:
    try: values = [float(shape.get(key, "")) for key in keys]
    except ValueError: values = [math.inf]
    return values if all(abs(v) <= FARTHEST for v in values) else problems.error(f"shapes whose {', '.join(keys)} are no numbers", [where])
  turned = 0.0
  if "rotation" in shape.keys() and (given := numbers("rotation")) is not None and given[0] % 360:
    turned = math.radians(given[0])
    problems.odd("rotation, taken as the upright box around the turned one", [where])
  if shape.tag == "box":
    if (b := numbers("xtl", "ytl", "xbr", "ybr")) is None: return None
    if b[2] < b[0] or b[3] < b[1]: return problems.error("boxes of negative width or height", [where])
    return around_turned((b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1], turned) if turned else b
  if shape.tag == "ellipse": return (b := numbers("cx", "cy", "rx", "ry")) and around_turned(b[0], b[1], 2 * b[2], 2 * b[3], turned)
  outlines = [shape] if shape.tag == "polygon" else shape.findall("points") if shape.tag == "skeleton" else []
  if not outlines: return problems.note(NO_BOX.format("shapes"), [where])
  try: flat = [float(n) for outline in outlines for n in outline.get("points", "").replace(";", ",").split(",")]
  except ValueError: flat = []
  if len(flat) < 4 or len(flat) % 2 or any(not abs(n) <= FARTHEST for n in flat):
    return problems.error("shapes whose points are not pairs of numbers", [where])
  return around_points(flat)
