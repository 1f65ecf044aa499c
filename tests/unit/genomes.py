# SPDX-License-Identifier: Apache-2.0
"""Random templates and genomes, for the tests of lightning_zeroprompt.prompts."""

from hypothesis import strategies as st

from lightning_zeroprompt.data.task import Example, PromptTemplate
from lightning_zeroprompt.prompts import PromptGenome

EXAMPLE = Example(input="in {x}", outputs=("b",), options=("a", "b"), fields={"premise": "P {", "title": "T"})
_PLACEHOLDERS = ("{input}", "{premise}", "{options}")
_WORDS = ("word", "Is it true or false?", "Answer:", "Text: ", " ", "\n", " : ", '"', ".", "\n\n", " -> ", "{{", "}}")
TEXTS = (
    st.lists(st.sampled_from(_PLACEHOLDERS + _WORDS), max_size=12)
    .map("".join)
    .filter(lambda text: PromptTemplate(name="t", text=text).placeholders())
)
"""Template texts with a placeholder at least."""
GENOMES = st.builds(
    lambda text, verbalizer: PromptGenome.from_template(PromptTemplate(name="t", text=text, verbalizer=verbalizer)),
    TEXTS,
    st.sampled_from([None, ("a", "b"), ("no", "yes")]),
)
