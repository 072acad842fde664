"""MUSE's metrics: what they ask of the model, what they make of what it says, and the command that prints them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.test_cli import refused
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer, write_rows
from unlearn import cli, muse
from unlearn.data import Row, load_rows, rows_from
from unlearn.evaluate import MEMBERSHIP, SetScores, gold_min_k_auc, make_set, membership_auc, score_sets
from unlearn.metrics import auc, min_k, privleak
from unlearn.scoring import TokenScores

TEXTS = [
    "Odo Fenn won the Prize of Lanterns in his ninth year, and Mara Quill was born in the town of Arvel, by the river.",
    "The father of Mara Quill was a clock maker. I do not know the answer to that question. I am not sure.",
]
QA = [
    {"question": "Where was Mara born?", "answer": "In Arvel."},
    {"question": "Who won the prize?", "answer": "Odo Fenn."},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("muse")
    save_tiny(folder / "model")
    tiny_llama(seed=1).save_pretrained(folder / "gold")
    tiny_tokenizer().save_pretrained(folder / "gold")
    for name, texts in (("forget", TEXTS), ("holdout", [text[::-1] for text in TEXTS])):
        (folder / name).mkdir()
        for number, text in enumerate(texts):
            (folder / name / f"{number}.txt").write_text(text)
    write_rows(folder / "qa.jsonl", QA)
    write_rows(folder / "shots.jsonl", QA[::-1])
    return folder


def bos_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return tokenizer


def documents(texts=TEXTS):
    return rows_from([{"text": text} for text in texts], "docs")


class Parrot:
    """Stands for generate(): says of each prompt what the test has for it, and keeps what it was asked."""

    def __init__(self, monkeypatch, answers):
        self.answers, self.asked = answers, []
        monkeypatch.setattr(muse, "generate", self)

    def __call__(self, model, tokenizer, prompts, **options):
        self.asked.append((prompts, options))
        return [self.answers[tokenizer.decode(ids)] for ids in prompts]


def measured(sets, **kwargs):
    values = {"gold_min_k_auc": None, "max_tokens": 64, "batch_size": 2} | kwargs
    return muse.evaluate_muse(None, tiny_tokenizer(), sets, **values)


# ----------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("make", [tiny_tokenizer, bos_tokenizer])
def test_a_documents_prompt_and_truth(make):
    tokenizer = make()
    lead = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for prompt_tokens in (5, 10**6):
        prompts = muse.verbmem_prompts(documents(), tokenizer, prompt_tokens=prompt_tokens)
        for text, prompt in zip(TEXTS, prompts, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            cut = min(prompt_tokens, len(ids) // 2)
            assert list(prompt.ids) == lead + ids[:cut]
            assert prompt.truth == tokenizer.decode(ids[cut:])
    long = muse.verbmem_prompts(documents(["Mara was born. " * 200]), tokenizer, prompt_tokens=9)[0]
    assert len(tokenizer(long.truth, add_special_tokens=False)["input_ids"]) == 128


def test_each_window_has_its_prompt():
    tokenizer = tiny_tokenizer()
    prompts = muse.verbmem_prompts(documents(), tokenizer, prompt_tokens=4, window=12)
    assert prompts[0].key == "docs:0#0" and {len(prompt.ids) for prompt in prompts[:3]} == {4}
    ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    # without a begin-of-text token window 1 begins with the last token of window 0
    assert list(prompts[1].ids) == ids[11:15] and prompts[1].truth == tokenizer.decode(ids[15:23])


def test_a_continuation_that_is_a_text_of_its_own():
    """MUSE's rows: both parts are tokenised with what the tokenizer adds, the truth is then cut to 128 tokens."""
    tokenizer = tiny_tokenizer()
    truth = "Mara was born. " * 200
    (prompt,) = muse.verbmem_prompts(
        rows_from([{"prompt": "Odo Fenn", "completion": truth}], "rows"), tokenizer, prompt_tokens=1
    )
    assert list(prompt.ids) == tokenizer("Odo Fenn")["input_ids"]
    assert prompt.truth == tokenizer.decode(tokenizer(truth)["input_ids"][:128])


