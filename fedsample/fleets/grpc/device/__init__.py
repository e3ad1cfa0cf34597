"""A device's side of its stream: the process, the connection, and its half of a run."""
