"""Make small tokenizers, chat templates as published models have them, and conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3: the system's message has the date, tools are JSON within it.
LLAMA = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system = messages[0]['content'] | trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}{%- set system = '' %}{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n' }}\n"
    "{%- if tools is not none %}\n"
    "    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}\n"
    "{%- endif %}\n"
    "{{- system + '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.tool_calls %}\n"
    "        {%- if message.tool_calls | length != 1 %}\n"
    "            {{- raise_exception('one tool call at once') }}\n"
    "        {%- endif %}\n"
    "        {%- set call = message.tool_calls[0].function %}\n"
    "        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    '        {{- \'{"name": "\' + call.name + \'", "parameters": \' }}\n'
    "        {{- call.arguments | tojson + '}<|eot_id|>' }}\n"
    "    {%- else %}\n"
    "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)
# Mistral: roles alternate, the system's message goes into the first user's.
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}{% for message in rest %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message.role == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.first and system else '') + message.content"
    " + ' [/INST]' }}{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
# Qwen 3: tools, reasoning that only the last turns keep, roles by a namespace.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}"
    "{{- messages[0].content + '\\n\\n' }}{%- endif %}{{- '<tools>' }}"
    "{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
    "{{- '\\n</tools><|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}\n"
    "{%- set ns = namespace(last=messages|length - 1, searching=true) %}\n"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}\n"
    "    {%- if ns.searching and message.role == 'user' %}\n"
    "        {%- set ns.searching = false %}{%- set ns.last = index %}{%- endif %}\n"
    "{%- endfor %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'system' and loop.first %}{%- continue %}{%- endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' }}\n"
    "    {%- if message.reasoning_content is string and loop.index0 > ns.last %}\n"
    "        {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n"
    "    {{- message.content | default('', true) }}\n"
    "    {%- for call in message.tool_calls or [] %}\n"
    "        {{- '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}\n"
    "    {%- endfor %}\n"
    "    {{- '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
# gpt-oss: channels, a macro, another end for the last turn than for the others.
HARMONY = (
    "{%- macro turn(role, text, end) %}"
    "{{- '<|start|>' + role + '<|message|>' + text + end }}{%- endmacro %}\n"
    "{{- turn('system', 'Reasoning: ' + reasoning_effort | default('medium'), '<|end|>') }}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "        {%- if message.thinking and loop.last %}\n"
    "            {{- turn('assistant<|channel|>analysis', message.thinking, '<|end|>') }}\n"
    "        {%- endif %}\n"
    "        {{- turn('assistant<|channel|>final', message.content,"
    " '<|return|>' if loop.last else '<|end|>') }}\n"
    "    {%- else %}\n"
    "        {{- turn('developer' if message.role == 'system' else message.role,"
    " message.content, '<|end|>') }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}\n"
)
TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "harmony": HARMONY,
}
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Tell the weather of <b>a place</b> & its "température".',
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    """Make a message."""
    return {"role": role, "content": content, **more}


ONE = [said("user", "What is 1 + 1?"), said("assistant", "Two, naturally.")]
MANY = [
    *ONE,
    said("user", "  Und auf Japanisch? "),
    said("assistant", "二です。\nにー\U0001f98a"),
    said("user", "<b>&amp;</b>"),
    said("assistant", "Ok.", reasoning="They write HTML."),
]
SYSTEM = said("system", "You are brief.")
CALLS = [
    SYSTEM,
    said("user", "How warm is it in Kyōto?"),
    said("assistant", None, tool_calls=[
        {"type": "function", "function": {"name": "weather", "arguments": {"place": "Kyōto"}}}
    ]),
    said("tool", "21 °C"),
    said("assistant", "It is 21 °C."),
]  # fmt: skip


def chat_tokenizer(folder: Path, template: str | None = CHATML, **settings: Any) -> Path:
    """Write a directory with a tokenizer of bytes that has the special tokens of chats."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("e", "r"), ("o", "u"), ("Ġ", "t"), ("i", "s")]
    vocab = {each: number for number, each in enumerate([*letters, *(a + b for a, b in pairs)])}
    made = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    number = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", number)]
    )
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    written = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", **settings}
    written = {"eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}} | written
    if template is not None:
        written["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return folder


def write_chats(path: Path, records: list[Any]) -> str:
    """Write records as JSON Lines; return the path."""
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return str(path)
