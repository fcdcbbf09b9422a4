import pytest
from datasets import Dataset

from uoe_peft.data import load_idk_answers, tokenize_with_alternatives


def texts(tokenized, tokenizer, *, column="input_ids"):
    return ["".join(tokenizer.convert_ids_to_tokens([i for i in row if i != -100])) for row in tokenized[column]]


def test_packaged_answers_are_many_and_distinct():
    answers = load_idk_answers()
    assert len(set(answers)) == len(answers) >= 30
    assert all(answer == answer.strip() for answer in answers)


def test_same_questions_other_answers(tokenizer):
    rows = Dataset.from_dict({"prompt": ["who?", "where?"], "completion": [" Ada", " Rome"]})
    forget, alternatives = tokenize_with_alternatives(rows, tokenizer, max_length=None, seed=3)
    assert texts(forget, tokenizer) == ["who? Ada|end|", "where? Rome|end|"]
    said = [answer.removesuffix("|end|") for answer in texts(alternatives, tokenizer, column="labels")]
    assert all(answer[0] == " " and answer[1:] in load_idk_answers() for answer in said)  # the answer's own space
    assert [text.split("?")[0] for text in texts(alternatives, tokenizer)] == ["who", "where"]


def test_answers_are_drawn_by_the_seed(tokenizer):
    rows = Dataset.from_dict({"prompt": ["who?"] * 20, "completion": [" Ada"] * 20})

    def drawn(seed):
        return texts(tokenize_with_alternatives(rows, tokenizer, max_length=None, seed=seed)[1], tokenizer)

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 5


def test_the_sets_own_alternatives_go_first(tokenizer):
    rows = Dataset.from_dict({"prompt": ["who?"], "completion": [" Ada"], "alternative": ["nobody"]})
    _, alternatives = tokenize_with_alternatives(rows, tokenizer, max_length=None, seed=0)
    assert texts(alternatives, tokenizer) == ["who? nobody|end|"]


def test_preference_sets(tokenizer):
    rows = Dataset.from_dict({"prompt": ["who? "], "chosen": ["nobody"], "rejected": ["Ada"]})
    forget, alternatives = tokenize_with_alternatives(rows, tokenizer, max_length=None, seed=0)
    assert texts(forget, tokenizer) == ["who? Ada|end|"]
    assert texts(alternatives, tokenizer) == ["who? nobody|end|"]


def test_the_last_turn_of_a_conversation_is_replaced(tokenizer):
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    rows = Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in turns], "alternative": "none"}])
    forget, alternatives = tokenize_with_alternatives(rows, tokenizer, max_length=None, seed=0)
    assert texts(forget, tokenizer) == ["<u>1.<a>2.<u>3.<a>4."]
    assert texts(alternatives, tokenizer) == ["<u>1.<a>2.<u>3.<a>none."]
    assert texts(forget, tokenizer, column="labels") == ["4."]


def test_the_last_turn_of_share_gpts_conversations_is_replaced(tokenizer):
    turns = [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]
    rows = Dataset.from_list([{"conversations": turns, "alternative": "none"}])
    forget, alternatives = tokenize_with_alternatives(rows, tokenizer, max_length=None, seed=0)
    assert texts(forget, tokenizer) == ["<u>1.<a>2."]
    assert texts(alternatives, tokenizer, column="labels") == ["none."]


def test_a_row_that_loses_one_answer_is_in_neither_set(tokenizer):
    rows = Dataset.from_dict(
        {"prompt": ["who?", "where is it?"], "completion": [" A", " B"], "alternative": ["x", "y"]}
    )
    forget, alternatives = tokenize_with_alternatives(rows, tokenizer, max_length=12, seed=0)
    assert texts(forget, tokenizer) == ["who? A|end|"]
    assert texts(alternatives, tokenizer) == ["who? x|end|"]


def test_sets_without_questions_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"need questions: the forget set has the columns \['text'\]"):
        tokenize_with_alternatives(Dataset.from_dict({"text": ["x"]}), tokenizer, max_length=None, seed=0)
