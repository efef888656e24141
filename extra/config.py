"""Configuration: one dataclass at the top of a program; every field is a flag, an environment variable and a line of `--help`."""
import contextlib, dataclasses, difflib, json, math, re, sys, textwrap, types, typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from tinydet.errors import UserError

Config = TypeVar("Config")
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
PREFIX = "TINYDET_"
DEVICE = "this device"   # the source of settings that a program chooses by the device
BARE = ("bs", "epochs", "lr", "seed", "gpus", "wandb")   # whose variables have no prefix: tinygrad's own examples read them


def option(default: Any, help: str, *, choices: Sequence | None = None, minimum: float | None = None, maximum: float | None = None,
           parse: Callable[[str], Any] | None = None, show: Callable[[Any], str] | None = None, env: str | None = None,
           group: str = "options") -> Any:
  """Declare a configuration field: `bs: int = option(16, "images a step", minimum=1)`.

  choices, minimum and maximum (both inclusive) bound the value wherever it comes from. parse turns the text of a flag or variable into the value and
  raises ValueError with what it accepts; without it the field's type decides: int, float, str, bool, or one of them `| None`, written "none".
  A float must be finite; `parse=float` lifts that. show turns the value back into its text, for `--help` and logs. env is its environment variable
  where that is not what `variable` makes of its name. group is its heading in `--help`.
  """
  about = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "parse": parse, "show": show, "env": env, "group": group}
  return dataclasses.field(default=default, metadata=about)


def new_file(text: str) -> str:
  """Parse the name of a file that is written at the end; ValueError where its folder is not there."""
  if not Path(text).absolute().parent.is_dir(): raise ValueError("its folder does not exist")
  return text


def size(text: str) -> tuple[int, int]:
  """Parse "800" or "192x144" (width x height, pixels) into (width, height); ValueError otherwise. For `option(parse=size, show=show_size)`."""
  match = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text.strip().lower())
  if match is None: raise ValueError("expected pixels such as 800 or 192x144 (width x height)")
  return int(match[1]), int(match[2] or match[1])


def show_size(value: tuple[int, int]) -> str:
  """Write (width, height) the way `size` reads it."""
  return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"


def show_input(size: tuple[int, int], max_size: int) -> str:
  """The size that a network sees pictures at, in words: `size` (width, height), or with `max_size` the shorter side and the longer one at most."""
  return f"{min(size)} to {max_size} pixels" if max_size else f"{size[0]}x{size[1]}"


def parse(config_class: type[Config], presets: Mapping[str, Mapping[str, Any]], argv: Sequence[str], environ: Mapping[str, str],
          default_preset: str | None = None, kept: Mapping[str, Any] | None = None) -> Config:
  """Fill config_class, a dataclass of `option`s, from a flag, else the environment, else the preset, else the default.

  A field `trainable_layers` is the flag `--trainable-layers N` (or `=N`) and a variable (see `variable`); a bool `ema` is `--ema`, `--no-ema` and
  TINYDET_EMA=1 or 0. `--preset NAME` or TINYDET_PRESET picks one of presets (name -> field -> value). An empty variable counts as unset; the last of
  a repeated flag wins; `--help` prints and exits. argv is without the program's name. `kept`, what `recall` read of a run that goes on, takes the
  place of the preset: one that is named again must be the one of then. The result also carries `preset` (name or None) and `sources` (field -> the
  flag or variable that set it, "preset NAME", "the run" or "default"). UserError names the flag or variable and what it accepts.
  """
  fields = {f.name: f for f in dataclasses.fields(config_class)}
  kinds = {name: _kind(hint) for name, hint in typing.get_type_hints(config_class).items() if name in fields}
  for values in presets.values():
    for name, value in values.items(): _check(fields[name], value)

  flags = _flags(argv, kinds)
  if "help" in flags:
    print(_help(config_class, fields, kinds, presets, default_preset))
    sys.exit(0)
  variables = {"preset": f"{PREFIX}PRESET"} | {name: variable(field) for name, field in fields.items()}
  given = {name: (f"{key}={environ[key]}", key, environ[key]) for name, key in variables.items() if environ.get(key)} | flags

  preset = default_preset
  if "preset" in given:
    where, _, preset = given.pop("preset")
    if preset not in presets: raise UserError(f"{where}: no such preset; choose from {', '.join(presets) or 'none: this program has no presets'}")
    began = (kept or {}).get("preset", preset)
    if preset != began and began in presets:
      raise UserError(f"{where}: the run that is resumed was begun with --preset {began}; leave it out, or choose another --run-name")
  values, preset = (dict(presets[preset]) if preset else {}, preset) if kept is None else (dict(kept), kept.get("preset"))
  values.pop("preset", None)
  sources = {name: ("the run" if kept is not None else f"preset {preset}") if name in values else "default" for name in fields}
  for name, (where, source, text) in given.items():
    try: _check(fields[name], value := _convert(fields[name], kinds[name], text))
    except ValueError as e: raise UserError(f"{where}: {e}") from None
    values[name], sources[name] = value, source
  config = config_class(**values)
  object.__setattr__(config, "preset", preset)
  object.__setattr__(config, "sources", sources)
  return config


