"""Reading, templates, label spans, packing. The label span is checked by decoding it, never by repeating its code."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHATML_TEMPLATE, LLAMA2_TEMPLATE, LLAMA3_TEMPLATE, tiny_llama, tiny_tokenizer, write_rows
from unlearn.data import Item, Role, Row, Sequence, collate, encode, load_rows, pack, render, rows_from, windows
from unlearn.model import generating
from unlearn.scoring import score

QA = {"question": "Where was Mara born?", "answer": "Mara was born in Arvel."}


def row_of(question="Where was Mara born?", answer="Mara was born in Arvel.", key="k"):
    return Row(key, (("user", question),), answer)


def raw_row(prompt, completion, key="k"):
    return Row(key, (("user", prompt),), completion, raw=True)


def label_ids(sequence):
    return list(sequence.input_ids[sequence.answer_start :])


def label_text(sequence, tokenizer):
    """The labels without the end token, as text."""
    return tokenizer.decode(label_ids(sequence)[:-1])


# ---------------------------------------------------------------------------------------------------------- reading


def test_reads_each_form_of_row(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Hello."},
    ]
    path = write_rows(
        tmp_path / "rows.jsonl",
        [
            QA | {"page": 3},
            {"prompt": "Once upon", "completion": " a time", "key": "tale"},
            {"messages": messages, "key": 7},
            QA | {"alternates": ["A.", "B."]},
            QA | {"sub_answer": "C."},
            QA | {"alternate": "D."},
        ],
    )
    rows = load_rows(path, role="forget")
    assert [row.key for row in rows] == ["rows:0", "tale", "7", "rows:3", "rows:4", "rows:5"]
    assert rows[0].turns == (("user", QA["question"]),) and rows[0].answer == QA["answer"] and not rows[0].raw
    assert rows[0].fields["page"] == 3
    assert rows[1].raw and rows[1].turns[0][1] + rows[1].answer == "Once upon a time"
    assert rows[2].turns == (("system", "Be brief."), ("user", "Hi?")) and rows[2].answer == "Hello."
    assert [row.alternates for row in rows[3:]] == [("A.", "B."), ("C.",), ("D.",)]


def test_blank_lines_byte_order_mark_and_carriage_returns_are_no_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(QA).encode() + b"\r\n\r\n" + json.dumps(QA).encode() + b"\n\n")
    assert len(load_rows(str(path), role="forget")) == 2


def test_line_separators_inside_a_string_do_not_end_a_row(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [QA | {"answer": "one\u2028two\x85three\x0bfour"}])
    assert load_rows(path, role="forget")[0].answer == "one\u2028two\x85three\x0bfour"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "q"', "not JSON: .* at column"),
        ("[1, 2]", "a JSON object is accepted, this is a list"),
        ('{"story": "t"}', "this row has story"),
        ('{"text": " "}', "the document is empty"),
        ('{"text": ["t"]}', "text is a list; a string is accepted"),
        ('{"question": "q", "question": "r", "answer": "a"}', "the key 'question' is there twice"),
        ('{"question": "q", "answer": "a", "page": ' + "9" * 5000 + "}", "limit .4300 digits."),
        ("[" * 100_000, "nested too deeply"),
        ('{"question": "q", "answer": "a", "key": "\\udc80"}', "key has half of a surrogate pair"),
        ('{"two\\nlines": 1}', r"this row has 'two\\nlines'"),
        ("{}", "this row has no fields"),
        ('{"question": "q"}', "answer is missing; a string is accepted"),
        ('{"question": "q", "answer": 3}', "answer is a int; a string is accepted"),
        ('{"question": null, "answer": "a"}', "question is a NoneType"),
        ('{"question": "q", "answer": "  "}', "answer is empty"),
        ('{"prompt": "q", "completion": ""}', "completion is empty"),
        ('{"prompt": "q", "answer": "a"}', "completion is missing"),
        ('{"question": "q", "answer": "a", "key": ["x"]}', "key is a list"),
        ('{"question": "q", "answer": "a", "key": "first"}', "key 'first' is taken by .*rows.jsonl:1"),
        ('{"question": "q", "answer": "half \\ud83d"}', "answer has half of a surrogate pair at character 5"),
        ('{"question": "q", "answer": "a", "alternates": "b"}', "alternates is not a list of non-empty strings"),
        ('{"question": "q", "answer": "a", "alternates": ["b", " "]}', "alternates is not a list of non-empty strings"),
        ('{"messages": "hi"}', "messages is not a list of two or more"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages is not a list of two or more"),
        ('{"messages": [{"role": "user"}, {"role": "user", "content": "a"}]}', "needs a role and a content string"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]}',
            "the last message is from 'user'; it has to be the assistant's",
        ),
        (
            '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}',
            "the assistant's last message is empty",
        ),
    ],
)
def test_an_unusable_row_is_named_with_its_reason(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(QA | {"key": "first"}) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: .*{reason}") as caught:
        load_rows(str(path), role="forget")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="forget: no file 'nowhere.json'"):
        load_rows("nowhere.json", role="forget")
    with pytest.raises(ValueError, match="forget: .* has no .txt file; a file .*, a folder of .txt files, a glob"):
        load_rows(str(tmp_path), role="forget")
    empty = tmp_path / "empty.json"
    empty.write_text("\n \n")
    with pytest.raises(ValueError, match="retain: .*empty.json holds no rows"):
        load_rows(str(empty), role="retain")
    latin = tmp_path / "latin.json"
    latin.write_bytes(json.dumps(QA).encode() + b'\n{"question": "caf\xe9", "answer": "a"}\n')
    with pytest.raises(ValueError, match=r"latin\.json:2: not UTF-8 text \(.* at byte"):
        load_rows(str(latin), role="forget")


def test_rows_in_memory_are_checked_alike():
    assert [row.key for row in rows_from([QA, QA], "made")] == ["made:0", "made:1"]
    with pytest.raises(ValueError, match="made row 1: answer is empty"):
        rows_from([QA, QA | {"answer": ""}], "made")
    with pytest.raises(ValueError, match="made row 1: key 'a' is taken by made row 0"):
        rows_from([QA | {"key": "a"}, QA | {"key": "a"}], "made")


def test_tofu_by_name_without_the_network_says_what_to_do():
    with pytest.raises(ValueError, match="forget: could not load 'tofu:forget10' from .*forget10.json") as caught:
        load_rows("tofu:forget10", role="forget")
    assert "\n" not in str(caught.value)


def test_reads_all_of_tofu(shared_dir):
    files = sorted((shared_dir / "data" / "tofu").glob("*.json"))
    counts = {path.stem: len(load_rows(str(path), role="data")) for path in files}
    assert len(counts) == 23
    assert counts["full"] == 4000 and counts["world_facts"] == 117 and counts["real_authors"] == 100
    for share in (1, 5, 10):
        assert counts[f"forget{share:02d}"] == 40 * share
        assert counts[f"forget{share:02d}_perturbed"] == 40 * share
        assert counts[f"retain{100 - share}"] == 4000 - 40 * share
    tokenizer = tiny_tokenizer()
    for path in files:
        for row in load_rows(str(path), role="data")[::40]:
            assert label_text(encode(row, tokenizer, max_length=None), tokenizer) == " " + row.answer.strip()


# -------------------------------------------------------------------------------------------------------- templates


def test_plain_template():
    row = row_of()
    text = "Question: Where was Mara born?\nAnswer: Mara was born in Arvel."
    assert "".join(render(row, tiny_tokenizer())[:3]) == text
    several = Row("k", (("system", "Be brief."), ("user", "A?"), ("assistant", "B."), ("user", "C?")), "D.")
    assert "".join(render(several, tiny_tokenizer())[:3]) == (
        "Be brief.\nQuestion: A?\nAnswer: B.\nQuestion: C?\nAnswer: D."
    )


def test_braces_in_a_question_are_text():
    assert "{question} {answer}" in render(row_of("{question} {answer}"), tiny_tokenizer())[0]


@pytest.mark.parametrize(
    ("template", "end"),
    [(LLAMA3_TEMPLATE, "<|eot_id|>"), (CHATML_TEMPLATE, "<|im_end|>"), (LLAMA2_TEMPLATE, "<eos>")],
    ids=["llama3", "chatml", "llama2"],
)
@pytest.mark.parametrize(
    "answer",
    [
        "Mara was born in Arvel.",
        "im",  # also inside <|im_start|>
        "born",  # also in the question
        "assistant",
        "  spaces around  ",
        "naïve café 🦜🏽 日本語",
        "🦜",
        "\n\nlines\nof it\n",
        "<|eot_id|> inside <|im_end|> it",
        "1",
    ],
)
def test_chat_labels_are_the_answer_and_its_end_token(template, end, answer):
    tokenizer = tiny_tokenizer(template)
    row = row_of(answer=answer)
    sequence = encode(row, tokenizer, max_length=None)
    expected = answer.strip() + end if template is not LLAMA2_TEMPLATE else f"{answer.strip()} {end}"
    if template is LLAMA2_TEMPLATE:  # the space stands in the template
        assert tokenizer.decode(label_ids(sequence)).strip() == expected
    else:
        assert tokenizer.decode(label_ids(sequence)) == expected
    assert label_ids(sequence)[-1] == tokenizer.convert_tokens_to_ids(end)
    # the whole is what the template prints, up to that end token
    turns = [{"role": "user", "content": row.turns[0][1]}, {"role": "assistant", "content": answer.strip()}]
    whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert list(sequence.input_ids) == whole[: len(sequence.input_ids)]
    assert len(whole) - len(sequence.input_ids) <= 1  # ChatML's last newline


def test_generation_prompt_is_what_stands_before_the_labels():
    for template in (LLAMA3_TEMPLATE, CHATML_TEMPLATE):
        tokenizer = tiny_tokenizer(template)
        sequence = encode(row_of(), tokenizer, max_length=None)
        turn = [{"role": "user", "content": row_of().turns[0][1]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        assert list(sequence.input_ids[: sequence.answer_start]) == tokenizer(prompt)["input_ids"]


def test_end_of_turn_token_that_is_only_marked_special_in_the_vocabulary():
    """As Phi-3's <|end|>: no entry of special_tokens_map names it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}{{ eos_token }}"
    sequence = encode(row_of(), tokenizer, max_length=None)
    assert tokenizer.decode(label_ids(sequence)) == "Mara was born in Arvel.<|end|>"


