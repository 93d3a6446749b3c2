"""The conversations that the golden renders are of."""

from typing import Any

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place, in °C.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name"},
                "days": {"type": "integer"},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "now",
        "description": "The time <now>.",
        "parameters": {"type": "object", "properties": {}},
    },
}

SYSTEM = {"role": "system", "content": "Answer in one sentence."}
QUESTION = {"role": "user", "content": "Why is the sky blue?"}
ANSWER = {"role": "assistant", "content": "Air scatters blue light more than red."}
SECOND = {"role": "user", "content": "And at dusk?"}
SECOND_ANSWER = {"role": "assistant", "content": "The light's way is longer; blue is lost on it."}
HARD = {"role": "user", "content": "  天空为什么是蓝色的？ 🌤️\n\n\tx = {'a': 1}  \n"}
HARD_ANSWER = {"role": "assistant", "content": "\n  因为瑞利散射。\n```py\nprint('<b>')\n```\n"}
ASK = {"role": "user", "content": "How warm is it in Zürich?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call12345",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 1}},
        }
    ],
}
RESULT = {"role": "tool", "content": '{"celsius": 21}', "name": "get_weather", "tool_call_id": "call12345"}
WARM = {"role": "assistant", "content": "It is 21 °C."}
THOUGHT = {**ANSWER, "reasoning_content": "Rayleigh: the fourth power of the frequency."}
SECOND_THOUGHT = {**SECOND_ANSWER, "reasoning_content": "The path through the air grows."}

CASES: dict[str, dict[str, Any]] = {
    "single": {"messages": [QUESTION, ANSWER]},
    "multi": {"messages": [QUESTION, ANSWER, SECOND, SECOND_ANSWER]},
    "system": {"messages": [SYSTEM, QUESTION, ANSWER]},
    "hard": {"messages": [HARD, HARD_ANSWER]},
    "prompt": {"messages": [SYSTEM, QUESTION], "add_generation_prompt": True},
    "later_prompt": {"messages": [QUESTION, ANSWER, SECOND], "add_generation_prompt": True},
    "tools": {"messages": [SYSTEM, ASK], "tools": [WEATHER, CLOCK], "add_generation_prompt": True},
    "calls": {"messages": [ASK, CALL, RESULT, WARM], "tools": [WEATHER]},
    "calls_prompt": {"messages": [ASK, CALL, RESULT], "tools": [WEATHER], "add_generation_prompt": True},
    "bare_calls": {"messages": [ASK, CALL, RESULT, WARM]},
    "reasoning": {"messages": [QUESTION, THOUGHT, SECOND, SECOND_THOUGHT]},
    "reasoning_prompt": {"messages": [QUESTION, THOUGHT, SECOND], "add_generation_prompt": True},
    "no_thinking": {"messages": [QUESTION], "add_generation_prompt": True, "enable_thinking": False},
    "continued": {
        "messages": [QUESTION, {"role": "assistant", "content": "Air scatters "}],
        "continue_final_message": True,
    },
}

TOKENS = {
    "chatml": ("", "<|im_end|>"),
    "deepseek-r1-distill": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-v2.5": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-v3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-v3.1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gemma-2": ("<bos>", "<end_of_turn>"),
    "gemma-3": ("<bos>", "<end_of_turn>"),
    "glm-4": ("", "<|endoftext|>"),
    "glm-4.6": ("", "<|endoftext|>"),
    "gpt-oss": ("<|startoftext|>", "<|return|>"),
    "granite-3.3": ("<|end_of_text|>", "<|end_of_text|>"),
    "internlm2": ("<s>", "</s>"),
    "internlm3": ("<s>", "</s>"),
    "llama-2": ("<s>", "</s>"),
    "llama-3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama-3.1": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama-3.2": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral-nemo": ("<s>", "</s>"),
    "mistral-v0.2": ("<s>", "</s>"),
    "phi-3": ("<s>", "<|endoftext|>"),
    "phi-3.5": ("<s>", "<|endoftext|>"),
    "phi-4": ("<|endoftext|>", "<|im_end|>"),
    "qwen2.5": ("", "<|im_end|>"),
    "qwen3": ("", "<|im_end|>"),
    "qwq": ("", "<|im_end|>"),
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "smollm3": ("", "<|im_end|>"),
    "zephyr": ("<s>", "</s>"),
}
"""Begin and end token of each template's tokenizer; "" for none."""

SPECIALS = (
    "<s> </s> <bos> <|im_start|> <|im_end|> <|im_sep|> <|endoftext|> <|begin_of_text|> <|end_of_text|> "
    "<|eot_id|> <|eom_id|> <|start_header_id|> <|end_header_id|> <|python_tag|> <start_of_turn> "
    "<end_of_turn> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] <|user|> <|assistant|> <|system|> <|end|> <|observation|> [gMASK] <sop> "
    "<|startoftext|> <|start|> <|message|> <|channel|> <|constrain|> <|return|> <|call|> "
    "<|start_of_role|> <|end_of_role|> <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> "
    "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁outputs▁begin｜> "
    "<｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜> <｜tool▁sep｜> "
).split()

TEXT_ARGUMENTS = ("deepseek-v2.5", "deepseek-v3")
"""Templates that put a call's arguments next to text, so that transformers has to be given them as JSON text."""
