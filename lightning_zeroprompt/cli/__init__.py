# SPDX-License-Identifier: Apache-2.0
"""The console scripts: short stories that call the library, and no logic of their own."""
