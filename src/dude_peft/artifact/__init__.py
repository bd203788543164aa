"""Adapter files: what is on disk, how it is checked. Torch and safetensors only; PEFT is not known here."""
