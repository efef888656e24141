"""The command `tinydet`: the programs of `examples/`, each under a short name."""
import runpy, sys
from pathlib import Path
from tinydet.errors import UserError, exit_on_user_error

PROGRAMS = {"train": "train_retinanet.py", "train-yolo": "train_yolo.py", "train-fcos": "train_fcos.py", "train-classifier": "train_classifier.py",
            "detect": "detect.py", "evaluate": "evaluate.py", "explain": "explain.py", "export": "export.py"}
MODULES = {"check": "tinydet.datasets.check", "report": "tinydet.reporting.report", "download": "tinydet.datasets.download"}


def main() -> None:
  """Run the program that the first word names, with the rest of the command line; exit code 2 for a word that names none."""
  with exit_on_user_error():
    name, sys.argv = (sys.argv[1:2] or ["--help"])[0], sys.argv[1:]
    if name in ("-h", "--help"):
      print(f"tinydet {'|'.join([*PROGRAMS, *MODULES])} ...; --help after any of them has its settings")
    elif name in MODULES: runpy.run_module(MODULES[name], run_name="__main__", alter_sys=True)
    elif name in PROGRAMS: runpy.run_path(str(program(PROGRAMS[name])), run_name="__main__")
    else: raise UserError(f"tinydet {name}: no such command; choose from {', '.join([*PROGRAMS, *MODULES])}")


def program(file: str) -> Path:
  """Where a program of `examples/` lies: inside the package where that was built as a wheel, else beside it."""
  here = Path(__file__).parent
  return next((path for path in (here/"programs"/file, here.parent/"examples"/file) if path.is_file()), here/"programs"/file)
