"""Reading, tokenising, packing, splitting and walking through text."""

import json

import numpy as np
import pytest
import torch

from eightfold.train.config import DataConfig
from eightfold.train.data import IGNORED, Corpus, Sequences, pack, read_documents, split, tokenize
from eightfold.train.distributed import World
from eightfold.train.loop import micro_batches


def documents(*lengths, start=10):
    """Documents whose tokens are all different, each counting as a target."""
    result = []
    for length in lengths:
        result.append((np.arange(start, start + length, dtype=np.int32), np.ones(length, dtype=bool)))
        start += length
    return result


def test_pack_marks_boundaries():
    packed = pack(documents(5, 4, 3), 4)
    assert packed.ids.tolist() == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21]]
    assert packed.labels.tolist() == [
        [11, 12, 13, 14],  # the target of a sequence's last token is the first of the next
        [IGNORED, 16, 17, 18],
        [IGNORED, 20, 21, IGNORED],
    ]
    assert packed.document_ids.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]


def test_pack_pads_the_end_and_drops_sequences_without_targets():
    ids, counts = documents(10)[0]
    counts[:6] = False
    packed = pack([(ids, counts)], 4)
    assert packed.ids.tolist() == [[14, 15, 16, 17], [18, 19, 0, 0]]
    assert packed.labels.tolist() == [[IGNORED, 16, 17, 18], [19, IGNORED, IGNORED, IGNORED]]
    assert packed.document_ids.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert packed.targets([0, 1]) == 4


def test_no_token_is_lost_or_doubled():
    lengths = [3, 50, 2, 17, 64, 9]
    packed = pack(documents(*lengths), 16)
    targets = packed.labels[packed.labels != IGNORED].tolist()
    firsts = {10 + sum(lengths[:i]) for i in range(len(lengths))}
    assert targets == [token for token in range(10, 10 + sum(lengths)) if token not in firsts]


def test_whole_documents_are_not_cut():
    packed = pack(documents(3, 2, 4, 7), 5, whole=True)
    assert packed.ids.tolist() == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 0], [19, 20, 21, 22, 23]]
    assert packed.document_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert packed.counts.tolist() == [[True] * 5, [True] * 4 + [False], [True] * 5]
    assert packed.labels.tolist()[1] == [16, 17, 18, IGNORED, IGNORED]


def test_counts_follow_the_tokens():
    ids, counts = documents(7)[0]
    counts[:3] = False
    packed = pack([(ids, counts)], 4)
    assert packed.ids.tolist() == [[10, 11, 12, 13], [14, 15, 16, 0]]
    assert packed.counts.tolist() == [[False, False, False, True], [True, True, True, False]]


