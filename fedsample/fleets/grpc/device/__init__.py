"""The device's side of a stream: the process, the connection, and its part of a run."""
