"""`dude compare`: methods compared on somebody's own rows by a protocol that a sceptic accepts."""
