"""The README's settings are the program's."""
import dataclasses, importlib.util, re
from pathlib import Path
from tinydet.config import variable

ROOT = Path(__file__).parent.parent


def settings_of(program):
  """Flag -> environment variable."""
  spec = importlib.util.spec_from_file_location(program, ROOT / "examples" / f"{program}.py")
  spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
  return {"--" + field.name.replace("_", "-"): variable(field) for field in dataclasses.fields(module.Config)}


def test_every_setting_is_in_the_readme_and_none_is_invented():
  settings = settings_of("train_retinanet")
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  assert dict(re.findall(r"^\| `(--[a-z-]+)` \| `([A-Z_]+)` \|", readme, re.M)) == settings
  flags = settings.keys() | {"--preset", "--help", "--compare", "--subset"}
  for program in ("train_yolo", "train_classifier", "evaluate", "export_weights", "detect", "explain"): flags |= settings_of(program).keys()
  assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) <= flags


def test_every_file_that_the_readme_names_exists():
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  for name in re.findall(r"\]\(((?!http)[^)#]+)\)", readme) + re.findall(r"(?:examples|extra|test|docs)/[\w./-]*\w", readme):
    assert (ROOT / name).exists(), name
