"""Chat templates of the structures that published models have, in a few lines each.

Each is named by what it does to the answers of a conversation. STOPS holds its stop tokens.
"""

ROLE = "<|{{ m.role }}|>\n"
CALLS = (
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}</call>{% endfor %}"
)
TOOL_LIST = "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>\n{% endif %}"
LOOP, END_LOOP = "{% for m in messages %}", "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
THINK_PROMPT = "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
# The last user's place; the reasoning of an answer, and its text behind the reasoning.
LAST_USER = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
)
SPLIT = (
    "{% set text = m.content %}{% set why = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}"
    "{% set why = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
IS_ANSWER, ELSE, END_IF = "{% if m.role == 'assistant' %}", "{% else %}", "{% endif %}"

TEMPLATES = {
    "keeps everything": TOOL_LIST
    + LOOP
    + ROLE
    + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    + "{{ m.content }}"
    + CALLS
    + "<|end|>\n"
    + END_LOOP
    + PROMPT,
    "knows only contents": LOOP + ROLE + "{{ m.content }}<|end|>\n" + END_LOOP + PROMPT,
    "cuts the reasoning of history": TOOL_LIST
    + LAST_USER
    + LOOP
    + ROLE
    + IS_ANSWER
    + SPLIT
    + "{% if loop.index0 > ns.last %}<think>\n{{ why }}\n</think>\n\n{% endif %}{{ text }}"
    + CALLS
    + ELSE
    + "{{ m.content }}"
    + END_IF
    + "<|end|>\n"
    + END_LOOP
    + PROMPT,
    "asks for reasoning in the prompt": LOOP
    + ROLE
    + IS_ANSWER
    + SPLIT
    + "{{ text }}<|end|>\n"
    + ELSE
    + "{{ m.content }}<|end|>\n"
    + END_IF
    + END_LOOP
    + THINK_PROMPT,
    "ends the text with the EOS": LOOP
    + ROLE
    + "{{ m.content }}<|end|>\n"
    + END_LOOP
    + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "ends earlier answers in another token": LOOP
    + "<|start|>{{ m.role }}"
    + "{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
    + "<|message|>{{ m.content }}"
    + "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}"
    + END_LOOP
    + "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "writes the stop token with the next turn": LOOP
    + "{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}"
    + "{% else %}{% if not loop.first %}<|stop|>{% endif %}<|{{ m.role }}|>{{ m.content }}"
    + "{% endif %}"
    + END_LOOP
    + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "has the next role as its stop token": LOOP
    + "<|{{ m.role }}|>\n{{ m.content | trim }}"
    + END_LOOP
    + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "puts an empty channel into the prompt": LOOP
    + "<turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    + END_LOOP
    + "{% if add_generation_prompt %}<turn>assistant\n<channel>thought\n</channel>{% endif %}",
    "writes tools before the last question": LAST_USER
    + LOOP
    + "{% if m.role == 'user' %}"
    + "{% if tools and loop.index0 == ns.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    + "[INST]{{ m.content }}[/INST]"
    + "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]"
    + "{% elif m.role == 'assistant' %}{{ m.content }}"
    + CALLS
    + "{{ eos_token }}{% endif %}"
    + END_LOOP,
    "writes results inside the calling turn": LOOP
    + "{% if m.role == 'assistant' %}"
    + "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<turn>model\n{% endif %}"
    + CALLS
    + "{% if m.tool_calls %}<result>{{ m.tool_calls[0].function.name }}: "
    + "{{ messages[loop.index0 + 1].content }}</result>{% endif %}"
    + "{{ m.content | trim }}{% if not m.tool_calls or m.content %}<end>\n{% endif %}"
    + "{% elif m.role != 'tool' %}<turn>{{ m.role }}\n{{ m.content | trim }}<end>\n{% endif %}"
    + END_LOOP
    + "{% if add_generation_prompt and messages[-1].role != 'tool' %}<turn>model\n{% endif %}",
    "marks answers": LOOP
    + ROLE
    + "{% if m.role == 'assistant' %}"
    + "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{{ '\\n' }}"
    + "{% else %}{{ m.content }}<|end|>\n{% endif %}"
    + END_LOOP
    + PROMPT,
}
STOPS = {
    "ends the text with the EOS": ("</s>", "<|end|>"),
    "ends earlier answers in another token": ("<|return|>",),
    "writes the stop token with the next turn": ("<|stop|>",),
    "has the next role as its stop token": ("<|eos|>", "<|user|>", "<|tool|>"),
    "puts an empty channel into the prompt": ("<end_of_turn>",),
    "writes tools before the last question": ("</s>",),
    "writes results inside the calling turn": ("<end>", "<result>"),
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def stops_of(kind: str) -> tuple[str, ...]:
    """Return the stop tokens of a kind of template."""
    return STOPS.get(kind, ("<|end|>",))
