"""Items of reasoning-gym and of JSON lines files: prompts, their order, its resumption, and what is refused."""

import itertools

import pytest

from eightfold.train.rl.tasks import PromptOptions, Prompts, TaskOptions, load_task

LINES = "".join(f'{{"question": "What is {number} + 1?", "answer": {number + 1}}}\n' for number in range(5))


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(LINES)
    return path


def prompts_of(path, tokenizer, seed=0, **options):
    return Prompts(load_task(TaskOptions(path=str(path)), seed), tokenizer, PromptOptions(**options), seed)


def indices(prompts, count):
    return [prompt.index for prompt in itertools.islice(prompts, count)]


def test_plain_prompt(lines, tokenizer):
    prompts = prompts_of(lines, tokenizer, text="Q: {question} {kept}\nA:")
    prompt = next(prompts)
    assert prompt.text == f"Q: What is {prompt.index} + 1? {{kept}}\nA:"
    assert tokenizer.decode(prompt.ids) == prompt.text
    assert prompt.item == {"question": f"What is {prompt.index} + 1?", "answer": prompt.index + 1}


def test_chat_prompt(lines, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="template: chat needs a tokenizer with a chat template"):
        prompts_of(lines, tokenizer, template="chat")
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    prompt = next(prompts_of(lines, tokenizer, template="chat", system="Be brief.", text="{question} Think."))
    assert prompt.text == f"[system]Be brief.[user]What is {prompt.index} + 1? Think.[me]"
    assert tokenizer.decode(prompt.ids) == prompt.text


def test_every_item_once_an_epoch_in_an_order_of_the_seed(lines, tokenizer):
    order = indices(prompts_of(lines, tokenizer, seed=1), 15)
    assert [sorted(order[begin : begin + 5]) for begin in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert order[:5] != order[5:10]
    assert order == indices(prompts_of(lines, tokenizer, seed=1), 15)
    assert order != indices(prompts_of(lines, tokenizer, seed=2), 15)


def test_resume_in_the_middle_of_an_epoch(lines, tokenizer):
    prompts = prompts_of(lines, tokenizer)
    prompts.take(7)
    state = prompts.state_dict()
    expected = indices(prompts, 11)
    again = prompts_of(lines, tokenizer)
    again.load_state_dict(state)
    assert indices(again, 11) == expected


def test_state_of_other_items_is_refused(lines, tokenizer, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(LINES.replace("What", "Which"))
    with pytest.raises(ValueError, match=r"the data are not those of the checkpoint \(the task, its options, its file"):
        prompts_of(other, tokenizer).load_state_dict(prompts_of(lines, tokenizer).state_dict())


def test_reasoning_gym(tokenizer):
    pytest.importorskip("reasoning_gym")
    options = TaskOptions(name="chain_sum", options={"min_terms": 2, "max_terms": 2, "max_digits": 1}, size=30)
    task = load_task(options, seed=3)
    prompts = Prompts(task, tokenizer, seed=3)
    found = prompts.take(30)
    assert sorted(prompt.index for prompt in found) == list(range(30))
    for prompt in found:
        expression = prompt.text.rpartition(": ")[2].removesuffix(" =")
        first, sign, second = expression.split()
        assert int(prompt.item["answer"]) == int(first) + int(second) * (1 if sign == "+" else -1)
    assert [task.item(index) for index in range(5)] == [load_task(options, seed=3).item(index) for index in range(5)]
    other = load_task(options, seed=4)
    assert other.item(0) != task.item(0)
    with pytest.raises(ValueError, match="the data are not those of the checkpoint"):
        Prompts(other, tokenizer).load_state_dict(prompts.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_sun", {}, r"no task 'chain_sun' \(did you mean 'chain_sum'\?\); its tasks: .*basic_arithmetic"),
        ("chain_sum", {"terms": 3}, r"'chain_sum' refuses \{'terms': 3\}: .*unexpected keyword argument 'terms'"),
        ("chain_sum", {"min_terms": 9}, r"refuses \{'min_terms': 9\}: max_terms must be >= min_terms"),
        ("chain_sum", {"seed": 9}, "task options: seed of 'chain_sum' are set by the task itself"),
    ],
)
def test_bad_reasoning_gym_task(name, options, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=message):
        load_task(TaskOptions(name=name, options=options), seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "items.jsonl: holds no item"),
        ("\n \n", "items.jsonl: holds no item"),
        ('{"question": "a", "answer": 1}\n\n{"questoin": "b"}\n', r"jsonl:3: has no field 'question'; .*: questoin"),
        ('{"question": "a"}\n', r"jsonl:1: has no field 'answer'; its fields: question"),
        ('{"question": 3, "answer": 1}\n', "jsonl:1: field 'question' should be text, got int"),
        ('{"question": "a", "answer": [1]}\n', "jsonl:1: field 'answer' should be text or a number, got list"),
        ('{"question": "a", "answer": true}\n', "jsonl:1: field 'answer' should be text or a number, got bool"),
        ('{"question": "a", \n', "jsonl:1: not JSON at column"),
        ("[1]\n", "jsonl:1: expected a JSON object, got list"),
    ],
)
def test_bad_lines(lines, content, message):
    lines.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_task(TaskOptions(path=str(lines)), seed=0)
    assert "\n" not in str(error.value)


def test_absent_file(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such file"):
        load_task(TaskOptions(path=str(tmp_path / "absent.jsonl")), seed=0)


def test_a_users_verifier_needs_no_answer(lines):
    lines.write_text('{"question": "a"}\n')
    assert len(load_task(TaskOptions(path=str(lines)), seed=0, needs_answer=False)) == 1


def test_fields_of_other_names(lines, tokenizer):
    lines.write_text('{"problem": "a", "solution": "#### 2"}\n')
    options = TaskOptions(path=str(lines), question_field="problem", answer_field="solution")
    assert next(Prompts(load_task(options, seed=0), tokenizer)).text == "a"


def test_prompt_of_a_wrong_length(lines, tokenizer):
    with pytest.raises(ValueError, match=r"item \d: expected a prompt of 1 to 4 tokens, got 14: 'What is"):
        next(prompts_of(lines, tokenizer, max_tokens=4))
    lines.write_text('{"question": "", "answer": 1}\n')
    with pytest.raises(ValueError, match="item 0: expected a prompt of 1 or more tokens, got 0"):
        next(prompts_of(lines, tokenizer))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TaskOptions, {}, "name, path: expected one of the two, got {'name': None, 'path': None}"),
        (TaskOptions, {"name": "a", "path": "b"}, "name, path: expected one of the two"),
        (TaskOptions, {"path": "b", "options": {"a": 1}}, "options: expected none for a JSON lines file"),
        (TaskOptions, {"name": "a", "size": 0}, "size: expected 1 or more items, got 0"),
        (PromptOptions, {"template": "jinja"}, "template: expected one of plain, chat, got 'jinja'"),
        (PromptOptions, {"text": "Q:"}, "text: expected a text with {question} in it, got 'Q:'"),
        (PromptOptions, {"system": "a"}, "system: expected none unless template is chat, got 'a'"),
        (PromptOptions, {"max_tokens": 0}, "max_tokens: expected 1 or more, got 0"),
    ],
)
def test_bad_options(kind, values, message):
    with pytest.raises(ValueError) as error:
        kind(**values)
    assert str(error.value).startswith(message)
