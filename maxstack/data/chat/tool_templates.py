"""Templates with a place for tools, for models whose own have none though their makers say how tools are written.

A row is known by tokens that its models' vocabularies have.
"""

from collections.abc import Collection

INTERNLM = (
    "{{ bos_token }}{% set ns = namespace(told=false) %}{% for message in messages %}"
    "{% if not ns.told and message.role != 'system' %}{% set ns.told = true %}{% if tools %}"
    "<|im_start|>system name=<|plugin|>\n["
    "{% for tool in tools %}{{ (tool.function or tool) | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}"
    "]<|im_end|>\n{% endif %}{% endif %}"
    "{% if message.role == 'tool' %}<|im_start|>environment name=<|plugin|>\n"
    "{% else %}<|im_start|>{{ message.role }}\n{% endif %}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<|action_start|><|plugin|>\n"
    '{"name": {{ call.function.name | tojson }}, "parameters": {{ call.function.arguments | tojson }}}<|action_end|>'
    "{% if not loop.last %}\n{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""InternLM2 and 3, as chat/chat_format.md of their repository describes it."""

TEMPLATES = ((("<|action_start|>", "<|plugin|>", "<|action_end|>"), INTERNLM),)


def tool_template_for(template: str, vocabulary: Collection[str]) -> str | None:
    """The template to use where tools are given; None where the model's own does, or none is known."""
    if "tools" in template:
        return None
    return next((text for tokens, text in TEMPLATES if {*tokens} <= {*vocabulary}), None)
