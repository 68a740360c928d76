"""Which tokens are trained, scored and sampled, for tokenizers that differ where it hurts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.data.tokens import answers
from align.data.tokens.chat import (
    encode_completion,
    encode_examples,
    encode_pair,
    encode_prompt,
    encode_sft,
    end_token_ids,
)
from align.data.tokens.decode import decode_response
from align.data.tokens.packing import collate
from align.types import AlignError, PreferencePair, PromptExample, SFTExample

BOS, EOS, IM_START, IM_END, PAD = 0, 1, 2, 3, 4

QUESTION = ({"role": "user", "content": "Who wept?"},)
TWO_ROUNDS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second answer"},
)


def counted_text(tokenizer, group) -> str:
    (sequence,) = group.continuations
    return tokenizer.decode(sequence.input_ids[sequence.loss_mask])


# ---------------------------------------------------------------- strings


def test_a_string_prompt_has_one_bos_and_no_eos(make_tokenizer) -> None:
    tokenizer = make_tokenizer(specials="<s> $A </s>")
    ids = encode_prompt(tokenizer, "In the beginning")
    assert ids.dtype == np.int32
    assert ids[0] == BOS
    assert EOS not in ids
    assert tokenizer.decode(ids[1:]) == "In the beginning"


def test_a_bos_that_the_text_spells_out_is_not_doubled(plain) -> None:
    assert encode_prompt(plain, "<s>And").tolist() == encode_prompt(plain, "And").tolist()


def test_a_prompt_that_ends_in_the_eos_string_keeps_it(plain) -> None:
    assert encode_prompt(plain, "And</s>")[-1] == EOS


def test_a_string_completion_gets_eos_once_and_no_bos(plain) -> None:
    ids = encode_completion(plain, "Who?", "the king")
    assert ids[-1] == EOS
    assert (ids == EOS).sum() == 1
    assert BOS not in ids
    assert encode_completion(plain, "Who?", "the king</s>").tolist() == ids.tolist()


def test_an_unfinished_completion_has_no_end_token(plain, chatml) -> None:
    assert EOS not in encode_completion(plain, "Who?", "the king", finished=False)
    assert IM_END not in encode_completion(chatml, QUESTION, "the king", finished=False)


def test_prompt_and_completion_never_merge(plain) -> None:
    """Sampling continues tok(prompt); " th" + "e" must not become the token " the" in training."""
    prompt, completion = encode_prompt(plain, " th"), encode_completion(plain, " th", "e")
    example = SFTExample(id="x", prompt=" th", completion="e")
    (sequence,) = encode_sft(plain, example).continuations
    assert sequence.input_ids.tolist() == [*prompt, *completion]
    assert len(sequence.input_ids) == len(encode_prompt(plain, " the")) + 2  # one more, and EOS
    assert sequence.loss_mask.tolist() == [False] * len(prompt) + [True] * len(completion)


def test_eos_is_learned_though_it_is_the_padding_token(make_tokenizer) -> None:
    tokenizer = make_tokenizer(pad_token="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    batch = collate([encode_sft(tokenizer, SFTExample(id="x", prompt="a", completion="b"))])
    assert batch.input_ids[0, -1] == EOS
    assert batch.loss_mask[0, -1]
    assert batch.segment_ids.min() == 1  # nothing is taken for padding


def test_a_tokenizer_without_eos_is_refused(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(AlignError, match="no EOS token"):
        encode_completion(tokenizer, "a", "b")


# ---------------------------------------------------------------- conversations


def test_a_prompt_of_turns_opens_the_assistants_turn(chatml) -> None:
    ids = encode_prompt(chatml, QUESTION)
    expected = "<|im_start|>user\nWho wept?<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.decode(ids) == expected
    assert ids[0] == IM_START  # one id, not the letters of the tag


def test_an_answer_of_turns_ends_at_the_end_of_turn(chatml) -> None:
    """Not at the newline that ChatML writes after it: sampling stops before that one."""
    ids = encode_completion(chatml, QUESTION, "Jesus.")
    assert chatml.decode(ids) == "Jesus.<|im_end|>"
    as_turn = ({"role": "assistant", "content": "Jesus."},)
    assert encode_completion(chatml, QUESTION, as_turn).tolist() == ids.tolist()


def test_no_double_bos_from_a_template_that_writes_its_own(make_tokenizer) -> None:
    template = "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    tokenizer = make_tokenizer(template=template, specials="<s> $A")
    assert encode_prompt(tokenizer, QUESTION).tolist().count(BOS) == 1
    (sequence,) = encode_sft(tokenizer, SFTExample(id="x", messages=TWO_ROUNDS)).continuations
    assert sequence.input_ids.tolist().count(BOS) == 1


def test_eos_is_added_where_a_template_closes_nothing(make_tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(template=template)
    assert end_token_ids(tokenizer) == (EOS,)
    assert tokenizer.decode(encode_completion(tokenizer, QUESTION, "He.")) == "He.\n</s>"
    group = encode_sft(tokenizer, SFTExample(id="x", messages=TWO_ROUNDS))
    # each turn learns to stop; the second one is not given an EOS that serving would not give it
    said = [tokenizer.decode(s.input_ids[s.loss_mask]) for s in group.continuations]
    assert said == ["first answer\n</s>", "second answer\n</s>"]
    second = [*group.prefix_ids, *group.continuations[1].input_ids]
    assert tokenizer.decode(second) == (
        "system: Be brief.\nuser: one\nassistant: first answer\n"
        "user: two\nassistant: second answer\n</s>"
    )


def test_every_assistant_turn_counts_with_its_end_and_nothing_else(chatml) -> None:
    group = encode_sft(chatml, SFTExample(id="x", messages=TWO_ROUNDS))
    assert counted_text(chatml, group) == "first answer<|im_end|>second answer<|im_end|>"
    (sequence,) = group.continuations
    assert chatml.decode(sequence.input_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst answer<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nsecond answer<|im_end|>"
    )


def test_a_dialogue_is_trained_on_the_tokens_that_sampling_sees(chatml) -> None:
    (sequence,) = encode_sft(chatml, SFTExample(id="x", messages=TWO_ROUNDS)).continuations
    asked, answer = TWO_ROUNDS[:-1], TWO_ROUNDS[-1:]
    sampled = [*encode_prompt(chatml, asked), *encode_completion(chatml, asked, answer)]
    assert sequence.input_ids.tolist() == sampled


def test_a_template_that_leaves_out_earlier_answers_is_refused(make_tokenizer) -> None:
    forgetful = (
        "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}"
        "[{{ m['role'] }}] {{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    with pytest.raises(AlignError, match="leaves out turns of role 'assistant'"):
        encode_sft(make_tokenizer(template=forgetful), SFTExample(id="x", messages=TWO_ROUNDS))


def test_turns_without_a_template_are_refused(plain) -> None:
    with pytest.raises(AlignError, match="no chat template"):
        encode_prompt(plain, QUESTION)


def test_a_template_that_raises_is_told_in_one_line(make_tokenizer) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(AlignError, match=r"refuses turns in this order \(user\): roles must"):
        encode_prompt(make_tokenizer(template=template), QUESTION)


def test_end_tokens_are_eos_the_turns_end_and_what_the_model_names(make_tokenizer) -> None:
    gemma_like = "{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer = make_tokenizer(template=gemma_like)  # EOS is </s>
    assert end_token_ids(tokenizer) == (EOS, IM_END)
    assert end_token_ids(tokenizer, [EOS, 7]) == (EOS, IM_END, 7)
    tokenizer.chat_template = None
    assert end_token_ids(tokenizer, 9) == (EOS, 9)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_decoded_responses_encode_to_the_same_tokens(plain, chatml, text: str) -> None:
    for tokenizer, prompt in ((plain, "Who?"), (chatml, QUESTION)):
        ids = encode_completion(tokenizer, prompt, text)
        assert decode_response(tokenizer, ids) == text
        again = encode_completion(tokenizer, prompt, decode_response(tokenizer, ids))
        assert again.tolist() == ids.tolist()


def test_decoding_removes_the_final_end_token_only(plain) -> None:
    ids = encode_completion(plain, "", "a , b")
    assert decode_response(plain, ids) == "a , b"  # spaces are not tidied
    assert decode_response(plain, ids[:-1]) == "a , b"
    assert decode_response(plain, [EOS, *ids]) == "</s>a , b"
    assert decode_response(plain, []) == ""


# ---------------------------------------------------------------- groups


def test_plain_text_counts_whole_and_ends_in_eos(plain) -> None:
    example = SFTExample(id="x", text="And God said")
    assert counted_text(plain, encode_sft(plain, example)) == "<s>And God said</s>"
    with pytest.raises(AlignError, match="plain text has no completion"):
        encode_sft(plain, example, loss_on="completion")


def test_loss_on_all_counts_the_prompt_too(plain) -> None:
    example = SFTExample(id="x", prompt="Who? ", completion="He.")
    assert counted_text(plain, encode_sft(plain, example, loss_on="all")) == "<s>Who? He.</s>"
    assert counted_text(plain, encode_sft(plain, example)) == "He.</s>"


def test_a_pair_holds_its_prompt_once(plain) -> None:
    pair = PreferencePair(id="x", prompt="Who? ", chosen="He.", rejected="She.", margin=0.5)
    group = encode_pair(plain, pair)
    texts = [plain.decode(c.input_ids) for c in group.continuations]
    assert (plain.decode(group.prefix_ids), texts) == ("<s>Who? ", ["He.</s>", "She.</s>"])
    assert all(c.loss_mask.all() for c in group.continuations)
    assert (group.id, group.margin) == ("x", 0.5)


def test_answers_that_are_the_same_tokens_are_no_pair(plain) -> None:
    pair = PreferencePair(id="f.jsonl:3", prompt="Who?", chosen="He.", rejected="He.</s>")
    with pytest.raises(AlignError, match=r"f.jsonl:3: chosen and rejected are the same tokens"):
        encode_examples(plain, [pair], max_tokens=99)


def test_a_prompt_of_ten_thousand_tokens_is_told_and_not_cut(plain) -> None:
    long = PreferencePair(id="f.jsonl:2", prompt="x" * 9999, chosen="a", rejected="b")
    short = PreferencePair(id="f.jsonl:1", prompt="x", chosen="a", rejected="b")
    with pytest.raises(AlignError) as caught:
        encode_examples(plain, [short, long], max_tokens=1024)
    assert str(caught.value) == (
        "f.jsonl:2: prompt has 10000 tokens and its longest answer 2, more than "
        "data.max_tokens=1024; shorten it, raise data.max_tokens; or set data.on_bad_row=skip"
    )
    groups, owners, dropped = encode_examples(
        plain, [long, short], max_tokens=1024, on_bad_row="skip"
    )
    assert owners == [1]
    assert [g.id for g in groups] == ["f.jsonl:1"]
    assert dropped == {"longer than data.max_tokens": 1}


def test_exactly_max_tokens_fits(plain) -> None:
    pair = PreferencePair(id="x", prompt="abc", chosen="d", rejected="ef")
    exactly = len(encode_prompt(plain, "abc")) + len(encode_completion(plain, "abc", "ef"))
    assert len(encode_examples(plain, [pair], max_tokens=exactly)[0]) == 1
    with pytest.raises(AlignError, match=f"data.max_tokens={exactly - 1}"):
        encode_examples(plain, [pair], max_tokens=exactly - 1)


def test_when_no_row_fits_skipping_is_an_error_too(plain) -> None:
    prompt = PromptExample(id="p:1", prompt="x" * 50)
    with pytest.raises(AlignError, match="no usable row among 1; the first: p:1: prompt has 51"):
        encode_examples(plain, [prompt], max_tokens=10, on_bad_row="skip")


def test_prompts_become_groups_without_continuations(plain) -> None:
    groups, _, _ = encode_examples(plain, [PromptExample(id="p:1", prompt="Who?")], max_tokens=99)
    assert plain.decode(groups[0].prefix_ids) == "<s>Who?"
    assert groups[0].continuations == ()


@pytest.mark.parametrize("max_tokens", [2, 5, 7, 100])
def test_long_text_is_cut_into_pieces_that_lose_nothing(plain, max_tokens: int) -> None:
    example = SFTExample(id="x", text="And the earth was without form, and void.")
    (whole,) = encode_sft(plain, example).continuations
    groups, _, dropped = encode_examples(plain, [example], max_tokens=max_tokens)
    assert dropped == {}
    assert max(g.num_tokens for g in groups) <= max_tokens
    pieces = [g.continuations[0].input_ids for g in groups]
    assert np.concatenate(pieces).tolist() == whole.input_ids.tolist()
    # every token but the very first is predicted, across the cuts too
    assert int(collate(groups).loss_mask.sum()) == len(whole.input_ids) - 1


# ---------------------------------------------------------------- roles


def dialogue(role: str) -> SFTExample:
    turns = ({"role": role, "content": "a word"}, *TWO_ROUNDS[1:3])
    return SFTExample(id="d.jsonl:7", messages=turns)


@pytest.mark.parametrize("role", ["tool", "developer", "function", "observation"])
def test_roles_of_the_ecosystem_are_rendered(chatml, role) -> None:
    groups, _, dropped = encode_examples(chatml, [dialogue(role)], max_tokens=99)
    assert dropped == {}
    assert f"{role}\na word" in chatml.decode(groups[0].continuations[0].input_ids)


def test_an_invented_role_is_refused_with_its_place(chatml) -> None:
    line = r"^d.jsonl:7: the chat template does not know the role 'banana'; allowed: system, dev"
    with pytest.raises(AlignError, match=line):
        encode_examples(chatml, [dialogue("banana")], max_tokens=99)


def test_a_role_that_the_template_names_is_one(make_tokenizer, chatml) -> None:
    named = "{% if messages[0]['role'] == 'narrator' %}{% endif %}" + chatml.chat_template
    tokenizer = make_tokenizer(template=named, eos="<|im_end|>")
    groups, _, _ = encode_examples(tokenizer, [dialogue("narrator")], max_tokens=99)
    assert "narrator\na word" in tokenizer.decode(groups[0].continuations[0].input_ids)


def test_a_role_that_the_template_leaves_out_is_refused(make_tokenizer, chatml) -> None:
    ours = chatml.chat_template.replace(
        "for m in messages", "for m in messages if m['role'] in ['system', 'user', 'assistant']"
    )
    tokenizer = make_tokenizer(template=ours, eos="<|im_end|>")
    with pytest.raises(AlignError, match=r"^d.jsonl:7: the chat template leaves out turns of role"):
        encode_examples(tokenizer, [dialogue("developer")], max_tokens=99)
    assert encode_examples(tokenizer, [dialogue("system")], max_tokens=99)[2] == {}


def test_a_role_that_counts_in_front_only_is_rendered(make_tokenizer, chatml) -> None:
    """As some templates take a developer's turn: the first one."""
    words = "{% if messages[0]['role'] == 'developer' %}{{ messages[0]['content'] }}{% endif %}"
    later = chatml.chat_template.replace(
        "for m in messages", "for m in messages if m['role'] != 'developer'"
    )
    first = words + later
    tokenizer = make_tokenizer(template=first, eos="<|im_end|>")
    groups, _, _ = encode_examples(tokenizer, [dialogue("developer")], max_tokens=99)
    assert tokenizer.decode(groups[0].continuations[0].input_ids).startswith("a word")


