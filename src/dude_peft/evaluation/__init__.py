"""How good a model is at tasks: scored by lm-evaluation-harness, the base model beside the tuned one."""