def is_free(config: Any, name: str) -> bool:
  """Whether the user left a setting to the program."""
  source = config.sources.get(name, "default")
  return source in ("default", DEVICE) or source.startswith("preset ")


def set_free(config: Any, settings: Mapping[str, Any], source: str) -> None:
  """Set those of `settings` that the user left to the program, on behalf of `source`."""
  for name, value in settings.items():
    if is_free(config, name):
      setattr(config, name, value)
      config.sources[name] = source


def variable(field: dataclasses.Field) -> str:
  """The environment variable of an `option`: its name in capitals after TINYDET_, so that no other program's variable is taken for a setting; the few
  that tinygrad's own examples read have no prefix."""
  return field.metadata.get("env") or ("" if field.name in BARE else PREFIX) + field.name.upper()


@contextlib.contextmanager
def named_sources(config: Any) -> Iterator[None]:
  """A UserError from inside whose message names a flag that nobody typed, its value having come from a variable, says which."""
  try: yield
  except UserError as e:
    message = str(e)
    for field in dataclasses.fields(config):
      source, flag = config.sources.get(field.name, ""), "--" + field.name.replace("_", "-")
      value = _show(field, getattr(config, field.name))
      named = re.search(rf"{flag}(?![\w-])", message) or (isinstance(getattr(config, field.name), str) and message.startswith(f"{value}: "))
      if source == variable(field) and named and source not in message: message += f" ({flag} comes from the variable {source})"
    if message == str(e): raise
    raise UserError(message) from e


def differences(before: Mapping[str, Any], config: Any) -> str:
  """"lr=0.5 (was 0.003) ...": the settings of `config` that differ from those that `recall` read."""
  fields = {f.name: f for f in dataclasses.fields(config)}
  changed = [(f, before[name]) for name, f in fields.items() if name in before and before[name] != getattr(config, name)]
  return " ".join(f"{f.name}={_show(f, getattr(config, f.name))} (was {_show(f, old)})" for f, old in changed if f.name not in ("resume", "out"))


