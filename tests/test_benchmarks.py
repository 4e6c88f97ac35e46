"""What the recorded runs of benchmarks/ rest on."""

import re

from benchmarks import real_model
from infra.dataset import load_problems


def test_the_real_model_s_problems_are_right_and_in_one_split_each(tmp_path):
    real_model.write_problems(tmp_path)
    splits = {name: load_problems(str(tmp_path / f"{name}.jsonl"), "--x", True) for name in real_model.SPLITS}
    assert {name: len(problems) for name, problems in splits.items()} == real_model.SPLITS
    texts = [p.text for problems in splits.values() for p in problems]
    assert len(set(texts)) == len(texts)
    for problem in (p for problems in splits.values() for p in problems):
        a, b = map(int, re.findall(r"\d+", problem.text))
        assert problem.answer == str(a - b if re.search("gives away|takes", problem.text) else a + b), problem.text
        assert len(problem.messages) == 5 and problem.text not in str(problem.messages)
