"""dlcourse: an introduction to deep learning that runs.

Import the rooms by name (`from dlcourse import models`); this file imports nothing, so that
`import dlcourse` costs nothing.
"""

__version__ = "0.1.0"
