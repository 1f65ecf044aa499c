# SPDX-License-Identifier: Apache-2.0
"""Models: T5 as a list of blocks, soft prompts, checkpoints in and out, and the LightningModule that trains them."""