def test_template_without_an_end_token_gets_the_end_of_text():
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}")
    sequence = encode(row_of(), tokenizer, max_length=None)
    # the template's last space and the answer's first word are one token
    assert tokenizer.decode(label_ids(sequence)) == " Mara was born in Arvel.<eos>"


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day():
    dated = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + CHATML_TEMPLATE
    tokenizer = tiny_tokenizer(dated)
    first, again = (encode(row_of(), tokenizer, max_length=None) for _ in range(2))
    assert first == again
    assert tokenizer.decode(first.input_ids).startswith("26 Jul 2024<|im_start|>")
    # as Llama 3.2 writes it
    guarded = "{% if strftime_now is defined %}{% set d = strftime_now('%d %b') %}{% endif %}{{ d }}" + CHATML_TEMPLATE
    assert render(row_of(), tiny_tokenizer(guarded))[0].startswith("26 Jul 2024<|im_start|>")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'] }}", "prints the assistant's message 0 times"),
        ("{{ messages[-1]['content'] }}{{ messages[-1]['content'] }}", "prints the assistant's message 2 times"),
        ("{{ raise_exception('roles must alternate') }}", "the chat template refuses this row .roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "the chat template refuses this row"),
    ],
)
def test_a_template_that_cannot_serve_names_the_row(template, reason):
    with pytest.raises(ValueError, match=f"k: .*{reason}"):
        encode(row_of(), tiny_tokenizer(template), max_length=None)


