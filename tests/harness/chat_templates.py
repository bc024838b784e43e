"""Chat templates in the shapes that model families use, and a tokenizer with one of them."""

from tiny_tokenizers import byte_level

HEAD = "{% for m in messages %}"
CHATML = HEAD + (
    "<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
LLAMA2 = HEAD + (
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
PHI3 = CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add")
EMPTY_THOUGHT = HEAD + (
    "<|user|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
DROPS_THOUGHT = HEAD + (
    "<|user|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n<think>\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
IGNORES_SYSTEM = CHATML.replace(HEAD, "{% for m in messages if m['role'] != 'system' %}")
NO_END = HEAD + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def chatting(template):
    tokenizer = byte_level(trim=True)
    tokenizer.chat_template = template
    return tokenizer