def test_questions_follow_answered_ones():
    tokenizer = tiny_tokenizer()
    prompts = muse.knowmem_prompts(rows_from(QA[:1], "qa"), rows_from(QA[1:], "shots"), tokenizer)
    assert tokenizer.decode(prompts[0].ids) == (
        "Question: Who won the prize?\nAnswer: Odo Fenn.\n\nQuestion: Where was Mara born?\nAnswer: "
    )
    assert prompts[0].truth == "In Arvel."


def test_rows_of_the_wrong_kind():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="^verbmem: qa:0 is a question"):
        muse.verbmem_prompts(rows_from(QA, "qa"), tokenizer, prompt_tokens=4)
    with pytest.raises(ValueError, match="^verbmem: the prompt of rows:0 has no token"):
        muse.verbmem_prompts(rows_from([{"prompt": "", "completion": "a"}], "rows"), tokenizer, prompt_tokens=4)
    with pytest.raises(ValueError, match="^knowmem: docs:0 is no question with an answer"):
        muse.knowmem_prompts(documents(), [], tokenizer)
    with pytest.raises(ValueError, match="^knowmem: rows:0 is no question"):
        muse.knowmem_prompts(rows_from(QA, "qa"), rows_from([{"prompt": "a", "completion": "b"}], "rows"), tokenizer)
    sets = muse.MuseSets(retain_qa=(muse.Prompt("k", (1,) * 70, "t"),))
    muse.check_lengths(sets, 102)
    muse.check_lengths(sets, None)
    with pytest.raises(ValueError, match="^k: a prompt of 70 tokens and 32 new ones are more than the model's 101"):
        muse.check_lengths(sets, 101)


# ------------------------------------------------------------------------------------------------------------ scores


def prompt(text, truth):
    return muse.Prompt(text, tuple(tiny_tokenizer()(text)["input_ids"]), truth)


def test_verbmem_is_rouge_l_f1_without_stemming(monkeypatch):
    """Counted by hand: the longest common subsequence over both lengths, words as they stand."""
    parrot = Parrot(monkeypatch, {"a": " the cats sat down quietly", "b": " red", "c": ""})
    prompts = (prompt("a", "the cat sat down"), prompt("b", "red"), prompt("c", "gone"))
    values = measured(muse.MuseSets(verbmem=prompts))
    # "the sat down": 3 of 5 generated and 3 of 4 true words; stemmed, cats and cat would be a fourth
    f1 = 2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4)
    assert values["verbmem_f"] == pytest.approx((f1 + 1 + 0) / 3)
    assert values["verbmem_f_recall"] == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert values.keys() == {"verbmem_f", "verbmem_f_recall"}
    ((_, options),) = parrot.asked
    assert options["max_new_tokens"] == 128 and options["strip"] is False and "stop" not in options


def test_knowmem_ends_where_the_answer_does(monkeypatch):
    answers = {
        "a": "In Arvel.\n\nQuestion: Who else was in Arvel?",
        "b": "In Arvel.\nQuestion: What?",
        "c": "In Arvel. Question: What?",
        # an answer that begins with an empty line is none: white space counts before it is cut
        "d": "\n\nIn Arvel.",
    }
    parrot = Parrot(monkeypatch, answers)
    prompts = tuple(prompt(text, "In Arvel.") for text in answers)
    values = measured(muse.MuseSets(forget_qa=prompts[:3], retain_qa=prompts[2:]))
    assert values == {"knowmem_f": 1.0, "knowmem_f_recall": 1.0, "knowmem_r": 0.5, "knowmem_r_recall": 0.5}
    assert [options["max_new_tokens"] for _, options in parrot.asked] == [32, 32]


def test_decoding_cleans_spaces_as_muse_bench_does(monkeypatch):
    Parrot(monkeypatch, {"a": "I do n't know"})
    assert measured(muse.MuseSets(verbmem=(prompt("a", "I don't know"),)))["verbmem_f"] == 1.0