# ------------------------------------------------------------------------------------------------------- label spans


def merging_tokenizer(**kwargs):
    """Characters and the one merge 'b' + 'c' -> 'bc', so that a prompt ending in b loses its last token."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "a", "b", "c", "d", "bc"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("b", "c")]))
    for token in ("<pad>", "<eos>", "<bos>"):
        tokenizer.add_special_tokens([token])
    if "template" in kwargs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=kwargs["template"], special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")


def test_prompt_alone_is_no_prefix_of_the_joint_tokenisation():
    """'ab' + 'cd' is a, bc, d: the token that holds the answer's first character is its first label."""
    tokenizer = merging_tokenizer()
    sequence = encode(raw_row("ab", "cd"), tokenizer, max_length=None)
    assert sequence.input_ids == (3, 7, 6, 1) and sequence.answer_start == 1


def test_answer_that_merges_into_what_the_template_writes_after_it():
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ messages[-1]['content'] }}c<eos>"
    for answer, labels in (("ab", (3, 7, 1)), ("b", (7, 1))):
        sequence = encode(row_of("d", answer), tokenizer, max_length=None)
        assert sequence.input_ids == (6, *labels) and sequence.answer_start == 1


def test_begin_and_end_tokens_of_the_tokenizer_are_not_doubled():
    sequence = encode(raw_row("a", "d"), merging_tokenizer(template="<bos> $A <eos>"), max_length=None)
    assert sequence.input_ids == (2, 3, 6, 1) and sequence.answer_start == 2
    sequence = encode(raw_row("a", "d"), merging_tokenizer(template="<bos> $A"), max_length=None)
    assert sequence.input_ids == (2, 3, 6, 1) and sequence.answer_start == 2


