"""The former name of train_classifier.py, with its settings and what it does."""
import runpy
from pathlib import Path

globals().update(runpy.run_path(str(Path(__file__).with_name("train_classifier.py")), run_name=__name__))