def test_answers_are_filled_with_end_tokens(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    config = DataConfig(path=str(tmp_path / "a.jsonl"), fill_answers=4)
    ids, counts = tokenize(read_documents(config)[0], tokenizer, config)
    assert (tokenizer.decode(ids[:5]), ids[5:].tolist()) == ("1+1=2", [0, 0, 0])
    assert counts.tolist() == [False] * 4 + [True] * 4
    (tmp_path / "a.txt").write_text("text")  # has no answer
    config = config.model_copy(update={"path": str(tmp_path / "a.txt")})
    assert len(tokenize(read_documents(config)[0], tokenizer, config)[0]) == 5


def test_whole_documents_need_isolation(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text")
    config = DataConfig(path=str(tmp_path / "a.txt"), whole_documents=True, isolate_documents=False)
    with pytest.raises(ValueError, match=r"data\.whole_documents: needs data\.isolate_documents"):
        Corpus.load(config, tokenizer, 0)


def test_split_keeps_documents_whole():
    given = documents(*[10] * 40)
    train, held_out = split(given, 0.1, seed=3)
    assert len(held_out) == 4
    assert sorted(int(ids[0]) for ids, _ in train + held_out) == [int(ids[0]) for ids, _ in given]
    again, _ = split(given, 0.1, seed=3)
    assert [int(ids[0]) for ids, _ in again] == [int(ids[0]) for ids, _ in train]
    other, _ = split(given, 0.1, seed=4)
    assert [int(ids[0]) for ids, _ in other] != [int(ids[0]) for ids, _ in train]


def test_split_of_one_document_holds_out_its_tail():
    train, held_out = split(documents(100), 0.1, seed=0)
    assert (len(train[0][0]), len(held_out[0][0])) == (90, 10)
    assert split(documents(100), 0, seed=0)[1] == []


def corpus(count=10, seed=0):
    ids = torch.arange(count * 2, dtype=torch.int32).view(count, 2)
    return Corpus(Sequences(ids, ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)), None, seed)


def test_each_epoch_is_a_new_order_of_all_sequences():
    cursor = corpus().start()
    epochs = [cursor.take(10) for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert corpus().start().take(30) == epochs[0] + epochs[1] + epochs[2]
    assert corpus(seed=1).start().take(10) != epochs[0]


def test_cursor_resumes_anywhere():
    whole = corpus().start().take(35)
    for cut in range(0, 35, 5):
        cursor = corpus().start()
        cursor.take(cut)
        again = corpus().start()
        again.load_state_dict(json.loads(json.dumps(cursor.state_dict())))
        assert again.take(35 - cut) == whole[cut:]


def test_cursor_refuses_other_data():
    with pytest.raises(ValueError, match="the data are not those of the checkpoint"):
        corpus(11).start().load_state_dict(corpus(10).start().state_dict())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_one_global_batch(size):
    cpu = torch.device("cpu")
    parts = [micro_batches(list(range(16)), 2, World(rank, size, cpu)) for rank in range(size)]
    merged = [part for group in zip(*parts, strict=True) for part in group]
    assert merged == [[i, i + 1] for i in range(0, 16, 2)]


def test_formats(tmp_path, tokenizer):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.md").write_text("alpha")
    (tmp_path / "deep" / "b.txt").write_text("beta ä")
    (tmp_path / "c.bin").write_bytes(b"\xff\xff")
    config = DataConfig(path=str(tmp_path))
    assert [document.text for document in read_documents(config)] == ["alpha", "beta ä"]

    lines = tmp_path / "d.jsonl"
    lines.write_text('{"text": "one"}\n\n{"question": "2+2?", "answer": "4"}\n{"prompt": "p", "completion": "c"}\n')
    read = read_documents(DataConfig(path=str(lines)))
    assert [(document.prompt, document.text) for document in read] == [("", "one"), ("2+2?", "4"), ("p", "c")]

    ids, counts = tokenize(read[1], tokenizer, config)
    assert tokenizer.decode(ids.tolist()) == "2+2?4<end>"
    assert counts.tolist() == [False] * 4 + [True] * 2
    _, counts = tokenize(read[1], tokenizer, config.model_copy(update={"train_on_prompt": True}))
    assert counts.all()


def test_chat_template(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "2+2?", "answer": "4"}\n')
    config = DataConfig(path=str(path), template="chat", held_out=0, sequence_length=64)
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        Corpus.load(config, tokenizer, 0)
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}[assistant]{% endif %}"
    try:
        ids, counts = tokenize(read_documents(config)[0], tokenizer, config)
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(ids.tolist()) == "[user]2+2?[assistant]4"
    assert tokenizer.decode(ids[counts].tolist()) == "4"


def test_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": ["one", "two"]})
    rows.save_to_disk(str(tmp_path / "set"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "sets"))
    for name in ("set", "sets"):
        read = read_documents(DataConfig(path=str(tmp_path / name), text_field="body"))
        assert [document.text for document in read] == ["one", "two"]
    with pytest.raises(ValueError, match="row 0: has neither 'text' nor a prompt and a completion; its fields: body"):
        read_documents(DataConfig(path=str(tmp_path / "set")))
    next((tmp_path / "set").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable dataset folder"):
        read_documents(DataConfig(path=str(tmp_path / "set"), text_field="body"))


def test_datasets_package_missing(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package: pip install datasets"):
        read_documents(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nbad \xff here", r"a\.txt: not UTF-8: byte 9 \(line 2\) is 0xff"),
        ("a.txt", b" \n\t\n", "contains no text"),
        ("a.txt", b"", "contains no text"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": oops}\n', r"a\.jsonl:2: not JSON at column 10"),
        ("a.jsonl", b'{"text": "ok"}\n[1]\n', r"a\.jsonl:2: expected a JSON object, got list"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: field 'text' should be text, got int"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: has neither 'text' nor a prompt .* its fields: body"),
        ("a.jsonl", b'{"text": "\xc3"}\n', r"a\.jsonl: not UTF-8: byte 10 \(line 1\)"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_documents(DataConfig(path=str(path)))
    assert "\n" not in str(error.value)


def test_missing_or_wrong_folder(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        read_documents(DataConfig(path=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match=r"no file with one of the extensions \.txt"):
        read_documents(DataConfig(path=str(tmp_path)))


def test_too_little_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="too little text to train on"):
        Corpus.load(DataConfig(path=str(tmp_path / "a.txt"), sequence_length=8), tokenizer, 0)
