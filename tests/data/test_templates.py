"""Published templates: what is given and what is said, in the tokens that serving gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from align.data.tokens.chat import (
    encode_answers,
    encode_completion,
    encode_examples,
    encode_pair,
    encode_prompt,
    encode_sft,
)
from align.data.tokens.decode import decode_response
from align.data.tokens.findings import of_tokens, show
from align.data.tokens.template import end_token_ids
from align.rollout.experience import decode_rollout
from align.types import AlignError, PreferencePair, Rollout, SFTExample
from tests.data.templates import CHATML, LLAMA2, PUBLISHED, QWEN3, R1, ZEPHYR

U1, A1 = {"role": "user", "content": "Who wept?"}, {"role": "assistant", "content": "Jesus."}
U2, A2 = {"role": "user", "content": "And who came?"}, {"role": "assistant", "content": "Lazarus."}
SYSTEM = {"role": "system", "content": "Be short."}
DIALOGUE = (U1, A1, U2, A2)
THOUGHT = {"role": "assistant", "content": "<think>\nThat is easy.\n</think>\n\nJesus."}
END = {"chatml": "<|im_end|>", "falcon": "</s>"}


@pytest.fixture(scope="session")
def sentencepiece() -> Callable[[str], PreTrainedTokenizerFast]:
    """As Llama 2's: no pre-tokeniser, spaces as ``▁``, one of them put before every text."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    raw.train_from_iterator(
        ["Who wept? Jesus. And who came? Lazarus. [INST] [/INST]\n"] * 5, trainer
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])

    def make(template: str) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(raw.to_str()),
            chat_template=template,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
        )

    return make


def said(tokenizer: Any, group: Any) -> list[str]:
    """The trained text of each turn."""
    return [
        tokenizer.decode(s.input_ids[s.loss_mask], clean_up_tokenization_spaces=False)
        for s in group.continuations
    ]


def sequences(group: Any) -> list[list[int]]:
    return [[*group.prefix_ids.tolist(), *s.input_ids.tolist()] for s in group.continuations]


def served(tokenizer: Any, turns: Any, **options: bool) -> list[int]:
    """Plain transformers."""
    return tokenizer.apply_chat_template(list(turns), tokenize=True, **options)["input_ids"]


def dialogue(*turns: Any) -> SFTExample:
    return SFTExample(id="d.jsonl:1", messages=turns)


