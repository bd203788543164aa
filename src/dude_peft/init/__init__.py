"""`dude init`: the start of an adapter as a file, computed from a checkpoint that need not fit into memory."""
