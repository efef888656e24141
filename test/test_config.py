import dataclasses, json
import pytest
from hypothesis import given, strategies as st
from tinydet.errors import UserError
from tinydet.config import as_dict, describe, option, parse, show_size, size, variable
from tinydet.training.trainer import TrainerConfig


@dataclasses.dataclass
class Config:
  """Train a thing."""
  bs: int = option(16, "images a step", minimum=1, maximum=4096, group="training")
  lr: float = option(0.01, "learning rate", minimum=0, group="training")
  trainable_layers: int = option(3, "unfrozen stages", minimum=0, maximum=5, group="model")
  ema: bool = option(False, "average the weights")
  data: str = option("shapes:2", "data set")
  size: tuple = option((128, 128), "network input", parse=size, show=show_size)
  dtype: str = option("float32", "compute type", choices=("float32", "float16"))
  depth: int = option(18, "layers of the backbone", choices=(18, 50))
  target: float | None = option(None, "stop at this mAP", maximum=1)
  group: str | None = option(None, "runs it belongs to", env="WANDB_RUN_GROUP")


PRESETS = {"tiny": {"bs": 4, "ema": True, "size": (64, 48)}, "full": {"bs": 32, "target": 0.35}}


def run(*argv, preset="tiny", **environ): return parse(Config, PRESETS, argv, environ, preset)


def test_flag_beats_environment_beats_preset_beats_default():
  config = run("--bs", "9", BS="7", TINYDET_TRAINABLE_LAYERS="5")
  assert (config.bs, config.trainable_layers, config.ema, config.lr) == (9, 5, True, 0.01)
  assert [config.sources[n] for n in ("bs", "trainable_layers", "ema", "lr")] == ["--bs", "TINYDET_TRAINABLE_LAYERS", "preset tiny", "default"]
  assert describe(config) == "bs=9 (--bs) trainable_layers=5 (TINYDET_TRAINABLE_LAYERS) ema=1 (preset tiny) size=64x48 (preset tiny)"
  assert run(BS="7").bs == 7 and run().bs == 4 and run(preset=None).bs == 16


@given(st.booleans(), st.booleans(), st.sampled_from([None, "tiny", "full"]), st.integers(1, 4096), st.integers(1, 4096))
def test_precedence_in_every_combination(flag, variable, preset, a, b):
  config = run(*(["--bs", str(a)] if flag else []), preset=preset, **({"BS": str(b)} if variable else {}))
  assert config.bs == (a if flag else b if variable else PRESETS[preset]["bs"] if preset else 16)


@given(st.floats(0, allow_infinity=False))
def test_any_finite_float_survives_its_text(x): assert run("--lr", repr(x)).lr == x


def test_preset_from_flag_and_environment():
  assert run(TINYDET_PRESET="full").bs == 32
  assert run("--preset=tiny", TINYDET_PRESET="full").preset == "tiny"
  with pytest.raises(UserError, match=r"--preset huge: no such preset; choose from tiny, full"): run("--preset", "huge")
  with pytest.raises(UserError, match=r"TINYDET_PRESET=huge: "): run(TINYDET_PRESET="huge")


@pytest.mark.parametrize("argv, environ, expected", [
  (["--ema"], {}, True), (["--no-ema"], {}, False), (["--ema=0"], {}, False), ([], {"TINYDET_EMA": "1"}, True), ([], {"TINYDET_EMA": "0"}, False),
  (["--no-ema"], {"TINYDET_EMA": "1"}, False), (["--ema", "--no-ema"], {}, False), ([], {"TINYDET_EMA": "off"}, False),
  ([], {"TINYDET_EMA": ""}, True)])
def test_switches(argv, environ, expected): assert run(*argv, **environ).ema is expected


def test_forms_of_a_flag():
  assert run("--bs=8").bs == 8 and run("--bs", "8", "--bs=6").bs == 6
  assert run("--size", "192x144").size == (192, 144) and run("--size", "800").size == (800, 800)
  assert run("--target", "0.5").target == 0.5 and run("--target", "none", preset="full").target is None
  assert run("--depth", "50").depth == 50
  assert run("--data", "a=b").data == "a=b" and run("--data=").data == ""


