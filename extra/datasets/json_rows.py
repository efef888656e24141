"""The lists of objects in a JSON file, a portion at a time: a file of any size in little memory."""
import codecs, json, re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from tinydet.datasets.problems import read_bytes

BLOCK = 2 ** 24   # bytes of a file read at once
PORTION = 50_000  # objects, at least
TAIL = 2 ** 16    # characters in which the end of an object is looked for
ROW_END = re.compile(r"\}[ \t\n\r]*(?=,[ \t\n\r]*\{)")
NEAR = 16         # no token but a text is longer: an error so close to the end of what was read may be for want of the rest
SPACE = re.compile(r"[ \t\n\r]*")
TWICE = "an object in it has two fields of one name"


def read_whole(path: str | Path, keys: list[str]) -> Iterator[tuple[str, Any]]:
  """`(key, value)` of each of `keys` that the JSON object in a file has; OSError, ValueError or RecursionError where there is none."""
  content = json.loads(read_bytes(path).decode("utf-8-sig"), object_pairs_hook=_unique)
  for key in keys:
    if isinstance(content, dict) and key in content: yield key, content[key]


def read_portions(path: str | Path, keys: list[str]) -> Iterator[tuple[str, Any]]:
  """As `read_whole`, but in the order of the file, and a list comes in portions, the first of which may be empty."""
  with open(path, "rb") as file:
    text, seen = _Text(file), set()
    text.step("{")
    while text.peek() != "}":
      if seen: text.step(",")
      if text.peek() != '"': raise text.error("Expecting property name enclosed in double quotes")
      if (key := text.value()) in seen: raise ValueError(TWICE)
      seen.add(key)
      text.step(":")
      if key not in keys or text.peek() != "[":
        value = text.value()
        if key in keys: yield key, value
      else: yield from ((key, rows) for rows in text.portions())
    text.step("}")
    if text.peek(): raise text.error("Extra data")


class _Text:
  """The text of a file from where it has been read to."""
  def __init__(self, file: BinaryIO):
    self.file, self.decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
    self.scan = json.JSONDecoder(object_pairs_hook=_unique).scan_once
    self.text, self.at, self.ended, self.passed = "", 0, False, 0   # passed: characters before `text`

  def more(self) -> None:
    """Read on; at least twice what is there, so that a long value is not tried again and again."""
    begun = self.file.tell() - len(self.decoder.getstate()[0])
    block = self.file.read(max(BLOCK, len(self.text) - self.at))
    self.ended = not block
    self.passed += self.at
    try: self.text, self.at = self.text[self.at:] + self.decoder.decode(block, self.ended), 0
    except UnicodeDecodeError as e:
      e.start += begun
      raise

  def peek(self) -> str:
    """The next character that is no white space; "" at the end."""
    while True:
      self.at = SPACE.match(self.text, self.at).end()
      if self.at < len(self.text) or self.ended: return self.text[self.at:self.at + 1]
      self.more()

  def step(self, character: str) -> None:
    if self.peek() != character: raise self.error(f"Expecting '{character}' delimiter")
    self.at += 1

  def value(self) -> Any:
    """The value that begins here."""
    self.peek()
    while True:
      try: value, end = self.scan(self.text, self.at)
      except StopIteration as e: message, position = "Expecting value", e.value
      except json.JSONDecodeError as e: message, position = e.msg, e.pos
      else:
        if end < len(self.text) or self.ended:   # else a number may go on
          self.at = end
          return value
        self.more()
        continue
      if self.ended or not (position > len(self.text) - NEAR or message.startswith("Unterminated string")): raise self.error(message, position)
      self.more()

  def portions(self) -> Iterator[list]:
    """The list that begins here."""
    self.step("[")
    if self.peek() == "]": yield []
    while self.peek() != "]":
      rows = [self.value()]
      if self.peek() == ",": rows += self.rows_at_once()
      while len(rows) < PORTION and self.peek() == ",":
        self.step(",")
        rows.append(self.value())
      yield rows
      if self.peek() == ",":
        self.step(",")
        if self.peek() == "]": raise self.error("Expecting value")
      elif self.peek() != "]": raise self.error("Expecting ',' delimiter")
    self.step("]")

  def rows_at_once(self) -> list:
    """Rows that follow here in what has been read, by one call of the parser, which is much faster; none where that fails."""
    ends = [match.start() + 1 for match in ROW_END.finditer(self.text, max(self.at, len(self.text) - TAIL))]
    if not ends: return []
    # Were the end that is guessed inside of a row, a bracket or a quote would be open, and nothing returned. The list may end before it.
    try: rows, end = self.scan(f"[{self.text[self.at + 1:ends[-1]]}]", 0)
    except (StopIteration, json.JSONDecodeError): return []
    self.at += end - 1
    return rows

  def error(self, message: str, position: int | None = None) -> ValueError:
    return ValueError(f"{message}: character {self.passed + (self.at if position is None else position):,}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if len(fields := dict(pairs)) != len(pairs): raise ValueError(TWICE)
  return fields
