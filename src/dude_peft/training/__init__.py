"""The main job: one configuration file in, a fine-tuned adapter and an honest record of the run out."""
