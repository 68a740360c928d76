"""Chat templates written by hand with the quirks of published ones: what tests render with.

The tags are those of the test tokenizer's special tokens (``<s>``, ``</s>``, ``<|im_start|>``,
``<|im_end|>``) or plain text, so that one tokenizer serves all of them.
"""

from __future__ import annotations

_EACH = "{% for m in messages %}"
_END = "{% endfor %}"


def _by_role(**written: str) -> str:
    cases = [f"m['role'] == '{role}' %}}{text}" for role, text in written.items()]
    return "{% if " + "{% elif ".join(cases) + "{% endif %}"


def _prompt(text: str) -> str:
    return "{% if add_generation_prompt %}" + text + "{% endif %}"


_WORDS = "{{ m['content'] }}"
_TAGGED = "<|im_start|>{{ m['role'] }}\n" + _WORDS + "<|im_end|>\n"
_ASSISTANT = "<|im_start|>assistant\n"

CHATML = _EACH + _TAGGED + _END + _prompt(_ASSISTANT)

QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHATML
)
"""Writes a system text of its own where there is none."""

_CALLS = (
    "{% for c in m.tool_calls %}<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>"
    "{% endfor %}"
)
HERMES = (
    "{% if tools %}<|im_start|>system\n{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}\n\n{% endif %}# Tools\n"
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    + _EACH
    + "{% if not (tools and loop.first and m['role'] == 'system') %}"
    + _TAGGED.replace("<|im_end|>", _CALLS + "<|im_end|>")
    + "{% endif %}"
    + _END
    + _prompt(_ASSISTANT)
)
"""Tools in the system turn, calls as tags in the words, as Qwen 2.5 writes them."""

MISTRAL_TOOLS = (
    "{% set n = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set n.last = loop.index0 %}{% endif %}{% endfor %}<s>"
    + _EACH
    + "{% if m['role'] == 'user' %}{% if tools and loop.index0 == n.last %}"
    "[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST]{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% else %}{{ m['content'] }}</s>{% endif %}" + _END
)
"""Tools before the last question, wherever that is."""

QWEN3 = (
    "{% set n = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set n.last = loop.index0 %}{% endif %}{% endfor %}"
    + _EACH
    + "{% set c = m['content'] %}{% set r = '' %}{% if m['role'] == 'assistant' %}"
    "{% if m.reasoning_content is string %}{% set r = m.reasoning_content %}"
    "{% elif '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > n.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n"
    "{% else %}" + _TAGGED + "{% endif %}" + _END + _prompt(_ASSISTANT)
)
"""Drops the thinking of turns before the last question, and opens none in the prompt."""

QWEN3_THINKING = QWEN3[: -len("{% endif %}")] + "<think>\n{% endif %}"
"""Opens the thinking in the prompt too; an answer without any has an empty one."""

R1 = (
    "<s>"
    + _EACH
    + _by_role(
        system=_WORDS,
        user="[User]" + _WORDS,
        assistant="[Assistant]{{ m['content'].split('</think>')[-1] }}</s>",
    )
    + _END
    + _prompt("[Assistant]<think>\n")
)
"""Drops all thinking, and opens it in the prompt."""

LLAMA2 = (
    _EACH
    + _by_role(
        system="",
        user="<s>[INST] {% if loop.index0 == 1 and messages[0]['role'] == 'system' %}<<SYS>>\n"
        "{{ messages[0]['content'] }}\n<</SYS>>\n\n{% endif %}{{ m['content'] | trim }} [/INST]",
        assistant=" {{ m['content'] | trim }} </s>",
    )
    + _END
)
"""The system text is inside the first question; BOS before every question."""

LLAMA3 = (
    "<s>" + _EACH + "<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>" + _END
) + _prompt("<|im_start|>assistant\n\n")
"""The header ends in two line ends, which one token may be; EOS is another token than the end."""

MISTRAL1 = (
    "<s>" + _EACH + _by_role(user="[INST] " + _WORDS + " [/INST]", assistant=_WORDS + "</s> ")
) + _END
"""Leaves system turns out without a word; a space follows EOS."""

MISTRAL3 = (
    "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' %}<s>"
    + _EACH
    + _by_role(
        user="[INST]{% if s and loop.last %} {{ s }}\n\n{% endif %} " + _WORDS + "[/INST]",
        assistant=" " + _WORDS + "</s>",
    )
    + _END
)
"""The system text moves to the last question."""

PHI35 = (
    _EACH
    + "<|im_start|>{{ m['role'] }}\n"
    + _WORDS
    + "<|im_end|>\n"
    + _END
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
"""EOS after the last turn, behind its end token; none in the prompt."""

ZEPHYR = (
    _EACH + "[{{ m['role'] }}]\n" + _WORDS + "{{ eos_token }}\n" + _END + _prompt("[assistant]\n")
)

TULU = (
    _EACH
    + "[{{ m['role'] }}]\n"
    + _WORDS
    + "{% if m['role'] == 'assistant' and loop.last %}{{ eos_token }}{% endif %}\n"
    + _END
    + _prompt("[assistant]\n")
)
"""EOS after the last answer only."""

GEMMA = (
    "<s>{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + _EACH + "{% set r = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<|im_start|>{{ r }}\n{{ m['content'] | trim }}<|im_end|>\n"
    + _END
    + _prompt("<|im_start|>model\n")
)
"""Refuses system turns, and calls the assistant a model."""

FALCON = (
    _EACH + "{% if not loop.first %}\n\n{% endif %}{{ m['role'] | capitalize }}: "
    "{{ m['content'].strip().replace('\n\n', '\n') }}" + _END + _prompt("\n\nAssistant:")
)
"""No end token at all, and white space of its own."""

VICUNA = (
    "A chat. "
    + _EACH
    + _by_role(
        system=_WORDS + " ",
        user="USER: " + _WORDS + " ",
        assistant="ASSISTANT: " + _WORDS + "</s>",
    )
    + _END
    + _prompt("ASSISTANT:")
)
"""The prompt ends before the space that the turn begins with."""

COMMAND_R = (
    "<s>"
    + _EACH
    + "<|im_start|>[{{ m['role'] | upper }}]{{ m['content'] | trim }}<|im_end|>"
    + _END
    + _prompt("<|im_start|>[ASSISTANT]")
)

SMOLLM3 = (
    _EACH
    + "{% if m['role'] == 'assistant' %}<|im_start|>assistant\n<think>\n\n</think>\n\n"
    + "{{ m['content'].lstrip('\n') }}<|im_end|>\n{% else %}"
    + _TAGGED
    + "{% endif %}"
    + _END
    + _prompt("<|im_start|>assistant\n<think>\n\n</think>\n\n")
)
"""An empty thinking in every turn and in the prompt."""

PUBLISHED = {
    "chatml": CHATML, "qwen2.5": QWEN25, "qwen3": QWEN3, "qwen3-thinking": QWEN3_THINKING, "r1": R1,
    "llama-2": LLAMA2, "llama-3": LLAMA3, "mistral-0.1": MISTRAL1, "mistral-0.3": MISTRAL3,
    "phi-3.5": PHI35, "zephyr": ZEPHYR, "tulu": TULU, "gemma": GEMMA, "falcon": FALCON,
    "vicuna": VICUNA, "command-r": COMMAND_R, "smollm3": SMOLLM3,
}  # fmt: skip
