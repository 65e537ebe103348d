"""Arguments of other libraries are accepted if they change nothing, and refused with a reason."""

from dataclasses import dataclass, replace

import pytest

from minitune.config.foreign_arguments import ANYTHING, Foreign, Renamed, foreign_arguments


@foreign_arguments(
    token=Foreign("nothing is downloaded", neutral=ANYTHING),
    load_in_8bit=Foreign("use load_in_4bit", neutral=(None, False)),
    max_seq_length=Renamed("max_length"),
)
def load(name, max_length=2048):
    return name, max_length


@foreign_arguments(max_seq_length=Renamed("max_length"))
@dataclass(frozen=True)
class Settings:
    max_length: int | None = None


def test_neutral_values_change_nothing():
    assert load("m", token="secret", load_in_8bit=False) == ("m", 2048)


def test_a_renamed_argument_sets_the_argument_of_its_new_name():
    assert load("m", max_seq_length=512) == ("m", 512)


@pytest.mark.parametrize("value", [True, 1, 0, "yes"])
def test_another_value_is_refused_with_the_reason(value):
    with pytest.raises(ValueError, match=r"load_in_8bit=.*use load_in_4bit"):
        load("m", load_in_8bit=value)


def test_an_argument_under_both_names_is_refused():
    with pytest.raises(TypeError, match="both max_length and max_seq_length"):
        load("m", max_length=1, max_seq_length=2)


@pytest.mark.parametrize(
    ("name", "hint"), [("max_lenght", "did you mean max_length"), ("zzz", "known are name, max_l")]
)
def test_an_unknown_argument_is_a_type_error_with_a_hint(name, hint):
    with pytest.raises(TypeError, match=f"load.*{name}.*{hint}"):
        load("m", **{name: 1})


def test_dataclasses_take_foreign_arguments_too():
    assert Settings(max_seq_length=3) == replace(Settings(), max_length=3)


@foreign_arguments(token=Foreign("nothing is downloaded"))
def render(name, **variables):
    return name, variables


def test_a_function_with_kwargs_gets_unknown_arguments_itself():
    assert render("m", token=None, enable_thinking=True) == ("m", {"enable_thinking": True})
    with pytest.raises(ValueError, match="nothing is downloaded"):
        render("m", token="secret", enable_thinking=True)