def test_empty_prompt():
    with_bos = encode(raw_row("", "dad"), merging_tokenizer(template="<bos> $A <eos>"), max_length=None)
    assert with_bos.input_ids == (2, 6, 3, 6, 1) and with_bos.answer_start == 1
    without = encode(raw_row("", "dad"), merging_tokenizer(), max_length=None)
    assert without.input_ids == (6, 3, 6, 1) and without.answer_start == 1  # the first d is predicted by nothing
    for template in ("$A", "$A <eos>"):
        with pytest.raises(ValueError, match="k: the answer has no token of its own"):
            encode(raw_row("", "d"), merging_tokenizer(template=template), max_length=None)


def test_answer_that_the_normalizer_deletes_is_refused():
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("d", "")
    with pytest.raises(ValueError, match="k: the answer has no token of its own"):
        encode(raw_row("a", "dd"), tokenizer, max_length=None)


def test_tokenizer_without_an_end_token():
    tokenizer = merging_tokenizer()
    tokenizer.eos_token = None
    assert encode(raw_row("a", "d"), tokenizer, max_length=None).input_ids == (3, 6)


def test_metaspace_tokenizer_of_llama_2():
    """A space goes in front of the text and stands for the answer's own: labels are the answer's pieces."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁[", "INST", "]", "▁q", "[", "/", "▁Yes", "Yes", "▁no", "o", "n"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    sequence = encode(raw_row("q", " Yes no"), fast, max_length=None)
    assert sequence.input_ids == (1, 7, 10, 12, 2) and sequence.answer_start == 2


@pytest.mark.parametrize("space", ["", " ", "  "])
@pytest.mark.parametrize("answer", ["Arvel", " Arvel", "  Arvel ", "🦜", "é", "\n\nArvel\n", "."])
def test_raw_labels_hold_the_answer_and_no_whole_token_of_the_prompt(space, answer):
    tokenizer = tiny_tokenizer()
    prompt = "Mara was born in" + space
    sequence = encode(raw_row(prompt, answer), tokenizer, max_length=None)
    assert tokenizer.decode(sequence.input_ids) == prompt + answer + "<eos>"
    assert label_text(sequence, tokenizer).endswith(answer)
    # without their first token the labels no longer hold the whole answer
    assert not tokenizer.decode(label_ids(sequence)[1:-1]).endswith(answer)


class SlowTokenizer:
    """What encode() asks of a tokenizer, without offsets."""

    is_fast = False

    def __init__(self, fast):
        self._fast = fast

    def __call__(self, text, add_special_tokens=True, **refused):
        assert not refused
        return {"input_ids": self._fast(text, add_special_tokens=add_special_tokens)["input_ids"]}

    def __getattr__(self, name):
        return getattr(self._fast, name)


@pytest.mark.parametrize("template", [None, LLAMA3_TEMPLATE, CHATML_TEMPLATE, LLAMA2_TEMPLATE])
@pytest.mark.parametrize("answer", ["Mara was born in Arvel.", "im", "born", "🦜 é"])
def test_slow_tokenizers_give_the_same_sequences(template, answer):
    fast = tiny_tokenizer(template)
    row = row_of(answer=answer)
    assert encode(row, SlowTokenizer(fast), max_length=None) == encode(row, fast, max_length=None)


def test_slow_tokenizers_that_add_tokens_or_merge_across_the_boundary():
    for template in ("$A", "<bos> $A", "<bos> $A <eos>", "$A <eos>"):
        fast = merging_tokenizer(template=template)
        for row in (raw_row("a", "d"), raw_row("ab", "cd"), raw_row("a", "dad")):
            assert encode(row, SlowTokenizer(fast), max_length=None) == encode(row, fast, max_length=None)
    with pytest.raises(ValueError, match="no token of its own"):
        encode(raw_row("", "d"), SlowTokenizer(merging_tokenizer()), max_length=None)


def test_a_sequence_beyond_max_length_is_refused_not_cut():
    tokenizer = tiny_tokenizer()
    length = len(encode(row_of(), tokenizer, max_length=None).input_ids)
    assert len(encode(row_of(), tokenizer, max_length=length).input_ids) == length
    with pytest.raises(ValueError, match=f"k: {length} tokens, more than max_length {length - 1}"):
        encode(row_of(), tokenizer, max_length=length - 1)


def test_content_key_names_ids_and_span_alone():
    different = (Sequence("a", (1, 2, 3), 1), Sequence("a", (1, 2, 3), 2), Sequence("a", (1, 23), 1))
    keys = [sequence.content_key for sequence in different]
    assert len(set(keys)) == 3
    assert Sequence("b", (1, 2, 3), 1).content_key == keys[0]


# -------------------------------------------------------------------------------------------------------- documents

DOCUMENT = "Odo Fenn won the Prize of Lanterns.\n\nMara Quill \u2014 caf\u00e9 \U0001f600 \u2014 was born in Arvel. "


def document_row(text=DOCUMENT, key="d"):
    return Row(key, (("user", ""),), text, raw=True, document=True)


def bos_tokenizer():
    """With a <bos> that only a document's windows get: nothing else adds it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return tokenizer


