# SPDX-License-Identifier: Apache-2.0
"""The embedded default source: more than 1,000 small text tasks, generated offline and the same on every machine.

A task is a composition of a text operation, a content domain, an answer form and a list length. Tasks on one input
distribution see the same kind of input and give different answers, so only the instruction tells what to do. Three
levels are held out:

* whole categories (:data:`HELDOUT_CATEGORIES`), whose operations training never shows;
* compositions: about one in eight (operation, domain, form) triples; operation, domain and form each occur in training,
  never together. A triple is a *family*: all its list lengths are on one side;
* instances, which the compiler holds out of every training task.

Which compositions are held out depends on a constant, not on the seed, so runs with different seeds are measured on the
same tasks. Random numbers come from :class:`random.Random` seeded with text (hashed with SHA-512), so that hash
randomisation changes nothing. Making one task of 300 examples costs about 4 ms.
"""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from lightning_zeroprompt.data.sources.builtin_operations import OPERATIONS, Form
from lightning_zeroprompt.data.sources.builtin_scenes import SAMPLERS, Scene
from lightning_zeroprompt.data.sources.builtin_wording import build_templates
from lightning_zeroprompt.data.task import Example, Task, TaskError

__all__ = [
    "HELDOUT_CATEGORIES",
    "HELDOUT_SHARE",
    "NUM_OPTIONS",
    "Spec",
    "builtin_tasks",
    "curriculum_stage",
    "list_specs",
]

HELDOUT_CATEGORIES: tuple[str, ...] = ("condition", "exclusion", "replacement")
"""Categories that the default split keeps out of training as a whole."""
HELDOUT_SHARE = 0.125
"""Share of the (operation, domain, form) triples of every other category that are held out."""
NUM_OPTIONS = 3
"""Options of a multiple-choice example (two where a rule names two labels)."""

_SPLIT = "compositions held out, drawing 7"
_MAX_REDRAWS = 50


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """What a built-in task is: the parts of its id.

    Attributes:
        operation: Key of the operations table.
        domain: Content domain.
        form: Answer form.
        length: List length.
        variant: Which other domains a mixed list draws from.
    """

    operation: str
    domain: str
    form: Form
    length: int
    variant: int = 0

    @property
    def family(self) -> str:
        """The composition; it is trained or held out as a whole."""
        return f"{self.operation}.{self.domain}.{self.form}"

    @property
    def task_id(self) -> str:
        """Unique id, such as ``"first.animal.free.3"``."""
        return f"{self.family}.{self.length}" + (f".{self.variant}" if self.variant else "")

    @property
    def category(self) -> str:
        """Task type: the operation's, or ``"verification"`` for yes / no answers."""
        return "verification" if self.form == "verify" else OPERATIONS[self.operation].category

    def draw(self, rng: random.Random) -> tuple[Scene, str]:
        """Draw a scene for which the operation has an answer.

        Returns:
            The scene and the answer (the operation's, also where the form is yes / no).
        """
        operation = OPERATIONS[self.operation]
        while True:
            scene = SAMPLERS[operation.sampler](rng, self.domain, self.length, self.variant)
            answer = operation.answer(scene, self.domain)
            if answer is not None:
                return scene, answer

    def example(self, rng: random.Random) -> Example:
        """Draw one example in this task's answer form."""
        scene, answer = self.draw(rng)
        if self.form == "free":
            return Example(input=scene.text, outputs=(answer,))
        pool = [word for word in OPERATIONS[self.operation].wrong(scene, self.domain) if word != answer]
        if self.form == "options":
            wrong = rng.sample(pool, min(NUM_OPTIONS - 1, len(pool)))
            options = rng.sample([answer, *wrong], 1 + len(wrong))
            return Example(input=scene.text, outputs=(answer,), options=tuple(options))
        right = rng.random() < 0.5
        proposed = answer if right else rng.choice(pool)
        return Example(input=f"{scene.text} ; {proposed}", outputs=("yes" if right else "no",), options=("yes", "no"))


def list_specs() -> list[Spec]:
    """Every built-in task, training and held-out, in a fixed order; yes / no tasks at the shortest list length only."""
    return [
        Spec(operation.name, domain, form, length, variant)
        for operation in OPERATIONS.values()
        for form in operation.forms
        for domain in operation.domains
        for length in (operation.lengths[:1] if form == "verify" else operation.lengths)
        for variant in operation.variants
    ]


def _heldout_families(specs: Iterable[Spec]) -> frozenset[str]:
    """The held-out compositions: random domains of each operation and form, ``HELDOUT_SHARE`` of all triples."""
    domains: dict[tuple[str, str], dict[str, str]] = {}
    for spec in specs:
        domains.setdefault((spec.operation, spec.form), {})[spec.domain] = spec.family
    chosen: set[str] = set()
    owed = 0.0
    for (operation, form), families in domains.items():
        # An operation with one or two domains would vanish from training in that form.
        if len(families) < 4:
            continue
        owed += HELDOUT_SHARE * len(families)
        take = int(owed)
        owed -= take
        names = list(families.values())
        chosen.update(random.Random(f"{_SPLIT}/{operation}/{form}").sample(names, take))
    return frozenset(chosen)


