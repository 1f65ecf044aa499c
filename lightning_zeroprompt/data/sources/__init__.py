# SPDX-License-Identifier: Apache-2.0
"""Task sources: each module yields :class:`~lightning_zeroprompt.data.task.Task` records from one kind of place.

Nothing is imported here: a source is imported when it is used, because some of them load ``datasets`` or ``jinja2``.
"""
