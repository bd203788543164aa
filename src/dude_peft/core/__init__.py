"""The mathematics: torch tensors in, torch tensors out; nothing of PEFT or transformers is known here."""
