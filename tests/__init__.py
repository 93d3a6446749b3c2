"""The tests. `check` is what checks annotations of maxstack while they run; pyproject.toml names it to jaxtyping."""

from typing import Self

import beartype

# jaxtyping has single methods checked, not classes, and a method alone does not tell what its Self is.
_OVERRIDES = beartype.FrozenDict({Self: object})
check = beartype.beartype(conf=beartype.BeartypeConf(hint_overrides=_OVERRIDES))  # pyrefly: ignore