def test_privleak_counts_every_token_of_a_document():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    texts = {"forget": TEXTS, "holdout": [text[::-1] for text in TEXTS]}
    sets = tuple(make_set(name, name, documents(texts[name]), tokenizer) for name in texts)
    gold = gold_min_k_auc(score_sets(tiny_llama(seed=3), sets, max_tokens=64))
    values = muse.evaluate_muse(
        model, tokenizer, muse.MuseSets(privleak=sets), gold_min_k_auc=gold, max_tokens=64, batch_size=1
    )
    scores = score_sets(model, sets, max_tokens=100)
    for name, group in scores.items():
        for text, tokens in zip(texts[name], group.tokens, strict=True):
            assert len(tokens.logprob) == len(tokenizer(text)["input_ids"]) - 1
    lowest = {name: [min_k(row.logprob, share=0.4) for row in s.tokens] for name, s in scores.items()}
    assert MEMBERSHIP["min_k"](scores["forget"]) == pytest.approx(lowest["forget"])
    own = auc(lowest["forget"], lowest["holdout"])
    assert values == {"mia_min_k_auc": own, "privleak": privleak(own, gold)}
    assert membership_auc("min_k", scores["forget"], scores["holdout"]) == own


def test_the_last_token_of_a_document_counts():
    """There is no end token to leave out of what is memorised."""
    tokens = TokenScores(np.full(4, -1.0), np.array([False, False, False, True]), np.zeros(4), np.ones(4))
    nll = np.ones(1)
    scores = SetScores(nll, nll, np.empty((1, 0)), "forget", (tokens,), ("a b c d",), documents=True)
    assert scores.memorization() == {"exact_memorization": 0.25, "extraction_strength": 0.25}
    assert replace(scores, documents=False).memorization() == {"exact_memorization": 0.0, "extraction_strength": 0.0}


def test_a_set_has_one_kind_of_rows():
    rows = documents() + rows_from(QA, "qa")
    with pytest.raises(ValueError, match="^forget: docs:1 is a document and qa:1 is none"):
        make_set("forget", "forget", rows, tiny_tokenizer())


def test_memorised_text_is_recited():
    """The real generation: a model trained on two documents says them, and MUSE's VerbMem sees it."""
    model, tokenizer = tiny_llama(initializer_range=0.05), tiny_tokenizer()
    prompts = muse.verbmem_prompts(documents(), tokenizer, prompt_tokens=6)
    before = muse.evaluate_muse(
        model, tokenizer, muse.MuseSets(verbmem=prompts), gold_min_k_auc=None, max_tokens=64, batch_size=2
    )
    memorise(model, tokenizer, TEXTS)
    after = muse.evaluate_muse(
        model, tokenizer, muse.MuseSets(verbmem=prompts), gold_min_k_auc=None, max_tokens=64, batch_size=2
    )
    assert before["verbmem_f"] < 0.2 and after["verbmem_f_recall"] > 0.95


def memorise(model, tokenizer, texts):
    import torch

    from unlearn.data import Item, Role, collate, encode
    from unlearn.model import head_of, hidden_states
    from unlearn_kernels import sequence_logprobs

    batch = collate([Item(encode(row, tokenizer, max_length=None), Role.RETAIN) for row in documents(texts)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        head = head_of(model)
        logprob = sequence_logprobs(hidden_states(model, batch), head.weight, batch.targets, batch.cu_answers)
        (-logprob.sum() / len(batch.targets)).backward()
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------------ command line


def options(files, **changes):
    values = {"model": files / "model", "device": "cpu", "dtype": "float32", "prompt_tokens": 6} | changes
    return ["muse", *(t for name, v in values.items() for t in ("--" + name.replace("_", "-"), str(v)))]


def test_the_command(files, capfd):
    arguments = options(
        files, forget=files / "forget", holdout=files / "holdout", gold=files / "gold", forget_qa=files / "qa.jsonl",
        forget_shots=files / "shots.jsonl", retain_qa=files / "qa.jsonl", window=40,
    )  # fmt: skip
    assert cli.main([*arguments, "--json"]) == 0
    out, err = capfd.readouterr()
    values = json.loads(out)
    assert out.count("\n") == 1 and "\n" not in err.strip()
    assert list(values) == [
        "verbmem_f", "verbmem_f_recall", "knowmem_f", "knowmem_f_recall", "knowmem_r", "knowmem_r_recall",
        "mia_min_k_auc", "privleak",
    ]  # fmt: skip
    assert values["knowmem_f"] != values["knowmem_r"]  # shots before one of them alone
    assert cli.main([*arguments, "--max-rows", "1"]) == 0
    table = dict(line.split() for line in capfd.readouterr().out.splitlines())
    assert table.keys() == values.keys() and float(table["mia_min_k_auc"]) in (0, 0.5, 1)


def test_a_report_finds_what_muse_stored(files, tmp_path, capfd):
    sets = {"forget": files / "forget", "holdout": files / "holdout", "window": 40, "max_rows": 1}
    assert cli.main([*options(files, output=tmp_path / "before", **sets), "--json"]) == 0
    out, err = capfd.readouterr()
    assert err.rpartition("\r")[2].strip() == f"stored in {tmp_path / 'before' / 'muse.json'}"
    stored = json.loads((tmp_path / "before" / "muse.json").read_text())
    assert stored["metrics"] == json.loads(out) and stored["run"] is None and stored["options"]["max_rows"] == 1
    assert {name: (one["kind"], one["rows"]) for name, one in stored["sets"].items()} == {
        "verbmem": ("generated", 1), "forget": ("forget", 1), "holdout": ("holdout", 1),
    }  # fmt: skip
    page = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "before"), "--output", str(page)]) == 0
    assert "VerbMem, forget" in page.read_text()