def test_long_dialogues_are_rendered_twice_a_turn(
    make_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is looked for once, and the words of a turn in one prompt."""
    tokenizer = make_tokenizer(
        template="{% for m in messages %}{{ m['role'] + ': ' + m.get('reasoning_content', '') }}"
        "{{ m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    turns = [
        turn
        for i in range(10)
        for turn in (
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"answer {i}", "reasoning_content": f"thought {i}"},
        )
    ]
    encode_sft(tokenizer, SFTExample(messages=tuple(turns), id="a"))
    rendered, firsts = [], []
    require = answers.require_rendered
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", _counted(tokenizer.apply_chat_template, rendered)
    )

    def checked(*args, first=0):
        firsts.append(first)
        require(*args, first=first)

    monkeypatch.setattr(answers, "require_rendered", checked)
    encode_sft(tokenizer, SFTExample(messages=tuple(turns), id="b"))
    assert len(rendered) == 20
    assert firsts == [0, *range(1, 18, 2)]


def _counted(function, calls: list):
    def call(*args, **options):
        calls.append(args)
        return function(*args, **options)

    return call


def test_a_template_that_forgets_earlier_turns_is_refused(make_tokenizer) -> None:
    tokenizer = make_tokenizer(
        template="{% for m in messages[-4:] %}{{ m['role'] + ': ' + m['content'] + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    turns = [
        {"role": role, "content": f"{role} {i}"} for i in range(4) for role in ("user", "assistant")
    ]
    with pytest.raises(AlignError, match="leaves out turns of role 'user'"):
        encode_sft(tokenizer, SFTExample(messages=tuple(turns), id="a"))
