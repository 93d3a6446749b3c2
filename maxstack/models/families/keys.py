"""A model folder's config.json, read key by key: what a family does not read, it does not know, and is refused."""

from collections.abc import Iterable, Mapping
from typing import Any

from maxstack.config import UserError

REQUIRED: Any = object()

# Keys that say nothing about the mathematics of a forward pass: names, tokens, training, code, caches.
HARMLESS = frozenset(
    {
        "_name_or_path", "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
        "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "return_dict", "output_attentions",
        "output_hidden_states", "output_router_logits", "initializer_range", "initializer_factor", "attention_dropout",
        "hidden_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop", "dropout", "classifier_dropout", "problem_type",
        "id2label", "label2id", "chunk_size_feed_forward", "is_encoder_decoder", "task_specific_params",
        "pretraining_tp", "attn_implementation", "_attn_implementation", "cache_implementation",
        "gradient_checkpointing", "transformers.js_config",
        "unsloth_fixed", "unsloth_version", "tokenizer_class", "finetuning_task", "language", "license",
    }
)  # fmt: skip


class Keys:
    """The keys of a config.json (or of a mapping in it); every read is recorded."""

    def __init__(self, values: Mapping[str, Any], where: str, path: str = ""):
        self.values, self.where, self.path = values, where, path
        self.read: set[str] = set()
        self.inner: list[Keys] = []

    def __contains__(self, name: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(name) is not None

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a key; null counts as absent. Raises UserError when it is needed and absent."""
        self.read.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise UserError(f"{self.where}: {self.path}{name} is missing; this family's models need it")
        return default

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A number (or None as the default). Raises UserError for anything else."""
        value = self.get(name, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{self.where}: {self.path}{name} is {value!r}, not a number")
        return value

    def whole(self, name: str, default: Any = REQUIRED, *, least: int = 1) -> Any:
        """A whole number of at least `least` (or None as the default)."""
        value = self.number(name, default)
        if value is None:
            return None
        if value != int(value) or value < least or value > 2**40:
            raise UserError(
                f"{self.where}: {self.path}{name} is {value!r}: a whole number from {least} on is needed"
            )
        return int(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers."""
        value = self.get(name)
        if not isinstance(value, list) or any(
            isinstance(x, bool) or not isinstance(x, int | float) for x in value
        ):
            raise UserError(f"{self.where}: {self.path}{name} is {value!r}, not a list of numbers")
        return tuple(float(x) for x in value)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {self.path}{name} is {value!r}, not true or false")
        return value

    def expect(self, name: str, *allowed: Any) -> Any:
        """The value of a key that may be absent or one of `allowed`, the first being the default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise UserError(
                f"{self.where}: {self.path}{name} is {value!r}, which is not supported; it may be "
                f"{' or '.join(repr(one) for one in allowed)}"
            )
        return value

    def choices(self, name: str, default: list[str], *allowed: str) -> list[str]:
        """As many of the `allowed` words as there are in `default`, such as each layer's kind."""
        value = self.get(name, default)
        if (
            not isinstance(value, list)
            or len(value) != len(default)
            or any(one not in allowed for one in value)
        ):
            raise UserError(
                f"{self.where}: {self.path}{name} is {value!r}: {len(default)} of {' or '.join(allowed)} are needed"
            )
        return value

    def with_defaults(self, defaults: Mapping[str, Any], *, over_null: bool = True) -> "Keys":
        """The same keys with values for some that are absent (or null, unless told otherwise).

        What is read there counts as read here.
        """
        known = self if over_null else self.values
        absent = {name: value for name, value in defaults.items() if name not in known}
        filled = Keys({**self.values, **absent}, self.where, self.path)
        filled.read, filled.inner = self.read, self.inner
        return filled

    def nested(self, name: str) -> "Keys":
        """A mapping inside; empty when absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise UserError(f"{self.where}: {self.path}{name} is {value!r}, not a mapping")
        inner = Keys(value, self.where, f"{self.path}{name}.")
        self.inner.append(inner)
        return inner

    def skip(self, *names: str) -> None:
        """These say nothing that the family needs."""
        self.read.update(names)

    def unread(self, harmless: Iterable[str] = ()) -> list[str]:
        """Keys, at any depth, that nobody read and that are neither harmless nor null."""
        known = self.read | HARMLESS | set(harmless)
        own = [
            f"{self.path}{name}"
            for name, value in self.values.items()
            if name not in known and value is not None
        ]
        return own + [name for inner in self.inner for name in inner.unread()]