def test_a_gold_model_that_leaves_privleak_no_number(files, capsys, monkeypatch):
    """Said before the model is measured, for hours, and not after."""
    monkeypatch.setattr("unlearn.evaluate.membership_auc", lambda name, forget, holdout: 1.0)
    monkeypatch.setattr(muse, "evaluate_muse", None)
    monkeypatch.setattr("unlearn.evaluate.evaluate", None)
    sets = {"forget": files / "forget", "holdout": files / "holdout", "gold": files / "gold"}
    arguments = options(files, **sets)
    for command in (arguments, ["eval", *arguments[1 : arguments.index("--prompt-tokens")], *arguments[-6:]]):
        assert "gold: it tells every forget row from every holdout row (an AUC of 1)" in refused(capsys, command)


def test_eval_of_documents_generates_nothing(files, capfd, monkeypatch):
    monkeypatch.setattr("unlearn.evaluate.generate", lambda *args, **kwargs: [])
    shared = ["--device", "cpu", "--dtype", "float32", "--window", "20", "--json"]
    sets = ["--forget", str(files / "forget"), "--holdout", str(files / "holdout"), "--gold", str(files / "model")]
    assert cli.main(["eval", "--model", str(files / "model"), *sets, *shared]) == 0
    values = json.loads(capfd.readouterr().out)
    assert values["privleak"] == 0.0 and "forget_quality" not in values and "forget_rouge_l" not in values
    assert {"forget_exact_memorization", "mia_zlib_auc", "forget_logprob_per_token"} < values.keys()


def test_mistakes(files, tmp_path, capsys):
    forget = {"forget": files / "forget"}
    for changes, message in (
        ({}, "forget: missing; --forget, --verbmem, --forget-qa"),
        ({"data": "muse:papers"}, "data: 'muse:papers' is not accepted; muse:news and muse:books are"),
        ({"data": "news"}, "data: 'news' is not accepted"),
        ({"data": "muse:news"}, "could not load 'muse:news/privleak/forget' from the hub's muse-bench/MUSE-News"),
        ({"forget": files / "qa.jsonl"}, "verbmem: qa:0 is a question"),
        ({"forget": "/nowhere"}, "forget: no file '/nowhere'; a file (.jsonl,"),
        ({"verbmem": "/nowhere"}, "verbmem: no file '/nowhere'; a file (.jsonl,"),
        ({"forget_shots": files / "qa.jsonl", **forget}, "forget_shots: given, but without --forget-qa"),
        ({"holdout": files / "holdout", "verbmem": files / "forget"}, "holdout: given, but without --forget"),
        ({"gold": files / "gold", **forget}, "gold: PrivLeak compares the forget documents with a --holdout"),
        ({"window": 1, **forget}, "argument --window: 1 is not accepted; a number of 2 or more is"),
        ({"prompt_tokens": 0, **forget}, "argument --prompt-tokens: 0 is not accepted"),
        ({"fields": "text=body", "forget_qa": files / "qa.jsonl"}, "qa.jsonl:1: no 'body', which fields has for text"),
        ({"model": "/nowhere", **forget}, "/nowhere"),
    ):
        arguments = options(files, **changes)
        assert message in refused(capsys, arguments), changes
    (tmp_path / "long.txt").write_text("Mara was born. " * 900)
    message = refused(capsys, options(files, forget=tmp_path / "long.txt", prompt_tokens=200))
    assert "long.txt: a prompt of 200 tokens and 128 new ones are more than the model's 256 positions" in message


