from pathlib import Path
from setuptools import setup

DISTRIBUTED = ["mpi4py>=4.1; sys_platform != 'win32'", "mpich>=4.3; sys_platform != 'win32'"]
ONNX = ["onnx>=1.17", "onnxruntime>=1.20"]
MLPERF = ["mlperf-logging>=4.1.68"]
NOTEBOOK = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]

setup(
  name="tinydet",
  version="0.1.0",
  description="Train and run single-stage object detectors in tinygrad",
  long_description=(Path(__file__).parent/"README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="MIT",
  # The folder is called as tinygrad's own, extra/; the package is not, or the two would hide each other.
  packages=["tinydet", *(f"tinydet.{folder.parent.name}" for folder in sorted((Path(__file__).parent/"extra").glob("*/__init__.py"))),
            "tinydet.programs"],
  package_dir={"tinydet": "extra", "tinydet.programs": "examples"},
  package_data={"tinydet": ["*.c"], "tinydet.models": ["*.safetensors"], "tinydet.reporting": ["*.jinja"]},
  entry_points={"console_scripts": ["tinydet = tinydet.commands:main"]},
  python_requires=">=3.11",
  # ziglang is the clang that tinygrad's CPU device needs, for every platform; see extra/runtime/device.py
  install_requires=["tinygrad>=0.14,<0.15", "numpy>=1.26", "pycocotools>=2.0.7", "wandb>=0.31.0", "Pillow>=10.1", "PyYAML>=6",
                    "requests>=2.32", "urllib3>=2",   # many small files at once; wandb brings them anyway, 2 tells when one broke off
                    "matplotlib>=3.8", "Jinja2>=3.1",   # the page about a run
                    "ziglang>=0.13.0; sys_platform != 'win32'"],
  extras_require={# several processes and machines: mpich has mpirun, and needs nothing of the system
                  "distributed": DISTRIBUTED,
                  "video": ["av>=15.1"],
                  # opens reports in the system's Chromium, where there is one (test/test_report.py)
                  "browser": ["playwright>=1.50"],
                  "mlperf": MLPERF,   # --mlperf-log
                  "onnx": ONNX,   # examples/export.py
                  # runs examples/retinanet.ipynb; any editor or Jupyter shows it
                  "notebook": NOTEBOOK,
                  "test": ["pytest>=8", "pytest-xdist>=3.8", "hypothesis>=6.100", "ruff>=0.9", "import-linter>=2.5", "av>=15.1",
                           *MLPERF, *NOTEBOOK, *ONNX, *DISTRIBUTED],
                  # torchvision as the oracle of test/test_torch_*.py and the peer of examples/bench_retinanet.py --torch; nothing else imports it
                  "torch": ["torch==2.13.0", "torchvision==0.28.0"]},
)