def _examples(spec: Spec, seed: int, count: int) -> Iterator[Example]:
    rng = random.Random(f"{seed}/{spec.task_id}/examples")
    seen: set[str] = set()
    redraws = 0
    while len(seen) < count and redraws < _MAX_REDRAWS:
        example = spec.example(rng)
        if example.input in seen:
            redraws += 1
            continue
        redraws = 0
        seen.add(example.input)
        yield example


def _reader(spec: Spec, seed: int, count: int) -> Callable[[], Iterator[Example]]:
    return lambda: _examples(spec, seed, count)


def _spread(specs: Sequence[Spec], count: int, seed: int) -> set[str]:
    """Ids of ``count`` specs, in proportion to the categories and random inside; larger counts contain smaller."""
    by_category: dict[str, list[Spec]] = {}
    for spec in specs:
        by_category.setdefault(spec.category, []).append(spec)
    ranked: list[tuple[float, str]] = []
    for category, members in by_category.items():
        shuffled = random.Random(f"{seed}/{category}/order").sample(members, len(members))
        ranked += [((i + 0.5) / len(members), spec.task_id) for i, spec in enumerate(shuffled)]
    return {task_id for _, task_id in sorted(ranked)[:count]}


def builtin_tasks(
    *,
    seed: int = 0,
    examples_per_task: int = 300,
    num_tasks: int | None = None,
    heldout_categories: Sequence[str] = HELDOUT_CATEGORIES,
) -> list[Task]:
    """The built-in tasks, training and held-out. Examples are made when ``task.examples()`` is iterated over.

    Args:
        seed: Seeds examples and wordings, and which tasks ``num_tasks`` keeps; not which compositions are held out.
        examples_per_task: Distinct inputs of a task; a task with fewer possible inputs has as many as it finds.
        num_tasks: Keep this many training tasks, spread over the categories in proportion; all when None. Held-out
            tasks are all
            kept: their number must not depend on how much is trained on.
        heldout_categories: Categories that are held out as a whole.

    Returns:
        Tasks in a fixed order with ``origin="synthetic"``; ``role`` says on which side of the split each is, ``family``
        is the (operation, domain, form) triple, ``domain`` the content domain.

    Raises:
        TaskError: A count below one, more tasks asked for than there are, or an unknown category.

    Example:
        >>> task = builtin_tasks()[0]
        >>> task.task_id, task.category, task.role
        ('first.animal.free.3', 'position', 'train')
    """
    if examples_per_task < 1:
        raise TaskError(f"examples_per_task={examples_per_task}: a task needs at least one example")
    specs = list_specs()
    categories = {spec.category for spec in specs}
    unknown = sorted(set(heldout_categories) - categories)
    if unknown:
        raise TaskError(f"unknown categories to hold out: {unknown}; there are: {', '.join(sorted(categories))}")
    heldout = _heldout_families(spec for spec in specs if spec.category not in heldout_categories)
    trained = [spec for spec in specs if spec.category not in heldout_categories and spec.family not in heldout]
    if num_tasks is not None and not 1 <= num_tasks <= len(trained):
        raise TaskError(
            f"num_tasks={num_tasks}: the built-in source has {len(trained)} training tasks "
            f"({len(specs)} in all, {len(specs) - len(trained)} held out); ask for 1 to {len(trained)}"
        )
    kept = _spread(trained, len(trained) if num_tasks is None else num_tasks, seed)
    all_trained = {spec.task_id for spec in trained}
    return [
        Task(
            task_id=spec.task_id,
            category=spec.category,
            family=spec.family,
            templates=build_templates(
                spec.operation, spec.domain, spec.form, random.Random(f"{seed}/{spec.task_id}/wordings")
            ),
            examples=_reader(spec, seed, examples_per_task),
            role="train" if spec.task_id in all_trained else "heldout",
            metric="exact_match",
            source="lightning_zeroprompt.data.sources.builtin",
            origin="synthetic",
            domain=spec.domain,
            licence="CC0-1.0",
        )
        for spec in specs
        if spec.task_id in kept or spec.task_id not in all_trained
    ]


def curriculum_stage(task_id: str) -> int:
    """When a curriculum lets a built-in task in: stage 0, 1 or 2.

    Stage 0 is copying, position and length; 1 parts, order, and what turns on the kinds of words; 2 the rest. Yes / no
    tasks are of stage 2 whatever their operation: they are learnt last. Whether a curriculum pays depends on the model:
    with embeddings initialised at standard deviation ``d_model ** -0.5`` the full mixture from the start was a little
    better at 300,000 examples (0.75 against 0.73 exact match on held-out compositions, one seed).

    Args:
        task_id: Id of a built-in task.

    Raises:
        TaskError: It is not one.

    Example:
        >>> [curriculum_stage(task) for task in ("first.food.free.3", "pick.tool.options.3", "first.food.verify.3")]
        [0, 1, 2]
    """
    operation, _, rest = task_id.partition(".")
    if operation not in OPERATIONS:
        raise TaskError(
            f"{task_id!r} is not a built-in task: its operation {operation!r} is none of {', '.join(OPERATIONS)}"
        )
    return 2 if rest.split(".")[1:2] == ["verify"] else OPERATIONS[operation].stage