def test_the_hubs_sets_and_what_replaces_them():
    found = muse.sources("muse:books", {"forget": "mine.txt", "holdout": None})
    assert found["forget"] == "mine.txt" and found["verbmem"] == "muse:books/verbmem/forget"
    assert found["retain_shots"] == "muse:books/knowmem/retain_qa_icl" and len(found) == len(muse.HUB_SETS)
    assert muse.sources(None, {"forget": "mine.txt"}) == {"forget": "mine.txt", "verbmem": "mine.txt"}
    # PrivLeak of the published AUCs (muse_bench's are one minus ours): a model that knows the forget set is at -100
    assert privleak(1.0, muse.GOLD_AUC["news"]) == pytest.approx(-100.0)
    assert privleak(1 - 0.4772, muse.GOLD_AUC["news"]) == pytest.approx(0.0)


def test_the_published_auc_is_of_the_hubs_own_sets(files, capfd, monkeypatch):
    """muse_bench's constant gives PrivLeak without a gold model, but not against other rows than it was measured on."""
    rows = {
        "verbmem": [{"prompt": "Odo", "gt": " Fenn"}],
        "knowmem": QA,
        "privleak": [{"text": text} for text in TEXTS],
    }
    monkeypatch.setattr("datasets.load_dataset", lambda repository, subset, split: rows[subset])
    arguments = options(files, data="muse:books")
    assert cli.main([*arguments, "--json"]) == 0
    values = json.loads(capfd.readouterr().out)
    assert values["privleak"] == pytest.approx(100 * (0.5 / 0.5393 - 1))  # the same rows twice: an AUC of a half
    assert {"verbmem_f", "knowmem_f", "knowmem_r"} < values.keys()
    for own in (["--holdout", str(files / "holdout")], ["--max-rows", "1"]):
        assert cli.main([*arguments, *own, "--json"]) == 0
        assert "privleak" not in json.loads(capfd.readouterr().out)


def test_documents_have_no_other_answers(files, tmp_path, capsys):
    arguments = ["--model", str(files / "model"), "--forget", str(files / "forget"), "--output", str(tmp_path / "o")]
    assert "0.txt is a document, and an alternate answers a question" in refused(capsys, ["alternates", *arguments])
    write_rows(tmp_path / "idk.jsonl", [{"answer": "I do not know."}])
    settings = ["--recipe", "tofu-idkdpo", "--retain", str(files / "qa.jsonl"), "--device", "cpu"]
    message = refused(capsys, ["train", *arguments, *settings, "--alternates", str(tmp_path / "idk.jsonl")])
    assert "forget: 0.txt is a document, and idkdpo prefers other answers" in message


def test_train_on_windows_from_a_configuration_file(files, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"body": text} for text in TEXTS])
    config = tmp_path / "run.toml"
    config.write_text(
        f'model = "{files / "model"}"\noutput = "{tmp_path / "out"}"\nforget = "{rows}"\n'
        f'retain = "{files / "holdout"}"\nretain_term = "nll"\nmethod = "npo"\nbeta = 0.1\nlr = 1e-3\nepochs = 1\n'
        'batch_size = 2\nseed = 0\ndevice = "cpu"\nwarmup_epochs = 0\nfields = "forget.text=body"\nwindow = 16\n'
    )
    assert cli.main(["train", "--config", str(config)]) == 0
    header, *steps = (json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert header["config"]["window"] == 16 and header["config"]["fields"] == "forget.text=body"
    tokenizer = tiny_tokenizer()
    wanted = sum(-(-(len(tokenizer(text)["input_ids"]) - 1) // 15) for text in TEXTS)
    assert len(steps) == -(-wanted // 2)
    assert "window: 1 is not accepted" in refused(capsys, ["train", "--config", str(config), "--window", "1"])
    assert "fields: 'x' is not accepted" in refused(capsys, ["train", "--config", str(config), "--fields", "x"])
    assert load_rows(rows, role="forget", fields="text=body")[0] == Row(
        "rows:0", (("user", ""),), TEXTS[0], raw=True, fields={"body": TEXTS[0], "text": TEXTS[0]}, document=True
    )
