"""The machine around the katas: runs them, records, shows, and judges the system they make."""
