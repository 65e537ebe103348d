"""Chat templates by name, for base models and for models whose folder lacks one.

    tokenizer = get_chat_template(tokenizer, "chatml")

Each renders the text that its family's models were trained on. The special tokens of a template
must be in the vocabulary: split into pieces, an end of turn would not stop generation.
"""

from dataclasses import dataclass

from minitune.data.tokenization.tokenizer import Tokenizer

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
    "mistral": BuiltinTemplate(MISTRAL, (), ("bos", "eos")),
    "qwen": BuiltinTemplate(QWEN, ("<|im_start|>", "<|im_end|>")),
    "gemma": BuiltinTemplate(GEMMA, ("<start_of_turn>", "<end_of_turn>"), ("bos",)),
    "phi": BuiltinTemplate(PHI, ("<|user|>", "<|assistant|>", "<|end|>"), ("eos",)),
    "alpaca": BuiltinTemplate(ALPACA, (), ("eos",)),
    "zephyr": BuiltinTemplate(ZEPHYR, (), ("eos",)),
}


def get_chat_template(tokenizer: Tokenizer, chat_template: str = "chatml") -> Tokenizer:
    """Set a chat template of this package, and return the tokenizer.

    chat_template: chatml, llama-3, mistral, qwen, gemma, phi, alpaca or zephyr.

    Raises: ValueError if the name is unknown, or the vocabulary lacks a token of the template.
    """
    template = BUILTIN_TEMPLATES.get(chat_template)
    if template is None:
        raise ValueError(
            f"no chat template is named {chat_template!r:.60}; choose from "
            f"{', '.join(BUILTIN_TEMPLATES)}, or assign Jinja text to tokenizer.chat_template"
        )
    lacking = [f"a {name} token" for name in template.names if name not in tokenizer.special]
    for token in template.tokens:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            lacking.append(token)
    if lacking:
        raise ValueError(
            f"{tokenizer.folder}: the vocabulary lacks {', '.join(lacking)}, which the chat "
            f"template {chat_template!r} writes; choose the template of this model's family, or "
            "alpaca, which needs an EOS token only"
        )
    tokenizer.chat_template = template.source
    return tokenizer
