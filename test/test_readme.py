"""The README's settings are the program's."""
import dataclasses, importlib.util, re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_setting_is_in_the_readme_and_none_is_invented():
  spec = importlib.util.spec_from_file_location("train_retinanet", ROOT / "examples/train_retinanet.py")
  spec.loader.exec_module(program := importlib.util.module_from_spec(spec))
  flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(program.Config)}
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  assert {match[1] for match in re.finditer(r"^\| `(--[a-z-]+)` \|", readme, re.M)} == flags
  assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) <= flags | {"--preset", "--help"}


def test_every_file_that_the_readme_names_exists():
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  for name in re.findall(r"\]\(((?!http)[^)#]+)\)", readme) + re.findall(r"(?:examples|extra|test|docs)/[\w./-]*\w", readme):
    assert (ROOT / name).exists(), name