# name -> what the two answers of DIALOGUE are trained on, and in how many sequences
TWO = ["Jesus.{end}Lazarus.{end}"]
EXPECTED = {
    "qwen3": ["<think>\n\n</think>\n\nJesus.{end}", "<think>\n\n</think>\n\nLazarus.{end}"],
    "qwen3-thinking": ["\n</think>\n\nJesus.{end}", "\n</think>\n\nLazarus.{end}"],
    "llama-2": [" Jesus. </s> Lazarus. </s>"],
    "mistral-0.3": [" Jesus.</s> Lazarus.</s>"],
    "tulu": ["Jesus.</s>", "Lazarus.</s>"],
    "falcon": [" Jesus.</s>", " Lazarus.</s>"],
    "vicuna": [" Jesus.</s> Lazarus.</s>"],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_answer_is_trained_through_its_end_token(make_tokenizer, name: str) -> None:
    template = PUBLISHED[name]
    tokenizer = make_tokenizer(template=template)
    end = "<|im_end|>" if "<|im_end|>" in template else "</s>"
    group = encode_sft(tokenizer, dialogue(*DIALOGUE))
    assert said(tokenizer, group) == [t.format(end=end) for t in EXPECTED.get(name, TWO)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_last_answer_has_the_tokens_that_serving_gives(make_tokenizer, name: str) -> None:
    """The whole conversation through plain transformers, up to the end of its last turn."""
    tokenizer = make_tokenizer(template=PUBLISHED[name])
    whole = served(tokenizer, DIALOGUE)
    last = sequences(encode_sft(tokenizer, dialogue(*DIALOGUE)))[-1]
    # of those that write no end, EOS is ours; one token "\n\n" of qwen3-thinking crosses the prompt
    assert last[:-1] == whole[: len(last) - 1] or name in ("falcon", "qwen3-thinking")
    pair = PreferencePair(id="x", prompt=DIALOGUE[:3], chosen=(A2,), rejected=(A1,))
    assert sequences(encode_pair(tokenizer, pair))[0] == last
    assert sequences(encode_answers(tokenizer, DIALOGUE[:3], ["Lazarus."]))[0] == last
    prompt = served(tokenizer, DIALOGUE[:3], add_generation_prompt=True)
    assert encode_prompt(tokenizer, DIALOGUE[:3]).tolist() == prompt
    if name != "r1":  # an answer without thinking is given the prompt without <think>
        answer = encode_completion(tokenizer, DIALOGUE[:3], "Lazarus.").tolist()
        assert [*prompt, *answer] == last


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_system_text_is_given_or_refused(make_tokenizer, name: str) -> None:
    tokenizer = make_tokenizer(template=PUBLISHED[name])
    why = {"mistral-0.1": "leaves out turns of role 'system'", "gemma": "role not supported"}
    if name in why:
        with pytest.raises(AlignError, match=why[name]):
            encode_sft(tokenizer, dialogue(SYSTEM, *DIALOGUE))
        return
    group = encode_sft(tokenizer, dialogue(SYSTEM, *DIALOGUE))
    assert all("Be short." in tokenizer.decode(ids) for ids in sequences(group))


def test_mistral_moves_the_system_text_to_each_answers_own_question(make_tokenizer) -> None:
    tokenizer = make_tokenizer(template=PUBLISHED["mistral-0.3"])
    group = encode_sft(tokenizer, dialogue(SYSTEM, *DIALOGUE))
    assert [tokenizer.decode(ids) for ids in sequences(group)] == [
        "<s>[INST] Be short.\n\n Who wept?[/INST] Jesus.</s>",
        "<s>[INST] Who wept?[/INST] Jesus.</s>"
        "[INST] Be short.\n\n And who came?[/INST] Lazarus.</s>",
    ]
    assert said(tokenizer, group) == [" Jesus.</s>", " Lazarus.</s>"]


# ---------------------------------------------------------------- thinking


@pytest.mark.parametrize("name", ["qwen3", "chatml"])
def test_thinking_is_said_in_its_own_turn(make_tokenizer, name: str) -> None:
    tokenizer = make_tokenizer(template=PUBLISHED[name])
    group = encode_sft(tokenizer, dialogue(U1, THOUGHT, U2, A2))
    assert said(tokenizer, group)[0].startswith(f"{THOUGHT['content']}<|im_end|>")
    kept = "That is easy" in tokenizer.decode(sequences(group)[-1])
    assert kept == (name == "chatml")  # qwen3 drops it before the next question, as in serving


def test_thinking_that_the_template_drops_is_said_all_the_same(make_tokenizer) -> None:
    """R1 opens it in the prompt, and leaves it out of every rendered turn."""
    tokenizer = make_tokenizer(template=R1)
    group = encode_sft(tokenizer, dialogue(U1, THOUGHT))
    assert said(tokenizer, group) == ["That is easy.\n</think>\n\nJesus.</s>"]
    (whole,) = sequences(group)
    given = served(tokenizer, (U1,), add_generation_prompt=True)
    assert whole[: len(given)] == given
    # as it was sampled, after the <think> of the prompt
    sampled = encode_answers(tokenizer, (U1,), ["That is easy.\n</think>\n\nJesus."])
    assert sequences(sampled) == [whole]
    plain = encode_answers(tokenizer, (U1,), ["Jesus."])
    assert tokenizer.decode(sequences(plain)[0]) == "<s>[User]Who wept?[Assistant]Jesus.</s>"


def test_a_pair_may_have_an_answer_with_thinking_and_one_without(make_tokenizer) -> None:
    tokenizer = make_tokenizer(template=R1)
    group = encode_pair(
        tokenizer, PreferencePair(id="x", prompt=(U1,), chosen=(THOUGHT,), rejected=(A2,))
    )
    assert said(tokenizer, group) == ["That is easy.\n</think>\n\nJesus.</s>", "Lazarus.</s>"]
    assert tokenizer.decode(group.prefix_ids) == "<s>[User]Who wept?[Assistant]"


def test_a_turns_thinking_key_is_rendered_or_refused(make_tokenizer) -> None:
    turn = {**A1, "reasoning_content": "That is easy."}
    tokenizer = make_tokenizer(template=QWEN3)
    group = encode_sft(tokenizer, dialogue(U1, turn, U2, A2))
    assert said(tokenizer, group)[0] == "<think>\nThat is easy.\n</think>\n\nJesus.<|im_end|>"
    line = r"^d.jsonl:1: the chat template leaves out 'reasoning_content' of a turn of role 'assis"
    with pytest.raises(AlignError, match=line):
        encode_examples(make_tokenizer(template=CHATML), [dialogue(U1, turn)], max_tokens=99)


# ---------------------------------------------------------------- keys of a turn


@pytest.mark.parametrize(
    ("turn", "key"),
    [
        ({**U1, "name": "Martha"}, "name"),
        ({**A1, "tool_calls": [{"function": {"name": "weep", "arguments": {}}}]}, "tool_calls"),
        ({**A1, "thinking": "easy"}, "thinking"),
        ({**SYSTEM, "documents": ["John 11"]}, "documents"),
    ],
)
def test_a_key_that_the_template_leaves_out_is_named(chatml, turn: Any, key: str) -> None:
    with pytest.raises(AlignError, match=f"leaves out '{key}' of a turn of role '{turn['role']}'"):
        encode_sft(chatml, dialogue(turn, U1, A1) if turn is not A1 else dialogue(U1, turn))
    with pytest.raises(AlignError, match=f"leaves out '{key}'"):
        encode_prompt(chatml, (turn, U1))


def test_keys_that_say_nothing_of_what_was_said_are_let_be(chatml) -> None:
    more = {
        "tool_calls": None,
        "name": "",
        "thinking": [],
        "timestamp": 7,
        "id": "a",
        "train": True,
    }
    with_keys = dialogue(
        U1, {**A1, **more}, {"role": "tool", "content": "yes", "tool_call_id": "b"}, A2
    )
    plain = dialogue(U1, A1, {"role": "tool", "content": "yes"}, A2)
    assert sequences(encode_sft(chatml, with_keys)) == sequences(encode_sft(chatml, plain))


def test_tool_calls_go_to_a_template_that_writes_them(make_tokenizer) -> None:
    calls = "{% for c in m.tool_calls %}CALL {{ c.function.name }}{% endfor %}"
    tokenizer = make_tokenizer(template=CHATML.replace("<|im_end|>", calls + "<|im_end|>", 1))
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weep"}}]}
    group = encode_sft(tokenizer, dialogue(U1, turn, {"role": "tool", "content": '"a"\nb'}, A2))
    assert said(tokenizer, group) == ["CALL weep<|im_end|>Lazarus.<|im_end|>"]


def test_a_tools_words_may_be_written_as_json(make_tokenizer) -> None:
    """As Llama 3.1's template writes them."""
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | tojson }}")
    encode_sft(
        make_tokenizer(template=template), dialogue(U1, {"role": "tool", "content": '"a"\nb'}, A2)
    )


