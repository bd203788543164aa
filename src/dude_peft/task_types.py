"""PEFT's task types that runs train: which head stands behind the pretrained model, for whoever makes or loads one."""

from __future__ import annotations

from typing import Literal

TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]
CAUSAL: TaskType = "CAUSAL_LM"
"""Logits over a vocabulary."""
SCORES: TaskType = "SEQ_CLS"
"""One number for a whole conversation: a sequence classification of one label."""