def as_dict(config: Any) -> dict[str, Any]:
  """The configuration as JSON values: field -> value (tuples become lists, other objects their text), and "preset" where one was used."""
  def plain(value):
    if isinstance(value, (list, tuple)): return [plain(v) for v in value]
    if isinstance(value, dict): return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value): return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
  preset = getattr(config, "preset", None)
  return ({"preset": preset} if preset else {}) | {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def split_words(argv: list[str], switches: tuple[str, ...] = ()) -> tuple[tuple[str, ...], list[str]]:
  """The words of a command line that belong to no flag, and the rest; `switches` are the flags that take no value, beside --help."""
  free, flags, rest = [], [], list(argv)
  while rest:
    if not (word := rest.pop(0)).startswith("-"): free.append(word)
    else:
      takes_value = word not in ("-h", "--help", *switches) and "=" not in word and rest and not rest[0].startswith("--")
      flags += [word] + ([rest.pop(0)] if takes_value else [])
  return tuple(free), flags


def recall(config_class: type[Config], file: str | Path) -> dict[str, Any]:
  """What `as_dict` wrote to the JSON `file`, for `parse`, less fields that the class no longer has. UserError if it cannot be read, or was edited
  into what no setting can be."""
  try: values = json.loads(Path(file).read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as e: raise UserError(f"{file}: cannot be read as a configuration ({e})") from None
  if not isinstance(values, dict): raise UserError(f"{file}: cannot be read as a configuration: it is no JSON object")
  fields, kinds = {f.name: f for f in dataclasses.fields(config_class)}, typing.get_type_hints(config_class)
  kept = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in fields}
  for name, value in kept.items():
    (kind, optional), field = _kind(kinds[name]), fields[name]
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) if kind is float else isinstance(value, kind) and (
      kind is bool or not isinstance(value, bool))
    if not (fits or (value is None and optional)): raise UserError(f"{file}: {name}: {value!r} is not what --{name.replace('_', '-')} can be")
    try:
      if kind is tuple and value and field.metadata.get("parse") is not None: _convert(field, (kind, optional), _show(field, value))
      _check(field, value)
    except (ValueError, TypeError) as e: raise UserError(f"{file}: {name}: {value!r}: {e}") from None
  preset = values.get("preset")
  return kept | ({"preset": preset} if isinstance(preset, str) else {})


def describe(config: Any) -> str:
  """One line, "bs=16 (BS) lr=0.01 (--lr) ...": every field that something other than its default set, and what set it."""
  sources = config.sources
  return " ".join(f"{f.name}={_show(f, getattr(config, f.name))} ({sources[f.name]})"
                  for f in dataclasses.fields(config) if sources[f.name] != "default")


def _kind(hint: Any) -> tuple[type, bool]:
  """A field's type and whether it may be None."""
  arms = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
  plain = [arm for arm in arms if arm is not types.NoneType]
  return typing.get_origin(plain[0]) or plain[0], len(plain) < len(arms)


def _flags(argv: Sequence[str], kinds: dict[str, tuple[type, bool]]) -> dict[str, tuple[str, str, str]]:
  """Flags as field -> (what the user typed, flag, text)."""
  known = {"--" + name.replace("_", "-"): name for name in [*kinds, "preset", "help"]}
  negative = {"--no-" + name.replace("_", "-"): name for name, (kind, _) in kinds.items() if kind is bool}
  found: dict[str, tuple[str, str, str]] = {}
  rest = list(argv)
  while rest:
    flag, equals, text = (arg := rest.pop(0)).partition("=")
    name = "help" if flag == "-h" else negative.get(flag, known.get(flag))
    if name is None:
      word = "--" + flag.lstrip("-").lower().replace("_", "-")
      close = difflib.get_close_matches(word, [*known, *negative], 1)
      raise UserError(f"{arg}: no such {'flag' if arg.startswith('-') else 'argument'}; " +
                      (f"did you mean {close[0]}? " if close else "") + "--help lists them all")
    switch = name == "help" or (name in kinds and kinds[name][0] is bool)
    if switch and equals and flag in negative: raise UserError(f"{arg}: {flag} takes no value")
    if not switch and not equals:
      if not rest or rest[0].startswith("--"): raise UserError(f"{flag}: needs a value, for example {flag} {'NAME' if name == 'preset' else 'VALUE'}")
      text = rest.pop(0)
    elif switch and not equals: text = "0" if flag in negative else "1"
    found[name] = (arg if equals or switch else f"{flag} {text}", flag, text)
  return found