# ---------------------------------------------------------------- turns that are not trained


def test_a_turn_that_is_not_trained_is_a_part_of_what_follows(chatml) -> None:
    silent = {**A1, "train": False}
    whole, part = (encode_sft(chatml, dialogue(U1, a, U2, A2)) for a in (A1, silent))
    assert sequences(whole) == sequences(part)
    assert said(chatml, part) == ["Lazarus.<|im_end|>"]
    with pytest.raises(AlignError, match="every assistant turn says that it is not trained"):
        encode_sft(chatml, dialogue(U1, silent))
    with pytest.raises(AlignError, match="loss_on=all trains every token, but a turn says"):
        encode_sft(chatml, dialogue(U1, silent, U2, A2), loss_on="all")


def test_what_users_and_tools_say_in_an_answer_is_not_trained(chatml) -> None:
    example = SFTExample(id="x", prompt=(U1,), completion=(A1, U2, A2))
    assert said(chatml, encode_sft(chatml, example)) == ["Jesus.<|im_end|>Lazarus.<|im_end|>"]
    pair = PreferencePair(id="x", prompt=(U1,), chosen=(A1, U2, A2), rejected=(A2,))
    assert said(chatml, encode_pair(chatml, pair))[0] == "Jesus.<|im_end|>Lazarus.<|im_end|>"


