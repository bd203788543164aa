"""What leaves training: verified adapters, merged models, adapters and files for other programs."""
