"""What this package changes in tinygrad, done when tinygrad is imported: importing the package itself imports nothing, and sets no variables."""
import functools, os, sys, threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from tinydet.errors import UserError


def change_tinygrad() -> None:
  """Let tinygrad open its devices sooner, and compile with our clang, our processes and our loops, and in any thread, from now on or from when it is
  imported."""
  _when_imported("tinygrad.helpers", _helpers)
  _when_imported("tinygrad.device", _devices)
  _when_imported("tinygrad.runtime.ops_cpu", _cpu)
  _when_imported("tinygrad.runtime.support.compiler_cpu", _clang)
  _when_imported("tinygrad.codegen.opt.heuristic", _heuristic)
  _when_imported("tinygrad.tensor", _questions)
  for user in ("tinygrad.engine.worker", "tinygrad.engine.realize", "tinygrad.codegen.opt.search"): _when_imported(user, _workers)


def _helpers(module: ModuleType) -> None:
  _cache_of_threads(module)
  _variables(module)


def _devices(module: ModuleType) -> None:
  from tinydet.runtime import opening
  opening.use_in_devices(module)


def _cpu(module: ModuleType) -> None:
  from tinydet.runtime import opening
  opening.use_in_cpu(module)


def _clang(module: ModuleType) -> None:
  from tinydet.runtime import clang
  clang.use_in(module)


def _heuristic(module: ModuleType) -> None:
  from tinydet.runtime import unrolling
  unrolling.use_in(module)


def _questions(module: ModuleType) -> None:
  from tinydet.runtime import hazards, views
  hazards.use()
  views.use()


def _workers(module: ModuleType) -> None:
  from tinydet.runtime import workers
  workers.use_in(module)


def _cache_of_threads(module: ModuleType) -> None:
  """A connection to tinygrad's cache of kernels for each thread: sqlite's may not be used in another than the one that opened it."""
  if not hasattr(module, "db_connection") or not hasattr(module, "_db_connection") or not hasattr(module, "CACHEDB"): return
  connect, connections, lock = module.db_connection, threading.local(), threading.Lock()
  def db_connection() -> Any:
    mine = vars(connections)
    if (file := module.CACHEDB) not in mine:
      with lock:
        module._db_connection = None
        mine[file] = connect()
    return mine[file]
  module.db_connection = db_connection


def _variables(module: ModuleType) -> None:
  """A variable of tinygrad's that is to be a number, and is none, is named."""
  read = module.getenv
  @functools.wraps(read)
  def getenv(key: str, default: Any = 0) -> Any:
    try: return read(key, default)
    except ValueError as e: raise UserError(_no_number(key)) from e
  module.getenv = getenv


def _no_number(key: str) -> str: return f"{key}={os.environ[key]}: this variable of tinygrad's is a number, such as {key}=1; mend or unset it"


def _when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
  """Call `change` with the module `name`: at once if it is imported, else right after it will be. One change a module: of two, one is not called."""
  if (module := sys.modules.get(name)) is not None: change(module)
  else: sys.meta_path.insert(0, SimpleNamespace(find_spec=functools.partial(_spec, name, change)))


def _spec(wanted: str, change: Callable[[ModuleType], None], name: str, path: Any = None, target: Any = None) -> Any:
  """The module's own, whose loader calls `change` at the end."""
  if name != wanted: return None
  others = [finder for finder in sys.meta_path if getattr(getattr(finder, "find_spec", None), "func", None) is not _spec]
  spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
  if spec is None or spec.loader is None: return None
  execute = spec.loader.exec_module
  def exec_module(module: ModuleType) -> None:
    try: execute(module)
    except ValueError as e:
      # a program's first import: nobody is there yet to catch a UserError
      keys = [key for key, value in os.environ.items() if str(e).endswith(f": {value!r}")]
      if not keys or name != "tinygrad.helpers": raise
      print(f"error: {_no_number(sorted(keys)[0])}", file=sys.stderr)
      raise SystemExit(2) from e
    change(module)
  spec.loader.exec_module = exec_module
  return spec