def test_an_answer_of_turns_that_are_rewritten_is_no_pair(make_tokenizer) -> None:
    pair = PreferencePair(id="x", prompt=(U1,), chosen=(A1, U2, A2), rejected=(A2,))
    with pytest.raises(AlignError, match="put all but the last into the prompt"):
        encode_pair(make_tokenizer(template=QWEN3), pair)


# ---------------------------------------------------------------- the first turn, long dialogues


@pytest.mark.parametrize(("name", "given"), [
    ("chatml", "<|im_start|>assistant\n"), ("r1", "<s>[Assistant]"), ("zephyr", "[assistant]\n"),
    ("phi-3.5", "<|im_start|>assistant\n"),
    ("qwen2.5", "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>assistant\n"),
])  # fmt: skip
def test_a_conversation_may_begin_with_the_assistant(make_tokenizer, name: str, given: str) -> None:
    tokenizer = make_tokenizer(template=PUBLISHED[name])
    (sequence,) = encode_sft(tokenizer, dialogue(A1, U2, A2)).continuations
    first = int(sequence.loss_mask.argmax())
    assert tokenizer.decode(sequence.input_ids[:first]) == given
    assert tokenizer.decode(sequence.input_ids[sequence.loss_mask]).startswith("Jesus.")


def test_a_long_dialogue_of_own_prefixes_becomes_several_groups(make_tokenizer) -> None:
    """A microbatch holds a whole group: together they would need memory for all turns at once."""
    tokenizer = make_tokenizer(template=QWEN3)
    example = dialogue(*DIALOGUE * 4)
    whole = encode_sft(tokenizer, example)
    longest = max(len(ids) for ids in sequences(whole))
    groups, owners, _ = encode_examples(tokenizer, [example], max_tokens=longest)
    assert len(groups) > 1
    assert owners == [0] * len(groups)
    assert max(g.num_tokens for g in groups) <= longest
    assert [ids for g in groups for ids in sequences(g)] == sequences(whole)
    assert sum(g.num_counted for g in groups) == whole.num_counted


# ---------------------------------------------------------------- end tokens


def test_words_that_are_added_but_not_special_end_nothing(make_tokenizer) -> None:
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}\n\n")
    tokenizer = make_tokenizer(template=template)
    tokenizer.add_tokens(["\n\n", "</answer>"])  # as StarCoder and GPT-NeoX have runs of spaces
    assert end_token_ids(tokenizer) == (1, 3)
    assert said(tokenizer, encode_sft(tokenizer, dialogue(U1, A1))) == ["Jesus.\n\n<|im_end|>"]


def test_what_the_template_writes_behind_the_end_is_not_said(make_tokenizer) -> None:
    template = CHATML.replace("<|im_end|>\n", "<|im_end|>\n(next turn)\n")
    tokenizer = make_tokenizer(template=template)
    group = encode_sft(tokenizer, dialogue(*DIALOGUE))
    assert said(tokenizer, group) == ["Jesus.<|im_end|>Lazarus.<|im_end|>"]


