"""How byte-level BPE cuts text into words before it merges, by the names that GGUF files use.

A GGUF file holds no rules, only a name ("tokenizer.ggml.pre"); what stands behind it is in llama.cpp's source. Here are
those names whose ids were compared with published ones. A row gives the patterns as the models' own tokenizer.json has
them: each cuts what the one before left into its matches and what lies between.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN_2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
QWEN_3_5 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
GPT_4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
    "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-"
    "\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
    "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclasses.dataclass(frozen=True)
class Split:
    """The words of one kind of byte-level BPE."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    """A word that is in the vocabulary is one token, whatever the merges would do ("ignore_merges")."""
    compose: bool = False
    """Text is put in Unicode's form C first. llama.cpp does not; the models' own tokenizers, which made their training
    data, do."""
    starts: bool = False
    """llama.cpp puts the begin token before the text unless the file says otherwise."""


SPLITS: Mapping[str, Split] = {
    "gpt-2": Split((GPT_2,)),
    "smollm": Split((DIGIT, GPT_2)),
    "llama-bpe": Split((LLAMA_3,), whole_words=True, starts=True),
    "smaug-bpe": Split((LLAMA_3,)),
    "qwen2": Split((QWEN_2,), compose=True),
    "qwen35": Split((QWEN_3_5,)),
    "gpt-4o": Split((GPT_4O,)),
    "tekken": Split((TEKKEN,), whole_words=True, starts=True),
    "deepseek-llm": Split(("[\r\n]", rf"\s?[{_CASED}]+", _PUNCTUATION, r"\s+$", _CJK, r"\p{N}+")),
    "deepseek-coder": Split(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT)),
    "deepseek-v3": Split((r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK_3_WORDS)),
    "falcon": Split((r"[\p{P}\$\+<=>\^~\|`]+", GPT_2, "[0-9][0-9][0-9]")),
}
# Other names of the same rules, in llama.cpp's own table.
ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("mpt", "olmo", "phi-2", "exaone4", "mellum", "jais", "trillion"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("dbrx", "chatglm-bpe"), "smaug-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
    "llama4": "gpt-4o",
}


def named_split(name: str) -> Split | None:
    """The row of a name or of another name for it."""
    if name in ("glm4", "glm5"):
        return dataclasses.replace(SPLITS["llama-bpe"], starts=False)
    return SPLITS.get(ALIASES.get(name, name))


def pre_tokenizer(patterns: Sequence[str]) -> dict[str, Any]:
    """The words as a step of a definition."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if tuple(patterns) == (DIGIT, GPT_2):  # as the models' own files have it; the same, and twice as fast
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, {**byte_level, "use_regex": True}]}
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*cuts, {**byte_level, "use_regex": False}]}


def split_name(inner: tokenizers.Tokenizer) -> str | None:
    """The name of the rules by which a byte-level BPE cuts; None for rules that have none here."""
    parsed = json.loads(inner.pre_tokenizer.__getstate__()) if inner.pre_tokenizer is not None else {}
    patterns = _patterns(parsed)
    if patterns is None:
        return None
    rules = {key: tuple(map(_bare, split.patterns)) for key, split in SPLITS.items()}
    same = [key for key in SPLITS if rules[key] == tuple(map(_bare, patterns))]
    ignore = json.loads(inner.model.__getstate__())["ignore_merges"] if len(same) > 1 else None
    exact = [key for key in same if ignore is None or SPLITS[key].whole_words == ignore]
    return (exact or same or [None])[0]


def _patterns(step: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The patterns of a step of a definition, None when it does something else."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            parts = [_patterns(one) for one in steps]
            return None if None in parts else tuple(p for part in parts if part for p in part)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return (pattern,)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            return (pattern,)
        case {"type": "Digits", "individual_digits": bool(single)}:
            return (DIGIT if single else DIGIT + "+",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(words)}:
            return (GPT_2,) if words else ()
    return None


def _bare(pattern: str) -> str:
    """A pattern in one spelling: line ends by their escapes, 1 to 3 digits without spelling out 1."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")