def test_a_variable_of_another_name():
  config = run(WANDB_RUN_GROUP="rates", GROUP="staff")
  assert config.group == "rates" and config.sources["group"] == "WANDB_RUN_GROUP" and run("--group", "a", WANDB_RUN_GROUP="b").group == "a"
  assert run(GROUP="staff").group is None and run(GROUP="staff").sources["group"] == "default", "tcsh exports it"
  with pytest.raises(UserError, match=r"^WANDB_TAGS=a{65}: expected words with commas"): parse(TrainerConfig, {}, [], {"WANDB_TAGS": "a" * 65})
  trainer = parse(TrainerConfig, {}, [], {"WANDB_TAGS": "baseline, sgd", "WANDB_RUN_GROUP": "rates", "TAGS": "ctags", "GROUP": "staff"})
  assert (trainer.tags, trainer.group) == (("baseline", "sgd"), "rates")


def test_empty_variables_are_unset_and_strangers_are_ignored():
  config = run(BS="", BEAM="2", DEBUG="x", bs="9", TINYDET_PRESET="", SIZE="x86_64-conda-linux-gnu-size", DEPTH="1", DATA="/data", EMA="x")
  assert config.bs == 4 and config.sources["bs"] == "preset tiny" and config.size == (64, 48), "conda's compilers set SIZE"
  assert "default" == config.sources["depth"] == config.sources["data"]


@pytest.mark.parametrize("argv, environ, words", [
  (["--bs", "many"], {}, ["--bs many", "a whole number from 1 to 4096"]),
  (["--bs", "1.5"], {}, ["--bs 1.5", "a whole number"]),
  (["--bs=0"], {}, ["--bs=0", "from 1 to 4096"]),
  ([], {"BS": "5000"}, ["BS=5000", "from 1 to 4096"]),
  ([], {"BS": "١٢"}, ["BS=", "a whole number"]),
  ([], {"LR": "-1"}, ["LR=-1", "at least 0"]),
  (["--lr", "-1"], {}, ["--lr -1", "at least 0"]),
  ([], {"LR": "nan"}, ["LR=nan", "a finite number"]),
  (["--lr", "inf"], {}, ["--lr inf", "a finite number"]),
  (["--lr", "1e999"], {}, ["--lr 1e999", "a finite number"]),
  (["--dtype", "int8"], {}, ["--dtype int8", "one of float32, float16"]),
  ([], {"TINYDET_DEPTH": "19"}, ["TINYDET_DEPTH=19", "one of 18, 50"]),
  (["--size", "0x9"], {}, ["--size 0x9", "192x144"]),
  ([], {"TINYDET_EMA": "maybe"}, ["TINYDET_EMA=maybe", "1 or 0"]),
  (["--target", "2"], {}, ["--target 2", "at most 1"]),
  (["--bs"], {}, ["--bs: needs a value"]),
  (["--bs", "--ema"], {}, ["--bs: needs a value"]),
  (["--no-ema=1"], {}, ["--no-ema takes no value"]),
  (["--trainable-layer", "3"], {}, ["--trainable-layer: no such flag", "did you mean --trainable-layers?"]),
  (["--trainable_layers=3"], {}, ["did you mean --trainable-layers?"]),
  (["BS=16"], {}, ["BS=16: no such argument", "did you mean --bs?"]),
  (["--no-bs"], {}, ["--no-bs: no such flag"]),
])
def test_bad_input_is_named_with_what_is_accepted(argv, environ, words):
  with pytest.raises(UserError) as error: run(*argv, **environ)
  assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


def test_a_preset_is_checked_like_input():
  with pytest.raises(ValueError, match="from 1 to 4096"): parse(Config, {"bad": {"bs": 0}}, [], {}, None)
  with pytest.raises(KeyError): parse(Config, {"bad": {"batch": 1}}, [], {}, None)


def test_help_shows_every_field(capsys):
  with pytest.raises(SystemExit) as stop: run("--bs", "3", "--help")
  text = " ".join(capsys.readouterr().out.split())
  assert not stop.value.code and "Train a thing." in text
  for field in dataclasses.fields(Config): assert f"--{field.name.replace('_', '-')}" in text and f"({variable(field)})" in text
  assert "--lr X (LR) learning rate" in text and "--group TEXT (WANDB_RUN_GROUP) runs it belongs to" in text
  assert "[default 16; tiny 4; full 32]" in text and "[default 128; tiny 64x48]" in text and "one of float32, float16" in text
  assert "--preset NAME (TINYDET_PRESET) tiny, full; default tiny" in text


def test_as_dict_is_strict_json():
  config = run("--size", "5x6", TINYDET_PRESET="full")
  expected = {"preset": "full", "bs": 32, "lr": 0.01, "trainable_layers": 3, "ema": False, "data": "shapes:2", "size": [5, 6], "dtype": "float32",
              "depth": 18, "target": 0.35, "group": None}
  assert json.loads(json.dumps(as_dict(config), allow_nan=False)) == expected