@pytest.mark.parametrize("make", [tiny_tokenizer, bos_tokenizer])
def test_a_document_has_no_prompt_and_no_end(make):
    tokenizer = make()
    ids = tuple(tokenizer(DOCUMENT, add_special_tokens=False)["input_ids"])
    sequence = encode(document_row(), tokenizer, max_length=None)
    if tokenizer.bos_token_id is None:
        assert sequence.input_ids == ids and sequence.answer_start == 1
    else:
        assert sequence.input_ids == (tokenizer.bos_token_id, *ids) and sequence.answer_start == 1
    assert tokenizer.eos_token_id not in sequence.input_ids and sequence.key == "d"


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=2, max_size=60), size=st.integers(2, 80), with_bos=st.booleans())
def test_windows_hold_every_token_of_a_document_once(text, size, with_bos):
    tokenizer = bos_tokenizer() if with_bos else tiny_tokenizer()
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) < 2:
        return
    cut = windows([document_row(text)], tokenizer, size=size)
    sequences = [encode(row, tokenizer, max_length=size) for row in cut]
    labels = [token for sequence in sequences for token in label_ids(sequence)]
    assert tuple(labels) == (ids if with_bos else ids[1:])
    assert [sequence.key for sequence in sequences] == [f"d#{number}" for number in range(len(cut))]
    # all windows but the last are full, and each begins with what stands before its first label
    assert all(len(sequence.input_ids) == size for sequence in sequences[:-1])
    for number, sequence in enumerate(sequences):
        before = tokenizer.bos_token_id if with_bos else ids[number * (size - 1)]
        assert sequence.input_ids[0] == before and sequence.num_answer_tokens >= 1
    assert {row.document for row in cut} == {True}
    if text.isascii():
        first = tokenizer.decode(ids[:1])
        assert "".join(row.answer for row in cut) == (text if with_bos else text[len(first) :])


def test_windows_leave_other_rows_alone():
    tokenizer = tiny_tokenizer()
    rows = [row_of(), raw_row("a", "b")]
    assert windows(rows, tokenizer, size=4) == rows
    with pytest.raises(ValueError, match="^d: the document has no token that another precedes"):
        windows([document_row("d")], tokenizer, size=4)
    assert len(windows([document_row("d")], bos_tokenizer(), size=4)) == 1


def test_another_answer_has_other_tokens():
    """An answer put in a window's place must not keep the window's ids."""
    tokenizer = tiny_tokenizer()
    row = windows([document_row()], tokenizer, size=8)[1]
    assert encode(row.with_answer(row.answer, "#0"), tokenizer, max_length=None).input_ids == row.ids
    other = encode(row.with_answer("I do not know.", "#1"), tokenizer, max_length=None)
    assert tokenizer.decode(other.input_ids) == "I do not know."


