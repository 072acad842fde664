"""What a run is: the order of strength, every refusal by name, and nothing but ValueError whatever is typed."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.config import TrainConfig, build, coerce, field_types, read_file
from unlearn.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
BASE = {"model": "m", "output": "o", "method": "npo", "lr": 1e-5, "epochs": 2, "batch_size": 4, "seed": 0}


def built(**overrides):
    return build(recipe=None, file_values=BASE, overrides=overrides)


def test_recipe_then_file_then_command_line():
    file_values = {"recipe": "tofu-npo-rt", "model": "m", "output": "o", "retain": "r", "epochs": 3, "lr": 2e-5}
    config = build(recipe=None, file_values=file_values, overrides={"lr": 3e-5})
    assert (config.lr, config.epochs, config.batch_size) == (3e-5, 3, 32)
    assert config.recipe == "tofu-npo-rt"
    config = build(recipe=None, file_values=file_values, overrides={"recipe": "tofu-altpo"})
    assert (config.method, config.lr, config.epochs, config.batch_size) == ("altpo", 2e-5, 3, 35)
    config = build(recipe="tofu-npo", file_values={"model": "m", "output": "o"}, overrides={})
    assert (config.method, config.recipe) == ("npo", "tofu-npo")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name):
    retain = {"retain": "r"} if RECIPES[name].values.get("retain_term", "none") != "none" else {}
    config = build(recipe=name, file_values={}, overrides={"model": "m", "output": "o"} | retain)
    assert {key: getattr(config, key) for key in RECIPES[name].values} == dict(RECIPES[name].values)


def test_unknown_recipe():
    for wrong in ("tofu", ""):
        with pytest.raises(ValueError, match=f"^recipe: '{wrong}' is not accepted; tofu-ga, "):
            built(recipe=wrong)


def test_missing_options_are_named_as_flags():
    with pytest.raises(
        ValueError, match="^missing: --model, --output, --method, --lr, --epochs, --batch-size, --seed "
    ):
        build(recipe=None, file_values={}, overrides={})
    with pytest.raises(ValueError, match="^missing: --batch-size "):
        build(recipe=None, file_values={k: v for k, v in BASE.items() if k != "batch_size"}, overrides={})


def test_read_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\nlr = 1e-5\nepochs = 3\ngradient_checkpointing = true\n')
    assert read_file(path) == {"model": "m", "lr": 1e-5, "epochs": 3, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"learning_rate = 1.0\n", "unknown key 'learning_rate'; known are model, output, method"),
        (b"lr = \n", "is not a TOML file"),
        (b"\xff\xfe", "is not a TOML file"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        read_file(path)
    assert str(path) in str(error.value) and str(error.value).startswith("config: ")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="^config: no file "):
        read_file(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="^config: .* cannot be read"):
        read_file(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", "1e-5", "float"),
        ("epochs", 2.0, "int"),
        ("epochs", True, "int"),
        ("lr", True, "float"),
        ("model", 3, "str"),
        ("gradient_checkpointing", 1, "bool"),
        ("seed", None, "int"),
        ("model", ["m"], "str"),
    ],
)
def test_a_wrong_type_is_named(name, value, expected):
    with pytest.raises(ValueError, match=rf"^{name}: .* is not accepted; a value of type {expected} is"):
        built(**{name: value})


def test_integers_are_accepted_as_floats():
    assert isinstance(built(lr=1).lr, float)
    with pytest.raises(ValueError, match="^lr: 1000.* is not accepted; a finite number is"):
        built(lr=10**400)


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match="^learning_rate: no such setting"):
        built(learning_rate=1.0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lr", (0.0, -1e-5, math.nan, math.inf)),
        ("epochs", (0, -1)),
        ("batch_size", (0,)),
        ("max_tokens", (0,)),
        ("retain_per_forget", (0,)),
        ("max_grad_norm", (0.0, -1.0, math.nan, math.inf)),
        ("max_length", (0,)),
        ("weight_decay", (-0.1, math.nan)),
        ("warmup_epochs", (-1.0, math.inf)),
        ("forget_weight", (-1.0, math.nan)),
        ("retain_weight", (-1.0, math.inf)),
        ("save_every", (-1,)),
        ("skip_below", (-0.1, 1.0, math.nan)),
        ("beta", (math.nan, math.inf)),
        ("gamma", (math.nan, -math.inf)),
        ("beta2", (math.nan,)),
        ("seed", (-1, 2**63)),
        ("retain_term", ("l2", "NLL", "")),
        ("dtype", ("float16", "bf16")),
        ("on_non_finite", ("ignore",)),
        ("model", ("",)),
        ("output", ("",)),
    ],
)
def test_each_value_is_checked_and_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: .*not accepted"):
            built(**{name: value})


@pytest.mark.parametrize("name", [name for name, (plain, _) in field_types().items() if plain is float])
def test_numbers_are_within_what_float32_can_use(name):
    """Beyond, a run would end in its first step."""
    for value in (1e39, -1e39, 1e31, 1e-39, 5e-324):
        with pytest.raises(ValueError, match=rf"^{name}: .*not accepted; 0 and magnitudes of 1e-30 to 1e\+30 are$"):
            built(**{name: value})
    if name not in ("lr", "max_grad_norm", "skip_below"):
        assert getattr(built(**{name: 1e30}), name) == 1e30 and getattr(built(**{name: 0}), name) == 0


def test_retain_rows_and_retain_term_go_together():
    with pytest.raises(ValueError, match="^retain: missing, and retain_term nll needs rows"):
        built(retain_term="nll")
    with pytest.raises(ValueError, match="^retain: given, but with retain_term none"):
        built(retain="rows.jsonl")
    assert built(method="finetune", retain="rows.jsonl").retain == "rows.jsonl"


def test_where_the_reference_lies():
    assert built().reference_dir == Path("o/reference")
    assert built(reference_cache="c").reference_dir == Path("c")


def test_a_configuration_survives_json():
    config = built(beta=0.1, retain="r", retain_term="kl", max_grad_norm=1.0)
    assert json.loads(json.dumps(config.to_dict(), allow_nan=False)) == config.to_dict()
    assert TrainConfig(**config.to_dict()) == config


def test_every_field_has_its_help():
    for field in dataclasses.fields(TrainConfig):
        assert len(field.metadata["help"]) > 10, field.name


def test_importing_the_configuration_imports_no_torch():
    code = "import sys, unlearn.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**63, max_value=2**2000),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dates(),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=1),
)


def plausible(name):
    """Mostly values of the right type, so that the later checks are reached."""
    plain, _ = field_types()[name]
    right = {
        int: st.integers(-2, 2**64),
        float: st.floats(),
        bool: st.booleans(),
        str: st.sampled_from(["none", "nll", "kl", "float32", "stop", "npo", "finetune", "", *list(RECIPES)[:2]]),
    }
    return st.one_of(right[plain], right[plain], ANYTHING)


SETTINGS = st.fixed_dictionaries({}, optional={name: plausible(name) for name in field_types()})


@given(recipe=st.one_of(st.none(), st.sampled_from(sorted(RECIPES)), st.text(max_size=4)), file=SETTINGS, line=SETTINGS)
def test_build_gives_a_configuration_or_a_value_error(recipe, file, line):
    try:
        config = build(recipe=recipe, file_values=BASE | file, overrides=line)
    except ValueError as error:
        assert str(error).partition(":")[0] in {*field_types(), "missing"}
    else:
        assert isinstance(config, TrainConfig)
        for name, (plain, optional) in field_types().items():
            value = getattr(config, name)
            assert type(value) is plain or (optional and value is None), name
        json.dumps(config.to_dict(), allow_nan=False)


@given(key=st.text(max_size=8), value=ANYTHING)
def test_coerce_of_anything(key, value):
    with pytest.raises(ValueError):
        coerce("unknown " + key, value)
