"""What a run keeps on the disk, and whether it is the same run."""