def _convert(field: dataclasses.Field, kind: tuple[type, bool], text: str) -> Any:
  """The value that text stands for; ValueError says what is accepted."""
  (plain, optional), word = kind, text.strip().lower()
  if optional and word == "none": return None
  if (custom := field.metadata.get("parse")) is not None: return custom(text)
  expected = f"expected {_accepted(field, kind)}"
  if plain is bool:
    if word not in TRUE + FALSE: raise ValueError("expected 1 or 0")
    return word in TRUE
  if plain is int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", word): raise ValueError(expected)
    return int(word)
  if plain is float:
    try: value = float(word)
    except ValueError: raise ValueError(expected) from None
    if not math.isfinite(value): raise ValueError(expected)
    return value
  if plain is str: return text
  raise TypeError(f"field {field.name} of type {plain.__name__} needs option(parse=...)")


def _check(field: dataclasses.Field, value: Any) -> None:
  """ValueError where value is outside the field's choices or range."""
  choices, low, high = (field.metadata.get(key) for key in ("choices", "minimum", "maximum"))
  if value is None: return
  if (choices is not None and value not in choices) or (low is not None and not value >= low) or (high is not None and not value <= high):
    raise ValueError(f"expected {_accepted(field, (type(value), False))}")


def _accepted(field: dataclasses.Field, kind: tuple[type, bool]) -> str:
  """What a field takes, in words: "a whole number, at least 1"."""
  choices, low, high = (field.metadata.get(key) for key in ("choices", "minimum", "maximum"))
  if choices is not None: words = "one of " + ", ".join(_show(field, c) for c in choices)
  else: words = {int: "a whole number", float: "a finite number", str: "text", bool: "1 or 0"}.get(kind[0], "a value")
  if low is not None and high is not None: words += f" from {low:g} to {high:g}"
  elif low is not None: words += f", at least {low:g}"
  elif high is not None: words += f", at most {high:g}"
  return words + (", or none" if kind[1] else "")


def _show(field: dataclasses.Field, value: Any) -> str:
  """A value as the text that would set it."""
  if value is None: return "none"
  if (show := field.metadata.get("show")) is not None: return show(value)
  return str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _help(config_class: type, fields: dict[str, dataclasses.Field], kinds: dict, presets: Mapping, default_preset: str | None) -> str:
  """The text of `--help`: every field with its flag, variable, range, default and presets, by group."""
  doc = config_class.__doc__ or ""
  lines = ([] if not doc or doc.startswith(f"{config_class.__name__}(") else [textwrap.dedent(doc).strip(), ""])
  lines += ["Each setting comes from its flag, else its environment variable (in brackets), else the preset, else the default."]
  if presets: lines += ["", f"  --preset NAME ({PREFIX}PRESET)   {', '.join(presets)}" + (f"; default {default_preset}" if default_preset else "")]
  shared = {f.metadata.get("group") for base in config_class.__bases__ if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
  ordered = sorted(fields.values(), key=lambda f: f.metadata.get("group") in shared)   # what a program adds comes first
  for group in dict.fromkeys(f.metadata.get("group", "options") for f in ordered):
    lines += ["", group]
    for field in (f for f in ordered if f.metadata.get("group", "options") == group):
      (plain, _), flag = kinds[field.name], field.name.replace("_", "-")
      value = {int: " N", float: " X", bool: "", str: " TEXT"}.get(plain, " VALUE")
      lines += [f"  --{flag}{value}" + (f", --no-{flag}" if plain is bool else "") + f" ({variable(field)})"]
      bounded = any(field.metadata.get(key) is not None for key in ("choices", "minimum", "maximum"))
      text = field.metadata.get("help", "") + (f"; {_accepted(field, kinds[field.name])}" if bounded else "")
      usual = f"default {_show(field, field.default)}" + "".join(f"; {name} {_show(field, values[field.name])}"
                                                                 for name, values in presets.items() if field.name in values)
      lines += textwrap.wrap(f"{text} [{usual}]", 110, initial_indent=" " * 6, subsequent_indent=" " * 6, break_long_words=False)
  return "\n".join(lines)
