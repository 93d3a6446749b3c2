"""Random JSON schemas, of the parts that llguidance knows."""

from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "name", "größe", "x y", 'q"t'])
TEXTS = st.builds(
    lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
    st.integers(0, 2),
    st.integers(0, 3),
)
NUMBERS = st.builds(
    lambda kind, low, span: {"type": kind, "minimum": low, "maximum": low + span},
    st.sampled_from(["integer", "number"]),
    st.integers(-120, 120),
    st.integers(1, 90),
)
WORDS = st.lists(
    st.sampled_from(["on", "off", "é", "a\nb", 1, 2.5, None, True]), min_size=1, max_size=3, unique=True
)
SIMPLE = st.one_of(
    TEXTS, NUMBERS, st.just({"type": "boolean"}), st.just({"type": "null"}),
    st.builds(lambda words: {"enum": words}, WORDS), st.builds(lambda words: {"const": words[0]}, WORDS),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}$"}), st.just({"type": "string", "format": "date"}),
)  # fmt: skip


def _object(properties: dict, wanted: int, more: bool) -> dict:
    names = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": names[: wanted % (len(names) + 1)],
        "additionalProperties": more,
    }


def _larger(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.builds(
            _object,
            st.dictionaries(NAMES, inner, max_size=3),
            st.integers(0, 3),
            st.just(False),
        ),
        st.builds(
            lambda items, least, more: {
                "type": "array",
                "items": items,
                "minItems": least,
                "maxItems": least + more,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 1),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    )


def schemas() -> st.SearchStrategy:
    """Small ones, nested a little."""
    return st.recursive(SIMPLE, _larger, max_leaves=4)
