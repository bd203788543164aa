"""What every command shows at a terminal, and what it keeps away from it."""
