"""Assignments over the real files: hand-outs, marks, hints. See README.md."""
