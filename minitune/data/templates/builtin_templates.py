"""Chat templates of model families as Jinja texts, and the names by which they are called.

Each renders the text that its family's models were trained on, for conversations without tools.
named_template.py sets one.
"""

from dataclasses import dataclass

ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

CHATML = """\
{%- for message in messages -%}
    {{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

LLAMA_3 = """\
{{- bos_token -}}
{%- macro header(role) -%}
    {{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}
{%- endmacro -%}
{%- for message in messages -%}
    {{ header(message.role) ~ (message.content | trim) ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ header('assistant') }}
{%- endif -%}
"""

LLAMA_3_1 = """\
{{- bos_token -}}
{%- macro header(role) -%}
    {{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}
{%- endmacro -%}
{{- header('system') ~ 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' -}}
{%- if messages and messages[0].role == 'system' -%}
    {{ messages[0].content | trim }}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- for message in messages -%}
    {%- if message.role != 'system' or not loop.first -%}
        {{ header(message.role) ~ (message.content | trim) ~ '<|eot_id|>' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ header('assistant') }}
{%- endif -%}
"""

# The system message opens the first question.
MISTRAL = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.system = message.content ~ '\\n\\n' -%}
    {%- elif message.role == 'user' -%}
        {{ '[INST] ' ~ ns.system ~ message.content ~ '[/INST]' }}
        {%- set ns.system = '' -%}
    {%- elif message.role == 'assistant' -%}
        {{ ' ' ~ (message.content | trim) ~ eos_token }}
    {%- endif -%}
{%- endfor -%}
"""

QWEN = (
    """\
{%- if messages and messages[0].role != 'system' -%}
    {{ '<|im_start|>system\\nDEFAULT<|im_end|>\\n' }}
{%- endif -%}
""".replace("DEFAULT", QWEN_SYSTEM)
    + CHATML
)

# The system message opens the first question.
GEMMA = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.system = message.content ~ '\\n\\n' -%}
    {%- else -%}
        {%- set role = 'model' if message.role == 'assistant' else message.role -%}
        {{ '<start_of_turn>' ~ role ~ '\\n' ~ ns.system ~ (message.content | trim) }}
        {{- '<end_of_turn>\\n' }}
        {%- set ns.system = '' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

PHI = """\
{%- for message in messages -%}
    {%- if message.role != 'system' or message.content -%}
        {{ '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '<|end|>\\n' }}
    {%- endif -%}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token -}}
"""

PHI_4 = """\
{%- for message in messages -%}
    {{ '<|im_start|>' ~ message.role ~ '<|im_sep|>' ~ message.content ~ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant<|im_sep|>' }}
{%- endif -%}
"""

ALPACA = """\
{{- bos_token -}}
{%- if messages and messages[0].role == 'system' -%}
    {{ messages[0].content ~ '\\n\\n' }}
{%- else -%}
    {{ 'DEFAULT\\n\\n' }}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{ '### Instruction:\\n' ~ message.content ~ '\\n\\n' }}
    {%- elif message.role == 'assistant' -%}
        {{ '### Response:\\n' ~ message.content ~ eos_token ~ '\\n\\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '### Response:\\n' }}
{%- endif -%}
""".replace("DEFAULT", ALPACA_SYSTEM)

ZEPHYR = """\
{%- for message in messages -%}
    {{ '<|' ~ message.role ~ '|>\\n' ~ message.content ~ eos_token ~ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|assistant|>\\n' }}
{%- endif -%}
"""


@dataclass(frozen=True)
class BuiltinTemplate:
    """A chat template of this package.

    source: the Jinja text.
    tokens: special tokens that the vocabulary must hold, besides those in `names`.
    names: special tokens that the tokenizer must name, such as "eos".
    """

    source: str
    tokens: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


BUILTIN_TEMPLATES = {
    "chatml": BuiltinTemplate(CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama-3": BuiltinTemplate(
        LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ("bos",)
    ),
    "llama-3.1": BuiltinTemplate(
        LLAMA_3_1, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ("bos",)
    ),
    "mistral": BuiltinTemplate(MISTRAL, (), ("bos", "eos")),
    "qwen": BuiltinTemplate(QWEN, ("<|im_start|>", "<|im_end|>")),
    "gemma": BuiltinTemplate(GEMMA, ("<start_of_turn>", "<end_of_turn>"), ("bos",)),
    "phi": BuiltinTemplate(PHI, ("<|user|>", "<|assistant|>", "<|end|>"), ("eos",)),
    "phi-4": BuiltinTemplate(PHI_4, ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    "alpaca": BuiltinTemplate(ALPACA, (), ("eos",)),
    "zephyr": BuiltinTemplate(ZEPHYR, (), ("eos",)),
}

# Names of the same text in notebooks. Llama 3.2's and 3.3's differ from 3.1's in the date at most.
ALIASES = {
    "llama3": "llama-3",
    **dict.fromkeys(("llama-31", "llama31", "llama-3.2", "llama-32", "llama32"), "llama-3.1"),
    **dict.fromkeys(("llama-3.3", "llama-33", "llama33"), "llama-3.1"),
    **dict.fromkeys(("qwen-2.5", "qwen2.5", "qwen-25", "qwen25"), "qwen"),
    **dict.fromkeys(("gemma2", "gemma-2", "gemma3", "gemma-3"), "gemma"),
    **dict.fromkeys(("phi-3", "phi3", "phi-3.5", "phi-35", "phi3.5"), "phi"),
    "phi4": "phi-4",
}
