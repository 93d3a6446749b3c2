"""Settings are typed; what does not fit is refused with what would."""

import json

import pytest

from maxstack.chat.settings import Settings, from_plain, names
from maxstack.config import UserError


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0", 0.0),
        ("top_p", ".9", 0.9),
        ("top-p", "0.9", 0.9),
        ("top_k", "40", 40),
        ("min_p", "0.05", 0.05),
        ("max_tokens", "2_048", 2048),
        ("seed", "7", 7),
        ("repetition_penalty", "1.1", 1.1),
        ("presence_penalty", "-0.5", -0.5),
        ("ignore_eos", "on", True),
        ("ignore_eos", "No", False),
        ("stop", "###", ("###",)),
        ("stop", r'"\n\n"', ("\n\n",)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("stop", "none", ()),
    ],
)
def test_a_setting_is_read_by_its_type(name, text, value):
    got = getattr(Settings().changed(name, text).sampling, name.replace("-", "_"))
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("temprature", "1", ["unknown setting 'temprature'", "did you mean temperature?", "top_p"]),
        ("zzz", "1", ["unknown setting 'zzz'; There are max_tokens"]),
        ("logprobs", "3", ["unknown setting"]),
        ("temperature", "warm", ["temperature is 'warm': a number is expected"]),
        ("temperature", "", ["temperature is ''"]),
        ("temperature", "-1", ["it must be 0"]),
        ("temperature", "nan", ["it must be 0"]),
        ("top_k", "1.5", ["a whole number is expected"]),
        ("seed", "-1", ["0 to 2**32 - 1"]),
        ("top_p", "2", ["(0, 1]"]),
        ("ignore_eos", "maybe", ["on or off"]),
        ("stop", "[1]", ["a text"]),
        ("template.a b", "1", ["name of a variable"]),
        ("template.", "1", ["name of a variable"]),
    ],
)
def test_what_does_not_fit_is_refused(name, text, parts):
    with pytest.raises(UserError) as refused:
        Settings().changed(name, text)
    for part in parts:
        assert part in str(refused.value)


def test_template_variables_are_json_or_text():
    settings = Settings()
    for name, text in (("enable_thinking", "false"), ("date", "1 May"), ("n", "3")):
        settings = settings.changed(f"template.{name}", text)
    assert settings.template == {"enable_thinking": False, "date": "1 May", "n": 3}
    assert ("template.enable_thinking", "off", "A variable of the chat template.") in settings.rows()


def test_each_setting_is_listed_with_a_meaning_and_a_value_that_can_be_set():
    settings = Settings()
    for name, value, meaning in settings.rows():
        assert meaning
        assert settings.changed(name, value) == settings
    assert {row[0] for row in settings.rows()} == set(names())


def test_settings_survive_json():
    settings = Settings().changed("stop", '["a"]').changed("top_p", "0.5").changed("template.x", "[1]")
    assert from_plain(json.loads(json.dumps(settings.plain()))) == settings
    assert from_plain({}) == Settings()


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ([], "not an object"),
        ({"temperature": "hot"}, "a number is expected"),
        ({"temperature": True}, "a number is expected"),
        ({"temperature": float("nan")}, "a number is expected"),
        ({"seed": 1.5}, "a whole number"),
        ({"stop": [1]}, "list of texts"),
        ({"stop": "a"}, "list of texts"),
        ({"tempratur": 1}, "did you mean temperature"),
        ({"template": []}, "not an object"),
        ({"template": {"a b": 1}}, "name of a variable"),
        ({"top_p": 3}, "(0, 1]"),
    ],
)
def test_wrong_settings_in_a_file_are_refused(values, part):
    with pytest.raises(UserError) as refused:
        from_plain(values)
    assert part in str(refused.value)