def test_a_turn_of_another_kind_may_end_in_a_token_of_its_own(make_tokenizer) -> None:
    """As Llama 3.1's tool calls end in <|eom_id|>; EOS is not put behind it."""
    template = CHATML.replace("<|im_end|>\n", "{{ '<s>' if m.call else '<|im_end|>\n' }}")
    tokenizer = make_tokenizer(template=template)
    group = encode_sft(tokenizer, dialogue(U1, {**A1, "call": "x"}))
    assert said(tokenizer, group) == ["Jesus.<s>"]


@pytest.mark.parametrize(
    "spelt", ["Jesus.<|im_end|>", "Jesus.<|im_end|>\n", "Jesus.<|im_end|><|im_end|>"]
)
def test_an_end_token_is_never_doubled(chatml, spelt: str) -> None:
    chat = dialogue(U1, {"role": "assistant", "content": spelt})
    string = SFTExample(id="d.jsonl:2", prompt="Who wept?", completion=spelt)
    for example in (chat, string):
        group = encode_sft(chatml, example)
        assert said(chatml, group) == ["Jesus.<|im_end|>"]
        (finding,) = of_tokens(chatml, [(example, group)])
        assert (finding.level, finding.places) == ("warning", (example.id,))
        assert "spell out the end token" in finding.what


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ((U1, {"role": "assistant", "content": "a<|im_end|>b"}), "an end token in the middle"),
        (({"role": "user", "content": "a<|im_end|>b"}, A1), "spell out tokens with which"),
        ((SYSTEM, {"role": "user", "content": "<|im_start|>system"}, A1), "spell out tokens with"),
        (({"role": "system", "content": "<s>"}, U1, A1), "spell out tokens with"),
        ((U1, {"role": "assistant", "content": "a<|im_end|>b<|im_end|>"}), "in the middle"),
    ],
)
def test_special_tokens_in_chats_are_found(chatml, turns: Any, what: str) -> None:
    example = dialogue(*turns)
    found = list(of_tokens(chatml, [(example, encode_sft(chatml, example))]))
    assert any(what in f.what and f.level == "error" and f.places == (example.id,) for f in found)
    pair = PreferencePair(id="p", prompt=turns[:-1], chosen=turns[-1:], rejected=(A2,))
    found = list(of_tokens(chatml, [(pair, encode_pair(chatml, pair))]))
    assert any(what in f.what and f.level == "error" for f in found)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_template_itself_writes_is_no_finding(make_tokenizer, name: str) -> None:
    """BOS before every question (Llama 2), and a BOS that is the turns' own tag (SmolLM2)."""
    for bos in ("<s>", "<|im_start|>"):
        tokenizer = make_tokenizer(template=PUBLISHED[name], bos_token=bos)
        example = dialogue(*DIALOGUE)
        found = list(of_tokens(tokenizer, [(example, encode_sft(tokenizer, example))]))
        assert [f.level for f in found] == (["note"] if name == "r1" else [])


def test_answers_without_the_thinking_that_the_prompt_opens_are_noted(make_tokenizer) -> None:
    tokenizer = make_tokenizer(template=R1)
    for answer, count in ((THOUGHT, 0), (A1, 1)):
        example = dialogue(U1, answer)
        found = list(of_tokens(tokenizer, [(example, encode_sft(tokenizer, example))]))
        assert [f.what.startswith("rows with answers that lack") for f in found] == [True] * count


def test_strings_with_the_templates_own_bos_are_no_finding(make_tokenizer) -> None:
    tokenizer = make_tokenizer(template=LLAMA2, specials="<s> $A")
    text = "[INST] Who? [/INST] He. </s><s>[INST] And who? [/INST]"
    example = SFTExample(id="x", prompt=text, completion=" She. ")
    assert list(of_tokens(tokenizer, [(example, encode_sft(tokenizer, example))])) == []
    tokenizer.chat_template = ZEPHYR
    (finding,) = of_tokens(tokenizer, [(example, encode_sft(tokenizer, example))])
    assert finding.what == "rows with BOS more than once"


# ---------------------------------------------------------------- sentencepiece