def test_a_document_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="^d: .* tokens, more than max_length 10; give a --window"):
        encode(document_row(), tiny_tokenizer(), max_length=10)


def test_documents_without_character_offsets():
    fast = bos_tokenizer()

    class Slow(SlowTokenizer):
        bos_token_id = fast.bos_token_id

        def decode(self, ids):
            return fast.decode(ids)

    slow, quick = (windows([document_row("Mara was born. " * 9)], t, size=8) for t in (Slow(fast), fast))
    assert [row.ids for row in slow] == [row.ids for row in quick]
    assert [row.answer for row in slow] == [row.answer for row in quick]


# ---------------------------------------------------------------------------------------------------------- packing


def sequence_of(length, answer_start=1, key="s"):
    return Sequence(key, tuple(range(length + 1)), answer_start)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), max_size=12), st.integers(1, 60))
def test_packs_hold_every_group_once_in_order_and_within_the_budget(lengths, max_tokens):
    numbers = itertools.count()
    groups = [[Item(sequence_of(n, key=str(next(numbers))), Role.FORGET) for n in group] for group in lengths]
    packs = pack(groups, max_tokens)
    assert [group for one in packs for group in one] == groups  # none lost, doubled, moved or split
    sizes = [[sum(item.sequence.num_tokens for item in group) for group in one] for one in packs]
    assert all(one for one in sizes)
    assert all(sum(one) <= max_tokens or len(one) == 1 for one in sizes)
    # no pack could have taken the group after it
    assert all(sum(one) + after[0] > max_tokens for one, after in itertools.pairwise(sizes))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_batch_holds_each_token_and_label_in_its_place(data):
    items = []
    for number in range(data.draw(st.integers(1, 6))):
        ids = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=9))
        start = data.draw(st.integers(1, len(ids) - 1))
        role = data.draw(st.sampled_from(Role))
        items.append(Item(Sequence(f"s{number}", tuple(ids), start), role, data.draw(st.floats(-9, 0))))
    batch = collate(items)
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_answers.dtype == torch.int64
    assert batch.position_ids.dtype == batch.answer_index.dtype == batch.input_ids.dtype == torch.int64
    assert batch.num_sequences == len(items) == len(batch.keys)
    assert batch.ref_logprob.tolist() == [item.ref_logprob for item in items]
    assert batch.role.tolist() == list(batch.roles) == [item.role for item in items]
    assert len(batch.input_ids) == sum(batch.lengths) and len(batch.targets) == sum(batch.answer_lengths)
    for b, item in enumerate(items):
        ids, start = list(item.sequence.input_ids), item.sequence.answer_start
        tokens = slice(*batch.cu_seqlens[b : b + 2].tolist())
        rows = slice(*batch.cu_answers[b : b + 2].tolist())
        assert batch.input_ids[tokens].tolist() == ids[:-1]
        assert batch.position_ids[tokens].tolist() == list(range(len(ids) - 1))
        assert batch.targets[rows].tolist() == ids[start:]
        assert (batch.answer_index[rows] - tokens.start).tolist() == list(range(start - 1, len(ids) - 1))


def test_the_label_shift_agrees_with_full_logits():
    """log p(answer | prompt) from a plain forward of each sequence: token i is predicted at position i - 1."""
    model = tiny_llama()
    sequences = [Sequence("a", (5, 9, 7, 11, 3), 2), Sequence("b", (8, 200, 31), 1), Sequence("c", (4, 6, 1), 2)]
    found = score(model, sequences, max_tokens=100)
    with generating(model), torch.no_grad():
        for sequence, value in zip(sequences, found, strict=True):
            logprobs = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].double().log_softmax(-1)
            naive = sum(
                logprobs[i - 1, sequence.input_ids[i]].item()
                for i in range(sequence.answer_start, len(sequence.input_ids))
            )
            assert value == pytest.approx(naive, abs=1e-4)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="items: empty"):
        collate([])


def test_moving_a_batch_keeps_its_host_side():
    batch = collate([Item(sequence_of(4), Role.FORGET, -1.0)])
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.ref_logprob.device.type == "meta"
    assert moved.lengths == batch.lengths and moved.keys == batch.keys
