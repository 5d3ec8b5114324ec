"""One page that shows runs: read from our record, or from what other trainers leave; without network, in one file.

A run's folder is read by :mod:`.folders` into a :class:`~.run.Run`, large curves are thinned (:mod:`.series`), and
:mod:`.document` puts the result, the styles and the programs of ``assets/`` into one HTML file. Nothing here imports
torch, so that the command starts at once.
"""
