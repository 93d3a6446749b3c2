"""Makes renders/*.json: what transformers' apply_chat_template gives for each template and conversation.

    python tests/goldens/chat/make_chat.py

needs transformers and jinja2, no PyTorch. A case is {"text"}, or {"refused": message} where the template raises.
"""

import datetime
import json
import sys
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from conversations import CASES, TEXT_ARGUMENTS, TOKENS  # noqa: E402


class FixedDate(datetime.datetime):
    """The templates of Llama, Granite and GPT-OSS print the date."""

    @classmethod
    def now(cls, tz=None):
        return cls(2025, 3, 9, 12, 0, 0)


def with_text_arguments(messages):
    """Tool calls with arguments as JSON text."""
    done = json.loads(json.dumps(messages))
    for message in done:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return done


def rendered(tokenizer, name, case):
    messages = case["messages"]
    if name in TEXT_ARGUMENTS:
        messages = with_text_arguments(messages)
    options = {key: value for key, value in case.items() if key != "messages"}
    try:
        return {"text": tokenizer.apply_chat_template(messages, tokenize=False, **options)}
    except Exception as error:  # noqa: BLE001  # whatever the template raises is what is recorded
        if "no attribute 'content'" not in str(error):
            return {"refused": f"{type(error).__name__}: {error}"}
    # apply_chat_template drops a content of None, which some templates ask for; others want a text.
    given = {**tokenizer.special_tokens_map, **options, "chat_template": tokenizer.chat_template}
    empty = [{**message, "content": message["content"] or ""} for message in messages]
    for form in (messages, empty):
        try:
            return {"text": chat_template_utils.render_jinja_template([form], **given)[0][0]}
        except Exception as error:  # noqa: BLE001
            refused = {"refused": f"{type(error).__name__}: {error}"}
    return refused


def main():
    chat_template_utils.datetime = FixedDate
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    (HERE / "renders").mkdir(exist_ok=True)
    for name, (bos, eos) in TOKENS.items():
        named = {"bos_token": bos or None, "eos_token": eos or None}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
        tokenizer.chat_template = (HERE / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        found = {case: rendered(tokenizer, name, options) for case, options in CASES.items()}
        text = json.dumps(found, ensure_ascii=False, indent=1)
        (HERE / "renders" / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
