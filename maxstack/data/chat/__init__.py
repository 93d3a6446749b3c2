"""One renderer for chat: messages to token ids and loss mask by a model's own jinja template.

    renderer = renderer_for(tokenizer)
    prompt = renderer(messages, add_generation_prompt=True, tools=tools)      # what a server feeds a model
    sample = renderer.sample(messages)                                        # what training learns from

- `messages`: what a message may be
- `template`: the jinja template, in `sandbox` and within its `budget`
- `instrument`, `marks`, `supervision`: which part of the text is the assistant's own
- `encoding`: text to ids, without special tokens that a message smuggles in
- `show`: the mask for people
"""

from maxstack.data.chat.messages import Message
from maxstack.data.chat.renderer import CHATML, ChatRenderer, Rendered, renderer_for
from maxstack.data.chat.show import show

__all__ = ["CHATML", "ChatRenderer", "Message", "Rendered", "renderer_for", "show"]
