"""Token ids of a text, and how often a row's texts are made: by the tokenizer's backend itself."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from align.data.tokens.chat import encode_pair, encode_sft
from align.data.tokens.text_ids import encode_text
from align.types import Message, PreferencePair, SFTExample

TEXTS = ["God made light.", " two  spaces\n\n", "<s>a<|im_end|>b</s>", "日本 🙂", ""]


def called(tokenizer: Any, text: str, *, specials: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=specials)["input_ids"])


@pytest.mark.parametrize("specials", [False, True])
def test_ids_are_those_of_a_call_of_the_tokenizer(make_tokenizer, specials: bool) -> None:
    tokenizer = make_tokenizer(specials="<s> $A </s>")
    for text in TEXTS:
        wanted = called(tokenizer, text, specials=specials)
        assert encode_text(tokenizer, text, specials=specials) == wanted


def test_a_tokenizers_own_cutting_and_padding_do_not_act(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    text = "In the beginning God created the heaven and the earth."
    wanted = encode_text(tokenizer, text)
    assert len(wanted) > 4
    tokenizer.backend_tokenizer.enable_truncation(4)  # as some tokenizer.json have it
    assert encode_text(tokenizer, text) == wanted
    tokenizer.backend_tokenizer.enable_padding(length=99)
    assert encode_text(tokenizer, text) == wanted


def test_special_tokens_are_text_where_the_tokenizer_says_so(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    (end,) = encode_text(tokenizer, "</s>")
    tokenizer.split_special_tokens = True
    found = encode_text(tokenizer, "</s>")
    assert end not in found
    assert tokenizer.decode(found) == "</s>"


def test_a_tokenizer_with_a_call_of_its_own_is_called(make_tokenizer) -> None:
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, text: str, **options: Any) -> Any:
            return super().__call__(text.upper(), **options)

    raw = make_tokenizer().backend_tokenizer
    shouting = Shouting(tokenizer_object=raw, eos_token="</s>")
    assert encode_text(shouting, "abc") == encode_text(make_tokenizer(), "ABC")


# ---------------------------------------------------------------- each text once

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = CHATML.replace("<|im_end|>", "]")
TEXT_TAGS = NO_END.replace("<|im_start|>", "[")


def turns(count: int) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[k % 2], "content": f"turn {k} of many"} for k in range(count))


def test_answers_of_a_pair_share_the_rendering_of_their_prompt(make_tokenizer, monkeypatch) -> None:
    tokenizer = make_tokenizer(template=CHATML, eos="<|im_end|>")
    pair = PreferencePair(id="r", prompt=turns(3), chosen="yes", rejected="no", margin=None)
    encode_pair(tokenizer, pair)  # what is asked once for each template
    asked: list[tuple[int, bool]] = []
    apply = tokenizer.apply_chat_template

    def counted(given: Any, **options: Any) -> Any:
        asked.append((len(given), options["add_generation_prompt"]))
        return apply(given, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    encode_pair(tokenizer, pair)
    assert sorted(asked) == [(3, True), (4, False), (4, False)]


@pytest.mark.parametrize("template", [NO_END, TEXT_TAGS])
def test_prompts_that_go_on_have_the_tokens_of_the_whole_text(make_tokenizer, template) -> None:
    tokenizer = make_tokenizer(template=template)  # EOS is appended: a sequence for each answer
    group = encode_sft(tokenizer, SFTExample(id="r", messages=turns(8)))
    assert len(group.continuations) == 4
    for number, sequence in enumerate(group.continuations):
        asked = turns(8)[: 2 * number + 1]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        wanted = called(tokenizer, text, specials=False)
        ids = [*group.prefix_ids.tolist(), *sequence.input_ids.tolist()]
        assert ids[: len(wanted)] == wanted
