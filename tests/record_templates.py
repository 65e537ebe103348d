"""Chat templates that write every text of a conversation, for tests of records."""

from tokenizer_files import HEAD

CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
FOOT = "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
REASONING = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
WHOLE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ persona }}"
    + HEAD
    + REASONING
    + "{{ m.content }}{{ m.mood }}"
    + CALLS
    + FOOT
)
FORGETS_REASONING = WHOLE.replace("m.reasoning_content %}", "m.reasoning_content and loop.last %}")
