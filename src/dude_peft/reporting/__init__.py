"""`dude report`: a run, an evaluation or a comparison as one page."""
