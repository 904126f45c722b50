"""transformers' Auto classes and pipelines know the models after `import trbert_model`, which stays light."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
USE = """
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline
directory = {directory!r}
assert type(AutoConfig.from_pretrained(directory)).__name__ == "TRBertConfig"
assert AutoTokenizer.from_pretrained(directory)("good")["input_ids"]
for auto in (AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification):
    print(type(auto.from_pretrained(directory)).__name__)
print(type(AutoModelForTokenClassification.from_pretrained({tags!r})).__name__)
(result,) = pipeline("text-classification", model=directory)("good news " * 100)
print(sorted(result))
found = pipeline("token-classification", model={tags!r}, aggregation_strategy="simple")("good news, the bank")
print(sorted(found[0]))
"""
BEFORE = """
import sys
import trbert_model
assert not {"torch", "transformers"} & set(sys.modules)
"""
AFTER = "import transformers.models.auto.modeling_auto\nimport trbert_model\n"


@pytest.mark.parametrize("imports", [BEFORE, AFTER], ids=["before", "after"])
def test_transformers_knows_the_model_whichever_is_imported_first(imports, model_directory, tagging_model):
    script = imports + USE.format(directory=str(model_directory), tags=str(tagging_model))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[-7:-1] == [
        "TRBertModel",
        "TRBertForQuestionAnswering",
        "TRBertForSequenceClassification",
        "TRBertForTokenClassification",
        "['label', 'score']",
        "['end', 'entity_group', 'score', 'start', 'word']",
    ], done.stderr
    assert "not supported" not in done.stderr
