"""The config.json of published models is understood: the tree that it describes has as many parameters as the model.

published/*.json hold, for each model, its count of parameters (of the text model alone, where it sees images too) and
its config.json; lists of rotary factors are filled with stand-ins of the same length.
"""

import json
from pathlib import Path

import pytest

from maxstack.config import UserError
from maxstack.models.account import account_of
from maxstack.models.families import read_config

PUBLISHED = {
    name: model
    for file in sorted((Path(__file__).parent / "published").glob("*.json"))
    for name, model in json.loads(file.read_text()).items()
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_describes_a_model_of_the_published_size(name):
    family, config = read_config(PUBLISHED[name]["config"], name)
    assert account_of(config, 128).parameters == PUBLISHED[name]["parameters"]
    assert family.expresses(config), family.keys(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_key_that_is_not_understood_is_refused(name):
    with pytest.raises(UserError, match="unknown attention_twist=3"):
        read_config(PUBLISHED[name]["config"] | {"attention_twist": 3}, name)
