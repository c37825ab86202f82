"""What a run leaves behind: its folder, result, figures, page, and what the terminal shows.

Imports no model, data or training code, so that a report can be read and rebuilt without them.
"""
