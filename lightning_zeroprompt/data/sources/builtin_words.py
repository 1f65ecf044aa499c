# SPDX-License-Identifier: Apache-2.0
"""The closed vocabulary of the built-in tasks' content: twelve domains of ten words, numbers, days, months, labels.

Every word belongs to one domain only and never occurs in an instruction, so the kind of a word is a fact that a model
can learn from the tasks themselves. Words are short, lower case and free of punctuation: a word-level or byte-pair
tokeniser holds each as one token. The alternative, sampling from a word list of natural size, costs a tiny model most
of its parameters as embeddings.
"""

__all__ = ["DAYS", "DOMAINS", "LABEL_PAIRS", "MONTHS", "NAMES", "NUMBERS", "with_article"]

DOMAINS: dict[str, tuple[str, ...]] = {
    "animal": ("dog", "cat", "cow", "pig", "hen", "fox", "owl", "bee", "ant", "rat"),
    "colour": ("red", "blue", "green", "pink", "grey", "gold", "black", "white", "brown", "tan"),
    "fruit": ("apple", "pear", "plum", "fig", "lime", "kiwi", "mango", "grape", "melon", "peach"),
    "tool": ("saw", "axe", "drill", "spade", "rake", "hoe", "clamp", "hammer", "chisel", "wrench"),
    "city": ("rome", "paris", "oslo", "lima", "cairo", "delhi", "tokyo", "berlin", "kyiv", "dublin"),
    "food": ("bread", "rice", "soup", "cake", "egg", "cheese", "honey", "butter", "salt", "pasta"),
    "garment": ("hat", "coat", "sock", "shoe", "shirt", "scarf", "belt", "glove", "boot", "dress"),
    "instrument": ("drum", "harp", "flute", "horn", "piano", "violin", "lute", "bell", "organ", "banjo"),
    "vehicle": ("car", "bus", "train", "bike", "boat", "truck", "tram", "plane", "ship", "van"),
    "sport": ("golf", "judo", "chess", "polo", "rugby", "tennis", "hockey", "rowing", "boxing", "surfing"),
    "tree": ("oak", "elm", "pine", "birch", "cedar", "palm", "ash", "yew", "maple", "willow"),
    "relative": ("aunt", "uncle", "niece", "nephew", "father", "mother", "sister", "brother", "cousin", "grandma"),
}
"""Domain name (singular, the word that instructions use) -> its ten words."""

NAMES: tuple[str, ...] = ("ann", "bob", "tim", "eva", "max", "zoe", "leo", "ida", "sam", "mia")
"""Keys of the key-value records."""

NUMBERS: tuple[str, ...] = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""Number words; ``NUMBERS[n - 1]`` is n."""

DAYS: tuple[str, ...] = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
"""Days of the week in their order, Monday first."""

MONTHS: tuple[str, ...] = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
)
"""Months in their order."""

LABEL_PAIRS: tuple[tuple[str, str], ...] = (("left", "right"), ("up", "down"), ("hot", "cold"))
"""Meaningless answers of the tasks that state a rule: which of a pair is right depends on the instruction alone."""


def with_article(kind: str) -> str:
    """The domain name with its indefinite article.

    Example:
        >>> with_article("animal"), with_article("tool")
        ('an animal', 'a tool')
    """
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