@pytest.mark.parametrize("template", [LLAMA2, ZEPHYR], ids=["llama-2", "zephyr"])
def test_sentencepiece_tokens_are_those_of_the_whole(sentencepiece, template: str) -> None:
    tokenizer = sentencepiece(template)
    (ids,) = sequences(encode_sft(tokenizer, dialogue(*DIALOGUE)))
    whole = served(tokenizer, DIALOGUE)
    assert ids == whole[: len(ids)]
    assert set(tokenizer.decode(whole[len(ids) :])) <= {" ", "\n"}
    assert sequences(encode_answers(tokenizer, DIALOGUE[:3], ["Lazarus."])) == [ids]


def test_a_string_answer_gets_no_space_of_its_own(sentencepiece) -> None:
    tokenizer = sentencepiece(ZEPHYR)
    for prompt, answer in (
        ("Who wept?", "Jesus."),
        ("Who wept?", " Jesus."),
        ("Who wept? ", "Jesus."),
    ):
        (ids,) = sequences(
            encode_sft(tokenizer, SFTExample(id="x", prompt=prompt, completion=answer))
        )
        assert tokenizer.decode(ids) == f"<s> {prompt}{answer}</s>"


@pytest.mark.parametrize("prompt", ["Who wept?", "Who wept? ", "Who wept?\n", "Who wept"])
@pytest.mark.parametrize("answer", ["Jesus.", " Jesus.", "  Jesus.", " and", "\n Lazarus"])
def test_a_string_answer_is_decoded_to_the_text_that_was_said(
    sentencepiece, prompt: str, answer: str
) -> None:
    """The decoder alone drops the space of the first word, and the text has other tokens then."""
    tokenizer = sentencepiece(ZEPHYR)
    (group,) = encode_answers(tokenizer, prompt, [answer]).continuations
    ids = group.input_ids
    given = encode_prompt(tokenizer, prompt)
    text = decode_response(tokenizer, ids, prompt=prompt, prompt_ids=given)
    assert text == answer
    assert encode_completion(tokenizer, prompt, text).tolist() == ids.tolist()


def test_what_a_template_writes_before_an_answer_is_not_said(sentencepiece) -> None:
    """Llama 2's puts a space there: it stays with the template."""
    tokenizer = sentencepiece(LLAMA2)
    ids = encode_completion(tokenizer, DIALOGUE[:3], "Lazarus.")
    given = encode_prompt(tokenizer, DIALOGUE[:3])
    found = decode_response(tokenizer, ids, prompt=DIALOGUE[:3], prompt_ids=given)
    assert found.strip() == "Lazarus."
    assert not found.startswith(" ")


def test_each_row_of_a_rollout_is_decoded_behind_its_own_prompt(sentencepiece) -> None:
    tokenizer = sentencepiece(ZEPHYR)
    prompts = ["Who wept?", DIALOGUE[:1]]
    given = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    ids = torch.tensor(encode_completion(tokenizer, "Who wept?", " Jesus.").tolist())
    rows = ids.expand(4, -1)
    rollout = Rollout(
        prompt_ids=(given[0], given[0], given[1], given[1]),
        input_ids=rows,
        response_mask=torch.ones_like(rows, dtype=torch.bool),
        logprobs=torch.zeros(rows.shape),
        finished=torch.ones(4, dtype=torch.bool),
    )
    texts = decode_rollout(tokenizer, rollout, prompts, end_ids=())
    assert texts == [" Jesus.", " Jesus.", "Jesus.", "Jesus."]


def test_shown_words_keep_their_spaces(sentencepiece) -> None:
    tokenizer = sentencepiece(LLAMA2)
    example = dialogue(*DIALOGUE)
    ((_, pieces),) = show(tokenizer, encode_sft(tokenizer, example), example).parts
    text = "".join(text for text, _ in pieces)
    assert "[INST] Who wept? [/INST] Jesus. </s>" in text
    pair = PreferencePair(id="x", prompt="Who wept?", chosen=" Jesus.", rejected=" Lazarus.")
    parts = dict(show(tokenizer, encode_pair(tokenizer, pair), pair).parts)
    assert "".join(text for text, _ in parts["chosen"]) == " Jesus.</s>"
